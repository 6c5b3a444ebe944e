"""A training step captured once as a CUDA graph, so that one launch replays all of its kernels.

Launched one by one, the few hundred kernels of a step cost the host more time than they take on a fast GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_CALLS = 3
"""Calls before the capture: libraries pick their kernels, compilers compile, and optimizers allocate."""


def capture(
    work: Callable[[Tensor, Tensor], object], images_NCHW: Tensor, labels_N: Tensor
) -> Callable[[Tensor, Tensor], None]:
    """Capture `work` on a batch like those to come; returns a function that replays it on any such batch.

    The kernels are replayed with the addresses that they were captured with. So `work` must leave its results
    in tensors that stay, and take whatever changes from step to step from tensors, never from Python numbers;
    batches are copied to where the captured kernels look for them. `work` is called WARM_UP_CALLS times and
    then captured, which computes nothing. It must not wait for the GPU.
    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, "Whole-network capture".
    """
    images, labels = torch.empty_like(images_NCHW), torch.empty_like(labels_N)  # keeps channels_last
    images.copy_(images_NCHW)
    labels.copy_(labels_N)
    device = images.device
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        for _ in range(WARM_UP_CALLS):
            work(images, labels)
    torch.cuda.current_stream(device).wait_stream(aside)

    graph = torch.cuda.CUDAGraph()
    # thread_local: the threads of DALI and of the checkpoints may allocate memory in the meantime.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work(images, labels)

    def replay(images_NCHW: Tensor, labels_N: Tensor) -> None:
        require_like(images_NCHW, images)
        require_like(labels_N, labels)
        images.copy_(images_NCHW, non_blocking=True)
        labels.copy_(labels_N, non_blocking=True)
        graph.replay()

    return replay


def require_like(batch: Tensor, captured: Tensor) -> None:
    """Raise ValueError unless a batch is of the captured shape and type: copying would stretch or cast it."""
    if (batch.shape, batch.dtype) != (captured.shape, captured.dtype):
        raise ValueError(
            f"a batch of {tuple(batch.shape)} {batch.dtype} for a step that was captured with "
            f"{tuple(captured.shape)} {captured.dtype}"
        )
