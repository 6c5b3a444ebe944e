"""What a run measures: the time spent waiting for data, and its share of the hardware's peak rate."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
_Span = tuple[torch.cuda.Event, torch.cuda.Event]


class WaitTimer(Generic[T]):
    """Iterate over a loader and add up the seconds that training waits for it.

    On a GPU, where steps are asynchronous, time in the loader is only the host running ahead; there, the wait
    is the training stream's: from the end of a step until the next batch is ready.
    device: where the training computes. wait_seconds: what was waited before, as in a resumed epoch.
    waiting_since: time.perf_counter() at the start of the host's current wait; None between waits.
    """

    def __init__(self, batches: Iterable[T], device: torch.device, wait_seconds: float = 0.0) -> None:
        self._batches = batches
        self._clock = StreamClock(device) if device.type == "cuda" else HostClock()
        self._clock.seconds = wait_seconds
        self.waiting_since: float | None = None

    def __iter__(self) -> Iterator[T]:
        batches = iter(self._batches)
        while True:
            self.waiting_since = time.perf_counter()
            self._clock.start()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waiting_since = None
            self._clock.stop()
            yield batch

    @property
    def wait_seconds(self) -> float:
        """The seconds so far, read without waiting: complete once the device has been waited for."""
        self._clock.update()
        return self._clock.seconds


class HostClock:
    """Adds up the seconds between `start` and `stop`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self.seconds += time.perf_counter() - self._started

    def update(self) -> None:
        """Add what has ended: nothing is left to add."""


class StreamClock:
    """Adds up the seconds that a GPU's stream takes between what was queued before `start` and before `stop`.

    Neither waits for the GPU. Events are read once they have passed and then used again, so that there are
    never more than the GPU is behind the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._idle: list[_Span] = []
        self._under_way: deque[_Span] = deque()

    def start(self) -> None:
        self.update()
        if not self._idle:
            self._idle.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        self._record(self._idle[-1][0])

    def stop(self) -> None:
        span = self._idle.pop()
        self._record(span[1])
        self._under_way.append(span)

    def update(self) -> None:
        """Add the spans whose end the GPU has passed."""
        while self._under_way and self._under_way[0][1].query():
            started, stopped = span = self._under_way.popleft()
            self.seconds += started.elapsed_time(stopped) / 1000
            self._idle.append(span)

    def _record(self, event: torch.cuda.Event) -> None:
        event.record(torch.cuda.current_stream(self._device))


@contextmanager
def watch(timer: WaitTimer[Any], warn: Callable[[float], object], seconds: float = 60.0) -> Iterator[None]:
    """Within the block, call `warn` with the seconds waited when a wait for a batch exceeds `seconds`.

    Called once per wait, from a separate thread. Compiling and evaluating do not count as waiting.
    """
    over = threading.Event()

    def look() -> None:
        warned: float | None = None
        while not over.wait(seconds / 10):
            since = timer.waiting_since
            if since is not None and since != warned and time.perf_counter() - since >= seconds:
                warn(time.perf_counter() - since)
                warned = since

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def model_flops_utilization(
    images_per_sec: float, flop_per_image: float, matmul_tflops: float | None
) -> float | None:
    """Return the share of the measured matmul rate that the model's own operations reach; None if unknown.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    if not matmul_tflops:
        return None
    return images_per_sec * flop_per_image / (matmul_tflops * 1e12)
