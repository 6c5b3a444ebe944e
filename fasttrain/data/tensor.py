"""The pure-torch loader: all images in the device's memory, augmented a batch at a time.

The reference that tests hold DALI against, its rival in benchmarks, and the data path where DALI has no
wheel (macOS, Windows). Same sampler, same contract, same values; only the random draws differ.
Axis suffixes: N images, C channels, H rows, W columns.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.sampler import Sampler


class TensorLoader:
    """Batches of images and labels, cut and augmented by torch on the device.

    images: (N, 3, P, P) uint8, where P >= crop; P > crop means room for random crops.
    labels: (N,) uint8.
    Yields images_NCHW (batch, 3, crop, crop) of `dtype` in channels_last and labels_N int64, on `device`.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        sampler: Sampler,
        *,
        crop: int,
        flip: bool,
        cutout: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
    ) -> None:
        self.name = f"tensor-{device.type}"
        self.sampler = sampler
        self._images_NHWC = torch.from_numpy(images).to(device).permute(0, 2, 3, 1).contiguous()
        self._labels = torch.from_numpy(labels).to(device, torch.int64)
        self._crop, self._flip, self._cutout = crop, flip, cutout
        self._mean = 255 * torch.tensor(mean, device=device)
        self._inverse_std = 1 / (255 * torch.tensor(std, device=device))
        self._dtype, self._device, self._seed = dtype, device, seed
        self._generator = torch.Generator(device)
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
        # Seeded anew at every step, so that the step alone is the loader's state.
        [seed] = np.random.SeedSequence((self._seed, self._step)).generate_state(1)
        self._generator.manual_seed(int(seed))
        indices = torch.from_numpy(self.sampler(self._step)).to(self._device, non_blocking=True)
        self._step += 1
        images_NHWC = (self._cropped(indices) - self._mean) * self._inverse_std
        if self._cutout:
            images_NHWC.masked_fill_(self._holes(len(indices)), 0.0)  # the mean, once normalised
        return images_NHWC.to(self._dtype).permute(0, 3, 1, 2), self._labels[indices]

    def _draw(self, high: int, count: int) -> Tensor:
        """Uniform integers from 0 to high - 1: (count, 1)."""
        return torch.randint(high, (count, 1), generator=self._generator, device=self._device)

    def _cropped(self, indices: Tensor) -> Tensor:
        """Gather, crop and mirror in one indexing operation: (N, crop, crop, 3) uint8."""
        count, room = len(indices), self._images_NHWC.shape[1] - self._crop
        pixels = torch.arange(self._crop, device=self._device)
        rows = pixels + self._draw(room + 1, count)
        columns = pixels.expand(count, -1)
        if self._flip:
            columns = torch.where(self._draw(2, count).bool(), columns.flip(1), columns)
        columns = columns + self._draw(room + 1, count)
        return self._images_NHWC[indices[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _holes(self, count: int) -> Tensor:
        """True inside each image's cutout square: (count, crop, crop, 1)."""
        pixels = torch.arange(self._crop, device=self._device)

        def stripe() -> Tensor:
            corner = self._draw(self._crop - self._cutout + 1, count)
            return (pixels >= corner) & (pixels < corner + self._cutout)

        return (stripe()[:, :, None] & stripe()[:, None, :])[..., None]
