"""What a run measures: time spent waiting for data, throughput, distance to the hardware, memory."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Generic, TypeVar

import torch

from fasttrain.machine import (
    describe,
    hardware_name,
    measure_matmul_tflops,
    pick_compute_dtype,
    precision_name,
)
from fasttrain.model import EPOCH_IMAGES, CustomResNet, training_flop_per_image

T = TypeVar("T")


class WaitTimer(Generic[T]):
    """Iterates over a loader and adds up the seconds in which the training loop waited for it."""

    def __init__(self, batches: Iterable[T]) -> None:
        self._batches = batches
        self.wait_seconds = 0.0

    def __iter__(self) -> Iterator[T]:
        batches = iter(self._batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.wait_seconds += time.perf_counter() - start
            yield batch


def model_flops_utilization(
    images_per_sec: float, flop_per_image: int, matmul_tflops: float | None
) -> float | None:
    """Share of the measured matmul rate that the training's own operations reach; None without a rate.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    if not matmul_tflops:
        return None
    return images_per_sec * flop_per_image / (matmul_tflops * 1e12)


def epoch_floor(model: CustomResNet, device: torch.device) -> str:
    """In a sentence: the least time of an epoch on this device, at the matmul rate measured on it now."""
    dtype = pick_compute_dtype("auto", device)
    tflops = measure_matmul_tflops(device, dtype)
    seconds = training_flop_per_image(model) * EPOCH_IMAGES / (tflops * 1e12)
    return (
        f"At the {tflops:.3g} TFLOP/s of {precision_name('auto', dtype)} matmul just measured on "
        f"{hardware_name(describe(device))}, these FLOP alone take {seconds:.3g} s an epoch."
    )


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: allocated on the GPU, resident in the process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
