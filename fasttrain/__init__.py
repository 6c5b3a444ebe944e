"""Train an image classifier fast, and know how fast that is.

    import fasttrain
    run = fasttrain.train(fasttrain.load_recipe("default"))
    run.plot()

The public names are imported from their modules on first use, so that importing the package is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker takes the names below for
    from fasttrain.data.build_loader import build_loader as build_loader
    from fasttrain.data.load_dataset import load_dataset as load_dataset
    from fasttrain.errors import UserError as UserError
    from fasttrain.recipe import PRESETS as PRESETS
    from fasttrain.recipe import Recipe as Recipe
    from fasttrain.recipe import load_recipe as load_recipe
    from fasttrain.report.run import Run as Run
    from fasttrain.report.run import load_run as load_run
    from fasttrain.trainer import train as train

__version__ = "0.1.0"

_HOMES = {
    "PRESETS": "fasttrain.recipe",
    "Recipe": "fasttrain.recipe",
    "Run": "fasttrain.report.run",
    "UserError": "fasttrain.errors",
    "build_loader": "fasttrain.data.build_loader",
    "load_dataset": "fasttrain.data.load_dataset",
    "load_recipe": "fasttrain.recipe",
    "load_run": "fasttrain.report.run",
    "train": "fasttrain.trainer",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
