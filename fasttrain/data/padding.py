"""Images with a reflected border, so that every crop lies inside: padded once in memory, or batch by batch.

Axis suffixes: N images, C channels, H rows, W columns.
"""

import numpy as np


def pad(images_NHWC: np.ndarray, padding: int) -> np.ndarray:
    """Return a copy of the images with a reflected border: (N, H + 2 padding, W + 2 padding, 3) uint8."""
    border = (padding, padding)
    return np.pad(images_NHWC, ((0, 0), border, border, (0, 0)), mode="reflect")


def crop_views(images_NHWC: np.ndarray, resolution: int) -> np.ndarray:
    """View every square crop of every image without a copy: (N, rows, columns, resolution, resolution, 3)."""
    shape = (resolution, resolution)
    views = np.lib.stride_tricks.sliding_window_view(images_NHWC, shape, axis=(1, 2))
    return views.transpose(0, 1, 2, 4, 5, 3)


class LazyCrops:
    """The same crops for images too large to pad in memory: each batch is padded when it is requested.

    images_NHWC: (N, H, W, 3) uint8, in memory or mapped from a file. Crops have the size of the images.
    """

    def __init__(self, images_NHWC: np.ndarray, padding: int) -> None:
        self._images_NHWC, self._padding = images_NHWC, padding

    def __getitem__(self, places: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """Return crops, (N, H, W, 3) uint8; places: image, row and column of each crop, (N,) integers."""
        indices, rows, columns = places
        batch_NHWC = pad(self._images_NHWC[indices], self._padding)
        resolution = self._images_NHWC.shape[1]
        return crop_views(batch_NHWC, resolution)[np.arange(len(indices)), rows, columns]
