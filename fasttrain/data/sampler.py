"""Which images form which batch, and how each is cropped, mirrored and cut: pure functions of seed and step.

Both loaders ask here, so they deliver the same batches to the last bit, for any number of threads, and a
loader that knows its step knows everything there is to restore.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ORDER, AUGMENTATION, FIRST_FLIPS = 0, 1, 2
"""Streams of random numbers that share a seed and nothing else."""


class Sampler:
    """Image indices for every step of a run, counted on over all epochs.

    train: every epoch is a fresh full shuffle, and the last, smaller batch is dropped.
    Otherwise: stored order, every image exactly once, the last batch as small as it comes out.
    """

    def __init__(self, count: int, batch_size: int, *, train: bool, seed: int) -> None:
        self.count, self.batch_size, self.train, self.seed = count, batch_size, train, seed
        self.steps_per_epoch = count // batch_size if train else -(-count // batch_size)
        self._epoch = -1
        self._order = np.arange(count)

    def epoch(self, step: int) -> int:
        """The epoch that this step of the run is in, counted from 0."""
        return step // self.steps_per_epoch

    def __call__(self, step: int) -> np.ndarray:
        """Indices of the batch at this step of the run: (batch_size,) int64, fewer at an evaluation's end."""
        epoch, position = self.epoch(step), step % self.steps_per_epoch
        if self.train and epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.count)
            self._epoch = epoch
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]


class Draws(NamedTuple):
    """One batch's random choices; offsets and corners in pixels, int64.

    rows, columns: (N,), where the crop begins in the padded image. mirrored: (N,) bool.
    holes: (N, 2), row and column of the cutout's corner in the finished image.
    """

    rows: np.ndarray
    columns: np.ndarray
    mirrored: np.ndarray
    holes: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to every image of a batch.

    crop: side of the finished image. room: by how much the padded image exceeds it; 0 means no random crop.
    cutout: side of the square that is set to the mean; 0 means none.
    first_flips: (N,) bool, which images are mirrored in epoch 0, and then in every other one, the rest in
    those between; None where flip throws a coin for each image each time.
    """

    crop: int
    room: int
    flip: bool
    cutout: int
    seed: int
    first_flips: np.ndarray | None = None

    def draw(self, step: int, epoch: int, indices: np.ndarray) -> Draws:
        """The choices for these images at this step: offsets uniform, half of the images mirrored."""
        count = len(indices)
        rng = np.random.default_rng((self.seed, AUGMENTATION, step))
        rows, columns = rng.integers(self.room + 1, size=(2, count))
        mirrored = rng.integers(1 + self.flip, size=count).astype(bool)
        if self.first_flips is not None:
            mirrored = self.first_flips[indices] ^ bool(epoch % 2)
        return Draws(rows, columns, mirrored, rng.integers(self.crop - self.cutout + 1, size=(count, 2)))


def first_flips(count: int, seed: int) -> np.ndarray:
    """Which of `count` images an alternating flip mirrors in epoch 0: (count,) bool, half of them true.

    Two epochs in a row then show every image both ways, which coins do for half of the images only.
    Source: Jordan 2024, arXiv:2404.00498.
    """
    return np.random.default_rng((seed, FIRST_FLIPS)).integers(2, size=count).astype(bool)
