"""Train an image classifier fast, and know how fast that is.

    import fasttrain
    run = fasttrain.train(fasttrain.load_recipe("default"))
    run.plot()
    model = fasttrain.load_model(run.folder)  # takes pixels, uint8, and returns logits

The public names are imported from their modules on first use, so that importing the package is fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker takes the names below for
    from fasttrain.api import evaluate as evaluate
    from fasttrain.api import export as export
    from fasttrain.api import load_model as load_model
    from fasttrain.api import predict as predict
    from fasttrain.callbacks import Callback as Callback
    from fasttrain.data.build_loader import build_loader as build_loader
    from fasttrain.data.dataset import Dataset as Dataset
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
    "Callback": "fasttrain.callbacks",
    "Dataset": "fasttrain.data.dataset",
    "PRESETS": "fasttrain.recipe",
    "Recipe": "fasttrain.recipe",
    "Run": "fasttrain.report.run",
    "UserError": "fasttrain.errors",
    "build_loader": "fasttrain.data.build_loader",
    "evaluate": "fasttrain.api",
    "export": "fasttrain.api",
    "load_dataset": "fasttrain.data.load_dataset",
    "load_model": "fasttrain.api",
    "load_recipe": "fasttrain.recipe",
    "load_run": "fasttrain.report.run",
    "predict": "fasttrain.api",
    "train": "fasttrain.trainer",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
