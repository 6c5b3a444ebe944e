"""The choice of a loader: `build_loader` turns a Dataset and a Recipe into batches."""

import dataclasses
import functools
import platform
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fasttrain.data.augmentation import Augmentation, first_flips
from fasttrain.data.dataset import Dataset, Split
from fasttrain.data.loader import Loader
from fasttrain.data.padding import LazyPadded, pad
from fasttrain.data.sampler import WHOLE, Sampler, Shard
from fasttrain.errors import UserError, one_line
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.system.fallbacks import Fallbacks
from fasttrain.system.machine import pick_device
from fasttrain.system.signals import catch_signals

LoaderName = Literal["dali", "tensor"]

PADDED_GIB_MAX = 4
"""Images that need more memory than this once padded stay where they are, and are padded batch by batch."""

EVAL_BATCH_SIZE = 1000
"""Divides CIFAR-10's 10,000 test images, so that every batch has one shape."""


def pick_loader(requested: str, device: torch.device, fallbacks: Fallbacks) -> LoaderName:
    """Choose DALI if it works on this device, else the pure-torch loader.

    requested: auto, dali or tensor. Raises UserError if DALI was requested and cannot be used.
    """
    if requested == "tensor":
        return "tensor"
    reason = dali_unusable(device)
    if reason is None:
        return "dali"
    if requested == "dali":
        raise UserError(f"--loader dali: {reason}; or use --loader tensor")
    fallbacks(
        f"loader: {reason}", "the pure-torch loader makes the same batches, with more launches for each"
    )
    return "tensor"


@functools.cache
def dali_unusable(device: torch.device) -> str | None:
    """Return None if DALI makes the pure-torch loader's batches on this device, else reason and remedy.

    It is tried on a few images of noise, which takes 0.05 s on a CPU.
    """
    if device.type not in ("cpu", "cuda"):
        return f"DALI does not run on {device.type}"
    with catch_signals() as noted:  # DALI would turn a signal's exception into an error of its own
        reason = _why_unusable(device)
    if signum := noted():
        signal.raise_signal(signum)
    return reason


def _why_unusable(device: torch.device) -> str | None:
    try:
        alike = all(map(torch.equal, _first_batch("dali", device), _first_batch("tensor", device)))
    except ImportError as error:
        if platform.system() != "Linux":
            return f"DALI has no wheel for {platform.system()}"
        return f"DALI is not installed ({error}): pip install nvidia-dali-cuda120"
    except (RuntimeError, OSError) as error:
        remedy = (
            "update the driver to 525 or newer" if device.type == "cuda" else "reinstall nvidia-dali-cuda120"
        )
        return f"DALI fails on {device} ({one_line(error)}): {remedy}"
    pinned = "install the version that constraints.txt pins"
    return None if alike else f"DALI's pixels on {device} are not the expected ones: {pinned}"


