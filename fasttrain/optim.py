"""The optimizers, and the one-cycle schedule of learning rate and beta1."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fasttrain.errors import one_line
from fasttrain.recipe import Recipe

BASE_MOMENTUM, MAX_MOMENTUM = 0.85, 0.95
"""Range of Adam's beta1 if the recipe cycles it, as in torch's OneCycleLR."""

PADDING_SHARE = 0.01
"""Share of Muon's matrix products that zeros may add for each matrix that then shares its launches."""


def build_optimizer(
    model: nn.Module, recipe: Recipe, lr: float, *, fused: bool = True
) -> torch.optim.Optimizer:
    """Build Adam or AdamW, or Muon, with weight decay only on convolution and linear weights.

    Muon rescales the convolutions at every step, so they have no weight decay; neither have BatchNorm's
    parameters and the biases, as is usual.
    BatchNorm's biases form a separate group only if the recipe gives them another rate, since a fused kernel
    runs once per group, and a checkpoint identifies parameters by their position in the groups.
    fused: whether one kernel updates all parameters of a group; otherwise a few do.
    Source: arXiv:1711.05101; Goyal et al. 2017, arXiv:1706.02677, section 5.3.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trained if p.dim() > 1]
    scaled_biases = _batch_norm_biases(model) if recipe.bn_bias_lr_scale != 1 else []
    scaled_ids = {id(p) for p in scaled_biases}
    others = [p for p in trained if p.dim() <= 1 and id(p) not in scaled_ids]
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
    return optimizer_class(groups, lr=lr, **({"fused": True} if fused else {"foreach": True}))


@functools.cache
def fused_fails(device: torch.device) -> str | None:
    """Try a step of torch's fused AdamW on this device; returns None, or what went wrong, in a line.

    The average of the weights uses the fused kernel of SGD (ema.py), which comes with it.
    """
    parameter = nn.Parameter(torch.ones(4, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        torch.optim.AdamW([parameter], lr=0.25, weight_decay=0.0, fused=True).step()
        worst = (parameter - 0.75).abs().max().item()  # Adam's first step is the rate
    except RuntimeError as error:
        return f"fused AdamW fails on {device} ({one_line(error)})"
    return None if worst < 1e-3 else f"fused AdamW gives wrong values on {device}"


class Muon(torch.optim.AdamW):
    """Muon for the last group, the convolutions' filters; fused AdamW for the groups before it.

    The filters of a convolution form a matrix with one row per filter. An update is the momentum with all its
    singular values brought near 1, so that it moves equally far in every direction. Before the update, the
    matrix is scaled to the norm of one with orthonormal rows: BatchNorm cancels that, and the learning rate
    becomes the share of the weights that is replaced.
    It never waits for the device and reads rates that are tensors as tensors, so it can be captured; but with
    fp16 the gradient scaler waits at every step. Matrix products use the precision of the current autocast.
    Axis suffixes: F filters, C channels, H rows, W columns, X those three flattened, S matrices in a stack.
    Source: K. Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks", and the settings
    of cifar10-airbench's Muon trainer.
    """

    MOMENTUM = 0.6

    def __init__(self, groups: list[dict[str, Any]], lr: float, **settings: Any) -> None:
        super().__init__(groups, lr=lr, **settings)
        self._step_supports_amp_scaling = False  # the scaler must unscale the gradients: Muon reads them

    def __setstate__(self, state: dict[str, Any]) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's expects a step count in every state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        groups = self.param_groups
        *others, last = groups
        self.param_groups = others  # AdamW must not see the filters
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        self._update_filters(last)
        return loss

    def _update_filters(self, group: dict[str, Any]) -> None:
        """Update each convolution's filters (F, C, H, W) that have a gradient."""
        filters = [filters_FCHW for filters_FCHW in group["params"] if filters_FCHW.grad is not None]
        if not filters:
            return
        gradients = [filters_FCHW.grad for filters_FCHW in filters]
        momenta = [self._momentum(filters_FCHW) for filters_FCHW in filters]
        torch._foreach_mul_(momenta, self.MOMENTUM)
        torch._foreach_add_(momenta, gradients)
        ahead = torch._foreach_add(gradients, momenta, alpha=self.MOMENTUM)  # Nesterov's
        # In channels_last, this order of the columns makes a view. Any order gives the same singular values.
        ahead_as_matrices = [ahead_FCHW.permute(0, 2, 3, 1).flatten(1) for ahead_FCHW in ahead]
        updates = orthogonalize(ahead_as_matrices, -group["lr"])
        norms = torch._foreach_norm(filters)
        torch._foreach_mul_(norms, [len(filters_FCHW) ** -0.5 for filters_FCHW in filters])
        for filters_FCHW, norm, update_FX in zip(filters, norms, updates, strict=True):
            channels, *kernel = filters_FCHW.shape[1:]
            update_FCHW = update_FX.unflatten(1, (*kernel, channels)).permute(0, 3, 1, 2)
            torch.addcdiv(update_FCHW, filters_FCHW, norm, out=filters_FCHW)

    def _momentum(self, filters_FCHW: Tensor) -> Tensor:
        state = self.state[filters_FCHW]
        if not state:
            state["momentum"] = torch.zeros_like(filters_FCHW)
        return state["momentum"]


