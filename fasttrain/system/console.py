"""What a reader who leaves does to the output: a closed pipe is no error, and a training goes on."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import rich.console


class Console(rich.console.Console):
    """rich's console, without its guesses about figures and `:names:`.

    At a closed pipe it raises BrokenPipeError as `print` does, and does not exit.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "emoji": False, **options})

    def on_broken_pipe(self) -> None:
        del self._buffer[:]
        raise BrokenPipeError


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Within the block, a closed pipe only silences what is printed from then on."""
    try:
        yield
    except BrokenPipeError:
        silence_stdout()


def silence_stdout() -> None:
    """Send whatever is still printed to nowhere; otherwise Python would complain when it exits."""
    with suppress(OSError, ValueError):  # no file behind it: nothing to complain about
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
