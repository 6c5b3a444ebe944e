"""The DALI pipeline: one definition for the GPU and for DALI's CPU backend.

The images are decoded and padded in memory: the GPU's if they fit, otherwise the host's. Each image's crop is
copied out of there; DALI mirrors half of the crops, cuts out a square, and hands the batch to torch without a
copy.

Two costs of DALI 2.4 shape this file (docs/lab-notebook.md). Random choices are passed as a condition or as
one tensor, never as a scalar per image: DALI checks the whole batch again whenever it reads such a scalar.
And every iteration of a pipeline has a fixed cost, so one iteration makes a chunk of several small batches,
which is split afterwards.
Axis suffixes: N images, C channels, H rows, W columns.
"""

from collections import deque
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.augmentation import Augmentation, AugmentParams
from fasttrain.data.loader import Loader
from fasttrain.data.padding import LazyCrops, crop_views
from fasttrain.data.sampler import Sampler

PREFETCH = 2
"""Chunks that DALI prepares ahead of the consumer."""

CHUNK_BYTES = 2048 * 32 * 32 * 3
"""Pixels in a chunk of the training pipeline: they stay in the cache. A batch with more is a chunk itself."""

RESIDENT_SHARE = 0.25
"""Share of the GPU's free memory that the images may take; larger data sets stay in the host's memory."""


