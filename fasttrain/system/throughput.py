"""What a run measures: the time spent waiting for data, and its share of the hardware's peak rate."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class WaitTimer(Generic[T]):
    """Iterate over a loader and add up the seconds that the training loop waits for it.

    waiting_since: time.perf_counter() at the start of the current wait; None between waits.
    """

    def __init__(self, batches: Iterable[T]) -> None:
        self._batches = batches
        self.wait_seconds = 0.0
        self.waiting_since: float | None = None

    def __iter__(self) -> Iterator[T]:
        batches = iter(self._batches)
        while True:
            start = self.waiting_since = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waiting_since = None
                self.wait_seconds += time.perf_counter() - start
            yield batch


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
