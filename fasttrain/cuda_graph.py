"""A training step captured once as a CUDA graph, so that one launch replays all of its kernels.

Launching the few hundred kernels of a step one by one takes the host longer than a fast GPU takes to run
them.
"""

import functools
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import one_line

WARM_UP_CALLS = 3
"""Calls before the capture, in which libraries choose kernels, compilers compile, and optimizers allocate."""

ATTEMPTS = 2
"""Captures to try: the first may be disturbed by another thread."""


class CaptureError(RuntimeError):
    """The work cannot be captured."""


def capture(
    works: Sequence[Callable[[Tensor, Tensor], object]], images_NCHW: Tensor, labels_N: Tensor
) -> list[Callable[[Tensor, Tensor], None]]:
    """Capture functions on a batch like those to come; returns for each one that replays it on any batch.

    Kernels are replayed with the addresses that they were captured with. So a function must write its results
    to persistent tensors, and read everything that changes from step to step from tensors, never from Python
    numbers; each batch is copied to where the captured kernels read it. A function is called WARM_UP_CALLS
    times and then captured, which computes nothing. It must not wait for the GPU.
    All captures share their memory: a replay writes over whatever another one left there.
    Raises CaptureError if a capture fails twice; errors of the calls before it pass.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "Whole-network capture".
    """
    if not works:
        return []
    images, labels = torch.empty_like(images_NCHW), torch.empty_like(labels_N)  # keeps channels_last
    images.copy_(images_NCHW)
    labels.copy_(labels_N)
    device = images.device
    aside = torch.cuda.Stream(device)
    graphs: list[torch.cuda.CUDAGraph] = []
    for work in works:
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP_CALLS):
                work(images, labels)
        torch.cuda.current_stream(device).wait_stream(aside)
        shared = graphs[-1].pool() if graphs else None
        graphs.append(_capture_safely(functools.partial(work, images, labels), device, shared))

    def replay(graph: torch.cuda.CUDAGraph, images_NCHW: Tensor, labels_N: Tensor) -> None:
        require_like(images_NCHW, images)
        require_like(labels_N, labels)
        images.copy_(images_NCHW, non_blocking=True)
        labels.copy_(labels_N, non_blocking=True)
        graph.replay()

    return [functools.partial(replay, graph) for graph in graphs]


def _capture_safely(work: Callable[[], object], device: torch.device, pool: Any) -> torch.cuda.CUDAGraph:
    """Capture while nothing else on this device waits, allocates or frees.

    A call that waits for the whole device fails the capture, from any thread: DALI's makes one when it frees
    a batch (its tensors are freed on a thread of their own, which synchronises the device). So drop all
    garbage first, wait until the device is idle, keep the collector off, and try once more.
    pool: the memory of an earlier capture, to share; None for memory of its own. The second attempt has its
    own too: torch goes on to count a pool in which a capture failed as being recorded to (CUDAGraph.cpp,
    capture_end).
    """
    failure = ""
    for _ in range(ATTEMPTS):
        gc.collect()
        torch.cuda.synchronize(device)
        collects = gc.isenabled()
        gc.disable()
        try:
            graph = torch.cuda.CUDAGraph()
            # The outer context makes the stream current again: torch's own does not after a failure.
            with (
                torch.cuda.stream(torch.cuda.current_stream(device)),
                # thread_local: the threads of DALI and of the checkpoints may allocate memory meanwhile.
                torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
            ):
                work()
            return graph
        except RuntimeError as error:
            failure = one_line(error)  # not the error: its traceback would keep the attempt's tensors
            pool = None
        finally:
            if collects:
                gc.enable()
    raise CaptureError(failure)


def require_like(batch: Tensor, captured: Tensor) -> None:
    """Raise ValueError unless a batch has the captured shape and dtype: a copy would broadcast or cast it."""
    if (batch.shape, batch.dtype) != (captured.shape, captured.dtype):
        raise ValueError(
            f"the batch is {tuple(batch.shape)} {batch.dtype}, but the step was captured with "
            f"{tuple(captured.shape)} {captured.dtype}"
        )
