"""The learning-rate finder: torch-lr-finder on our loader, repeated, with a robust suggestion."""

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

from fasttrain.data.build import build_loader
from fasttrain.data.dataset import Dataset
from fasttrain.errors import UserError
from fasttrain.model import build_model
from fasttrain.optim import build_optimizer, set_schedule
from fasttrain.recipe import Recipe
from fasttrain.runtime import Runtime
from fasttrain.system.rng import fork_rng

SKIP_START, SKIP_END = 10, 5
"""Points left out at a curve's ends, as in the library's own suggestion: noise, and the divergence."""


SHORTEST = SKIP_START + SKIP_END + 2
"""Points that a curve needs: two of those that are left make a slope."""


@dataclass(frozen=True)
class LrCurve:
    """Learning rates tried and the smoothed training loss at each.

    diverged: the curve ends early, where the loss grew fivefold over its minimum or was no number any more.
    """

    lrs: list[float]
    losses: list[float]
    diverged: bool

    @property
    def suggestion(self) -> float | None:
        """The rate at which the loss falls fastest over log(lr); None if the curve is too short to tell."""
        if len(self.lrs) < SHORTEST:
            return None
        lrs, losses = self.lrs[SKIP_START:-SKIP_END], self.losses[SKIP_START:-SKIP_END]
        slope = np.gradient(losses, np.log(lrs))
        return lrs[int(slope.argmin())]

    def __str__(self) -> str:
        steps = f"{len(self.lrs)} steps"
        end = f"diverged after {steps}" if self.diverged else steps
        if self.suggestion is None:
            return f"nothing: {end}, too short to tell"
        return f"{self.suggestion:.3g} ({end})"


@dataclass(frozen=True)
class LrSearch:
    """Curves of independent repeats, and the median of their suggestions."""

    curves: list[LrCurve]
    suggestions: list[float]

    @property
    def suggestion(self) -> float:
        return statistics.median(self.suggestions)

    def __str__(self) -> str:
        """The suggestion with its spread, and how many tries diverged or told nothing."""
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

    Each repeat has a network, an optimizer and a loader of its own, seeded apart, so that nothing of the
    training to come is touched; the global random generators are put back as they were. One suggestion
    scatters by a factor of up to ten between seeds, hence the median. A repeat ends early where it diverges;
    each is logged in a line.
    Raises UserError for an impossible range or count, and if no repeat gives a curve long enough.
    Source: Smith 2017, arXiv:1506.01186; range and length as in the assignment.
    """
    if not 0 < start_lr < end_lr < math.inf:
        raise UserError(
            f"--start-lr {start_lr:g} --end-lr {end_lr:g}: expected a start above 0, below the end"
        )
    if num_iter < SHORTEST:
        raise UserError(f"--num-iter {num_iter}: expected at least {SHORTEST}: the curve's ends do not count")
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
        """Our loader under the library's interface: at an epoch's end it begins the next one by itself."""

        def inputs_labels_from_batch(self, batch: Any) -> Any:
            return batch

    device, dtype = runtime.device, runtime.dtype
    torch.manual_seed(recipe.seed)
    model = build_model(recipe, len(dataset.classes), mean=dataset.mean, std=dataset.std).to(device)
    loader = build_loader(dataset, recipe, train=True, device=device, loader=runtime.loader)
    optimizer = build_optimizer(model, recipe, lr=start_lr)
    # The library gives all groups one rate; some learn at a multiple of it.
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
        # The library wants a scaler even where bf16 needs none: a disabled one passes everything on.
        grad_scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
    )
    # The library stops on a loss that has grown fivefold, but goes on through NaN: there the criterion
    # raises. Its words are not ours, and its progress bar is for a terminal alone.
    with contextlib.ExitStack() as quiet:
        quiet.enter_context(contextlib.suppress(_Diverged))
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        finder.range_test(EndlessBatches(loader), start_lr=start_lr, end_lr=end_lr, num_iter=num_iter)
    count = min(len(finder.history["lr"]), len(finder.history["loss"]))
    return LrCurve(finder.history["lr"][:count], finder.history["loss"][:count], diverged=count < num_iter)


class _Diverged(Exception):
    """The loss is no finite number any more."""


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
