"""The DALI pipeline: one definition for the GPU and for DALI's CPU backend.

Images lie decoded in memory, already padded; DALI crops, mirrors, normalises, casts and turns planes into
channels-last in one kernel, cuts out a square, and hands the batch to torch without a copy.
Axis suffixes: N images, C channels, H rows, W columns.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.sampler import Augmentation, Sampler

PREFETCH = 2
"""Batches that DALI prepares ahead of the consumer."""


class DaliLoader:
    """Batches of images and labels from a DALI pipeline.

    images: (N, 3, P, P) uint8, padded: P = augmentation.crop + augmentation.room. labels: (N,) uint8.
    Yields images_NCHW (batch, 3, crop, crop) of `dtype` in channels_last and labels_N int64, on `device`.

    The pipeline knows no epochs: the step counts on, so DALI goes on preparing batches while an epoch ends,
    and nothing drains in between.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        sampler: Sampler,
        augmentation: Augmentation,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        dtype: torch.dtype,
        device: torch.device,
        threads: int,
    ) -> None:
        self.name = f"dali-{dali_version()}-{'gpu' if device.type == 'cuda' else 'cpu'}"
        self.sampler, self.augmentation = sampler, augmentation
        self._images, self._labels = images, labels.astype(np.int64)
        self._mean, self._std, self._dtype = mean, std, dtype
        self._device, self._threads = device, threads
        self._step = 0
        self._pipeline: Any = None

    def __len__(self) -> int:
        return self.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the current epoch: all of it, unless a restored state stands in its middle."""
        if self._pipeline is None:
            self._pipeline = self._build(first_step=self._step)
        while True:
            yield self._next()
            if self._step % len(self) == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; restores bit-exactly mid-epoch."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._pipeline = None  # what it has prepared is for other steps

    def _next(self) -> tuple[Tensor, Tensor]:
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        images, labels = self._pipeline.run(stream)  # ready on torch's stream, no host sync
        self._step += 1
        images_NHWC = torch.from_dlpack(images.as_tensor())
        return images_NHWC.permute(0, 3, 1, 2), torch.from_dlpack(labels.as_tensor())

    def _build(self, first_step: int) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        crop, room, cutout = self.augmentation.crop, self.augmentation.room, self.augmentation.cutout
        on_gpu = self._device.type == "cuda"
        inputs = 6 if cutout else 5  # without a cutout nothing reads the holes
        # DALI reads a batch after the callback has returned, without a copy: keep as many alive as can be
        # in flight, plus the one being read.
        in_flight: deque[tuple[np.ndarray, ...]] = deque(maxlen=PREFETCH + 2)

        def gather(info: Any) -> tuple[np.ndarray, ...]:
            step = first_step + info.iteration
            indices = self.sampler(step)
            rows, columns, mirrored, holes = self.augmentation.draw(step, len(indices))
            batch = (
                self._images[indices],
                self._labels[indices],
                # DALI wants a crop's offset as a share of the room, and rounds it back to pixels.
                (rows / max(room, 1)).astype(np.float32),
                (columns / max(room, 1)).astype(np.float32),
                mirrored.astype(np.int32),
                holes.astype(np.float32),
            )
            in_flight.append(batch[:inputs])
            return in_flight[-1]

        @pipeline_def(
            batch_size=self.sampler.batch_size,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if on_gpu else None,
            prefetch_queue_depth=PREFETCH,
        )
        def pipeline() -> Any:
            images, labels, rows, columns, mirrored, *holes = fn.external_source(
                source=gather,
                num_outputs=inputs,
                batch=True,
                batch_info=True,
                no_copy=True,
                dtype=[types.UINT8, types.INT64, types.FLOAT, types.FLOAT, types.INT32, types.FLOAT][:inputs],
                ndim=[3, 0, 0, 0, 0, 1][:inputs],
                layout=["CHW", "", "", "", "", ""][:inputs],
            )
            if on_gpu:
                images, labels = images.gpu(), labels.gpu()
            images = fn.crop_mirror_normalize(
                images,
                crop=(crop, crop),
                crop_pos_x=columns,
                crop_pos_y=rows,
                mirror=mirrored,
                mean=[255 * value for value in self._mean],
                std=[255 * value for value in self._std],
                dtype=types.FLOAT if self._dtype == torch.float32 else types.FLOAT16,
                output_layout="HWC",
            )
            if holes:
                # DALI 2.4's erase has no float16 kernel for the GPU. The mean is zero once normalised, and a
                # zero has the same bits in every type: there the batch passes as integers, without a copy.
                as_integers = on_gpu and self._dtype != torch.float32
                if as_integers:
                    images = fn.reinterpret(images, dtype=types.INT16)
                images = fn.erase(
                    images, anchor=holes[0], shape=[float(cutout)] * 2, axis_names="HW", fill_value=0.0
                )
                if as_integers:
                    images = fn.reinterpret(images, dtype=types.FLOAT16)
            return images, labels

        return pipeline()


def dali_version() -> str:
    """The installed DALI's version. Raises ImportError where there is none."""
    import nvidia.dali

    return nvidia.dali.__version__
