"""A checkpoint's proof: what its network said of a few fixed images when it was saved.

Whoever loads the checkpoint asks the network that it rebuilt the same. A setting that was lost on the way, an
activation say, changes no name and no shape among the weights: nothing but the answers can show it.
Shape suffixes: N images, C channels, H rows, W columns, K classes.
"""

import functools

import torch
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.machine import exact_float32
from fasttrain.model import CustomResNet

IMAGES = 4
TOLERANCE = 2e-4
"""Largest difference of a logit that counts as rounding, as a share of the largest logit.

Other instructions, which sum in another order, differ by 1e-6 of a trained network; its GELU approximated by
tanh differs by 3e-4, rounded to bf16 by 5e-3, with ReLU in GELU's place by 0.4 (docs: benchmarks/LOG.md).
"""


@functools.lru_cache(maxsize=4)
def proof_images(resolution: int, device: torch.device) -> Tensor:
    """The images, the same everywhere: (IMAGES, 3, resolution, resolution) uint8 in channels_last.

    Noise in squares of 1, 2, 4 and 8 pixels, for filters of every scale. Made by integer arithmetic on the
    device itself: no random generator, whose numbers may change with a library, and no copy to wait for.
    """
    scale_N111 = torch.arange(IMAGES, device=device).reshape(IMAGES, 1, 1, 1)
    row_H11 = torch.arange(resolution, device=device).reshape(resolution, 1, 1)
    column_W1 = torch.arange(resolution, device=device).reshape(resolution, 1)
    channel_C = torch.arange(3, device=device)
    square = ((row_H11 >> scale_N111) * 256 + (column_W1 >> scale_N111)) * 4 + channel_C + (scale_N111 << 20)
    for _ in range(2):  # a multiplicative hash: 32 bits by a factor of 27, so that 64 hold the product
        square = ((square ^ (square >> 16)) * 0x45D9F3B) & 0xFFFF_FFFF
    return (square >> 24).to(torch.uint8).permute(0, 3, 1, 2)


@torch.no_grad()
def proof_logits(model: CustomResNet) -> Tensor:
    """What the network says of these images in evaluation mode, float32 on its device: (IMAGES, K).

    Neither waits for the device nor draws from a random generator; the model's mode is restored.
    """
    was_training = model.training
    model.eval()
    with exact_float32():
        logits_NK = model(proof_images(model.resolution, model.mean.device))
    model.train(was_training)
    return logits_NK


def require_proven(model: CustomResNet, expected_NK: Tensor) -> None:
    """Raise UserError, naming the difference, unless the network says what the saved one said."""
    found_NK = proof_logits(model).cpu()
    if not isinstance(expected_NK, Tensor) or expected_NK.shape != found_NK.shape:
        raise UserError(f"its proof is no tensor of shape {tuple(found_NK.shape)}")
    difference = (found_NK - expected_NK).abs().max().item()
    largest = expected_NK.abs().max().item()
    if not difference <= TOLERANCE * largest:  # NaN is refused as well
        raise UserError(
            "it does not rebuild the network that was saved: logits of the proof images differ by "
            f"{difference:.2g}, at most {TOLERANCE * largest:.2g} would be rounding; use the version of "
            "fasttrain that wrote it, or train it again"
        )
