"""A roll call: which rank of a distributed training is lost, when gloo only says that one is.

It goes through torch's rendezvous store, since the ranks' connections are broken then. In a ring only the two
beside a lost rank notice, so each rank gives signs of life from a thread, also while it waits in gloo. The
store is only asked from threads: it may be in a rank that is frozen.
"""

import atexit
import json
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import Any

import torch.distributed as dist

SECONDS = 2.0
"""How long the ranks have to answer a call."""

SIGN_SECONDS = SECONDS / 4
"""The time between two signs of life."""

POLL_SECONDS = 0.02

LOST = "lost ranks"
"""The key with the ranks that were found missing first: those that end because of that are missed later."""

AWAY = -1
"""In place of the number of signs, of a rank that has left and need not give any."""


_giver: threading.Thread | None = None
_is_over = threading.Event()


def give_signs(rank: int) -> None:
    """Give signs of life for this rank, a number in the store that grows, until either ends."""
    global _giver
    if _giver is not None and _giver.is_alive():
        return
    _is_over.clear()

    def give() -> None:
        store = _store().clone()  # each thread has to have its own
        with suppress(RuntimeError):  # the store is gone
            while not _is_over.wait(SIGN_SECONDS):
                store.add(_key(rank), 1)

    _giver = threading.Thread(target=give, name="signs of life", daemon=True)
    _giver.start()
    atexit.register(_end_signs)


def leave(rank: int) -> None:
    """End them where the store will be gone before this process: in the first rank, without torchrun."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        _end_signs()
        _store().set(_key(rank), str(AWAY))  # which waits for no answer


def _end_signs() -> None:
    _is_over.set()
    if _giver is not None:
        _giver.join(1)  # a thread that is in torch when Python ends would abort the process
    atexit.unregister(_end_signs)


def missing_ranks() -> list[int]:
    """Call the roll; returns the ranks that do not answer, [] where it cannot be called."""
    return _ask(_call_roll, patience=SECONDS) or []


def wait_for_all(seconds: float) -> list[int] | None:
    """Wait until all ranks have called this as often as this one; none can have called it more often.

    Returns None then, or else the ranks that have given no sign of life for so long: [] if the store does not
    answer. It counts signs and polls, not time: if all ranks are stopped for a while, none is missing when
    they go on.
    """
    return _ask(lambda store: _wait(store, seconds), patience=seconds)


Answer = Generator[None, None, list[int] | None]
"""Yields between two polls of the store; returns lost ranks."""


def _ask(question: Callable[[Any], Answer], patience: float) -> list[int] | None:
    """Put a question to the store on a thread, so that signals and a store that hangs can end the wait.

    Returns its answer, or [] if the store is gone or says nothing for so long.
    """
    answers: list[list[int] | None] = []
    polls = stalls = known = 0

    def poll() -> None:
        nonlocal polls
        with suppress(RuntimeError, ValueError):  # the store is gone, or the ranks had not met
            answer = question(_store().clone())
            while True:
                try:
                    next(answer)
                except StopIteration as end:
                    answers.append(end.value)
                    return
                polls += 1

    thread = threading.Thread(target=poll, name="roll call", daemon=True)
    thread.start()
    while thread.is_alive() and stalls * POLL_SECONDS < patience:
        thread.join(POLL_SECONDS)
        stalls, known = (0 if polls > known else stalls + 1), polls
    return answers[0] if answers else []


def _call_roll(store: Any) -> Answer:
    if not store.check([LOST]):
        before = _signs(store)
        for _ in range(round(SECONDS / POLL_SECONDS)):
            time.sleep(POLL_SECONDS)
            yield
        _note(store, _silent(before, _signs(store)))
    return _noted(store)


def _wait(store: Any, seconds: float) -> Answer:
    size = dist.get_world_size()
    calls = store.add(f"arrivals/{dist.get_rank()}", 1)
    store.add("arrivals", 1)
    before, silences = _signs(store), [0] * size
    while not store.check([LOST]):
        for _ in range(round(SIGN_SECONDS / POLL_SECONDS)):
            if store.add("arrivals", 0) >= calls * size:
                return None
            time.sleep(POLL_SECONDS)
            yield
        after = _signs(store)
        silent = _silent(before, after)
        silences = [silences[rank] + 1 if rank in silent else 0 for rank in range(size)]
        if missing := [rank for rank in silent if silences[rank] * SIGN_SECONDS >= seconds]:
            _note(store, missing)
        before = after
    return _noted(store)


def _signs(store: Any) -> list[int]:
    """How many signs of life each rank has given, or AWAY."""
    return [store.add(_key(rank), 0) for rank in range(dist.get_world_size())]


def _silent(before: list[int], after: list[int]) -> list[int]:
    """The other ranks that have given no sign between the two, and should have."""
    own = dist.get_rank()
    signs = enumerate(zip(before, after, strict=True))
    return [rank for rank, (old, new) in signs if old == new != AWAY and rank != own]


def _note(store: Any, ranks: list[int]) -> None:
    """Note which ranks are lost, unless another rank has."""
    store.compare_set(LOST, "", json.dumps(ranks))


def _noted(store: Any) -> list[int]:
    """The ranks that are noted as lost, but for this one, should the others have taken it for lost."""
    return [rank for rank in json.loads(store.get(LOST)) if rank != dist.get_rank()]


def _key(rank: int) -> str:
    return f"signs of life/{rank}"


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()  # no public function returns it
