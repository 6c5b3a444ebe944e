import dataclasses
import errno
import functools
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from fasttrain import lr_finder, trainer
from fasttrain.cli import main
from fasttrain.data.dataset import Dataset, Split
from fasttrain.errors import UserError
from fasttrain.lr_finder import LrCurve, LrSearch, find_max_lr, smooth
from fasttrain.optim import build_optimizer
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.runtime import Runtime

CPU = torch.device("cpu")
RUNTIME = Runtime(device=CPU)
SMALL = Recipe(batch_size=16, width=8)


def curve(lowest_at: float, points: int = 100) -> LrCurve:
    """A loss that is a parabola of log(lr) around one rate."""
    lrs = [10 ** (-4 + index / 25) for index in range(points)]
    return LrCurve(lrs, [1 + math.log(lr / lowest_at) ** 2 for lr in lrs], diverged=points < 100)


def search(dataset, recipe: Recipe, **options) -> LrSearch:
    """A search of 20 steps, twice, in batches of 16."""
    settings = {"runtime": Runtime(device=CPU, precision="bf16"), "log": lambda _: None}
    return find_max_lr(
        dataset,
        recipe,
        **settings | {"start_lr": 1e-5, "end_lr": 1e-1, "num_iter": 20, "repeats": 2} | options,
    )


def find_lr(dataset_dir: Path, *args: str) -> int:
    """`fasttrain find-lr`: 20 steps, twice, in batches of 16; returns its exit status."""
    few = ["--batch-size", "16", "--width", "8", "--num-iter", "20", "--repeats", "2", "--device", "cpu"]
    return main(["find-lr", "--data-dir", str(dataset_dir), *few, *args])


def answer(monkeypatch, loss, noise: float = 0.0) -> None:
    """Replace the training by a loss that is a function of the rate, with noise from each try's seed."""

    def range_test(dataset, recipe, runtime, start_lr, end_lr, num_iter):
        rng = np.random.default_rng(recipe.seed)
        lrs = np.geomspace(start_lr, end_lr, num_iter)
        losses = [loss(lr) + noise * rng.standard_normal() for lr in lrs]
        return lrs.tolist(), losses, [0.0, 0.001]

    monkeypatch.setattr(lr_finder, "_range_test", range_test)


@pytest.mark.parametrize(("fall", "rise"), [(0.5, 0.5), (0.4, 1.0), (1.0, 0.6)])
@pytest.mark.parametrize("num_iter", [40, 200])
def test_the_suggestion_is_where_the_smoothed_loss_is_lowest(monkeypatch, fall, rise, num_iter) -> None:
    """The loss is exp(-x/fall) + exp(x/rise), x in decades from 0.01; a Gaussian of deviation s multiplies
    these by exp(s^2 / 2 fall^2) and exp(s^2 / 2 rise^2), so that the minimum is known."""

    def loss(lr: float) -> float:
        return math.exp(-math.log10(lr / 0.01) / fall) + math.exp(math.log10(lr / 0.01) / rise)

    answer(monkeypatch, loss)
    spread = lr_finder.BANDWIDTH**2 / 2 * (fall**-2 - rise**-2)
    expected = 0.01 * 10 ** ((math.log(rise / fall) + spread) / (1 / fall + 1 / rise))
    found = find_max_lr(None, Recipe(), RUNTIME, num_iter=num_iter, repeats=1, log=lambda _: None)
    half_step = 10 ** (5 / (num_iter - 1) / 2)
    assert expected / half_step / 1.02 < found.suggestion < expected * half_step * 1.02


def fall_and_rise(lr: float) -> float:
    """The loss of `default` on CIFAR-10, in short: from 3.0 to 1.6 at 0.01, flat around it, then up."""
    x = math.log10(lr / 0.01)
    return 1.6 + 0.3 * x**2 if x < 0 else 1.6 + 0.15 * x**2


def test_tries_agree_under_the_noise_of_batches_and_a_flat_loss_is_a_problem(monkeypatch) -> None:
    """The deviation of 0.05 is what batches of 512 have around 0.01."""
    counts = []
    for loss in (fall_and_rise, lambda lr: 2.3):
        answer(monkeypatch, loss, noise=0.05)
        tries = [
            find_max_lr(None, Recipe(seed=3 * index), RUNTIME, log=lambda _: None) for index in range(50)
        ]
        counts.append(sum(search.problem is None for search in tries))
        if loss is fall_and_rise:
            assert all(0.005 < one.suggestion < 0.02 for one in tries if one.problem is None)
    assert counts[0] >= 49 and counts[1] <= 10


