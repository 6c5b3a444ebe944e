"""The exponential moving average of a network's weights and BatchNorm statistics, kept on the device."""

import copy
import math

import torch
from torch import Tensor, nn


class WeightAverage:
    """A second network whose weights are the moving average of the trained network's.

    fused: whether one kernel updates all tensors; otherwise a few do.
    horizon: steps after which the share of a step has fallen to 1/e. Recipes give it in epochs, which means
    the same for any batch size and any length of the schedule.
    tensors: the averages, at fixed addresses.
    The shares of all steps so far sum to one, as in Adam's moments. The untrained first weights have no
    share, so an average over a few epochs needs no warm-up.
    Source: Polyak and Juditsky 1992; the correction is that of arXiv:1412.6980, section 3.
    """

    def __init__(self, model: nn.Module, horizon: float, *, fused: bool = True) -> None:
        self.model = copy.deepcopy(model)
        self._decay, self._fused = math.exp(-1 / horizon), fused
        self.tensors, self._values = _floating(self.model), _floating(model)

    def share(self, step: int) -> float:
        """Return the share that the weights after this step (counted from 0) get in the average."""
        return (1 - self._decay) / (1 - self._decay ** (step + 1))

    @torch.no_grad()
    def update(self, share: float | Tensor) -> None:
        """Add the trained network's weights with this share, without waiting for the device.

        share: if a tensor, on the network's device, where a captured update reads it.
        """
        if not self._fused:
            differences = torch._foreach_sub(self._values, self.tensors)
            torch._foreach_mul_(differences, share)
            torch._foreach_add_(self.tensors, differences)
            return
        # average -= share * (average - values) is a step of gradient descent for the gradient -values, with a
        # weight decay of 1. torch's fused kernel for it reads a rate on the device (FusedSgdKernel.cu), while
        # _foreach_lerp_ takes one weight for all only from the host, and torch.optim.swa_utils asks the
        # device whether this is the first update.
        torch._fused_sgd_(
            self.tensors,
            self._values,
            momentum_buffer_list=[],
            weight_decay=1.0,
            momentum=0.0,
            lr=share,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
        )


def _floating(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers to average: all except BatchNorm's batch counters."""
    tensors = [*model.parameters(), *model.buffers()]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
