"""The learning-rate finder: torch-lr-finder on our loader, repeated for a robust suggestion."""

import contextlib
import dataclasses
import io
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasttrain.checkpoint.network import initial_model
from fasttrain.data.build_loader import build_loader
from fasttrain.data.dataset import Dataset
from fasttrain.errors import UserError
from fasttrain.loss import class_weights, cross_entropy
from fasttrain.optim import build_optimizer, set_schedule
from fasttrain.recipe import Recipe
from fasttrain.runtime import Runtime
from fasttrain.system.rng import fork_rng

START_LR, ASSIGNMENT_START_LR, END_LR = 1e-4, 1e-2, 10.0
NUM_ITER, REPEATS = 200, 3
"""The default search. `assignment` starts where its assignment says, all other recipes far below a peak."""

SEARCH_SECONDS = 180
"""How long a search of default length may take; see _affordable."""

FEWEST_STEPS, FEWEST_ITER, FEWEST_REPEATS = 20, 40, 2
"""The fewest steps in a usable curve; the fewest steps and tries that a default search is shortened to."""

TIMED_STEPS = 5

BANDWIDTH = 0.3
"""Standard deviation, in decades of the rate, of the Gaussian that curves are smoothed with."""

LATE_START, LATE_SHARE = 1e-2, 0.1
"""From this start on, a network trains well from its first step, and its loss still falls when the rate is
long too high: then the suggestion is this share of the rate with the lowest loss."""

AGREEMENT = 3
"""The largest factor between the tries' suggestions."""


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
    def lowest(self) -> float | None:
        """The rate with the lowest loss; None if the curve is too short, or lowest at one of its ends."""
        index = int(np.argmin(self.losses)) if len(self.losses) >= FEWEST_STEPS else 0
        return self.lrs[index] if 0 < index < len(self.lrs) - 1 else None

    def __str__(self) -> str:
        steps = f"{len(self.lrs)} steps"
        end = f"diverged after {steps}" if self.diverged else steps
        if self.lowest is None:
            return f"no lowest loss between the ends of the curve ({end})"
        return f"lowest loss at {self.lowest:.3g} ({end})"


