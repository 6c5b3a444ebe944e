"""A checkpoint's proof: the logits of a few fixed images, computed when it is saved and when it is loaded.

If a setting such as the activation is lost in between, the names and shapes of the weights stay the same.
Only the network's output shows it.
Shape suffixes: N images, C channels, H rows, W columns, K classes.
"""

import functools

import torch
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.model import ImageClassifier
from fasttrain.system.precision import exact_float32

IMAGES = 4

TOLERANCE = 2e-4
"""Largest difference of a logit that counts as rounding, as a share of the largest logit.

On a trained network, other CPU kernels differ by less than 1e-6, GELU approximated by tanh by 3e-4, weights
rounded to bf16 by 5e-3, and ReLU instead of GELU by 0.4 (docs/lab-notebook.md).
"""


@functools.lru_cache(maxsize=4)
def proof_images(resolution: int, device: torch.device) -> Tensor:
    """Return the images, the same everywhere: (IMAGES, 3, resolution, resolution) uint8 in channels_last.

    Noise in squares of 1, 2, 4 and 8 pixels, for filters of every scale. Computed with integers on the device
    itself: a library's random generator may change its numbers, and a copy to the device would make it wait.
    """
    scale_N111 = torch.arange(IMAGES, device=device).reshape(IMAGES, 1, 1, 1)
    row_H11 = torch.arange(resolution, device=device).reshape(resolution, 1, 1)
    column_W1 = torch.arange(resolution, device=device).reshape(resolution, 1)
    channel_C = torch.arange(3, device=device)
    square = ((row_H11 >> scale_N111) * 256 + (column_W1 >> scale_N111)) * 4 + channel_C + (scale_N111 << 20)
    for _ in range(2):  # a multiplicative hash: 32 bits times a factor of 27, so that 64 hold the product
        square = ((square ^ (square >> 16)) * 0x45D9F3B) & 0xFFFF_FFFF
    return (square >> 24).to(torch.uint8).permute(0, 3, 1, 2)


@torch.no_grad()
def proof_logits(model: ImageClassifier) -> Tensor:
    """Return the network's logits of the proof images in evaluation mode: (IMAGES, K) float32, on its device.

    Does not wait for the device, uses no random numbers, and restores the model's mode.
    """
    was_training = model.training
    model.eval()
    with exact_float32():
        logits_NK = model(proof_images(model.resolution, model.mean.device))
    model.train(was_training)
    return logits_NK


def require_proven(model: ImageClassifier, expected_NK: Tensor) -> None:
    """Raise UserError, with the difference, unless the network returns the saved logits up to rounding."""
    found_NK = proof_logits(model).cpu()
    fits = isinstance(expected_NK, Tensor) and expected_NK.layout == torch.strided
    if not fits or (expected_NK.shape, expected_NK.dtype) != (found_NK.shape, torch.float32):
        raise UserError(f"the proof: expected float32 of shape {tuple(found_NK.shape)}; train it again")
    difference = (found_NK - expected_NK).abs().max().item()
    largest = expected_NK.abs().max().item()
    if not difference <= TOLERANCE * largest:  # refuses NaN too
        raise UserError(
            "this is not the network that was saved: logits of the proof images differ by "
            f"{difference:.2g}, but rounding explains at most {TOLERANCE * largest:.2g}; load it with the "
            "version of fasttrain that wrote it, or train it again"
        )
