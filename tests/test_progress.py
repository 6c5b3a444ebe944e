"""What a download shows: lines where stderr is piped, a bar on a terminal."""

import io

import pytest

from fasttrain.system import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_piped_it_says_how_far_it_is_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.show_bytes("CIFAR-10 from example.org", 170_000_000, 20_000_000) as show:
        for second in range(1, 25):
            clock[0] = 100 + second
            show(20_000_000 + second * 1_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "CIFAR-10 from example.org: 170.0 MB, 20.0 MB of them here already",
        "CIFAR-10 from example.org: 30.0 of 170.0 MB, 1.00 MB/s, 0:02:20 left",
        "CIFAR-10 from example.org: 40.0 of 170.0 MB, 1.00 MB/s, 0:02:10 left",
    ]


def test_before_the_first_byte_no_time_is_foretold(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.show_bytes("x", 10) as show:
        clock[0] = 10
        show(0)
    assert capsys.readouterr().err.splitlines() == ["x: 0.0 MB", "x: 0.0 of 0.0 MB, 0.00 MB/s"]


def test_on_a_terminal_it_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with progress.show_bytes("CIFAR-10 from example.org", 170_000_000, 20_000_000) as show:
        show(85_000_000)
    assert "CIFAR-10 from example.org" in screen.getvalue() and "85.0/170.0 MB" in screen.getvalue()
