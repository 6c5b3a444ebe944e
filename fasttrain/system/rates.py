"""Measured peak rates of this machine: matrix products and memory copies."""

import time
from collections.abc import Callable

import torch

EMULATED_TFLOPS = 0.01
"""Rate below which a CPU must be emulating the products: a single core exceeds it in float32."""


def measure_matmul_tflops(
    device: torch.device, dtype: torch.dtype, seconds: float = 0.5, side: int | None = None
) -> float:
    """Measure the best rate of a large square matrix product in TFLOP/s: the peak that MFU refers to.

    seconds: how long to measure. side: rows and columns of the matrices; by default 8,192 on a GPU and 2,048
    on a CPU, or 512 on a CPU that emulates the dtype and would need many seconds for one product of 2,048.
    float32 is computed as `set_fp32_precision` allows. Synchronises with the device.
    """
    if side is None and device.type == "cpu":
        side = 512 if measure_matmul_tflops(device, dtype, 0.0, side=512) < EMULATED_TFLOPS else 2048
    side = side or 8192
    noise = torch.Generator(device)  # leaves torch's global generator alone
    left, right = (torch.randn(side, side, generator=noise, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    work_seconds = best_seconds(lambda: torch.mm(left, right, out=product), device, seconds)
    return 2 * side**3 / work_seconds / 1e12


def glance_at_matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the same rate in some milliseconds, on smaller matrices: the result is somewhat low."""
    return measure_matmul_tflops(device, dtype, seconds=0.0, side=1024 if device.type == "cpu" else 4096)


def measure_copy_gbps(device: torch.device, seconds: float = 0.5) -> float:
    """Measure the best rate of a copy within the device's memory in GB/s, counting reads and writes.

    The 256 MiB buffers exceed the last-level cache of all but the largest CPUs. Synchronises with the device.
    """
    source = torch.zeros(2**28, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    work_seconds = best_seconds(lambda: target.copy_(source), device, seconds)
    return 2 * source.numel() / work_seconds / 1e9


def best_seconds(work: Callable[[], object], device: torch.device, budget_seconds: float) -> float:
    """Return the seconds that one call of `work` takes: the best burst within the budget, after a warm-up."""
    on_cpu = device.type == "cpu"
    calls = 1 if on_cpu else 10  # a burst of ten hides the cost of launching and waiting

    def burst() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if not on_cpu:
            torch.accelerator.synchronize(device)
        return (time.perf_counter() - start) / calls

    burst()
    deadline = time.perf_counter() + budget_seconds
    best = burst()
    while time.perf_counter() < deadline:
        best = min(best, burst())
    return best