@dataclass(frozen=True)
class LrSearch:
    """The curves of independent tries, and the peak rates that they suggest."""

    curves: list[LrCurve]
    suggestions: list[float]

    @property
    def problem(self) -> str | None:
        """Why the tries together suggest no rate; None if they do."""
        if 2 * len(self.suggestions) <= len(self.curves):
            without = len(self.curves) - len(self.suggestions)
            return f"{without} of {len(self.curves)} tries have no lowest loss between the ends of the curve"
        low, high = min(self.suggestions), max(self.suggestions)
        if high > AGREEMENT * low:
            return f"the tries suggest {low:.3g} to {high:.3g}, more than a factor of {AGREEMENT} apart"
        return None

    @property
    def suggestion(self) -> float:
        """The median of the suggestions. Raises UserError if there is a problem with them."""
        if self.problem:
            raise UserError(
                f"--max-lr auto: {self.problem}; give --max-lr a number, or see what find-lr draws"
            )
        return statistics.median(self.suggestions)

    def to_dict(self) -> dict[str, Any]:
        """Return curves, suggestions and the choice, which is None if there is a problem, for JSON."""
        return {"max_lr": None if self.problem else self.suggestion, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """Format the suggestion with its spread, and how many tries diverged or suggest nothing."""
        found = self.suggestions
        spread = f"median of {len(found)} tries, {min(found):.3g} to {max(found):.3g}"
        if len(found) == 1:
            spread = "one try, so no spread is known"
        diverged = sum(curve.diverged for curve in self.curves)
        without = sum(curve.lowest is None for curve in self.curves)
        return f"{self.suggestion:.3g} ({spread}; diverged: {diverged}, without a suggestion: {without})"


def check_search(
    recipe: Recipe, start_lr: float | None, end_lr: float, num_iter: int | None, repeats: int | None
) -> float:
    """Return the rate that a search starts at. Raises UserError for an impossible range or count."""
    if start_lr is None:
        start_lr = ASSIGNMENT_START_LR if recipe.name == "assignment" else START_LR
    if not 0 < start_lr < end_lr < math.inf:
        raise UserError(
            f"--start-lr {start_lr:g} --end-lr {end_lr:g}: expected a start above 0, below the end"
        )
    if num_iter is not None and num_iter < FEWEST_STEPS:
        raise UserError(f"--num-iter {num_iter}: expected at least {FEWEST_STEPS}")
    if repeats is not None and repeats < 1:
        raise UserError(f"--repeats {repeats}: expected at least 1")
    return start_lr


def find_max_lr(
    dataset: Dataset,
    recipe: Recipe,
    runtime: Runtime,
    *,
    start_lr: float | None = None,
    end_lr: float = END_LR,
    num_iter: int | None = None,
    repeats: int | None = None,
    log: Callable[[str], object],
) -> LrSearch:
    """Raise the learning rate exponentially over `num_iter` steps, `repeats` times, and suggest a peak.

    Each try has its own network, optimizer and loader, with its own seed, so that the training to come is not
    affected; the global random generators are restored. A try ends early if it diverges; each is logged in
    one line. A peak is where the loss stops falling; where it falls fastest is no guide, since that is at the
    start, whatever the start (docs/recipes.md).
    start_lr: by default 1e-4, in the recipe `assignment` 1e-2. num_iter, repeats: by default 200 and 3, or
    fewer on a machine where those would take more than three minutes.
    Raises UserError for an impossible range or count.
    Source: Smith 2017, arXiv:1506.01186.
    """
    start_lr = check_search(recipe, start_lr, end_lr, num_iter, repeats)
    curves = []
    with fork_rng(runtime.device):
        if num_iter is None or repeats is None:
            seconds = _seconds_per_step(dataset, recipe, runtime, start_lr)
            num_iter, repeats = _affordable(seconds, num_iter, repeats, log)
        for repeat in range(repeats):
            seeded = dataclasses.replace(recipe, seed=recipe.seed + repeat)
            curves.append(_curve(dataset, seeded, runtime, start_lr, end_lr, num_iter))
            log(f"try {repeat + 1} of {repeats}: {curves[-1]}")
    share = LATE_SHARE if start_lr >= LATE_START else 1.0
    return LrSearch(curves, [share * curve.lowest for curve in curves if curve.lowest is not None])


def smooth(lrs: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Return the losses, each averaged with its neighbours on both sides, so that nothing lags behind.

    Losses count as at most twice the first: how far the last ones explode must not matter.
    """
    position = np.log10(lrs)
    weights = np.exp(-(((position[:, None] - position) / BANDWIDTH) ** 2) / 2)
    limited = np.minimum(losses, 2 * np.array(losses[:1]))
    return (weights @ limited / weights.sum(1)).tolist()


def _affordable(
    seconds: float, num_iter: int | None, repeats: int | None, log: Callable[[str], object]
) -> tuple[int, int]:
    """Return the steps and tries that fit into SEARCH_SECONDS; log it if that shortens the search.

    num_iter, repeats: what the user asked for, which stays. A step takes `seconds`.
    """
    wanted = num_iter or NUM_ITER, repeats or REPEATS
    steps = int(SEARCH_SECONDS / seconds) if seconds else math.prod(wanted)
    if math.prod(wanted) <= steps:
        return wanted
    tries = repeats or max(FEWEST_REPEATS, min(REPEATS, steps // wanted[0]))
    length = num_iter or max(FEWEST_ITER, min(NUM_ITER, steps // tries))
    minutes = f"about {tries * length * seconds / 60:.0f} minutes at {seconds:.2g} s a step"
    log(f"{tries} tries of {length} steps instead of {wanted[1]} of {wanted[0]}: {minutes}")
    return length, tries


def _seconds_per_step(dataset: Dataset, recipe: Recipe, runtime: Runtime, start_lr: float) -> float:
    """Return the time of the fastest of a few steps, the first not among them; 0 if they diverge.

    The fastest, since what else runs on the machine makes single steps many times as slow.
    """
    *_, times = _range_test(dataset, recipe, runtime, start_lr, 2 * start_lr, TIMED_STEPS)
    return float(np.diff(times).min()) if len(times) > 1 else 0.0


def _curve(
    dataset: Dataset, recipe: Recipe, runtime: Runtime, start_lr: float, end_lr: float, num_iter: int
) -> LrCurve:
    lrs, losses, _ = _range_test(dataset, recipe, runtime, start_lr, end_lr, num_iter)
    return LrCurve(lrs, smooth(lrs, losses), diverged=len(lrs) < num_iter)


def _range_test(
    dataset: Dataset, recipe: Recipe, runtime: Runtime, start_lr: float, end_lr: float, num_iter: int
) -> tuple[list[float], list[float], list[float]]:
    """Return the rate, the loss and the time, in seconds, of every step of torch-lr-finder's range test."""
    from torch_lr_finder import LRFinder, TrainDataLoaderIter

    class EndlessBatches(TrainDataLoaderIter):
        """Our loader with the library's interface, which starts the next epoch when one ends."""

        def inputs_labels_from_batch(self, batch: Any) -> Any:
            return batch

    device, dtype = runtime.device, runtime.dtype
    torch.manual_seed(recipe.seed)
    model = initial_model(dataset, recipe).to(device)
    loader = build_loader(dataset, recipe, train=True, device=device, loader=runtime.loader)
    optimizer = build_optimizer(model, recipe, lr=start_lr, fused=runtime.fused_optimizer)
    # The library gives all groups the same rate; some groups learn at a multiple of it.
    optimizer.register_step_pre_hook(
        lambda *_: set_schedule(optimizer, optimizer.param_groups[0]["lr"], None)
    )
    loss_fn = _FiniteLoss(recipe.label_smoothing, class_weights(dataset, recipe)).to(device)
    finder = LRFinder(
        model,
        optimizer,
        loss_fn,
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
    # The losses in its history are smoothed, and lag behind the rates: the criterion keeps them as they are.
    # Its messages are silenced, and so is its progress bar unless stderr is a terminal.
    with contextlib.ExitStack() as quiet:
        quiet.enter_context(contextlib.suppress(_Diverged))
        quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not sys.stderr.isatty():
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        finder.range_test(EndlessBatches(loader), start_lr=start_lr, end_lr=end_lr, num_iter=num_iter)
    lrs = finder.history["lr"]
    return lrs, loss_fn.losses[: len(lrs)], loss_fn.times


class _Diverged(Exception):
    """The loss has become NaN or infinite."""


class _FiniteLoss(nn.Module):
    """Cross entropy that raises _Diverged instead of returning NaN or infinity.

    losses, times: every loss so far, and time.perf_counter() after it.
    """

    _class_weights_K: Tensor | None

    def __init__(self, label_smoothing: float, class_weights_K: Tensor | None = None) -> None:
        super().__init__()
        self._label_smoothing = label_smoothing
        self.register_buffer("_class_weights_K", class_weights_K)
        self.losses: list[float] = []
        self.times: list[float] = []

    def forward(self, logits_NK: Tensor, labels_N: Tensor) -> Tensor:
        loss = cross_entropy(logits_NK.float(), labels_N, self._label_smoothing, self._class_weights_K)
        self.losses.append(loss.item())  # the library itself waits for every step's loss
        if not math.isfinite(self.losses[-1]):
            raise _Diverged
        self.times.append(time.perf_counter())
        return loss
