"""The usual map-style dataset and its DataLoader, for the peers that augment one image at a time."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class ImageDataset(Dataset):
    """Images and labels in memory; `transform` takes one image (32, 32, 3) uint8 and returns (3, 32, 32)."""

    def __init__(
        self, images_NHWC: np.ndarray, labels_N: np.ndarray, transform: Callable[[np.ndarray], Any]
    ) -> None:
        self._images, self._labels, self._transform = images_NHWC, labels_N, transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self._transform(self._images[index]), int(self._labels[index])


def data_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    worker_init_fn: Callable[[int], None] | None = None,
) -> Iterable[tuple[Tensor, Tensor]]:
    """A DataLoader set up as its documentation advises for speed; batches arrive on the device."""
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init_fn,
        multiprocessing_context="fork" if workers else None,  # torch's default on Linux
    )
    if device.type == "cpu":
        return loader
    return _OnDevice(loader, device)


class _OnDevice:
    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self._loader, self._device = loader, device

    def __iter__(self) -> Any:
        for images, labels in self._loader:
            yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)
