"""Which images form which batch, and how each is cropped, mirrored and cut: pure functions of seed and step.

Both loaders use them, so they deliver the same batches, bit for bit and for any number of threads, and a
loader can be restored from its step and nothing else.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ORDER, AUGMENTATION, FIRST_FLIPS = 0, 1, 2
"""Independent streams of random numbers under one seed."""


@dataclass(frozen=True)
class Shard:
    """One rank's part of every batch: the same number of images for each rank, in the order of the ranks."""

    rank: int = 0
    size: int = 1

    def of(self, share: int) -> slice:
        """Return the slice of the whole batch that holds this rank's `share` images."""
        return slice(self.rank * share, (self.rank + 1) * share)


WHOLE = Shard()


class Sampler:
    """The image indices of every step of a run, with steps counted across epochs.

    count: images in the split. batch_size: images per step, of all ranks together; the attribute of that name
    is this rank's part.
    train: shuffle all images every epoch, and drop the last, smaller batch. Otherwise every image comes
    exactly once, in stored order, and the last batch may be smaller.
    shard: the part of every training batch to return.
    """

    def __init__(self, count: int, batch_size: int, *, train: bool, seed: int, shard: Shard = WHOLE) -> None:
        self.count, self.train, self.seed, self.shard = count, train, seed, shard
        self.batch_size = batch_size // shard.size
        self.steps_per_epoch = count // batch_size if train else -(-count // batch_size)
        self._epoch = -1
        self._order = np.arange(count)

    def epoch(self, step: int) -> int:
        """Return the epoch of this step, counted from 0."""
        return step // self.steps_per_epoch

    def __call__(self, step: int) -> np.ndarray:
        """Return the indices of this step's batch: (batch_size,) int64, fewer at the end of an evaluation."""
        epoch, position = self.epoch(step), step % self.steps_per_epoch
        if self.train and epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, ORDER, epoch)).permutation(self.count)
            self._epoch = epoch
        batch = self._order[position * self.batch_size * self.shard.size :]
        return batch[self.shard.of(self.batch_size)]


class AugmentParams(NamedTuple):
    """The random choices for one batch; offsets and corners in pixels, int64.

    rows, columns: (N,), where each crop begins in the padded image. mirrored: (N,) bool.
    cutout_corners: (N, 2), row and column of the cutout's top left corner in the finished image.
    """

    rows: np.ndarray
    columns: np.ndarray
    mirrored: np.ndarray
    cutout_corners: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The augmentation of every image in a batch.

    resolution: pixels per side of the finished image. max_offset: the largest row and column at which a crop
    may begin in the padded image; 0 means no random crop. flip: mirror half of the images.
    cutout: side of the square that is set to the mean, in pixels; 0 means none.
    shard: the rank's part: choices are drawn for the whole batch, and this part of them is used.
    first_flips: (N,) bool, the images to mirror in epoch 0 and every second epoch after it; the others are
    mirrored in the epochs between. None means a coin toss per image and epoch.
    """

    resolution: int
    max_offset: int
    flip: bool
    cutout: int
    seed: int
    shard: Shard = WHOLE
    first_flips: np.ndarray | None = None

    def draw(self, step: int, epoch: int, indices: np.ndarray) -> AugmentParams:
        """Draw the choices for these images at this step: uniform offsets, half of the images mirrored.

        indices: (N,) int64, this rank's images.
        """
        count = len(indices)
        rng = np.random.default_rng((self.seed, AUGMENTATION, step))
        whole, mine = count * self.shard.size, self.shard.of(count)
        rows, columns = rng.integers(self.max_offset + 1, size=(2, whole))[:, mine]
        mirrored = rng.integers(1 + self.flip, size=whole)[mine].astype(bool)
        if self.first_flips is not None:
            mirrored = self.first_flips[indices] ^ bool(epoch % 2)
        corners = rng.integers(self.resolution - self.cutout + 1, size=(whole, 2))[mine]
        return AugmentParams(rows, columns, mirrored, corners)


def first_flips(count: int, seed: int) -> np.ndarray:
    """Choose the images that an alternating flip mirrors in epoch 0: (count,) bool, about half of them true.

    Any two consecutive epochs then show every image both ways; coin tosses do so for only half of the images.
    Source: Jordan 2024, arXiv:2404.00498.
    """
    return np.random.default_rng((seed, FIRST_FLIPS)).integers(2, size=count).astype(bool)
