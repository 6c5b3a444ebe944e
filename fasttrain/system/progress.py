"""Progress bars for long operations, drawn on stderr, and only if that is a terminal."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def show_bytes(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the bytes received so far and shows them, the total and the speed."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with _bar(columns, title, total) as show:
        yield show


@contextmanager
def show_count(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield a function that takes the number of items done so far and shows it next to the total."""
    from rich.progress import MofNCompleteColumn, Progress

    with _bar((*Progress.get_default_columns(), MofNCompleteColumn()), title, total) as show:
        yield show


@contextmanager
def _bar(columns: tuple[Any, ...], title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
