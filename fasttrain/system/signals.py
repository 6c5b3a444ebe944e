"""A signal ends a command with one line; a training stops in order at the first, at once at the second."""

import _thread
import atexit
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from fasttrain.errors import Interrupted

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""The signals that ask a process to stop: Ctrl-C, kill and schedulers, a terminal that was closed."""


@contextmanager
def leave_on_signals() -> Iterator[None]:
    """Within the block, a signal ends the process at once, with one line and the status that shells use.

    For imports, which hold nothing that needs to be finished, and in which an exception can get lost.
    """
    with _handlers(_leave, STOPPING):
        yield


def _leave(signum: int, _: object) -> None:
    os.write(2, f"fasttrain: {signal.Signals(signum).name}: stopped\n".encode())
    os._exit(128 + signum)


def leave_from_now_on() -> None:
    """After the command: a signal ends the process as in leave_on_signals, until Python itself ends.

    Python waits for threads first, then takes handlers away, and then needs up to a second to end: signals
    are ignored meanwhile, since it does not reset ignored ones. Does nothing under torchrun, which must be
    able to end a rank that hangs there.
    """
    if _has_ranks() or threading.current_thread() is not threading.main_thread():
        return
    for signum in STOPPING:
        if signal.getsignal(signum) not in (None, signal.SIG_IGN):
            signal.signal(signum, _leave)
    atexit.register(_ignore, *STOPPING)


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise Interrupted, as Ctrl-C raises KeyboardInterrupt."""

    def stop(signum: int, _: object) -> None:
        raise Interrupted(f"{signal.Signals(signum).name}: stopped", signum)

    with (
        _handlers(stop, [signum for signum in STOPPING if signum != signal.SIGINT]),
        _repeat_lost_signals(),
    ):
        yield


@contextmanager
def die_of_signals() -> Iterator[None]:
    """Within the block, a signal ends the process as if Python did not handle it.

    For a long wait outside Python, in which no handler runs.
    """
    with _handlers(signal.SIG_DFL, STOPPING):
        yield


@contextmanager
def _repeat_lost_signals() -> Iterator[None]:
    """Within the block, if Python drops the exception of a signal, send the signal again; not on Windows.

    It drops what a destructor or a callback of the garbage collector raises, and signals come there too.
    """
    before = sys.unraisablehook

    def repeat(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, KeyboardInterrupt) or os.name != "posix":
            before(unraisable)
            return
        signum = getattr(unraisable.exc_value, "signum", signal.SIGINT)
        _thread.start_new_thread(again, (signum,))  # threading's would take a lock, in any place

    def again(signum: int) -> None:
        time.sleep(0.01)  # the destructor is over by then
        os.kill(os.getpid(), signum)

    sys.unraisablehook = repeat
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def _handlers(handler: Callable[[int, object], None] | signal.Handlers, signums: list[int]) -> Iterator[None]:
    """Handle these signals within the block, except those that the process ignores, as under nohup."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in signums:
            if signal.getsignal(signum) not in (None, signal.SIG_IGN):  # None: from outside Python
                before[signum] = signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, earlier in before.items():
            if signal.getsignal(signum) is handler:  # not if it has been replaced since
                signal.signal(signum, earlier)


@contextmanager
def catch_signals() -> Iterator[Callable[[], int | None]]:
    """Within the block, note SIGINT, SIGTERM and SIGHUP; yields a function that returns what was noted.

    It returns the number of the first signal, or None. A second signal does what it would have done without
    the block. SIGUSR1, where it exists, prints the stacks of all threads. The previous handlers are restored
    after the block, except one that was replaced within it. Python allows signal handlers only in the
    main thread; in any other the block does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    noted: list[int] = []
    noting = ExitStack()

    def note(signum: int, _: object) -> None:
        if noted:
            noting.close()
            signal.raise_signal(signum)
        noted.append(signum)

    noting.enter_context(_handlers(note, STOPPING))
    with suppress(AttributeError, ValueError, RuntimeError, OSError):  # Windows; a stderr that is not a file
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__ or sys.stderr)
    try:
        yield lambda: noted[0] if noted else None
    finally:
        noting.close()
        with suppress(AttributeError):
            faulthandler.unregister(signal.SIGUSR1)


def ignore_sigterm() -> None:
    """Ignore SIGTERM in a process that is about to end, so that it can still print why.

    SIGTERM stays ignored after catch_signals too. Does nothing outside the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        _ignore(signal.SIGTERM)


def _ignore(*signums: int) -> None:
    for signum in signums:
        signal.signal(signum, signal.SIG_IGN)


def _has_ranks() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"
