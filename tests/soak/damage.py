"""Ways to damage what a file holds, by bytes and by values, and a limit for reading it."""

import math
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, blank, repeat or replace a part."""
    first = rng.randrange(len(content) + 1)
    last = min(len(content), first + rng.choice((1, 1, 1, 2, 8, 100, 4000)))
    kind = rng.choice(("flip", "flip", "flip", "cut", "drop", "blank", "repeat", "noise", "nest"))
    if kind == "flip" and first < len(content):
        changed = bytearray(content)
        changed[first] ^= 1 << rng.randrange(8)
        return bytes(changed)
    middle = {
        "blank": bytes(last - first),
        "repeat": content[first:last] * 2,
        "noise": rng.randbytes(last - first),
        "nest": b"[" * 100_000,
    }.get(kind, b"")
    return content[:first] + middle + (b"" if kind == "cut" else content[last:])


JSON_VALUES: tuple[Any, ...] = (None, "text", True, 10**400, math.nan, -math.inf, -1, -0.5, [], {}, [[]])
VALUES: tuple[Any, ...] = (None, "text", math.nan, -math.inf, -1, -0.5, [], {}, [[]], torch.ones(3), b"\0")
"""What a leaf may become: in JSON, and in a checkpoint."""


def damage_value(state: Any, rng: random.Random, values: Sequence[Any] = VALUES) -> Any:
    """A copy in which one leaf of nested dicts and lists is gone, or of another type, shape or sign."""
    if isinstance(state, dict) and state:
        key = rng.choice(list(state))
        if rng.random() < 0.15:
            return {name: value for name, value in state.items() if name != key}
        return state | {key: damage_value(state[key], rng, values)}
    if isinstance(state, list) and state and rng.random() < 0.9:
        index = rng.randrange(len(state))
        return [*state[:index], damage_value(state[index], rng, values), *state[index + 1 :]]
    if isinstance(state, Tensor) and rng.random() < 0.7:
        poisoned = state.float().flatten().clone()
        if len(poisoned):
            poisoned[rng.randrange(len(poisoned))] = rng.choice((float("nan"), float("inf")))
        return rng.choice((state[..., None], state.double(), poisoned.reshape(state.shape)))
    return rng.choice(values)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError within the block when it takes longer. For the main thread."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
