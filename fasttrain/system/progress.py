"""Progress of long operations on stderr: bars on a terminal; of a download, lines where there is none."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

LINE_SECONDS = 10
"""From one line to the next, where stderr is not a terminal."""


def note(line: str) -> None:
    """Write one line to stderr at once."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def show_bytes(title: str, total: int, start: int = 0) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the bytes received so far and shows them, the total, rate and time left.

    start: bytes that were there before.
    """
    if not sys.stderr.isatty():
        yield _lines(title, total, start)
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with _bar(columns, title, total, start) as show:
        yield show


def _lines(title: str, total: int, start: int) -> Callable[[int], None]:
    note(f"{title}: {total / 1e6:.1f} MB" + (f", {start / 1e6:.1f} MB of them here already" if start else ""))
    began = last = time.monotonic()

    def show(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < LINE_SECONDS:
            return
        last = now
        rate = (done - start) / (now - began)
        left = f", {timedelta(seconds=(total - done) // rate)} left" if rate > 0 else ""
        note(f"{title}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, {rate / 1e6:.2f} MB/s{left}")

    return show


@contextmanager
def show_count(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of items done so far and shows it next to the total."""
    from rich.progress import MofNCompleteColumn, Progress

    with _bar((*Progress.get_default_columns(), MofNCompleteColumn()), title, total) as show:
        yield show


@contextmanager
def _bar(columns: tuple[Any, ...], title: str, total: int, start: int = 0) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=total, completed=start)
        yield lambda done: progress.update(task, completed=done)
