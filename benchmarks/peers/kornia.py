"""kornia's augmentations on whole batches, on the device."""

from collections.abc import Iterable, Iterator, Sequence

import kornia.augmentation as K
import numpy as np
import torch
from torch import Tensor, nn


class _Batches:
    def __init__(self, images_NCHW: Tensor, labels_N: Tensor, batch_size: int, augment: nn.Module) -> None:
        self._images, self._labels = images_NCHW, labels_N
        self._batch_size, self._augment = batch_size, augment

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._labels), device=self._labels.device)
        for indices in order.split(self._batch_size):
            if len(indices) == self._batch_size:
                yield self._augment(self._images[indices].float() / 255), self._labels[indices]


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
    side_share = (8 / 32) ** 2
    augment = nn.Sequential(
        K.RandomCrop((32, 32), padding=4, padding_mode="reflect", cropping_mode="slice"),
        K.RandomHorizontalFlip(p=0.5),
        K.Normalize(torch.tensor(mean), torch.tensor(std)),
        K.RandomErasing(p=1.0, scale=(side_share, side_share), ratio=(1.0, 1.0), value=0.0),
    ).to(device)
    images_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).contiguous().to(device)
    return _Batches(images_NCHW, torch.from_numpy(labels_N).to(device, torch.int64), batch_size, augment)
