"""A roll call: which rank of a distributed training is lost, when gloo only says that one is.

It goes through torch's rendezvous store, since the ranks' connections are broken then. In a ring only the
two beside a lost rank notice, so each rank answers from a thread, also while it waits in gloo.
"""

import atexit
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

SECONDS = 2.0
"""How long the ranks have to answer."""

CALL = "roll call"
"""The key that calls the roll."""


def answer(rank: int) -> Callable[[], None]:
    """Answer for this rank, once any rank calls the roll; returns a function that ends this.

    It ends with the process as well, and when the store is gone.
    """
    store, is_over = _store().clone(), threading.Event()  # each thread has to have its own

    def watch() -> None:
        with suppress(RuntimeError):
            while not is_over.wait(SECONDS / 4):
                if store.check([CALL]):
                    store.set(f"present/{rank}", "")
                    return

    def end() -> None:
        is_over.set()
        thread.join(1)  # a thread that is in torch when Python ends would abort the process
        atexit.unregister(end)

    thread = threading.Thread(target=watch, name="roll call", daemon=True)
    thread.start()
    atexit.register(end)
    return end


def missing_ranks() -> list[int]:
    """Call the roll; returns the ranks that do not answer, [] where it cannot be called."""
    missing: list[int] = []

    def call() -> None:
        with suppress(RuntimeError, ValueError):  # the store is gone as well, or the ranks had not met
            store, own, size = _store().clone(), dist.get_rank(), dist.get_world_size()
            store.set(CALL, "")
            time.sleep(SECONDS)
            silent = [rank for rank in range(size) if not store.check([f"present/{rank}"])]
            missing.extend(rank for rank in silent if rank != own)

    caller = threading.Thread(target=call, daemon=True)  # it may hang, if the store's own process does
    caller.start()
    caller.join(SECONDS + 1)
    return [*missing]


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # no public function returns it
