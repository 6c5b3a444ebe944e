"""torchvision's transforms v2, one image at a time, under torch's DataLoader."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.dataset import ImageDataset, data_loader

try:
    from torchvision.transforms import v2
except RuntimeError:
    # The usual wheel is built for CUDA: beside a CPU build of torch its compiled operators do not load, and
    # the import fails on schemas that they would have defined. The transforms need none of them.
    _schemas = torch.library.Library("torchvision", "FRAGMENT")
    for _operator in ("nms", "qnms"):
        _schemas.define(f"{_operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from torchvision.transforms import v2


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
    transform = v2.Compose(
        [
            v2.ToImage(),
            v2.RandomCrop(32, padding=4, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
            v2.RandomErasing(p=1.0, scale=(side_share, side_share), ratio=(1.0, 1.0), value=0.0),
        ]
    )
    dataset = ImageDataset(images_NHWC, labels_N, transform)
    return data_loader(dataset, batch_size=batch_size, workers=workers, device=device)
