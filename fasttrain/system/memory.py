"""Memory: the most that was held, what glibc does with freed memory, and one line when it is full."""

import ctypes
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fasttrain.errors import UserError


def peak_memory_gib(device: torch.device) -> float:
    """The most memory held so far: allocated on the GPU, resident in the process without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that this process frees; returns whether it does, False on other systems.

    By default it takes every large tensor from the kernel, which zeroes it page by page, and gives it back at
    once: a quarter of a training step of 512 images (docs/lab-notebook.md).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # their numbers in glibc's malloc.h
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


@contextmanager
def report_full_memory(batch_size: int) -> Iterator[None]:
    """Within the block, torch's, numpy's and DALI's errors about full memory become a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "can't allocate memory" not in text and "out of memory" not in text:
            raise
        half = max(2, batch_size // 2)
        raise UserError(f"--batch-size {batch_size}: the memory is full; try --batch-size {half}") from error
