"""A 3x3 convolution whose weights get their gradient quickly on a CPU with AMX, where images are small.

Shape suffixes: N images, G groups of images, I images of a group, C channels, H rows, W columns.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDEST = 8
"""Columns of an image up to which joining images pays. Measured: docs/lab-notebook.md, 2026-11-28."""

GROUP = 32
"""Images that are joined into one, at most."""


class Conv3x3(nn.Conv2d):
    """nn.Conv2d with 3x3 filters, a padding of 1 and no bias.

    AMX multiplies blocks of 32 values, and oneDNN forms them along an image's row for the gradient of the
    weights. With 4 or 8 columns most of a block is empty, and the gradient takes ten times as long as the
    convolution. So the images are put side by side, with a column of zeros in between, which is the padding
    of both neighbours: the same sums, in another order.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled() and joining_pays(x_NCHW):
            dtype = torch.get_autocast_dtype("cpu")
            return _JoinedGradient.apply(x_NCHW.to(dtype), self.weight.to(dtype))
        return super().forward(x_NCHW)


def joining_pays(x_NCHW: Tensor) -> bool:
    """Whether this input's images are small, and this is a CPU with AMX, which computes in bf16."""
    return (
        not torch.compiler.is_compiling()
        and x_NCHW.device.type == "cpu"
        and x_NCHW.shape[3] <= WIDEST
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and has_amx()
    )


@functools.cache
def has_amx() -> bool:
    """Whether this CPU multiplies blocks of bf16 numbers."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


class _JoinedGradient(torch.autograd.Function):
    """The convolution, and its gradients: that of the weights from joined images."""

    @staticmethod
    def forward(ctx: Any, x_NCHW: Tensor, weight_FCHW: Tensor) -> Tensor:
        ctx.save_for_backward(x_NCHW, weight_FCHW)
        return F.conv2d(x_NCHW, weight_FCHW, padding=1)

    @staticmethod
    def backward(ctx: Any, gradient_NFHW: Tensor) -> tuple[Tensor | None, Tensor]:
        x_NCHW, weight_FCHW = ctx.saved_tensors
        x_gradient_NCHW = None
        if ctx.needs_input_grad[0]:
            x_gradient_NCHW = _gradients(gradient_NFHW, x_NCHW, weight_FCHW, [True, False, False])[0]
        joined = join(gradient_NFHW), join(x_NCHW)
        return x_gradient_NCHW, _gradients(*joined, weight_FCHW, [False, True, False])[1]


def join(images_NCHW: Tensor) -> Tensor:
    """Put images side by side, each before a column of zeros: (N / I, C, H, I (W + 1)), channels_last."""
    count, _, rows, columns = images_NCHW.shape
    per_group = math.gcd(count, GROUP)
    groups_GIHWC = images_NCHW.permute(0, 2, 3, 1).unflatten(0, (-1, per_group))
    shape = count // per_group, rows, per_group, columns + 1, images_NCHW.shape[1]
    joined_GHIWC = images_NCHW.new_zeros(shape)
    joined_GHIWC[:, :, :, :columns] = groups_GIHWC.transpose(1, 2)
    return joined_GHIWC.flatten(2, 3).permute(0, 3, 1, 2)


def _gradients(gradient_NFHW: Tensor, x_NCHW: Tensor, weight_FCHW: Tensor, wanted: list[bool]) -> Any:
    """Return the gradients of input, weights and bias, None for those that are not wanted."""
    return torch.ops.aten.convolution_backward(
        gradient_NFHW, x_NCHW, weight_FCHW, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, wanted
    )
