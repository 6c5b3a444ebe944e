"""The data set that every source returns and every loader takes: two splits of images, and statistics."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fasttrain.data.sources.releases import Channels, Release


@dataclass(frozen=True)
class Split:
    """One split. images: (N, H, W, 3) uint8, red, green, blue. labels: (N,) unsigned integers."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Both splits, and the mean and std of the training images per channel (red, green, blue), as 0..1.

    release: the published release that the files are or imitate; None for images from elsewhere.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: Channels
    std: Channels
    release: Release | None = None

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the classes and of all images and labels; computed once, in 0.2 s for CIFAR-10."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels).data)
        return digest.hexdigest()


def channel_statistics(images: np.ndarray) -> tuple[Channels, Channels]:
    """Return the mean and the population std of each channel over all pixels, as 0..1.

    images: (N, H, W, 3) uint8. Exact up to the final rounding: values are counted, and the sums are integers.
    """
    means, stds = [], []
    for channel in range(3):
        counts = np.zeros(256, np.int64)
        # bincount makes a copy in 64-bit integers: a thousand images at a time keep that copy at 8 MB.
        for start in range(0, len(images), 1000):
            counts += np.bincount(images[start : start + 1000, ..., channel].ravel(), minlength=256)
        pixels = int(counts.sum())
        total = sum(value * int(count) for value, count in enumerate(counts))
        squares = sum(value * value * int(count) for value, count in enumerate(counts))
        means.append(total / pixels / 255)
        stds.append((pixels * squares - total * total) ** 0.5 / pixels / 255)
    return as_channels(means), as_channels(stds)


def as_channels(values: Iterable[float]) -> Channels:
    """Return three values within 0..1 as Channels. Raises TypeError or ValueError for anything else."""
    red, green, blue = values
    if not all(0 <= value <= 1 for value in (red, green, blue)):
        raise ValueError(f"expected three values within 0..1, got {(red, green, blue)}")
    return red, green, blue
