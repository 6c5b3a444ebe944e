"""Images with a reflected border, so that every crop lies inside: padded once in memory, or batch by batch.

Axis suffixes: N images, C channels, H rows, W columns.
"""

import numpy as np


def pad(images_NHWC: np.ndarray, padding: int) -> np.ndarray:
    """Return a copy of the images with a reflected border: (N, H + 2 padding, W + 2 padding, 3) uint8."""
    border = (padding, padding)
    return np.pad(images_NHWC, ((0, 0), border, border, (0, 0)), mode="reflect")


class LazyPadded:
    """The same for images too large to pad in memory: each batch is padded when it is requested.

    images_NHWC: (N, H, W, 3) uint8, in memory or mapped from a file.
    """

    def __init__(self, images_NHWC: np.ndarray, padding: int) -> None:
        self._images_NHWC, self._padding = images_NHWC, padding

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Return padded copies of the images with these indices, (N,) integers."""
        return pad(self._images_NHWC[indices], self._padding)
