"""The optimizer and the one-cycle schedule."""

import torch
from torch import Tensor, nn

from fasttrain.recipe import Recipe

BASE_MOMENTUM, MAX_MOMENTUM = 0.85, 0.95
"""Range of Adam's beta1 where the recipe cycles it, as in torch's OneCycleLR."""


def build_optimizer(model: nn.Module, recipe: Recipe, lr: float) -> torch.optim.Optimizer:
    """Fused Adam or AdamW; weight decay on convolution and linear weights only.

    BatchNorm's parameters and biases are one-dimensional: decaying them shrinks no function of the network.
    BatchNorm's biases are a group of their own where the recipe gives them another rate, and only there: a
    fused kernel runs once per group, and a checkpoint knows the parameters by their place in the groups.
    Source: arXiv:1711.05101; Goyal et al. 2017, arXiv:1706.02677, section 5.3.
    """
    weights = [p for p in model.parameters() if p.dim() > 1]
    apart = _batch_norm_biases(model) if recipe.bn_bias_lr_scale != 1 else []
    known = {id(p) for p in apart}
    others = [p for p in model.parameters() if p.dim() <= 1 and id(p) not in known]
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay, "lr_scale": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    if apart:
        groups.append({"params": apart, "weight_decay": 0.0, "lr_scale": recipe.bn_bias_lr_scale})
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return kind(groups, lr=lr, fused=True)


def _batch_norm_biases(model: nn.Module) -> list[nn.Parameter]:
    return [module.bias for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def one_cycle(step: int, total_steps: int, max_lr: float, recipe: Recipe) -> tuple[float, float | None]:
    """Learning rate and beta1 at this step: two straight lines, up to the peak and down again.

    beta1 is None where the recipe does not cycle it. The same values as torch's OneCycleLR with
    anneal_strategy="linear" and three_phase=False, as a pure function, so that a run can resume at any step.
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

    lr: of the groups whose lr_scale is 1; the others take their multiple of it.
    A rate that is a tensor is changed in place: a recorded step reads it there. Otherwise they are plain
    floats, which fused kernels take as arguments.
    """
    for group in optimizer.param_groups:
        rate = lr * group["lr_scale"]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        if beta1 is not None:
            group["betas"] = (beta1, group["betas"][1])
