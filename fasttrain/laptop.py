"""What the short recipe for a machine without a GPU says about the full one."""

import torch

from fasttrain.distributed import command
from fasttrain.model import training_flop_per_image
from fasttrain.options import TrainOptions, typed_flags
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.step import TrainStep
from fasttrain.system.gpu import other_gpu

FIRST_STEPS = 5
"""Steps after which the laptop recipe estimates how long the full one would take."""


def is_laptop(recipe: Recipe, device: torch.device) -> bool:
    """Whether a CPU trains the short recipe at full width: another width takes a different time."""
    return device.type == "cpu" and recipe.name == "laptop" and recipe.width == PRESETS["default"].width


def estimate_full_recipe(step: TrainStep, seconds: float, images: int, options: TrainOptions) -> str:
    """Return a line that says how long the full recipe would take here, and how to train it.

    seconds: those of one of the first steps. images: how many there are to train on.
    """
    full, resolution = PRESETS["default"], step.recipe.training_resolution(0, step.total_steps)
    seconds *= training_flop_per_image(step.model) / training_flop_per_image(step.model, resolution)
    minutes = full.epochs * images * seconds / step.recipe.batch_size / 60
    other = other_gpu()
    gpu = f"The {other} GPU is not used" if other else "No GPU is used"
    kept = typed_flags(options, "data", "data_dir", "skip_bad", "device", "out", "save_every", "tensorboard")
    if step.recipe.resolution != full.resolution:
        kept += ["--resolution", str(step.recipe.resolution)]
    return (
        f"{gpu}: this is the short laptop recipe. The full one, {full.epochs} epochs, would take about "
        f"{minutes:.0f} minutes here: {command('train', '--recipe', full.name, *kept)}"
    )
