import dataclasses
import errno
import functools
import math
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from fasttrain import lr_finder, trainer
from fasttrain.cli import main
from fasttrain.errors import UserError
from fasttrain.lr_finder import LrCurve, LrSearch, find_max_lr
from fasttrain.optim import build_optimizer
from fasttrain.recipe import Recipe
from fasttrain.runtime import Runtime

CPU = torch.device("cpu")
SMALL = Recipe(batch_size=16, width=8)


def curve(steepest_at: float, points: int = 100) -> LrCurve:
    """A loss that falls as a sigmoid of log(lr) around one rate."""
    lrs = [10 ** (-4 + index / 25) for index in range(points)]
    losses = [1 / (1 + math.exp(3 * math.log(lr / steepest_at))) for lr in lrs]
    return LrCurve(lrs, losses, diverged=points < 100)


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


def test_the_suggestion_is_where_the_loss_falls_fastest() -> None:
    assert curve(0.03).suggestion == pytest.approx(0.03, rel=0.1)


def test_a_curve_that_ended_at_once_suggests_nothing() -> None:
    assert curve(0.03, points=16).suggestion is None
    assert curve(0.03, points=17).suggestion is not None


def test_the_search_takes_the_median_of_its_repeats() -> None:
    assert LrSearch([], [0.01, 5.0, 0.02]).suggestion == 0.02


def test_a_search_says_its_spread_and_which_tries_failed() -> None:
    tries = [curve(0.03), curve(0.03, points=90), curve(0.03, points=9)]
    assert str(LrSearch(tries, [0.01, 0.04])) == (
        "0.025 (median of 2 tries, 0.01 to 0.04; diverged: 2, too short to tell: 1)"
    )
    assert "no spread is known" in str(LrSearch(tries[:1], [0.01]))
    assert str(tries[1]) == f"{tries[1].suggestion:.3g} (diverged after 90 steps)"
    assert str(tries[2]) == "no suggestion: diverged after 9 steps, too few to tell"


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
    assert all(1e-5 <= lr <= 1e-1 for lr in found.suggestions)
    assert found.curves[0].lrs == sorted(found.curves[0].lrs)
    assert [line.split(":")[0] for line in said] == ["try 1 of 2", "try 2 of 2"]


def test_a_search_leaves_no_trace_in_the_training_behind_it(dataset_dir: Path, tmp_path, monkeypatch) -> None:
    """The weights are, bit for bit, those of a run that was given the same rate."""
    quick = functools.partial(find_max_lr, start_lr=1e-4, end_lr=1e-2, num_iter=17, repeats=1)
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
    assert all(map(math.isfinite, found.losses)) and found.losses[-1] > 5 * min(found.losses)


def test_a_loss_that_is_no_number_ends_the_search_with_one_line(dataset, monkeypatch) -> None:
    monkeypatch.setattr(
        lr_finder._FiniteLoss,
        "forward",
        lambda self, logits, labels: (_ for _ in ()).throw(lr_finder._Diverged),
    )
    with pytest.raises(UserError, match="--max-lr auto: the loss diverged"):
        search(dataset, SMALL)


def test_a_finite_loss_is_cross_entropy_and_any_other_raises() -> None:
    loss_fn = lr_finder._FiniteLoss(0.0)
    logits, labels = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    assert loss_fn(logits, labels) == torch.nn.functional.cross_entropy(logits, labels)
    with pytest.raises(lr_finder._Diverged):
        loss_fn(logits * float("nan"), labels)


def test_find_lr_prints_every_try_and_draws_the_curves(dataset_dir: Path, tmp_path, capsys) -> None:
    plot = tmp_path / "curves.png"
    assert find_lr(dataset_dir, "--end-lr", "0.1", "--plot", str(plot)) == 0
    out, error = capsys.readouterr()
    assert error == ""  # piped: no progress bar
    assert "try 1 of 2: " in out and "try 2 of 2: " in out and "suggested --max-lr 0.0" in out
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


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--start-lr", "1", "--end-lr", "0.1"], "--start-lr 1 --end-lr 0.1: expected"),
        (["--start-lr", "0"], "--start-lr 0 --end-lr 10: expected"),
        (["--start-lr", "1", "--end-lr", "1"], "--start-lr 1 --end-lr 1: expected"),
        (["--end-lr", "nan"], "--end-lr nan: expected"),
        (["--end-lr", "inf"], "--end-lr inf: expected"),
        (["--num-iter", "16"], "--num-iter 16: expected at least 17"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--plot", "{tmp}/none/curves.png"], "curves.png: expected"),
        (["--plot", "{tmp}/curves.jpg"], "curves.jpg: expected"),
    ],
)
def test_an_impossible_search_is_one_line_and_status_2(args, said, dataset_dir, tmp_path, capsys) -> None:
    assert find_lr(dataset_dir, *(arg.format(tmp=tmp_path) for arg in args)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
