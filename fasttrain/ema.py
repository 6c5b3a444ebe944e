"""The exponential moving average of a network's weights and BatchNorm statistics, kept on the device."""

import copy
import math

import torch
from torch import Tensor, nn


class WeightAverage:
    """A second network whose weights are the moving average of the trained network's.

    horizon: steps after which the share of a step has fallen to 1/e. Recipes give it in epochs, which means
    the same for any batch size and any length of the schedule.
    tensors: the averages, at fixed addresses.
    The shares of all steps so far sum to one, as in Adam's moments. The untrained first weights have no
    share, so an average over a few epochs needs no warm-up.
    Source: Polyak and Juditsky 1992; the correction is that of arXiv:1412.6980, section 3.
    """

    def __init__(self, model: nn.Module, horizon: float) -> None:
        self.model = copy.deepcopy(model)
        self._decay = math.exp(-1 / horizon)
        self.tensors, self._values = _floating(self.model), _floating(model)
        # A tensor at a fixed address, from which a captured update reads each step's share.
        self._share = torch.ones((), device=self._values[0].device)

    def set_step(self, step: int) -> None:
        """Set the share that the weights after this step (counted from 0) get in the average."""
        self._share.fill_((1 - self._decay) / (1 - self._decay ** (step + 1)))

    @torch.no_grad()
    def update(self) -> None:
        """Add the trained network's weights, with the share from set_step. Does not wait for the device."""
        # torch.optim.swa_utils asks the device whether this is the first update, and _foreach_lerp_ takes its
        # weight from the host: both would wait.
        differences = torch._foreach_sub(self._values, self.tensors)
        torch._foreach_mul_(differences, self._share)
        torch._foreach_add_(self.tensors, differences)


def _floating(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers to average: all except BatchNorm's batch counters."""
    tensors = [*model.parameters(), *model.buffers()]
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
