"""What the short recipe for a machine without a GPU says about the full one."""

import dataclasses
import time

import torch

from fasttrain.model import build_model
from fasttrain.options import TrainOptions, typed_flags
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.step import TrainStep
from fasttrain.system.gpu import other_gpu
from fasttrain.system.precision import autocast
from fasttrain.system.program import typed_for_all_ranks
from fasttrain.system.rng import fork_rng

PROBE_PIXELS = 64 * 32**2
"""Pixels that the full recipe's network is timed on: about a second on two cores without bf16."""


def is_laptop(recipe: Recipe, device: torch.device) -> bool:
    """Whether a CPU trains the short recipe at full width: another width takes a different time."""
    return device.type == "cpu" and recipe.name == "laptop" and recipe.width == PRESETS["default"].width


def estimate_full_recipe(step: TrainStep, images: int, options: TrainOptions) -> str:
    """Return a line that says how long the full recipe would take here, and how to train it.

    images: how many there are to train on.
    """
    full, resolution = PRESETS["default"], step.recipe.resolution
    seconds = _seconds_per_image(dataclasses.replace(full, resolution=resolution), step)
    minutes = full.epochs * images * seconds / 60
    other = other_gpu()
    gpu = f"The {other} GPU is not used" if other else "No GPU is used"
    images_flags = ("data", "data_dir", "skip_bad", "hold_out")
    kept = typed_flags(options, *images_flags, "device", "out", "save_every", "tensorboard")
    if resolution != full.resolution:
        kept += ["--resolution", str(resolution)]
    return (
        f"{gpu}: this is the short laptop recipe. The full one, {full.epochs} epochs, would take about "
        f"{minutes:.0f} minutes here: {typed_for_all_ranks('train', '--recipe', full.name, *kept)}"
    )


def _seconds_per_image(recipe: Recipe, step: TrainStep) -> float:
    """Time the forward and backward pass of a recipe's network, on a CPU and in the precision of `step`.

    It may be another network than that of `step`, which reaches another share of the machine's speed.
    """
    with fork_rng(step.device):
        model = build_model(recipe, num_classes=10)
    count, side = max(PROBE_PIXELS // recipe.resolution**2, 1), recipe.resolution
    images_NCHW = torch.zeros(count, 3, side, side, dtype=torch.uint8)
    for _ in range(2):  # the first prepares kernels and memory
        start = time.perf_counter()
        with autocast(step.device, step.compute_dtype):
            loss = model(images_NCHW).float().square().mean()
        loss.backward()
        seconds = time.perf_counter() - start
    return seconds / count