def orthogonalize(matrices: list[Tensor], factor: float | Tensor = 1.0) -> list[Tensor]:
    """Return matrices (F, X) with their singular values brought near 1, to about 0.7 to 1.2, times `factor`.

    They are stacked, for few and large products, in autocast's precision if that is on, else in their own.
    """
    device = matrices[0].device
    dtype = matrices[0].dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    norms = torch._foreach_norm(matrices)
    torch._foreach_add_(norms, 1e-7)
    results: dict[int, Tensor] = {}
    for members in plan_stacks(tuple(tuple(matrix_FX.shape) for matrix_FX in matrices)):
        shape_FX = matrices[members[0]].shape
        is_padded = any(matrices[index].shape != shape_FX for index in members)
        allocate = torch.zeros if is_padded else torch.empty
        stack_SFX = allocate(len(members), *shape_FX, dtype=dtype, device=device)
        places = [(slice(matrices[i].shape[0]), slice(matrices[i].shape[1])) for i in members]
        for matrix_FX, index, place in zip(stack_SFX, members, places, strict=True):
            torch.div(matrices[index], norms[index], out=matrix_FX[place])
        stack_SFX = newton_schulz(stack_SFX).mul_(factor)
        for matrix_FX, index, place in zip(stack_SFX, members, places, strict=True):
            results[index] = matrix_FX[place]
    return [results[index] for index in range(len(matrices))]


def newton_schulz(stack_SFX: Tensor) -> Tensor:
    """Bring the singular values of matrices with a norm of at most 1 near 1.

    Three steps of an iteration whose polynomial is steep at 0: they only lift the values that matter, and
    cost three products each. Rows and columns of zeros stay zeros and change nothing else.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(3):
        gram_SFF = torch.bmm(stack_SFX, stack_SFX.mT)
        gram_SFF = torch.baddbmm(gram_SFF, gram_SFF, gram_SFF, beta=b, alpha=c)
        stack_SFX = torch.baddbmm(stack_SFX, gram_SFF, stack_SFX, beta=a)
    return stack_SFX


@functools.cache
def plan_stacks(shapes: tuple[tuple[int, int], ...]) -> list[list[int]]:
    """Return which matrices of these shapes (F, X) to stack, as lists of their indices, the largest first.

    All matrices of a stack are padded with zeros to the shape of its first. For each matrix, that may cost
    PADDING_SHARE of the products of all: a stack of its own takes nine products more.
    """

    def flop(rows: int, columns: int) -> int:
        """Floating-point operations of one step of newton_schulz."""
        return 2 * (2 * rows * rows * columns + rows**3)

    stacks: list[list[int]] = []
    most = PADDING_SHARE * sum(flop(*shape) for shape in shapes)
    for index in sorted(range(len(shapes)), key=lambda index: -flop(*shapes[index])):
        rows, columns = shapes[index]
        for stack in stacks:
            stack_rows, stack_columns = shapes[stack[0]]
            fits = rows <= stack_rows and columns <= stack_columns
            if fits and flop(stack_rows, stack_columns) - flop(rows, columns) <= most:
                stack.append(index)
                break
        else:
            stacks.append([index])
    return stacks


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
    """Write the schedule's values into the optimizer, as plain floats, which kernels take as arguments.

    lr: the rate of groups with an lr_scale of 1; the others get their multiple of it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
        if beta1 is not None:
            group["betas"] = (beta1, group["betas"][1])


class ScheduleTable:
    """What changes from step to step, as a table on the device, for captured steps.

    A captured step cannot be given numbers. It reads the row of its step, and moves on to the next row by
    itself, so that the host need not do anything.
    rows: the values of each step. step: (1,) int64, the row that the next call of `advance` reads.
    values: those of the row that was read last, each a 0-dim float32 tensor at a fixed address.
    Shape suffixes: T steps, V values.
    """

    def __init__(self, rows: list[list[float]], step: int, device: torch.device) -> None:
        self._table_TV = torch.tensor(rows, dtype=torch.float32, device=device)
        self._row_1V = self._table_TV[:1].clone()
        self.step = torch.tensor([step], device=device)
        self.values = self._row_1V[0].unbind()

    @torch.no_grad()
    def advance(self) -> None:
        """Read the step's row into `values`, and count the step. Does not wait for the device."""
        torch.index_select(self._table_TV, 0, self.step, out=self._row_1V)
        # A warm-up is undone afterwards, but may need more steps than the schedule has left.
        self.step.add_(1).clamp_(max=len(self._table_TV) - 1)
