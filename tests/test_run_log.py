import io
from pathlib import Path

import pytest
from rich.console import Console

from fasttrain.system import run_log
from fasttrain.system.run_log import RunLog

FIGURES = {
    "train_loss": 1.2345,
    "train_accuracy": 0.456,
    "images_per_sec": 123456.0,
    "data_wait_share": 0.012,
}


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    """A run's log on a terminal of 80 columns."""
    log = RunLog(tmp_path)
    log.console = Console(
        force_terminal=True, no_color=True, width=80, file=io.StringIO(), highlight=False, soft_wrap=True
    )
    return log


def shown(log: RunLog) -> str:
    assert isinstance(log.console.file, io.StringIO)
    return log.console.file.getvalue()


def test_a_terminal_of_80_columns_shows_every_live_figure(log: RunLog, monkeypatch) -> None:
    monkeypatch.setattr(run_log, "REFRESH_SECONDS", 0)
    assert list(log.steps(range(5), 5, "epoch 12/24", lambda: FIGURES)) == list(range(5))
    whole = [line for line in shown(log).split("\r") if "loss 1.23" in line and "ETA 0" in line]
    assert whole, shown(log)
    for part in ("epoch 12/24", "acc 45.6%", "123,456 images/s", "wait 1.2%"):
        assert all(part in line for line in whole)
    assert all("…" not in line for line in whole)


def test_a_figure_that_is_not_there_yet_is_left_out(log: RunLog, monkeypatch) -> None:
    monkeypatch.setattr(run_log, "REFRESH_SECONDS", 0)
    list(log.steps(range(2), 2, "epoch 1/1", lambda: {"images_per_sec": 7.0}))
    assert "7 images/s" in shown(log) and "loss" not in shown(log)


def test_figures_are_asked_for_seldom(log: RunLog, monkeypatch) -> None:
    """A clock that gives a tenth of a second to every look at it: one look per step, another per drawing."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(run_log.time, "perf_counter", lambda: next(ticks) / 10)
    asked: list[int] = []
    list(log.steps(range(100), 100, "epoch 1/1", lambda: asked.append(1) or FIGURES))
    assert 10 <= len(asked) <= 20


def test_piped_output_asks_for_nothing_and_shows_no_bar(tmp_path, capsys) -> None:
    def fail() -> dict[str, float]:
        raise AssertionError("nobody sees it")

    log = RunLog(tmp_path)
    assert list(log.steps(range(1000), 1000, "epoch 1/1", fail)) == list(range(1000))
    assert capsys.readouterr().out == ""