def _first_batch(loader: LoaderName, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first augmented batch of a tiny data set."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    split = Split(noise, np.arange(8, dtype=np.uint8))
    dataset = Dataset("noise", Path(), tuple("01234567"), split, split, (0.5,) * 3, (0.25,) * 3)
    recipe = Recipe(batch_size=8, resolution=16, loader_threads=1)
    return next(iter(build_loader(dataset, recipe, train=True, device=device, loader=loader)))


def fit_batch_size(recipe: Recipe, dataset: Dataset, log: Callable[[str], object]) -> Recipe:
    """Return the recipe, with a smaller batch if its preset's is larger than the training set.

    The batch becomes the largest power of two that leaves an epoch at least two steps, but 2 or more, and one
    line logs that. A batch that is not the preset's is the user's choice: build_loader will refuse it.
    """
    count = len(dataset.train.labels)
    preset = PRESETS.get(recipe.name, PRESETS["default"])
    if recipe.batch_size <= count or recipe.batch_size != preset.batch_size:
        return recipe
    batch_size = max(2, 1 << (count // 2).bit_length() >> 1)
    too_large = f"{dataset.name} has {count} training images"
    log(f"--batch-size {batch_size} instead of {recipe.batch_size}: {too_large}")
    return dataclasses.replace(recipe, batch_size=batch_size)


def build_loader(
    dataset: Dataset,
    recipe: Recipe,
    *,
    train: bool,
    device: torch.device | str = "auto",
    loader: LoaderName | None = None,
    shard: Shard = WHOLE,
) -> Loader:
    """Build the loader of the training images (shuffled, augmented) or of the test images (as they are).

    Iterating over it once is one epoch of images_NCHW, uint8 in channels_last, and labels_N, int64, both on
    the device.
    recipe: gives batch size, seed, resolution, augmentation and loader threads.
    device: auto takes a GPU if there is one. loader: dali or tensor; by default the recipe's.
    shard: one rank's part of every training batch, or of the test images as a whole. Concatenated in the
    order of the ranks, the parts equal what a single rank would get, bit for bit.
    Raises UserError if the batch is larger than the training set, if there are fewer test images than ranks,
    or if the images do not have the recipe's resolution.
    """
    device = pick_device(device) if isinstance(device, str) else device
    loader = loader or pick_loader(recipe.loader, device, Fallbacks())
    split = dataset.train if train else _part(dataset.test, shard)
    batch_size = recipe.batch_size if train else min(EVAL_BATCH_SIZE, len(split.labels))
    if batch_size > len(split.labels):
        raise UserError(
            f"--batch-size {batch_size}: {dataset.name} has {len(split.labels)} training images; "
            "choose a smaller batch"
        )
    own = shard if train else WHOLE
    resolution = split.images.shape[1]
    if resolution != recipe.resolution:
        raise UserError(
            f"--resolution {recipe.resolution}: the images of {dataset.name} have {resolution} pixels a side"
        )
    padding, flip = (recipe.crop_padding, recipe.flip) if train else (0, False)
    alternates = flip and recipe.flip_order == "alternating"
    settings: dict[str, Any] = {
        "images_NHWC": _padded(split, padding, loader),
        "labels_N": split.labels,
        "sampler": Sampler(len(split.labels), batch_size, train=train, seed=recipe.seed, shard=own),
        "augmentation": Augmentation(
            resolution=resolution,
            max_offset=2 * padding,
            flip=flip,
            cutout=recipe.cutout if train else 0,
            seed=recipe.seed,
            shard=own,
            first_flips=first_flips(len(split.labels), recipe.seed) if alternates else None,
        ),
        "fill": tuple(round(255 * value) for value in dataset.mean),
        "device": device,
    }
    if loader == "dali":
        from fasttrain.data.dali import DaliLoader

        return DaliLoader(**settings, threads=recipe.loader_threads)
    from fasttrain.data.tensor import TensorLoader

    return TensorLoader(**settings)


def _padded(split: Split, padding: int, loader: LoaderName) -> np.ndarray | LazyPadded:
    """Return the images as the loader takes them. Raises UserError if they are too large for it."""
    size = split.images.shape[1] + 2 * padding
    gib = 3 * size * size * len(split.labels) / 2**30
    if gib <= PADDED_GIB_MAX:
        return pad(split.images, padding)
    if loader == "dali":
        return LazyPadded(split.images, padding)
    raise UserError(f"--loader tensor: holds all images in memory, here {gib:,.1f} GiB; use --loader dali")


def _part(test: Split, shard: Shard) -> Split:
    """Return a rank's test images, which are consecutive; every image belongs to exactly one rank."""
    count = len(test.labels)
    if count < shard.size:
        raise UserError(f"{count} test images for {shard.size} ranks: start fewer ranks")
    first, end = (count * rank // shard.size for rank in (shard.rank, shard.rank + 1))
    return Split(test.images[first:end], test.labels[first:end])
