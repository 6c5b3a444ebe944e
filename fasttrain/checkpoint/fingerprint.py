"""The fingerprint of a run: everything that decides its weights. A checkpoint with another one is refused."""

from typing import Any

from torch import Tensor

from fasttrain.data.dataset import Dataset
from fasttrain.recipe import Recipe, flag, with_names_of_today
from fasttrain.runtime import Runtime


def fingerprint(recipe: Recipe, dataset: Dataset, runtime: Runtime, world_size: int) -> dict[str, Any]:
    """Return everything that decides a run's weights, by the names used to report a difference.

    The loader in use is not part of it: both make the same batches, bit for bit. Nor is the data set's name,
    which follows the folder's.
    """
    return recipe_flags(recipe) | {
        "the images' SHA-256": dataset.content_hash,
        "precision": runtime.precision,
        "compile": runtime.compile_mode or "off",
        "device": runtime.device.type,
        "world size": world_size,
    }


def differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """List, in words, where `now` differs from a checkpoint's fingerprint."""
    flags = {key: value for key, value in then.items() if str(key).startswith("--")}
    fields = {key[2:].replace("-", "_"): value for key, value in flags.items()}
    renamed = {flag(field): value for field, value in with_names_of_today(fields).items()}
    then = recipe_flags(Recipe()) | then | renamed  # fields that a fingerprint lacks have their defaults
    return [
        f"{key} is {value} and was {then.get(key)}"
        for key, value in now.items()
        if key not in then or isinstance(then[key], Tensor) or then[key] != value
    ]


def recipe_flags(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values by the names of their flags."""
    return {flag(key): value for key, value in recipe.to_dict().items()}
