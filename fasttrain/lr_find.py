"""The learning-rate finder: torch-lr-finder on our loader, repeated, with a robust suggestion."""

import contextlib
import dataclasses
import io
import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fasttrain.data.cifar import Dataset
from fasttrain.data.loader import LoaderKind, build_loader
from fasttrain.errors import UserError
from fasttrain.machine import fork_rng
from fasttrain.model import CustomResNet
from fasttrain.optim import build_optimizer
from fasttrain.recipe import Recipe

SKIP_START, SKIP_END = 10, 5
"""Points left out at a curve's ends, as in the library's own suggestion: noise, and the divergence."""


@dataclass(frozen=True)
class LrCurve:
    """Learning rates tried and the smoothed training loss at each; it ends where the loss diverged."""

    lrs: list[float]
    losses: list[float]

    @property
    def suggestion(self) -> float | None:
        """The rate at which the loss falls fastest over log(lr); None if the curve is too short to tell."""
        lrs, losses = self.lrs[SKIP_START:-SKIP_END], self.losses[SKIP_START:-SKIP_END]
        if len(losses) < 2:
            return None
        slope = np.gradient(losses, np.log(lrs))
        return lrs[int(slope.argmin())]


@dataclass(frozen=True)
class LrSearch:
    """Curves of independent repeats, and the median of their suggestions."""

    curves: list[LrCurve]
    suggestions: list[float]

    @property
    def suggestion(self) -> float:
        return statistics.median(self.suggestions)


def find_max_lr(
    dataset: Dataset,
    recipe: Recipe,
    *,
    kind: LoaderKind,
    device: torch.device,
    dtype: torch.dtype,
    start_lr: float = 1e-2,
    end_lr: float = 10.0,
    num_iter: int = 200,
    repeats: int = 3,
) -> LrSearch:
    """Raise the learning rate exponentially over `num_iter` steps, `repeats` times, and suggest a peak.

    Each repeat has a network, an optimizer and a loader of its own, seeded apart, so that nothing of the
    training to come is touched; the global random generators are put back as they were. One suggestion
    scatters by a factor of up to ten between seeds, hence the median.
    Raises UserError if no repeat gives a curve long enough.
    Source: Smith 2017, arXiv:1506.01186; range and length as in the assignment.
    """
    curves = []
    with fork_rng(device):
        for repeat in range(repeats):
            seeded = dataclasses.replace(recipe, seed=recipe.seed + repeat)
            curves.append(_curve(dataset, seeded, kind, device, dtype, start_lr, end_lr, num_iter))
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
    kind: LoaderKind,
    device: torch.device,
    dtype: torch.dtype,
    start_lr: float,
    end_lr: float,
    num_iter: int,
) -> LrCurve:
    from torch_lr_finder import LRFinder, TrainDataLoaderIter

    class EndlessBatches(TrainDataLoaderIter):
        """Our loader under the library's interface: at an epoch's end it begins the next one by itself."""

        def inputs_labels_from_batch(self, batch: Any) -> Any:
            return batch

    torch.manual_seed(recipe.seed)
    model = CustomResNet(len(dataset.classes), recipe.dropout, mean=dataset.mean, std=dataset.std).to(device)
    loader = build_loader(dataset, recipe, train=True, kind=kind, device=device)
    finder = LRFinder(
        model,
        build_optimizer(model, recipe, lr=start_lr),
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
    # raises.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(_Diverged):
        finder.range_test(EndlessBatches(loader), start_lr=start_lr, end_lr=end_lr, num_iter=num_iter)
    count = min(len(finder.history["lr"]), len(finder.history["loss"]))
    return LrCurve(finder.history["lr"][:count], finder.history["loss"][:count])


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