@pytest.mark.parametrize("loss", [lambda lr: 2 + lr, lambda lr: 2 - math.log10(lr)])
def test_a_loss_that_only_rises_or_only_falls_suggests_no_rate(monkeypatch, loss) -> None:
    answer(monkeypatch, loss)
    found = find_max_lr(None, Recipe(), RUNTIME, log=lambda _: None)
    assert found.problem == "3 of 3 tries have no lowest loss between the ends of the curve"
    with pytest.raises(UserError, match=r"--max-lr auto: 3 of 3 tries .*; give --max-lr a number"):
        _ = found.suggestion


def test_a_search_that_starts_at_the_peak_suggests_a_tenth(monkeypatch) -> None:
    answer(monkeypatch, lambda lr: 1 + math.log10(lr / 0.3) ** 2)
    said: list[str] = []
    found = find_max_lr(None, PRESETS["assignment"], RUNTIME, log=said.append)
    assert found.curves[0].lrs[0] == pytest.approx(0.01) and found.curves[0].lrs[-1] == pytest.approx(10)
    assert found.suggestion == pytest.approx(0.03, rel=0.05)
    assert said[0] == f"try 1 of 3: lowest loss at {found.curves[0].lowest:.3g} (200 steps)"
    early = find_max_lr(None, PRESETS["assignment"], RUNTIME, start_lr=1e-4, log=said.append)
    assert early.suggestion == pytest.approx(0.3, rel=0.05)
    other = find_max_lr(None, PRESETS["default"], RUNTIME, log=said.append)
    assert other.curves[0].lrs[0] == pytest.approx(1e-4)


def test_a_curve_that_ended_at_once_has_no_lowest_loss() -> None:
    assert curve(3e-4, points=19).lowest is None
    assert curve(3e-4, points=20).lowest == pytest.approx(3e-4, rel=0.1)
    assert LrCurve([], [], diverged=True).lowest is None


def test_losses_are_averaged_over_both_sides_and_limited() -> None:
    lrs = np.geomspace(1e-4, 1e-2, 21).tolist()
    assert smooth(lrs, [2.0] * 21) == pytest.approx([2.0] * 21)
    tall = smooth(lrs, [1.0] * 20 + [1e6])
    assert tall == sorted(tall) and tall[-1] < 5 and tall[0] == pytest.approx(1.0)
    peak = smooth(lrs, [1.0] * 10 + [2.0] + [1.0] * 10)
    assert peak == pytest.approx(peak[::-1]) and max(peak) == peak[10] < 1.5


def test_the_search_takes_the_median_of_tries_that_agree() -> None:
    assert LrSearch([], [0.01, 0.03, 0.02]).suggestion == 0.02
    assert LrSearch([], [0.01, 0.031, 0.02]).problem == (
        "the tries suggest 0.01 to 0.031, more than a factor of 3 apart"
    )


def test_a_search_says_its_spread_and_which_tries_failed() -> None:
    tries = [curve(0.03), curve(0.03, points=90), curve(0.03, points=9)]
    assert str(LrSearch(tries, [0.02, 0.04])) == (
        "0.03 (median of 2 tries, 0.02 to 0.04; diverged: 2, without a suggestion: 1)"
    )
    assert "no spread is known" in str(LrSearch(tries[:1], [0.01]))
    assert str(tries[1]) == f"lowest loss at {tries[1].lowest:.3g} (diverged after 90 steps)"
    assert str(tries[2]) == "no lowest loss between the ends of the curve (diverged after 9 steps)"
    assert LrSearch(tries[1:], [0.03]).problem is not None  # only one of two


@pytest.mark.parametrize(
    ("seconds", "asked", "expected"),
    [
        (0.29, (None, None), (200, 3)),
        (0.4, (None, None), (200, 2)),
        (1.0, (None, None), (90, 2)),
        (4.0, (None, None), (40, 2)),  # the fewest
        (1.0, (150, None), (150, 2)),
        (1.0, (None, 6), (40, 6)),
        (1.0, (None, 1), (180, 1)),
        (9.0, (300, 5), (300, 5)),
        (0.0, (None, None), (200, 3)),  # the few steps diverged
    ],
)
def test_a_search_on_a_slow_machine_is_shortened_unless_its_length_was_asked_for(
    monkeypatch, seconds: float, asked, expected: tuple[int, int]
) -> None:
    answer(monkeypatch, fall_and_rise)
    monkeypatch.setattr(lr_finder, "_seconds_per_step", lambda *_: seconds)
    said: list[str] = []
    found = find_max_lr(None, Recipe(), RUNTIME, num_iter=asked[0], repeats=asked[1], log=said.append)
    assert (len(found.curves[0].lrs), len(found.curves)) == expected
    shortened = [line for line in said if "minutes" in line]
    assert len(shortened) == (expected != (asked[0] or 200, asked[1] or 3))
    if expected == (90, 2):
        assert shortened == ["2 tries of 90 steps instead of 3 of 200: about 3 minutes at 1 s a step"]


