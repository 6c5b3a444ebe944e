"""The DALI pipeline: one definition for the GPU and for DALI's CPU backend.

The images lie in memory, padded: in the GPU's if they fit there, otherwise in the host's. The images of
several batches, a chunk, are gathered at a time. DALI crops and mirrors all of them in one affine warp, cuts
out a square of each, and hands the chunk to torch without a copy; it is split into batches afterwards.

This file follows from what a GPU does with a pipeline (docs/design.md, "What a GPU sees in one step"). The
random choices of a chunk form one tensor for each operator: DALI flips, splits and merges images one by one.
The images come on a stream of their own: DALI waits for it, and must not wait for queued training steps. And
a chunk is large: launches, copies and waits cost the same for any number of images.
Axis suffixes: N images, C channels, H rows, W columns.
"""

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.augmentation import Augmentation, AugmentParams
from fasttrain.data.loader import Loader
from fasttrain.data.padding import LazyPadded
from fasttrain.data.sampler import Sampler
from fasttrain.system.memory import pinned

PREFETCH = 2
"""Chunks that DALI prepares ahead of the consumer."""

IN_FLIGHT = PREFETCH + 2
"""The host's arrays to keep alive: DALI reads them after a callback has returned, without a copy."""

CHUNK_BYTES = 2048 * 32 * 32 * 3
"""On a CPU: the pixels of a chunk, which stay in the cache."""

CHUNK_IMAGES, CHUNK_SHARE = 16_384, 1 / 64
"""On a GPU: the images of a chunk, and the share of the free memory that its pixels may take.

DALI's kernels have a block for each image along a grid axis of at most 65,535 (block_setup.h, erase_gpu.h).
"""

RESIDENT_SHARE = 0.25
"""Share of the GPU's free memory that the images may take; larger data sets stay in the host's memory."""

Plan = Callable[[int], tuple[np.ndarray, AugmentParams]]
"""Of a chunk's number: the indices of its images, and how each of them is augmented."""


