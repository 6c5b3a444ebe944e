"""What a run measures: time spent waiting for data, throughput, distance to the hardware, memory."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class WaitTimer(Generic[T]):
    """Iterates over a loader and adds up the seconds in which the training loop waited for it.

    waiting_since: time.perf_counter() when the wait under way began; None while there is none.
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
    """Within the block, call `warn` with the seconds waited once a wait for a batch has lasted `seconds`.

    Once per wait, from a thread of its own; compiling and evaluating are no waits for a batch.
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
    """Share of the measured matmul rate that the training's own operations reach; None without a rate.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    if not matmul_tflops:
        return None
    return images_per_sec * flop_per_image / (matmul_tflops * 1e12)
