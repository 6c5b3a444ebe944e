"""How each image of a batch is cropped, mirrored and cut out: a pure function of seed and step.

Only the choices are made here. data/dali.py and data/tensor.py carry them out, to the same pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fasttrain.data.sampler import WHOLE, Shard

AUGMENTATION_STREAM, FIRST_FLIPS_STREAM = 1, 2
"""Of the random numbers under a recipe's seed, independent of each other and of the sampler's."""


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
        rng = np.random.default_rng((self.seed, AUGMENTATION_STREAM, step))
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
    return np.random.default_rng((seed, FIRST_FLIPS_STREAM)).integers(2, size=count).astype(bool)