class DaliLoader(Loader):
    """Batches of images and labels from a DALI pipeline.

    images_NHWC: (N, P, P, 3) uint8, padded: P = resolution + max_offset of the augmentation; or LazyPadded,
    for images too large for that. labels_N: (N,) integers.
    fill: the pixel that a cutout leaves: red, green and blue, 0 to 255.
    threads: DALI's worker threads.
    Yields images_NCHW, uint8 in channels_last, and labels_N, int64, on `device`.

    The pipeline has no epochs: steps are counted across them, so DALI keeps preparing batches while one epoch
    ends and the next begins, and the queue never runs dry.
    """

    def __init__(
        self,
        images_NHWC: np.ndarray | LazyPadded,
        labels_N: np.ndarray,
        sampler: Sampler,
        augmentation: Augmentation,
        *,
        fill: tuple[int, int, int],
        device: torch.device,
        threads: int,
    ) -> None:
        super().__init__(sampler, device)
        self.name = f"dali-{dali_version()}-{'gpu' if device.type == 'cuda' else 'cpu'}"
        self.augmentation = augmentation
        self._fill, self._threads = fill, threads
        self._store: ImageStore
        if isinstance(images_NHWC, np.ndarray) and fits_on(device, images_NHWC.nbytes):
            self._store = DeviceStore(images_NHWC, labels_N, device)
        else:
            self._store = HostStore(images_NHWC, labels_N)
        self._batches_per_chunk = batches_per_chunk(sampler, augmentation.resolution, device)
        self._forget()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._forget()  # the prepared batches belong to other steps

    def _forget(self) -> None:
        self._pipeline: Any = None
        self._ready: deque[tuple[Tensor, Tensor]] = deque()

    def _next(self) -> tuple[Tensor, Tensor]:
        if not self._ready:
            self._take_chunk()
        return self._ready.popleft()

    def _take_chunk(self) -> None:
        if self._pipeline is None:
            self._sizes: deque[list[int]] = deque()
            self._pipeline = self._build(self._plan(self._step, self._sizes))
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        outputs = self._pipeline.run(stream)  # ready on torch's stream, no host sync
        images_NHWC, labels_N = (torch.from_dlpack(output.as_tensor()) for output in outputs)
        images_NCHW, sizes = images_NHWC.permute(0, 3, 1, 2), self._sizes.popleft()
        self._ready.extend(zip(images_NCHW.split(sizes), labels_N.split(sizes), strict=True))

    def _plan(self, first_step: int, sizes: deque[list[int]]) -> Plan:
        """Return a function that chooses a chunk's images, and how each is augmented.

        It appends the sizes of each chunk's batches to `sizes`. It does not refer to this loader, and so the
        pipeline is closed as soon as the loader is dropped.
        """
        sampler, augmentation, count = self.sampler, self.augmentation, self._batches_per_chunk

        @lru_cache(maxsize=PREFETCH + 2)  # both sources ask for it
        def plan(chunk: int) -> tuple[np.ndarray, AugmentParams]:
            steps = range(first_step + chunk * count, first_step + (chunk + 1) * count)
            indices = [sampler(step) for step in steps]
            params = [
                augmentation.draw(step, sampler.epoch(step), chosen)
                for step, chosen in zip(steps, indices, strict=True)
            ]
            sizes.append([len(batch) for batch in indices])
            return np.concatenate(indices), AugmentParams(*map(np.concatenate, zip(*params, strict=True)))

        return plan

    def _build(self, plan: Plan) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        store, fill, resolution = self._store, self._fill, self.augmentation.resolution
        warp, cutout = self.augmentation.flip or self.augmentation.max_offset > 0, self.augmentation.cutout
        on_gpu = self.device.type == "cuda"
        in_flight: deque[list[np.ndarray]] = deque(maxlen=IN_FLIGHT)

        def images_and_labels(info: Any) -> list[Any]:
            indices, _ = plan(info.iteration)
            return store.gather(indices)

        def warps_and_cutouts(info: Any) -> list[np.ndarray]:
            _, params = plan(info.iteration)
            matrices, corners = warp_matrices(params, resolution), params.cutout_corners.astype(np.float32)
            in_flight.append([matrices] * warp + [corners] * bool(cutout))
            return in_flight[-1]

        @pipeline_def(
            batch_size=self.sampler.batch_size * self._batches_per_chunk,
            num_threads=self._threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        def pipeline() -> Any:
            images, labels = fn.external_source(
                images_and_labels,
                num_outputs=2,
                dtype=[types.UINT8, types.INT64],
                ndim=[3, 0],
                layout=["HWC", ""],
                batch=True,
                batch_info=True,
                **store.settings,
            )
            if on_gpu and store.settings["device"] == "cpu":
                images, labels = images.gpu(), labels.gpu()
            ndims = [2] * warp + [1] * bool(cutout)
            if ndims:
                choices = fn.external_source(
                    warps_and_cutouts,
                    num_outputs=len(ndims),
                    dtype=types.FLOAT,
                    ndim=ndims,
                    batch=True,
                    batch_info=True,
                    no_copy=True,
                )
            if warp:
                size = (resolution, resolution)
                images = fn.warp_affine(images, matrix=choices[0], size=size, interp_type=types.INTERP_NN)
            if cutout:
                images = fn.erase(
                    images,
                    anchor=choices[-1],
                    shape=[float(cutout)] * 2,
                    axis_names="HW",
                    fill_value=[float(value) for value in fill],
                )
            return images, labels

        return pipeline()


def warp_matrices(params: AugmentParams, resolution: int) -> np.ndarray:
    """Return the matrices that crop and mirror: (N, 2, 3) float32, from a finished pixel to a padded image's.

    Column and row are those of the pixel's centre, so that the nearest pixel is the exact one.
    """
    matrices = np.zeros((len(params.rows), 2, 3), np.float32)
    matrices[:, 0, 0] = np.where(params.mirrored, -1, 1)
    matrices[:, 0, 2] = params.columns + np.where(params.mirrored, resolution, 0)
    matrices[:, 1, 1] = 1
    matrices[:, 1, 2] = params.rows
    return matrices


def batches_per_chunk(sampler: Sampler, resolution: int, device: torch.device) -> int:
    """Return how many batches form a chunk on this device: at least one, at most an epoch."""
    image_bytes, images = 3 * resolution**2, CHUNK_BYTES // (3 * resolution**2)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        images = min(CHUNK_IMAGES, int(CHUNK_SHARE * free) // image_bytes)
    return max(1, min(images // sampler.batch_size, sampler.steps_per_epoch))


class ImageStore(Protocol):
    """All images and labels.

    settings: those of the DALI source that takes the arrays from `gather`.
    """

    settings: dict[str, Any]

    def gather(self, indices: np.ndarray) -> list[Any]:
        """Return copies of these images, padded, (N, P, P, 3) uint8, and their labels, (N,) int64."""


class HostStore:
    """Images in the host's memory, or mapped from a file."""

    def __init__(self, images_NHWC: np.ndarray | LazyPadded, labels_N: np.ndarray) -> None:
        self.settings = {"device": "cpu", "no_copy": True}
        self._images_NHWC, self._labels_N = images_NHWC, labels_N.astype(np.int64)
        self._in_flight: deque[list[np.ndarray]] = deque(maxlen=IN_FLIGHT)

    def gather(self, indices: np.ndarray) -> list[Any]:
        self._in_flight.append([self._images_NHWC[indices], self._labels_N[indices]])
        return self._in_flight[-1]


class DeviceStore:
    """Images in the GPU's memory: only the indices of a chunk cross the bus."""

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray, device: torch.device) -> None:
        # A stream of its own: DALI waits for what is queued on it, and that must not be training steps. DALI
        # copies its input within the GPU, in this stream's order, and torch reuses the memory in that order.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.settings = {"device": "gpu", "no_copy": False, "cuda_stream": self._stream}
        self._device = device
        self._images_NHWC = torch.from_numpy(images_NHWC).to(device)
        self._labels_N = torch.from_numpy(labels_N).to(device, torch.int64)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(device))  # until both are there

    def gather(self, indices: np.ndarray) -> list[Any]:
        indices_N = torch.from_numpy(indices)
        if self._device.type == "cuda":
            indices_N = pinned(indices_N)  # otherwise the copy would make the host wait
        with torch.cuda.stream(self._stream):
            indices_N = indices_N.to(self._device, non_blocking=True)
            return [self._images_NHWC.index_select(0, indices_N), self._labels_N.index_select(0, indices_N)]


def fits_on(device: torch.device, num_bytes: int) -> bool:
    """Return whether images of `num_bytes` in all are kept in the memory of this device, a GPU."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return num_bytes <= RESIDENT_SHARE * free


def dali_version() -> str:
    """Return the version of the installed DALI. Raises ImportError if there is none."""
    import nvidia.dali

    return nvidia.dali.__version__
