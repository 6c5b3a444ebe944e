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

from fasttrain.data.sampler import Sampler

PREFETCH = 2
"""Batches that DALI prepares ahead of the consumer."""


class DaliLoader:
    """Batches of images and labels from a DALI pipeline.

    images: (N, 3, P, P) uint8, where P >= crop; P > crop means room for random crops.
    labels: (N,) uint8.
    Yields images_NCHW (batch, 3, crop, crop) of `dtype` in channels_last and labels_N int64, on `device`.

    The pipeline knows no epochs: the sampler's step counts on, so DALI goes on preparing batches while an
    epoch ends, and nothing drains in between.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        sampler: Sampler,
        *,
        crop: int,
        flip: bool,
        cutout: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        threads: int,
    ) -> None:
        self.name = f"dali-{dali_version()}-{'gpu' if device.type == 'cuda' else 'cpu'}"
        self.sampler = sampler
        self.device = device
        self._images, self._labels = images, labels
        self._crop, self._flip, self._cutout = crop, flip, cutout
        self._mean, self._std, self._dtype = mean, std, dtype
        self._seed, self._threads = seed, threads
        self._step = 0
        self._pipeline: Any = None

    def __len__(self) -> int:
        return self.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the current epoch: all of it, unless a restored state stands in its middle."""
        if self._pipeline is None:
            self._pipeline = self._build(checkpoint=None)
        while True:
            yield self._next()
            if self._step % len(self) == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands, DALI's random generators included; restores bit-exactly mid-epoch."""
        if self._pipeline is None:
            self._pipeline = self._build(checkpoint=None)
        return {"step": self._step, "pipeline": self._pipeline.checkpoint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._pipeline = self._build(checkpoint=state["pipeline"])

    def _next(self) -> tuple[Tensor, Tensor]:
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        images, labels = self._pipeline.run(stream)  # ready on torch's stream, no host sync
        self._step += 1
        images_NHWC = torch.from_dlpack(images.as_tensor())
        return images_NHWC.permute(0, 3, 1, 2), torch.from_dlpack(labels.as_tensor())

    def _build(self, checkpoint: Any) -> Any:
        from nvidia.dali import fn, pipeline_def, types

        # DALI reads a batch after the callback has returned, without a copy: keep as many alive as can be
        # in flight, plus the one being read.
        in_flight: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=PREFETCH + 2)

        def gather(info: Any) -> tuple[np.ndarray, np.ndarray]:
            indices = self.sampler(info.iteration)
            in_flight.append((self._images[indices], self._labels[indices]))
            return in_flight[-1]

        use_gpu = self.device.type == "cuda"
        room = self._images.shape[2] - self._crop

        @pipeline_def(
            batch_size=self.sampler.batch_size,
            num_threads=self._threads,
            device_id=(self.device.index or 0) if use_gpu else None,
            seed=self._seed,
            prefetch_queue_depth=PREFETCH,
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        def pipeline() -> Any:
            # A callback that is told the step (batch_info) is what DALI can resume.
            images, labels = fn.external_source(
                source=gather,
                num_outputs=2,
                batch=True,
                batch_info=True,
                no_copy=True,
                dtype=[types.UINT8, types.UINT8],
                ndim=[3, 0],
                layout=["CHW", ""],
            )
            if use_gpu:
                images, labels = images.gpu(), labels.gpu()
            augmentation: dict[str, Any] = {}
            if room:
                # A list of values, because a continuous position is rounded to an offset, which would give
                # the first and the last offset half the share of the others.
                positions = [offset / room for offset in range(room + 1)]
                augmentation["crop_pos_x"] = fn.random.uniform(values=positions)
                augmentation["crop_pos_y"] = fn.random.uniform(values=positions)
            if self._flip:
                augmentation["mirror"] = fn.random.coin_flip()
            images = fn.crop_mirror_normalize(
                images,
                crop=(self._crop, self._crop),
                mean=[255 * value for value in self._mean],
                std=[255 * value for value in self._std],
                dtype=types.FLOAT if self._dtype == torch.float32 else types.FLOAT16,
                output_layout="HWC",
                **augmentation,
            )
            if self._cutout:
                # DALI 2.4's erase has no float16 kernel for the GPU. The mean is zero once normalised, and a
                # zero has the same bits in every type: there the batch passes as integers, without a copy.
                as_integers = use_gpu and self._dtype != torch.float32
                if as_integers:
                    images = fn.reinterpret(images, dtype=types.INT16)
                corners = [float(corner) for corner in range(self._crop - self._cutout + 1)]
                images = fn.erase(
                    images,
                    anchor=fn.random.uniform(values=corners, shape=2),
                    shape=[float(self._cutout)] * 2,
                    axis_names="HW",
                    fill_value=0.0,
                )
                if as_integers:
                    images = fn.reinterpret(images, dtype=types.FLOAT16)
            return images, fn.cast(labels, dtype=types.INT64)

        return pipeline()


def dali_version() -> str:
    """The installed DALI's version. Raises ImportError where there is none."""
    import nvidia.dali

    return nvidia.dali.__version__