def test_the_seconds_of_a_step_are_measured(dataset) -> None:
    start = time.perf_counter()
    seconds = lr_finder._seconds_per_step(dataset, SMALL, Runtime(device=CPU), 1e-4)
    assert 0 < 4 * seconds < time.perf_counter() - start


def test_groups_learn_at_their_multiple_of_the_rate_in_a_search_too(dataset, monkeypatch) -> None:
    taken: list[list[float]] = []

    def build(*args, **settings):
        optimizer = build_optimizer(*args, **settings)
        optimizer.register_step_post_hook(lambda *_: taken.append([g["lr"] for g in optimizer.param_groups]))
        return optimizer

    monkeypatch.setattr(lr_finder, "build_optimizer", build)
    found = search(dataset, dataclasses.replace(SMALL, optimizer="muon", muon_lr_scale=2.0), repeats=1)
    rates = found.curves[0].lrs
    # torch may call the hooks within Muon's step for AdamW's part too, which has a group less.
    steps = list(dict.fromkeys(tuple(step) for step in taken if len(step) == 3))
    assert [step[0] for step in steps[: len(rates)]] == pytest.approx(rates)
    assert all(step[-1] == pytest.approx(2 * step[0]) for step in steps)


def test_real_search_leaves_the_generators_alone(dataset) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    said: list[str] = []
    found = search(dataset, SMALL, runtime=Runtime.resolve(SMALL, CPU), log=said.append)
    assert torch.equal(torch.rand(3), expected)
    assert len(found.curves) == 2 and found.curves[0].losses != found.curves[1].losses
    assert all(1e-5 <= lr <= 1e-1 for curve in found.curves for lr in curve.lrs)
    assert found.curves[0].lrs == sorted(found.curves[0].lrs)
    assert [line.split(":")[0] for line in said] == ["try 1 of 2", "try 2 of 2"]


def test_a_search_leaves_no_trace_in_the_training_behind_it(dataset_dir: Path, tmp_path, monkeypatch) -> None:
    """The weights are, bit for bit, those of a run that was given the same rate."""
    quick = functools.partial(find_max_lr, num_iter=30, repeats=1)
    monkeypatch.setattr(trainer, "find_max_lr", quick)
    models = []
    max_lr: float | str = "auto"
    for name in ("asked", "told"):
        recipe = Recipe(name=name, epochs=1, batch_size=32, width=8, max_lr=max_lr, dropout=0.1)
        run = trainer.train(recipe, data_dir=dataset_dir, out=tmp_path, device="cpu", report=False)
        max_lr = run.result["max_lr"]
        models.append(torch.load(run.folder / "last.pt", weights_only=True)["model"])
    asked, told = models
    assert all(torch.equal(asked[name], told[name]) for name in told)


def test_a_diverging_loss_ends_a_try_early(dataset) -> None:
    [found] = search(dataset, SMALL, start_lr=1e-3, end_lr=1e6, num_iter=60, repeats=1).curves
    assert found.diverged and len(found.lrs) == len(found.losses) < 60
    assert all(map(math.isfinite, found.losses)) and found.losses[-1] > found.losses[0]


def test_a_loss_that_is_no_number_ends_the_search_with_one_line(dataset, monkeypatch) -> None:
    monkeypatch.setattr(
        lr_finder._FiniteLoss,
        "forward",
        lambda self, logits, labels: (_ for _ in ()).throw(lr_finder._Diverged),
    )
    with pytest.raises(UserError, match=r"--max-lr auto: 2 of 2 tries .*; give --max-lr a number"):
        _ = search(dataset, SMALL).suggestion


def test_a_finite_loss_is_cross_entropy_and_any_other_raises() -> None:
    loss_fn = lr_finder._FiniteLoss(0.0)
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    assert loss_fn(logits, labels) == torch.nn.functional.cross_entropy(logits, labels)
    with pytest.raises(lr_finder._Diverged):
        loss_fn(logits * float("nan"), labels)


