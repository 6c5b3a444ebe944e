"""albumentations, one image at a time, under torch's DataLoader: the training assignment's way."""

from collections.abc import Iterable, Sequence

import albumentations as A
import cv2
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from torch import Tensor

from benchmarks.peers.dataset import ImageDataset, data_loader

cv2.setNumThreads(
    0
)  # worker processes are the parallelism; threads beneath them only get in each other's way


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
    dataset = ImageDataset(images_NHWC, labels_N, lambda image: transform(image=image)["image"])
    return data_loader(
        dataset,
        batch_size=batch_size,
        workers=workers,
        device=device,
        # Forked workers inherit one state of albumentations' generators, and would all draw the same.
        worker_init_fn=lambda _: transform.set_random_seed(torch.initial_seed() % 2**32),
    )
