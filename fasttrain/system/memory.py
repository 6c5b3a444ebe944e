"""Memory: the peak, what glibc does with freed memory, and a one-line error when it is full."""

import ctypes
import functools
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fasttrain.errors import UserError, one_line


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


@functools.cache
def pinning_fails() -> str | None:
    """Try to pin memory, which a GPU can read while the host continues; returns None, or why it fails."""
    try:
        torch.empty(1, pin_memory=True)
    except RuntimeError as error:
        return one_line(error)
    return None


def pinned(tensor: Tensor) -> Tensor:
    """Return a copy of a CPU tensor in pinned memory; where pinning fails, the tensor itself."""
    return tensor if pinning_fails() else tensor.pin_memory()


def is_full_memory(error: BaseException) -> bool:
    """Return whether torch, NumPy or DALI ran out of memory."""
    text = str(error).lower()
    full = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return full or "can't allocate memory" in text or "out of memory" in text


@contextmanager
def report_full_memory(batch_size: int) -> Iterator[None]:
    """Within the block, out-of-memory errors become a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_full_memory(error):
            raise
        half = max(2, batch_size // 2)
        raise UserError(f"--batch-size {batch_size}: out of memory; try --batch-size {half}") from error
