"""What decides a run's weights: a checkpoint of another fingerprint is refused."""

from typing import Any

from torch import Tensor

from fasttrain.data.dataset import Dataset
from fasttrain.recipe import Recipe, flag
from fasttrain.runtime import Runtime


def fingerprint(recipe: Recipe, dataset: Dataset, runtime: Runtime, world_size: int) -> dict[str, Any]:
    """What decides a run's weights, under the names by which a difference is reported."""
    return recipe_flags(recipe) | {
        "dataset": dataset.name,
        "the images' SHA-256": dataset.content_hash,
        "loader": runtime.loader,
        "precision": runtime.precision,
        "compile": runtime.compile_mode or "off",
        "device": runtime.device.type,
        "world size": world_size,
    }


def differences(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """What of `now` is not as in a checkpoint's fingerprint, in words."""
    then = recipe_flags(Recipe()) | then  # a recipe has its defaults where it says nothing
    return [
        f"{key} is {value} and was {then.get(key)}"
        for key, value in now.items()
        if key not in then or isinstance(then[key], Tensor) or then[key] != value
    ]


def recipe_flags(recipe: Recipe) -> dict[str, Any]:
    return {flag(key): value for key, value in recipe.to_dict().items()}
