"""albumentations, one image at a time, under torch's DataLoader: the training assignment's way."""

from collections.abc import Iterable, Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch import Tensor
from torch.utils.data import get_worker_info

from benchmarks.peers.dataset import ImageDataset, data_loader

cv2.setNumThreads(
    0
)  # worker processes are the parallelism; threads beneath them only get in each other's way


class OnImage:
    """A transform of albumentations, called with an image as it is."""

    def __init__(self, transform: A.Compose) -> None:
        self.transform = transform

    def __call__(self, image: np.ndarray) -> Tensor:
        return self.transform(image=image)["image"]


def draw_differently(worker: int) -> None:
    """Seed this worker's generators; all workers begin with one state, and would draw the same."""
    info: Any = get_worker_info()
    info.dataset.transform.transform.set_random_seed(torch.initial_seed() % 2**32)


def batches(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    batch_size: int,
    workers: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> Iterable[tuple[Tensor, Tensor]]:
    transform = A.Compose(
        [
            A.PadIfNeeded(40, 40, border_mode=cv2.BORDER_REFLECT_101),
            A.RandomCrop(32, 32),
            A.HorizontalFlip(p=0.5),
            A.CoarseDropout(
                num_holes_range=(1, 1),
                hole_height_range=(8, 8),
                hole_width_range=(8, 8),
                fill=tuple(round(255 * value) for value in mean),
                p=1.0,
            ),
            A.Normalize(mean=tuple(mean), std=tuple(std)),
            ToTensorV2(),
        ]
    )
    dataset = ImageDataset(images_NHWC, labels_N, OnImage(transform))
    return data_loader(
        dataset, batch_size=batch_size, workers=workers, device=device, worker_init_fn=draw_differently
    )
