import math

import pytest
import torch

from fasttrain import lr_find
from fasttrain.data.loader import pick_loader
from fasttrain.errors import UserError
from fasttrain.lr_find import LrCurve, LrSearch, find_max_lr
from fasttrain.recipe import Recipe

CPU = torch.device("cpu")


def curve(steepest_at: float) -> LrCurve:
    """A loss that falls as a sigmoid of log(lr) around one rate."""
    lrs = [10 ** (-4 + index / 25) for index in range(100)]
    return LrCurve(lrs, [1 / (1 + math.exp(3 * math.log(lr / steepest_at))) for lr in lrs])


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    assert curve(0.03).suggestion == pytest.approx(0.03, rel=0.1)


def test_a_curve_that_ended_at_once_suggests_nothing() -> None:
    assert LrCurve([0.1] * 16, [1.0] * 16).suggestion is None


def test_the_search_takes_the_median_of_its_repeats() -> None:
    assert LrSearch([], [0.01, 5.0, 0.02]).suggestion == 0.02


def test_real_search_leaves_the_generators_alone(dataset) -> None:
    kind = pick_loader("auto", CPU, print)
    recipe = Recipe(batch_size=16)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    search = find_max_lr(
        dataset,
        recipe,
        kind=kind,
        device=CPU,
        dtype=torch.bfloat16,
        start_lr=1e-5,
        end_lr=1e-1,
        num_iter=20,
        repeats=2,
    )
    assert torch.equal(torch.rand(3), expected)
    assert len(search.curves) == 2 and search.curves[0].losses != search.curves[1].losses
    assert all(1e-5 <= lr <= 1e-1 for lr in search.suggestions)
    assert search.curves[0].lrs == sorted(search.curves[0].lrs)


def test_a_loss_that_is_no_number_ends_the_search_with_one_line(dataset, monkeypatch) -> None:
    monkeypatch.setattr(
        lr_find._FiniteLoss, "forward", lambda self, logits, labels: (_ for _ in ()).throw(lr_find._Diverged)
    )
    with pytest.raises(UserError, match="--max-lr auto: the loss diverged"):
        find_max_lr(dataset, Recipe(batch_size=16), kind="tensor", device=CPU, dtype=torch.float32, repeats=1)


def test_a_finite_loss_is_cross_entropy_and_any_other_raises() -> None:
    loss_fn = lr_find._FiniteLoss(0.0)
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    assert loss_fn(logits, labels) == torch.nn.functional.cross_entropy(logits, labels)
    with pytest.raises(lr_find._Diverged):
        loss_fn(logits * float("nan"), labels)
