"""A roll call: which rank of a distributed training is lost, when gloo only says that one is.

It goes through torch's rendezvous store, since the ranks' connections are broken then. In a ring only the two
beside a lost rank notice, so each rank gives signs of life from a thread, also while it waits in gloo.
"""

import atexit
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

SECONDS = 2.0
"""How long the ranks have to answer a call."""

SIGN_SECONDS = SECONDS / 4
"""The time between two signs of life."""

POLL_SECONDS = 0.02

LOST = "lost ranks"
"""The key with the ranks that the first to find out found missing; those that end of it are silent next."""


def answer(rank: int) -> Callable[[], None]:
    """Give signs of life for this rank, a number that grows; returns a function that ends this.

    It ends with the process as well, and when the store is gone.
    """
    store, is_over = _store().clone(), threading.Event()  # each thread has to have its own

    def give_signs() -> None:
        with suppress(RuntimeError):
            while not is_over.wait(SIGN_SECONDS):
                store.add(_key(rank), 1)

    def end() -> None:
        is_over.set()
        thread.join(1)  # a thread that is in torch when Python ends would abort the process
        atexit.unregister(end)

    thread = threading.Thread(target=give_signs, name="roll call", daemon=True)
    thread.start()
    atexit.register(end)
    return end


def missing_ranks() -> list[int]:
    """Call the roll; returns the ranks that do not answer, [] where it cannot be called."""
    missing: list[int] = []

    def call() -> None:
        with suppress(RuntimeError, ValueError):  # the store is gone as well, or the ranks had not met
            store = _store().clone()
            if not store.check([LOST]):
                before = _signs(store)
                time.sleep(SECONDS)
                _note(store, _silent(before, _signs(store)))
            missing.extend(_noted(store))

    caller = threading.Thread(target=call, daemon=True)  # it may hang, if the store's own process does
    caller.start()
    caller.join(SECONDS + 1)
    return [*missing]


def wait_for_all(seconds: float) -> list[int]:
    """Wait until all ranks have called this as often as this one, or some have given no sign for so long.

    Returns the ranks that gave none. It counts signs, not time: if all ranks are stopped for a while, none is
    missing when they go on.
    """
    store, size = _store(), dist.get_world_size()
    calls = store.add(f"arrivals/{dist.get_rank()}", 1)
    store.add("arrivals", 1)
    before, silences = _signs(store), [0] * size
    while True:
        for _ in range(round(SIGN_SECONDS / POLL_SECONDS)):
            if store.add("arrivals", 0) >= calls * size:
                return []
            time.sleep(POLL_SECONDS)
        after = _signs(store)
        silent = _silent(before, after)
        silences = [silences[rank] + 1 if rank in silent else 0 for rank in range(size)]
        if missing := [rank for rank in silent if silences[rank] * SIGN_SECONDS >= seconds]:
            _note(store, missing)
        if store.check([LOST]):
            return _noted(store)
        before = after


def _signs(store: Any) -> list[int]:
    """How many signs of life each rank has given."""
    return [store.add(_key(rank), 0) for rank in range(dist.get_world_size())]


def _silent(before: list[int], after: list[int]) -> list[int]:
    """The other ranks that have given no sign between the two."""
    own = dist.get_rank()
    signs = enumerate(zip(before, after, strict=True))
    return [rank for rank, (old, new) in signs if old == new and rank != own]


def _note(store: Any, ranks: list[int]) -> None:
    """Note which ranks are lost, unless another rank has."""
    store.compare_set(LOST, "", json.dumps(ranks))


def _noted(store: Any) -> list[int]:
    """The ranks that are noted as lost, without this one: it was away, and is back."""
    return [rank for rank in json.loads(store.get(LOST)) if rank != dist.get_rank()]


def _key(rank: int) -> str:
    return f"signs of life/{rank}"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # no public function returns it
