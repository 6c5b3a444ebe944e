"""The usual map-style dataset and its DataLoader, for the peers that augment one image at a time."""

import multiprocessing
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


class ImageDataset(Dataset):
    """Images and labels in memory; `transform` takes one image (32, 32, 3) uint8 and returns (3, 32, 32).

    Workers get the images as shared memory, and the transform pickled.
    """

    def __init__(
        self, images_NHWC: np.ndarray, labels_N: np.ndarray, transform: Callable[[np.ndarray], Any]
    ) -> None:
        self._images = torch.tensor(images_NHWC).share_memory_()
        self._labels, self.transform = labels_N, transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self._images[index].numpy()), int(self._labels[index])


def data_loader(
    dataset: ImageDataset,
    *,
    batch_size: int,
    workers: int,
    device: torch.device,
    worker_init_fn: Callable[[int], None] | None = None,
) -> Iterable[tuple[Tensor, Tensor]]:
    """A DataLoader set up as its documentation advises for speed; batches arrive on the device."""
    context = None
    if workers:
        # On a GPU, workers are forks of a server that has imported what they need and uses no CUDA: a process
        # that uses it must not be forked (docs.pytorch.org/docs/stable/notes/multiprocessing.html).
        context = multiprocessing.get_context("fork" if device.type == "cpu" else "forkserver")
        context.set_forkserver_preload([f"{__package__}.albumentations", f"{__package__}.torchvision"])
    loader = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=worker_init_fn,
        multiprocessing_context=context,
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