class DaliLoader(Loader):
    """Batches of images and labels from a DALI pipeline.

    images_NHWC: (N, P, P, 3) uint8, padded: P = resolution + max_offset of the augmentation; or LazyCrops,
    for images too large for that. labels_N: (N,) integers.
    fill: the pixel that a cutout leaves: red, green and blue, 0 to 255.
    threads: DALI's worker threads.
    Yields images_NCHW, uint8 in channels_last, and labels_N, int64, on `device`.

    The pipeline has no epochs: steps are counted across them, so DALI keeps preparing batches while one epoch
    ends and the next begins, and the queue never runs dry.
    """

    def __init__(
        self,
        images_NHWC: np.ndarray | LazyCrops,
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
            self._store = DeviceStore(images_NHWC, labels_N, augmentation.resolution, device)
        else:
            self._store = HostStore(images_NHWC, labels_N, augmentation.resolution)
        # The last batch of an evaluation is smaller: there, each batch is one chunk.
        batch_bytes = 3 * augmentation.resolution**2 * sampler.batch_size
        self._batches_per_chunk = max(1, CHUNK_BYTES // batch_bytes) if sampler.train else 1
        self._forget()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._forget()  # the prepared batches belong to other steps

    def _forget(self) -> None:
        self._pipeline: Any = None
        self._ready: deque[tuple[Tensor, Tensor]] = deque()

    def _next(self) -> tuple[Tensor, Tensor]:
        if not self._ready:
            if self._pipeline is None:
                self._pipeline = self._build(first_step=self._step)
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            outputs = self._pipeline.run(stream)  # ready on torch's stream, no host sync
            images_NHWC, labels_N = (torch.from_dlpack(output.as_tensor()) for output in outputs)
            images_NCHW, size = images_NHWC.permute(0, 3, 1, 2), self.sampler.batch_size
            self._ready.extend(zip(images_NCHW.split(size), labels_N.split(size), strict=True))
        return self._ready.popleft()

    def _build(self, first_step: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        flip, cutout = self.augmentation.flip, self.augmentation.cutout
        on_gpu = self.device.type == "cuda"
        # DALI reads the host's arrays after a callback has returned, without a copy: keep alive as many as
        # can be in flight, and the one being read.
        in_flight: deque[Any] = deque(maxlen=2 * (PREFETCH + 2))

        @lru_cache(maxsize=PREFETCH + 2)  # both callbacks need them
        def choices(chunk: int) -> tuple[np.ndarray, AugmentParams]:
            first = first_step + chunk * self._batches_per_chunk
            steps = range(first, first + self._batches_per_chunk)
            indices = [self.sampler(step) for step in steps]
            params = [
                self.augmentation.draw(step, self.sampler.epoch(step), chosen)
                for step, chosen in zip(steps, indices, strict=True)
            ]
            return np.concatenate(indices), AugmentParams(*map(np.concatenate, zip(*params, strict=True)))

        def crops(info: Any) -> list[Any]:
            indices, params = choices(info.iteration)
            batch = self._store.gather(indices, params.rows, params.columns)
            in_flight.append(batch)
            return batch

        def flips_and_cutouts(info: Any) -> list[np.ndarray]:
            _, params = choices(info.iteration)
            batch = [params.mirrored] * flip + [params.cutout_corners.astype(np.float32)] * bool(cutout)
            in_flight.append(batch)
            return batch

        param_columns = [(types.BOOL, 0, "")] * flip + [(types.FLOAT, 1, "")] * bool(cutout)
        of_crops = _source([(types.UINT8, 3, "HWC"), (types.INT64, 0, "")]) | self._store.settings
        of_params = _source(param_columns) | {"device": "cpu", "no_copy": True}

        @pipeline_def(
            batch_size=self.sampler.batch_size * self._batches_per_chunk,
            num_threads=self._threads,
            device_id=(self.device.index or 0) if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
            enable_conditionals=True,
        )
        def pipeline() -> Any:
            images, labels = fn.external_source(source=crops, **of_crops)
            if on_gpu and of_crops["device"] == "cpu":
                images, labels = images.gpu(), labels.gpu()
            params = fn.external_source(source=flips_and_cutouts, **of_params) if param_columns else []
            if flip:
                mirrored = params[0]
                if mirrored:  # decided per image: DALI splits the batch
                    images = fn.flip(images)
            if cutout:
                images = fn.erase(
                    images,
                    anchor=params[-1],
                    shape=[float(cutout)] * 2,
                    axis_names="HW",
                    fill_value=[float(value) for value in self._fill],
                )
            return images, labels

        return pipeline()


def _source(columns: list[tuple[Any, int, str]]) -> dict[str, Any]:
    """Return the settings of a DALI source whose callback returns whole batches.

    columns: dtype, number of dimensions and layout of each output.
    """
    dtypes, ndims, layouts = zip(*columns, strict=True) if columns else ((), (), ())
    settings = {"num_outputs": len(columns), "batch": True, "batch_info": True}
    return settings | {"dtype": list(dtypes), "ndim": list(ndims), "layout": list(layouts)}


class ImageStore(Protocol):
    """All images and labels, and a way to copy crops out of them.

    settings: those of the DALI source that takes the arrays from `gather`.
    """

    settings: dict[str, Any]

    def gather(self, indices: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> list[Any]:
        """Return the crops, (N, resolution, resolution, 3), that begin at these pixels, and labels_N."""


class HostStore:
    """Images in the host's memory, or mapped from a file."""

    def __init__(self, images_NHWC: np.ndarray | LazyCrops, labels_N: np.ndarray, resolution: int) -> None:
        self.settings = {"device": "cpu", "no_copy": True}
        self._crops = (
            images_NHWC if isinstance(images_NHWC, LazyCrops) else crop_views(images_NHWC, resolution)
        )
        self._labels_N = labels_N.astype(np.int64)

    def gather(self, indices: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> list[Any]:
        return [self._crops[indices, rows, columns], self._labels_N[indices]]


class DeviceStore:
    """Images in the GPU's memory: only the indices and offsets of a batch cross the bus."""

    def __init__(
        self, images_NHWC: np.ndarray, labels_N: np.ndarray, resolution: int, device: torch.device
    ) -> None:
        # DALI copies its input within the GPU, in the order of torch's current stream, before the memory can
        # be reused. Without that copy it would wait for everything queued on this stream later.
        self.settings = {"device": "gpu", "no_copy": False}
        self._device = device
        images = torch.from_numpy(images_NHWC).to(device)
        # As padding.crop_views: (N, rows, columns, resolution, resolution, 3).
        self._crops = images.unfold(1, resolution, 1).unfold(2, resolution, 1).permute(0, 1, 2, 4, 5, 3)
        self._labels_N = torch.from_numpy(labels_N).to(device, torch.int64)

    def gather(self, indices: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> list[Any]:
        places = torch.from_numpy(np.stack((indices, rows, columns)))
        if self._device.type == "cuda":
            places = places.pin_memory()  # otherwise the copy would make the host wait
        places = places.to(self._device, non_blocking=True)
        return [self._crops[tuple(places)].contiguous(), self._labels_N[places[0]]]


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
