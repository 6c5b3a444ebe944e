"""Which images form which batch: a pure function of seed and step.

Both loaders use it, so they deliver the same batches, bit for bit and for any number of threads, and a loader
can be restored from its step and nothing else.
"""

from dataclasses import dataclass

import numpy as np

ORDER_STREAM = 0
"""Of the random numbers under a recipe's seed; data/augmentation.py draws from others."""


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
            self._order = np.random.default_rng((self.seed, ORDER_STREAM, epoch)).permutation(self.count)
            self._epoch = epoch
        batch = self._order[position * self.batch_size * self.shard.size :]
        return batch[self.shard.of(self.batch_size)]
