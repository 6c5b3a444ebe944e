"""The images with a reflected border, so that no crop ever leaves its image: padded once, or batch by batch.

Axis suffixes: N images, C channels, H rows, W columns.
"""

import numpy as np


def pad(images_NCHW: np.ndarray, padding: int) -> np.ndarray:
    """The images, channels interleaved, in a reflected border: (N, H + 2 padding, W + 2 padding, 3) uint8."""
    border = (padding, padding)
    images_NHWC = images_NCHW.transpose(0, 2, 3, 1)
    return np.ascontiguousarray(np.pad(images_NHWC, ((0, 0), border, border, (0, 0)), mode="reflect"))


def windows(images_NHWC: np.ndarray, side: int) -> np.ndarray:
    """Every square window of every image, (N, rows, columns, side, side, 3): a view that copies nothing."""
    views = np.lib.stride_tricks.sliding_window_view(images_NHWC, (side, side), axis=(1, 2))
    return views.transpose(0, 1, 2, 4, 5, 3)


class LazyCrops:
    """The same windows of images too large to be padded in memory: each batch is, when it is asked for.

    images_NCHW: (N, 3, H, W) uint8, in memory or mapped from a file. The windows are as large as the images.
    """

    def __init__(self, images_NCHW: np.ndarray, padding: int) -> None:
        self._images_NCHW, self._padding = images_NCHW, padding

    def __getitem__(self, places: tuple[np.ndarray, np.ndarray, np.ndarray]) -> np.ndarray:
        """places: image, row and column of each window, (N,). Returns (N, H, W, 3) uint8."""
        indices, rows, columns = places
        batch_NHWC = pad(self._images_NCHW[indices], self._padding)
        return windows(batch_NHWC, self._images_NCHW.shape[-1])[np.arange(len(indices)), rows, columns]
