"""The optimizers, and the one-cycle schedule of learning rate and beta1."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.recipe import Recipe

BASE_MOMENTUM, MAX_MOMENTUM = 0.85, 0.95
"""Range of Adam's beta1 if the recipe cycles it, as in torch's OneCycleLR."""


def build_optimizer(model: nn.Module, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """Build fused Adam or AdamW, or Muon, with weight decay only on convolution and linear weights.

    Muon rescales the convolutions at every step, so they have no weight decay; neither have BatchNorm's
    parameters and the biases, as is usual.
    BatchNorm's biases form a separate group only if the recipe gives them another rate, since a fused kernel
    runs once per group, and a checkpoint identifies parameters by their position in the groups.
    Source: arXiv:1711.05101; Goyal et al. 2017, arXiv:1706.02677, section 5.3.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    scaled_biases = _batch_norm_biases(model) if recipe.bn_bias_lr_scale != 1 else []
    scaled_ids = {id(p) for p in scaled_biases}
    others = [p for p in model.parameters() if p.dim() <= 1 and id(p) not in scaled_ids]
    groups: list[dict[str, Any]] = [
        {"params": weights, "weight_decay": recipe.weight_decay, "lr_scale": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    if scaled_biases:
        groups.append({"params": scaled_biases, "weight_decay": 0.0, "lr_scale": recipe.bn_bias_lr_scale})
    if recipe.optimizer == "muon":
        groups[0]["params"] = [p for p in weights if p.dim() != 4]
        filters = [p for p in weights if p.dim() == 4]
        groups.append({"params": filters, "weight_decay": 0.0, "lr_scale": recipe.muon_lr_scale})
    optimizer_class = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon}[recipe.optimizer]
    return optimizer_class(groups, lr=lr, fused=True)


class Muon(torch.optim.AdamW):
    """Muon for the last group, the convolutions' filters; fused AdamW for the groups before it.

    The filters of a convolution form a matrix with one row per filter. An update is the momentum with all its
    singular values brought near 1, so that it moves equally far in every direction. Before the update, the
    matrix is scaled to the norm of one with orthonormal rows: BatchNorm cancels that, and the learning rate
    becomes the share of the weights that is replaced.
    It never waits for the device and reads rates that are tensors as tensors, so it can be captured; but with
    fp16 the gradient scaler waits at every step. Matrix products use the precision of the current autocast.
    Axis suffixes: F filters, C channels, H rows, W columns, X the axes after F flattened together.
    Source: K. Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", and the settings
    of cifar10-airbench's Muon trainer.
    """

    MOMENTUM = 0.6

    def __init__(self, groups: list[dict[str, Any]], lr: float, fused: bool) -> None:
        super().__init__(groups, lr=lr, fused=fused)
        self._step_supports_amp_scaling = False  # the scaler must unscale the gradients: Muon reads them

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's expects a step count in every state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        groups = self.param_groups
        *others, filters = groups
        self.param_groups = others  # AdamW must not see the filters
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for parameter in filters["params"]:
            if parameter.grad is not None:
                self._update_filters(parameter, filters["lr"])
        return loss

    def _update_filters(self, filters_FCHW: Tensor, lr: float | Tensor) -> None:
        gradient, state = filters_FCHW.grad, self.state[filters_FCHW]
        if not state:
            state["momentum"] = torch.zeros_like(filters_FCHW)
        momentum = state["momentum"].mul_(self.MOMENTUM).add_(gradient)
        ahead_FX = (gradient + self.MOMENTUM * momentum).flatten(1)  # Nesterov's
        update = orthogonalize(ahead_FX).view_as(filters_FCHW)
        filters_FCHW.mul_(len(filters_FCHW) ** 0.5 / filters_FCHW.norm())
        filters_FCHW.sub_(update * lr)


def state_example(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Return what the optimizer's state looks like after a step, by parameter index: names and shapes.

    A checkpoint is checked against it.
    """
    pairs = [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
    by_muon = optimizer.param_groups[-1] if isinstance(optimizer, Muon) else None
    return {
        index: {"momentum": parameter}
        if group is by_muon
        else {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        for index, (group, parameter) in enumerate(pairs)
    }


def orthogonalize(matrix_MN: Tensor) -> Tensor:
    """Return the matrix with its singular values brought near 1, to about 0.7 to 1.2; float32.

    Three steps of a Newton-Schulz iteration whose polynomial is steep at 0: they only lift the values that
    matter, and cost a few products.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix_MN if matrix_MN.shape[0] <= matrix_MN.shape[1] else matrix_MN.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(3):
        square = wide @ wide.T
        wide = a * wide + (b * square + c * square @ square) @ wide
    return wide if matrix_MN.shape[0] <= matrix_MN.shape[1] else wide.T


def _batch_norm_biases(model: nn.Module) -> list[nn.Parameter]:
    return [module.bias for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def one_cycle(step: int, total_steps: int, max_lr: float, recipe: Recipe) -> tuple[float, float | None]:
    """Return learning rate and beta1 at a step, counted from 0: two straight lines, to the peak and back.

    beta1 is None if the recipe does not cycle it. The values are those of torch's OneCycleLR with
    anneal_strategy="linear" and three_phase=False, from a pure function, so that a run can resume at any
    step.
    Source: Smith and Topin 2017, arXiv:1708.07120.
    """
    peak = recipe.pct_start * total_steps - 1
    last = total_steps - 1
    first_lr = max_lr / recipe.div_factor
    if step < peak:
        share, lr_from, lr_to = step / peak, first_lr, max_lr
        beta_from, beta_to = MAX_MOMENTUM, BASE_MOMENTUM
    else:
        share, lr_from, lr_to = (step - peak) / (last - peak), max_lr, first_lr / recipe.final_div_factor
        beta_from, beta_to = BASE_MOMENTUM, MAX_MOMENTUM
    beta1 = beta_from + share * (beta_to - beta_from) if recipe.cycle_momentum else None
    return lr_from + share * (lr_to - lr_from), beta1


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, beta1: float | None) -> None:
    """Write the schedule's values into the optimizer, without waiting for the device.

    lr: the rate of groups with an lr_scale of 1; the others get their multiple of it.
    A rate that is a tensor is changed in place, where a captured step reads it. Other rates are plain floats,
    which fused kernels take as arguments.
    """
    for group in optimizer.param_groups:
        rate = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if beta1 is not None:
            group["betas"] = (beta1, group["betas"][1])
