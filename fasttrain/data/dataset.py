"""The data set that every source returns and every loader takes: two splits of images, and statistics."""

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from fasttrain.data.sources.releases import Channels, Release
from fasttrain.errors import UserError

HELD_OUT = ", a tenth of the training images held out"
"""What the name of such a data set ends with."""


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


def hold_out_images(dataset: Dataset) -> Dataset:
    """Return a data set of the training images alone: a tenth of each class takes the test images' place.

    So settings can be chosen without the test images. The tenth is evenly spaced in the class, and at least
    one image. The images are copied; mean and std are those of the images that are left to train on.
    Raises UserError if a class has fewer than two training images.
    """
    images, labels = dataset.train.images, dataset.train.labels
    is_held = np.zeros(len(labels), bool)
    for label, name in enumerate(dataset.classes):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UserError(
                f"--hold-out: expected at least two training images of each class; {name} has {len(members)}"
            )
        step = len(members) // max(len(members) // 10, 1)
        is_held[members[step - 1 :: step]] = True
    train, test = (Split(images[chosen], labels[chosen]) for chosen in (~is_held, is_held))
    mean, std = channel_statistics(train.images)
    return dataclasses.replace(
        dataset, name=dataset.name + HELD_OUT, train=train, test=test, mean=mean, std=std
    )


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
