"""A recipe's settings beside those of a preset, and the command that trains it again."""

import shlex
from typing import Any

from fasttrain.data.dataset import HELD_OUT
from fasttrain.data.load_dataset import names_own_images
from fasttrain.data.run_images import RunImages
from fasttrain.recipe import PRESETS, Recipe, flag


def base_preset(recipe: Recipe) -> Recipe:
    """Return the preset to compare a recipe with: that of its name, else default."""
    return PRESETS.get(recipe.name, PRESETS["default"])


def changed_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings that are not those of the base preset, without the name and the seed."""
    base = base_preset(recipe).to_dict()
    return {
        key: value
        for key, value in recipe.to_dict().items()
        if key not in ("name", "seed") and value != base[key]
    }


def train_command(recipe: Recipe, images: RunImages | None) -> str:
    """Return the command that trains a recipe on these images; own images are named without their path."""
    words = ["fasttrain", "train", "--recipe", recipe.name]
    if recipe.name not in PRESETS:
        words[-1] = "recipe.json"
    else:
        for key, value in changed_settings(recipe).items():
            is_switch = isinstance(value, bool)
            words += [flag(key if value else f"no_{key}")] if is_switch else [flag(key), str(value)]
        if recipe.seed != base_preset(recipe).seed:
            words += ["--seed", str(recipe.seed)]
    if images is not None:
        name = images.name.removesuffix(HELD_OUT)
        data = name if names_own_images(name) else images.data
        words += ["--data", data] if data else []
        words += ["--skip-bad"] * images.skip_bad + ["--hold-out"] * images.hold_out
    return shlex.join(words)
