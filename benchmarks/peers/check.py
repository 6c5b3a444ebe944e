"""Whether a peer does the same work: augmentations read off images whose pixels tell their place."""

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def ramp_images(count: int) -> np.ndarray:
    """(count, 32, 32, 3) uint8: red = row + 150, green = column + 150, blue = 255; none is near the mean."""
    image = np.empty((32, 32, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = np.arange(32)[:, None] + 150, np.arange(32) + 150, 255
    return np.broadcast_to(image, (count, 32, 32, 3)).copy()


def statistics(loader: Iterable[tuple[Tensor, Tensor]], count: int) -> dict[str, Any]:
    """What `count` ramp images went through: counts of offsets, share mirrored, cutouts.

    offsets: (9, 9), how often each crop. mirrored: share. hole_pixels: the set of areas cut out.
    hole_corners: (2, 25), how often each row and column. error: largest distance of a value from its pixel's.
    """
    epochs = chain.from_iterable(repeat(loader))
    collected: list[Tensor] = []
    while sum(map(len, collected)) < count:
        images, _ = next(epochs)
        collected.append(images.float().cpu().clone())  # ffcv reuses its memory
    images_NCHW = torch.cat(collected)[:count]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels_NCHW = 255 * (images_NCHW * std + mean)
    hole_NHW = (pixels_NCHW[:, 2] - 255).abs() > 64
    # A row holds its number in every column but for those of the hole, which are the fewer: the median.
    rows_NH = pixels_NCHW[:, 0].median(2).values - 150
    columns_NW = pixels_NCHW[:, 1].median(1).values - 150
    mirrored_N = columns_NW[:, 15] > columns_NW[:, 16]
    middle_N = torch.where(mirrored_N, columns_NW[:, 15], columns_NW[:, 16])
    offsets = torch.zeros(9, 9)
    places = tuple((first_N - 12).round().long().clamp(0, 8) for first_N in (rows_NH[:, 16], middle_N))
    offsets.index_put_(places, torch.ones(count), accumulate=True)
    corners = [hole_NHW.any(axis).int().argmax(1).bincount(minlength=25) for axis in (2, 1)]
    shown = pixels_NCHW[:, :2].movedim(1, -1)[~hole_NHW]
    return {
        "offsets": offsets.numpy(),
        "mirrored": mirrored_N.float().mean().item(),
        "hole_pixels": set(hole_NHW.sum((1, 2)).tolist()),
        "hole_corners": torch.stack(corners).numpy(),
        "error": (shown - shown.round()).abs().max().item(),
    }


def differences(found: dict[str, Any]) -> Sequence[str]:
    """What is not as it should be, in words; empty for the same work. Fails by chance once in 20,000 runs."""
    count = found["offsets"].sum()
    wrong = []
    if chi_squared(found["offsets"]) > 145:  # 80 degrees of freedom
        wrong.append("the crops' offsets are not uniform over 9x9")
    if abs(found["mirrored"] - 0.5) > 2 / np.sqrt(count):  # four standard deviations
        wrong.append(f"{found['mirrored']:.1%} are mirrored, not half")
    if found["hole_pixels"] != {64}:
        wrong.append(f"cutouts cover {sorted(found['hole_pixels'])} pixels, not 64")
    if any(chi_squared(corners) > 62 for corners in found["hole_corners"]):  # 24 degrees of freedom
        wrong.append("the cutouts' corners are not uniform over 25x25")
    if found["error"] > 0.2:
        wrong.append("values are not the normalised pixels")
    return wrong


def chi_squared(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return float(((counts - expected) ** 2 / expected).sum())
