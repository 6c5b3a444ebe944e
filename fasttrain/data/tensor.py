"""The pure-torch loader: all images in the device's memory, augmented a batch at a time.

The reference that tests hold DALI against, its rival in benchmarks, and the data path where DALI has no
wheel (macOS, Windows). Same sampler, same draws, same batches to the last bit.
Axis suffixes: N images, C channels, H rows, W columns.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.sampler import Augmentation, Sampler


class TensorLoader:
    """Batches of images and labels, cut and augmented by torch on the device.

    images: (N, 3, P, P) uint8, padded: P = augmentation.crop + augmentation.room. labels: (N,) uint8.
    Yields images_NCHW (batch, 3, crop, crop) of `dtype` in channels_last and labels_N int64, on `device`.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        sampler: Sampler,
        augmentation: Augmentation,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.name = f"tensor-{device.type}"
        self.sampler, self.augmentation = sampler, augmentation
        self._images_NHWC = torch.from_numpy(images).to(device).permute(0, 2, 3, 1).contiguous()
        self._labels = torch.from_numpy(labels).to(device, torch.int64)
        self._mean = 255 * torch.tensor(mean, device=device)
        self._inverse_std = 1 / (255 * torch.tensor(std, device=device))  # as DALI: multiplied, not divided
        self._pixels = torch.arange(augmentation.crop, device=device)
        self._dtype, self._device = dtype, device
        self._step = 0

    def __len__(self) -> int:
        return self.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the current epoch: all of it, unless a restored state stands in its middle."""
        while True:
            yield self._next()
            if self._step % len(self) == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; restores bit-exactly mid-epoch."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]

    def _next(self) -> tuple[Tensor, Tensor]:
        indices = self.sampler(self._step)
        draws = self.augmentation.draw(self._step, len(indices))
        self._step += 1
        indices_N, rows_N, columns_N, mirrored_N, holes_N2 = (
            torch.from_numpy(values).to(self._device, non_blocking=True) for values in (indices, *draws)
        )
        # Gather, crop and mirror in one indexing operation.
        rows_NH = rows_N[:, None] + self._pixels
        columns_NW = torch.where(mirrored_N[:, None], self._pixels.flip(0), self._pixels) + columns_N[:, None]
        images_NHWC = self._images_NHWC[indices_N[:, None, None], rows_NH[:, :, None], columns_NW[:, None, :]]
        images_NHWC = (images_NHWC - self._mean) * self._inverse_std
        if self.augmentation.cutout:
            inside_NH, inside_NW = (self._inside(corners_N) for corners_N in holes_N2.unbind(1))
            holes_NHW1 = (inside_NH[:, :, None] & inside_NW[:, None, :])[..., None]
            images_NHWC.masked_fill_(holes_NHW1, 0.0)  # the mean, once normalised
        return images_NHWC.to(self._dtype).permute(0, 3, 1, 2), self._labels[indices_N]

    def _inside(self, corners_N: Tensor) -> Tensor:
        """Which pixels of a side lie in the cutout that begins at each corner: (N, crop) bool."""
        distance = self._pixels - corners_N[:, None]
        return (distance >= 0) & (distance < self.augmentation.cutout)
