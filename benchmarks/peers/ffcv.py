"""ffcv: its own file format, its operators compiled by numba, threads instead of processes.

Its own shift leaves a border of one colour. So that the work is the same, images are written with a reflected
border, and a small operator of ours crops them.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import torch

os.environ.setdefault("NUMBA_THREADING_LAYER", "omp")  # its default, TBB, hung at the process's exit

from ffcv.fields import IntField, RGBImageField
from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from ffcv.transforms import (
    Cutout,
    NormalizeImage,
    RandomHorizontalFlip,
    Squeeze,
    ToDevice,
    ToTensor,
    ToTorchImage,
)
from ffcv.writer import DatasetWriter
from torch import Tensor

PADDING, SIDE = 4, 32


class RandomCrop(Operation):
    """Cut SIDE x SIDE pixels out of every padded image, at an offset of its own."""

    def generate_code(self) -> Callable:
        in_parallel = Compiler.get_iterator()

        def crop(images: np.ndarray, out: np.ndarray) -> np.ndarray:
            for index in in_parallel(len(images)):
                row, column = np.random.randint(2 * PADDING + 1), np.random.randint(2 * PADDING + 1)
                out[index] = images[index, row : row + SIDE, column : column + SIDE]
            return out[: len(images)]

        crop.is_parallel = True  # type: ignore[attr-defined]
        return crop

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        state = replace(previous_state, shape=(SIDE, SIDE, 3), jit_mode=True)
        return state, AllocationQuery(state.shape, state.dtype)


class _Images:
    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray) -> None:
        self._images, self._labels = images_NHWC, labels_N

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._images[index], int(self._labels[index])


class _Batches:
    def __init__(self, loader: Loader, folder: tempfile.TemporaryDirectory) -> None:
        self._loader, self._folder = loader, folder  # the folder lives as long as the loader reads from it

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._loader


def batches(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    batch_size: int,
    workers: int,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
) -> Iterable[tuple[Tensor, Tensor]]:
    folder = tempfile.TemporaryDirectory(prefix="ffcv-")
    path = str(Path(folder.name) / "images.beton")
    border = (PADDING, PADDING)
    padded_NHWC = np.pad(images_NHWC, ((0, 0), border, border, (0, 0)), mode="reflect")
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    with redirect_stderr(StringIO()):  # its progress bar
        DatasetWriter(path, fields, num_workers=1).from_indexed_dataset(_Images(padded_NHWC, labels_N))
    fill = tuple(round(255 * value) for value in mean)
    to_device = [] if device.type == "cpu" else [ToDevice(device, non_blocking=True)]
    dtype = np.float16 if device.type == "cuda" else np.float32
    pixel_mean, pixel_std = 255 * np.array(mean), 255 * np.array(std)
    loader = Loader(
        path,
        batch_size=batch_size,
        num_workers=max(workers, 1),
        order=OrderOption.RANDOM,
        os_cache=True,
        drop_last=True,
        pipelines={
            "image": [
                SimpleRGBImageDecoder(),
                RandomHorizontalFlip(),
                RandomCrop(),
                Cutout(8, fill),
                NormalizeImage(pixel_mean, pixel_std, dtype),
                ToTensor(),
                *to_device,
                ToTorchImage(),
            ],
            "label": [IntDecoder(), ToTensor(), Squeeze(), *to_device],
        },
    )
    return _Batches(loader, folder)
