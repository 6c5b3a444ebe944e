"""The learning-rate finder: torch-lr-finder on our loader, repeated for a robust suggestion."""

import contextlib
import dataclasses
import io
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasttrain.data.build_loader import build_loader
from fasttrain.data.dataset import Dataset
from fasttrain.errors import UserError
from fasttrain.model import build_model
from fasttrain.optim import build_optimizer, set_schedule
from fasttrain.recipe import Recipe
from fasttrain.runtime import Runtime
from fasttrain.system.rng import fork_rng

SKIP_START, SKIP_END = 10, 5
"""Points left out at a curve's ends, as in the library's own suggestion: the noise, and the divergence."""

SHORTEST = SKIP_START + SKIP_END + 2
"""The fewest points in a usable curve: a slope takes two of those that are left."""


@dataclass(frozen=True)
class LrCurve:
    """The learning rates of one try, and the smoothed training loss at each.

    diverged: the curve ended early, because the loss exceeded five times its minimum or became NaN or
    infinite.
    """

    lrs: list[float]
    losses: list[float]
    diverged: bool

    @property
    def suggestion(self) -> float | None:
        """The rate at which the loss falls fastest over log(lr); None if the curve is too short."""
        if len(self.lrs) < SHORTEST:
            return None
        lrs, losses = self.lrs[SKIP_START:-SKIP_END], self.losses[SKIP_START:-SKIP_END]
        slope = np.gradient(losses, np.log(lrs))
        return lrs[int(slope.argmin())]

    def __str__(self) -> str:
        steps = f"{len(self.lrs)} steps"
        end = f"diverged after {steps}" if self.diverged else steps
        if self.suggestion is None:
            return f"no suggestion: {end}, too few to tell"
        return f"{self.suggestion:.3g} ({end})"


@dataclass(frozen=True)
class LrSearch:
    """The curves of independent tries, and their suggestions."""

    curves: list[LrCurve]
    suggestions: list[float]

    @property
    def suggestion(self) -> float:
        """The median of the suggestions."""
        return statistics.median(self.suggestions)

    def __str__(self) -> str:
        """Format the suggestion with its spread, and how many tries diverged or were too short."""
        found = self.suggestions
        spread = f"median of {len(found)} tries, {min(found):.3g} to {max(found):.3g}"
        if len(found) == 1:
            spread = "one try, so no spread is known"
        diverged = sum(curve.diverged for curve in self.curves)
        short = sum(curve.suggestion is None for curve in self.curves)
        return f"{self.suggestion:.3g} ({spread}; diverged: {diverged}, too short to tell: {short})"


def find_max_lr(
    dataset: Dataset,
    recipe: Recipe,
    runtime: Runtime,
    *,
    start_lr: float = 1e-2,
    end_lr: float = 10.0,
    num_iter: int = 200,
    repeats: int = 3,
    log: Callable[[str], object],
) -> LrSearch:
    """Raise the learning rate exponentially over `num_iter` steps, `repeats` times, and suggest a peak.

    Each try has its own network, optimizer and loader, with its own seed, so that the training to come is not
    affected; the global random generators are restored. Single suggestions vary by a factor of up to ten
    between seeds, hence the median. A try ends early if it diverges; each is logged in one line.
    Raises UserError for an impossible range or count, and if no try gives a curve that is long enough.
    Source: Smith 2017, arXiv:1506.01186; range and length as in the assignment.
    """
    if not 0 < start_lr < end_lr < math.inf:
        raise UserError(
            f"--start-lr {start_lr:g} --end-lr {end_lr:g}: expected a start above 0, below the end"
        )
    if num_iter < SHORTEST:
        raise UserError(
            f"--num-iter {num_iter}: expected at least {SHORTEST}, as the curve's ends do not count"
        )
    if repeats < 1:
        raise UserError(f"--repeats {repeats}: expected at least 1")
    curves = []
    with fork_rng(runtime.device):
        for repeat in range(repeats):
            seeded = dataclasses.replace(recipe, seed=recipe.seed + repeat)
            curves.append(_curve(dataset, seeded, runtime, start_lr, end_lr, num_iter))
            log(f"try {repeat + 1} of {repeats}: {curves[-1]}")
    suggestions = [curve.suggestion for curve in curves if curve.suggestion is not None]
    if not suggestions:
        raise UserError(
            f"--max-lr auto: the loss diverged at once from {start_lr:g} on, in all {repeats} tries; "
            "give a number, or run find-lr with a lower --start-lr"
        )
    return LrSearch(curves, suggestions)


def _curve(
    dataset: Dataset,
    recipe: Recipe,
    runtime: Runtime,
    start_lr: float,
    end_lr: float,
    num_iter: int,
) -> LrCurve:
    from torch_lr_finder import LRFinder, TrainDataLoaderIter

    class EndlessBatches(TrainDataLoaderIter):
        """Our loader with the library's interface, which starts the next epoch when one ends."""

        def inputs_labels_from_batch(self, batch: Any) -> Any:
            return batch

    device, dtype = runtime.device, runtime.dtype
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, len(dataset.classes), mean=dataset.mean, std=dataset.std).to(device)
    loader = build_loader(dataset, recipe, train=True, device=device, loader=runtime.loader)
    optimizer = build_optimizer(model, recipe, lr=start_lr, fused=runtime.fused_optimizer)
    # The library gives all groups the same rate; some groups learn at a multiple of it.
    optimizer.register_step_pre_hook(
        lambda *_: set_schedule(optimizer, optimizer.param_groups[0]["lr"], None)
    )
    finder = LRFinder(
        model,
        optimizer,
        _FiniteLoss(recipe.label_smoothing),
        device=device,
        amp_backend="torch",
        amp_config={
            "device_type": device.type,
            "dtype": dtype if dtype != torch.float32 else None,
            "enabled": dtype != torch.float32,
        },
        # The library wants a scaler even for bf16, which needs none: a disabled one passes everything on.
        grad_scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    # The library stops at five times the lowest loss, but continues on NaN, so the criterion raises there.
    # Its messages are silenced, and so is its progress bar unless stderr is a terminal.
    with contextlib.ExitStack() as quiet:
        quiet.enter_context(contextlib.suppress(_Diverged))
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        finder.range_test(EndlessBatches(loader), start_lr=start_lr, end_lr=end_lr, num_iter=num_iter)
    count = min(len(finder.history["lr"]), len(finder.history["loss"]))
    return LrCurve(finder.history["lr"][:count], finder.history["loss"][:count], diverged=count < num_iter)


class _Diverged(Exception):
    """The loss has become NaN or infinite."""


class _FiniteLoss(nn.Module):
    """Cross entropy that raises _Diverged instead of returning NaN or infinity."""

    def __init__(self, label_smoothing: float) -> None:
        super().__init__()
        self._loss_fn = nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def forward(self, logits_NK: Tensor, labels_N: Tensor) -> Tensor:
        loss = self._loss_fn(logits_NK.float(), labels_N)
        if not math.isfinite(loss.item()):  # the library itself waits for every step's loss
            raise _Diverged
        return loss
