"""The DALI pipeline: one definition for the GPU and for DALI's CPU backend.

Images lie decoded in memory, already padded. Of each, the window that its crop asks for is copied out; DALI
mirrors half of them, cuts out a square, and hands the batch to torch without a copy.

DALI's operators get their random choices as a condition or as one tensor, never as a scalar of each image:
DALI 2.4 checks the whole batch anew whenever it reads such a scalar, which costs more than the work
(benchmarks/LOG.md).
Axis suffixes: N images, C channels, H rows, W columns.
"""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.batches import Loader
from fasttrain.data.sampler import Augmentation, Sampler

PREFETCH = 2
"""Batches that DALI prepares ahead of the consumer."""


class DaliLoader(Loader):
    """Batches of images and labels from a DALI pipeline.

    images_NHWC: (N, P, P, 3) uint8, padded: P = augmentation.crop + augmentation.room. labels_N: (N,) uint8.
    fill: the pixel, red, green and blue from 0 to 255, that a cutout leaves.
    Yields images_NCHW (batch, 3, crop, crop) uint8 in channels_last and labels_N int64, on `device`.

    The pipeline knows no epochs: the step counts on, so DALI goes on preparing batches while an epoch ends,
    and nothing drains in between.
    """

    def __init__(
        self,
        images_NHWC: np.ndarray,
        labels_N: np.ndarray,
        sampler: Sampler,
        augmentation: Augmentation,
        *,
        fill: tuple[int, int, int],
        device: torch.device,
        threads: int,
    ) -> None:
        super().__init__(sampler)
        self.name = f"dali-{dali_version()}-{'gpu' if device.type == 'cuda' else 'cpu'}"
        self.augmentation = augmentation
        side = augmentation.crop
        # (N, room + 1, room + 1, side, side, 3): a view of every window of every image. Copies nothing.
        windows = np.lib.stride_tricks.sliding_window_view(images_NHWC, (side, side), axis=(1, 2))
        self._windows = windows.transpose(0, 1, 2, 4, 5, 3)
        self._labels_N = labels_N.astype(np.int64)
        self._fill, self._device, self._threads = fill, device, threads
        self._pipeline: Any = None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._pipeline = None  # what it has prepared is for other steps

    def _next(self) -> tuple[Tensor, Tensor]:
        if self._pipeline is None:
            self._pipeline = self._build(first_step=self._step)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        images, labels = self._pipeline.run(stream)  # ready on torch's stream, no host sync
        images_NHWC = torch.from_dlpack(images.as_tensor())
        return images_NHWC.permute(0, 3, 1, 2), torch.from_dlpack(labels.as_tensor())

    def _build(self, first_step: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        flip, cutout = self.augmentation.flip, self.augmentation.cutout
        on_gpu = self._device.type == "cuda"
        # DALI reads a batch after the callback has returned, without a copy: keep as many alive as can be
        # in flight, plus the one being read.
        in_flight: deque[list[np.ndarray]] = deque(maxlen=PREFETCH + 2)

        def gather(info: Any) -> list[np.ndarray]:
            step = first_step + info.iteration
            indices = self.sampler(step)
            draws = self.augmentation.draw(step, self.sampler.epoch(step), indices)
            rows, columns, mirrored, holes = draws
            batch = [self._windows[indices, rows, columns], self._labels_N[indices]]
            batch += [mirrored] * flip + [holes.astype(np.float32)] * bool(cutout)
            in_flight.append(batch)
            return batch

        inputs = [(types.UINT8, 3, "HWC"), (types.INT64, 0, "")]
        inputs += [(types.BOOL, 0, "")] * flip + [(types.FLOAT, 1, "")] * bool(cutout)
        dtypes, ndims, layouts = (list(column) for column in zip(*inputs, strict=True))

        @pipeline_def(
            batch_size=self.sampler.batch_size,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
            enable_conditionals=True,
        )
        def pipeline() -> Any:
            images, labels, *draws = fn.external_source(
                source=gather,
                num_outputs=len(inputs),
                batch=True,
                batch_info=True,
                no_copy=True,
                dtype=dtypes,
                ndim=ndims,
                layout=layouts,
            )
            if on_gpu:
                images, labels = images.gpu(), labels.gpu()
            if flip:
                mirrored = draws[0]
                if mirrored:  # of each image: DALI splits the batch
                    images = fn.flip(images)
            if cutout:
                images = fn.erase(
                    images,
                    anchor=draws[-1],
                    shape=[float(cutout)] * 2,
                    axis_names="HW",
                    fill_value=[float(value) for value in self._fill],
                )
            return images, labels

        return pipeline()


def dali_version() -> str:
    """The installed DALI's version. Raises ImportError where there is none."""
    import nvidia.dali

    return nvidia.dali.__version__
