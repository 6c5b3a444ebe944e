"""Memory: the peak, what glibc does with freed memory, and a one-line error when it is full."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fasttrain.errors import UserError


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak memory so far in GiB: allocated on the GPU, or the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees; returns whether it will (False on other systems).

    By default glibc requests the memory of every large tensor from the kernel, which zeroes it page by page,
    and returns it as soon as it is freed: a quarter of a training step of 512 images (docs/lab-notebook.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # as in glibc's malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


@contextmanager
def report_full_memory(batch_size: int) -> Iterator[None]:
    """Within the block, out-of-memory errors of torch, NumPy and DALI become a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "can't allocate memory" not in text and "out of memory" not in text:
            raise
        half = max(2, batch_size // 2)
        raise UserError(f"--batch-size {batch_size}: out of memory; try --batch-size {half}") from error
