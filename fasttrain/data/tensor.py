"""The pure-torch loader: all images in the device's memory, augmented a batch at a time.

It is the reference for DALI in the tests, its rival in the benchmarks, and the data path where DALI has no
wheel (macOS, Windows). Same sampler, same random choices, same batches, bit for bit.
Axis suffixes: N images, C channels, H rows, W columns.
"""

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.augmentation import Augmentation
from fasttrain.data.loader import Loader
from fasttrain.data.sampler import Sampler


class TensorLoader(Loader):
    """Batches of images and labels, cropped and augmented by torch on the device.

    images_NHWC: (N, P, P, 3) uint8, padded: P = resolution + max_offset of the augmentation. labels_N: (N,)
    integers.
    fill: the pixel that a cutout leaves: red, green and blue, 0 to 255.
    Yields images_NCHW, uint8 in channels_last, and labels_N, int64, on `device`.
    """

    def __init__(
        self,
        images_NHWC: np.ndarray,
        labels_N: np.ndarray,
        sampler: Sampler,
        augmentation: Augmentation,
        *,
        fill: tuple[int, int, int],
        device: torch.device,
    ) -> None:
        super().__init__(sampler, device)
        self.name = f"tensor-{device.type}"
        self.augmentation = augmentation
        self._images_NHWC = torch.from_numpy(images_NHWC).to(device)
        self._labels_N = torch.from_numpy(labels_N).to(device, torch.int64)
        self._fill = torch.tensor(fill, dtype=torch.uint8, device=device)
        self._pixels = torch.arange(augmentation.resolution, device=device)

    def _next(self) -> tuple[Tensor, Tensor]:
        indices = self.sampler(self._step)
        params = self.augmentation.draw(self._step, self.sampler.epoch(self._step), indices)
        indices_N, rows_N, columns_N, mirrored_N, cutout_N2 = (
            torch.from_numpy(values).to(self.device, non_blocking=True) for values in (indices, *params)
        )
        # Gather, crop and mirror in one indexing operation.
        rows_NH = rows_N[:, None] + self._pixels
        columns_NW = torch.where(mirrored_N[:, None], self._pixels.flip(0), self._pixels) + columns_N[:, None]
        images_NHWC = self._images_NHWC[indices_N[:, None, None], rows_NH[:, :, None], columns_NW[:, None, :]]
        if self.augmentation.cutout:
            inside_NH, inside_NW = (self._inside(corners_N) for corners_N in cutout_N2.unbind(1))
            cutout_NHW1 = (inside_NH[:, :, None] & inside_NW[:, None, :])[..., None]
            images_NHWC = torch.where(cutout_NHW1, self._fill, images_NHWC)
        return images_NHWC.permute(0, 3, 1, 2), self._labels_N[indices_N]

    def _inside(self, corners_N: Tensor) -> Tensor:
        """Mark the rows or columns inside the cutout that begins at each corner: (N, resolution) bool."""
        distance = self._pixels - corners_N[:, None]
        return (distance >= 0) & (distance < self.augmentation.cutout)