def test_the_search_minimises_the_loss_of_the_recipes_class_weights(dataset: Dataset, monkeypatch) -> None:
    """The first loss that a search sees is torch's, each image's weighted by its class."""
    labels = np.repeat([0, 1, 2], [20, 15, 5])
    data = dataclasses.replace(dataset, train=Split(dataset.train.images[:40], labels))
    seen: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    class Recorded(lr_finder._FiniteLoss):
        def forward(self, logits_NK: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
            loss = super().forward(logits_NK, labels_N)
            seen.append((logits_NK.detach().float(), labels_N, loss.item()))
            return loss

    monkeypatch.setattr(lr_finder, "_FiniteLoss", Recorded)
    search(data, dataclasses.replace(SMALL, class_weights="balanced", label_smoothing=0.0))
    logits_NK, labels_N, loss = seen[0]
    weights_K = torch.tensor([40 / (3 * count) for count in (20, 15, 5)])
    losses_N = torch.nn.functional.cross_entropy(logits_NK, labels_N, reduction="none")
    assert loss == pytest.approx((weights_K[labels_N] * losses_N).mean().item(), rel=1e-5)


def test_find_lr_prints_every_try_and_draws_the_curves(dataset_dir: Path, tmp_path, capsys) -> None:
    plot = tmp_path / "curves.png"
    assert find_lr(dataset_dir, "--num-iter", "40", "--repeats", "1", "--plot", str(plot)) == 0
    out, error = capsys.readouterr()
    assert error == ""  # piped: no progress bar
    assert "try 1 of 1: " in out and "suggested --max-lr 0.0" in out
    assert str(plot) in out
    pixels_HWC = imread(plot)
    assert pixels_HWC[0, 0].tolist() == [1, 1, 1, 1]  # white, and not transparent
    blue = (pixels_HWC[..., 2] > pixels_HWC[..., 0] + 0.4).sum()
    assert blue > 100  # the first try's curve


def test_a_plot_that_cannot_be_written_loses_neither_suggestion_nor_old_plot(
    dataset_dir: Path, tmp_path, capsys, monkeypatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    plot = tmp_path / "curves.png"
    plot.write_bytes(b"old")
    monkeypatch.setattr("fasttrain.system.files.os.fsync", full)
    monkeypatch.setattr(
        "fasttrain.tools.find_lr.find_max_lr", lambda *_, **__: LrSearch([curve(0.03)], [0.03])
    )
    assert find_lr(dataset_dir, "--plot", str(plot)) == 2
    said = capsys.readouterr()
    assert "suggested --max-lr" in said.out and "No space left on device" in said.err
    assert plot.read_bytes() == b"old" and list(tmp_path.iterdir()) == [plot]


def test_tries_that_disagree_are_drawn_and_end_in_one_line_and_status_2(
    dataset_dir: Path, tmp_path, capsys, monkeypatch
) -> None:
    plot = tmp_path / "curves.png"
    tries = LrSearch([curve(0.002), curve(0.03)], [0.002, 0.03])
    monkeypatch.setattr("fasttrain.tools.find_lr.find_max_lr", lambda *_, **__: tries)
    assert find_lr(dataset_dir, "--plot", str(plot)) == 2
    out, error = capsys.readouterr()
    assert "suggested" not in out and str(plot) in out and plot.exists()
    assert error == (
        "fasttrain find-lr: no rate to suggest: the tries suggest 0.002 to 0.03, more than a factor of 3 "
        "apart; try more --repeats or --num-iter, or another --start-lr\n"
    )


def test_a_training_ends_before_its_first_step_if_the_tries_disagree(
    dataset_dir: Path, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(trainer, "find_max_lr", lambda *_, **__: LrSearch([], [0.002, 0.03]))
    command = ["train", "--data-dir", str(dataset_dir), "--out", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--width", "8", "--batch-size", "16", "--max-lr", "auto"]) == 2
    error = capsys.readouterr().err
    assert "--max-lr auto: the tries suggest" in error and "give --max-lr a number" in error
    assert error.count("\n") == 1 and not list(tmp_path.glob("*/last.pt"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--end-lr", "1e-4"], "--start-lr 0.0001 --end-lr 0.0001: expected"),
        (["--start-lr", "1", "--end-lr", "0.1"], "--start-lr 1 --end-lr 0.1: expected"),
        (["--start-lr", "0"], "--start-lr 0 --end-lr 10: expected"),
        (["--start-lr", "1", "--end-lr", "1"], "--start-lr 1 --end-lr 1: expected"),
        (["--end-lr", "nan"], "--end-lr nan: expected"),
        (["--end-lr", "inf"], "--end-lr inf: expected"),
        (["--num-iter", "19"], "--num-iter 19: expected at least 20"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--plot", "{tmp}/none/curves.png"], "none is not a folder"),
        (["--plot", "{tmp}/curves.jpg"], "curves.jpg: expected"),
    ],
)
def test_an_impossible_search_is_one_line_and_status_2(
    args, said, dataset_dir, tmp_path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("fasttrain.tools.find_lr.load_from_options", lambda *_: pytest.fail("loaded first"))
    assert find_lr(dataset_dir, *(arg.format(tmp=tmp_path) for arg in args)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
