"""Train an image classifier fast, and know how fast that is.

    import fasttrain
    run = fasttrain.train(fasttrain.load_recipe("default"))
    run.plot()

The public names are imported from their modules on first use, so that importing the package is fast.
"""

import importlib
from typing import Any

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
