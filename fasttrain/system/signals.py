"""Signals during training: the first asks it to stop, the second ends it at once."""

import faulthandler
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def catch_signals() -> Iterator[Callable[[], int | None]]:
    """Within the block, note SIGINT and SIGTERM; yields a function that returns the signal noted, or None.

    A second signal does what it would have done without the block. SIGUSR1, where it exists, prints the
    stacks of all threads. The previous handlers are restored after the block, except one that ignore_sigterm
    has replaced. Python allows signal handlers only in the main thread; in any other the block does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    noted: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for signum, handler in before.items():
            if signal.getsignal(signum) is note:
                signal.signal(signum, handler)
        before.clear()

    def note(signum: int, _: object) -> None:
        if noted:
            restore()
            signal.raise_signal(signum)
        noted.append(signum)

    for signum in (signal.SIGINT, signal.SIGTERM):
        # None: a handler from outside Python, which cannot be restored. SIG_IGN: nohup and the like.
        if signal.getsignal(signum) not in (None, signal.SIG_IGN):
            before[signum] = signal.signal(signum, note)
    with suppress(AttributeError, ValueError, RuntimeError, OSError):  # Windows; a stderr that is not a file
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or sys.stderr)
    try:
        yield lambda: noted[0] if noted else None
    finally:
        restore()
        with suppress(AttributeError):
            faulthandler.unregister(signal.SIGUSR1)


def ignore_sigterm() -> None:
    """Ignore SIGTERM in a process that is about to end, so that it can still print why.

    SIGTERM stays ignored after catch_signals too. Does nothing outside the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
