"""Which images form which batch: a pure function of the seed and the step.

Both loaders ask the same sampler, so they deliver the same images in the same order, and a loader that
knows its step knows everything there is to restore.
"""

import numpy as np


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

    def __call__(self, step: int) -> np.ndarray:
        """Indices of the batch at this step of the run: (batch_size,) int64, fewer at an evaluation's end."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.train and epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(self.count)
            self._epoch = epoch
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]
