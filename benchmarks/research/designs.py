"""Other ways to build the DALI pipeline, beside the one that fasttrain has.

    python -m benchmarks.research.designs [--rounds 5] [--batch-size 512] [--step]

Each changes one thing. Images per second as delivered, and with --step the cost in a real training step; all
take turns. Random pixels stand for CIFAR-10.
"""

import dataclasses
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Workload, interleave, run, save, show
from benchmarks.loaders import REUSED, ms_in_a_step, rate
from benchmarks.stats import spread
from benchmarks.workloads import (
    Batch,
    build_step,
    endless,
    random_batch,
    random_dataset,
    train_loader,
    usual_variant,
)
from fasttrain.data import dali
from fasttrain.data.augmentation import Augmentation
from fasttrain.data.dataset import Dataset
from fasttrain.data.padding import pad
from fasttrain.data.sampler import Sampler
from fasttrain.recipe import Recipe
from fasttrain.system.machine import cpu_cores, pick_device
from fasttrain.system.precision import prepare

Stream = Iterator[Batch]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time designs of the DALI pipeline."""

    rounds: int = 5
    """Samples of each design, taken in turn."""
    seconds: float = 0.5
    """Length of a sample."""
    batch_size: int = 512
    """Images per batch."""
    images: int = 50_000
    """Size of the data set."""
    step: bool = False
    """Also measure each in a training step (on a GPU always)."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


@contextmanager
def changed(**constants: Any) -> Iterator[None]:
    """fasttrain/data/dali.py with other constants, for the pipelines that are built meanwhile."""
    before = {name: getattr(dali, name) for name in constants}
    for name, value in constants.items():
        setattr(dali, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(dali, name, value)


def ours(dataset: Dataset, recipe: Recipe, device: torch.device, **constants: Any) -> Stream:
    """Our pipeline, with other constants."""
    with changed(**constants):
        stream = endless(train_loader(dataset, recipe, device, "dali"))
        next(stream)  # builds the pipeline
    return stream


def all_in_one_operator(dataset: Dataset, recipe: Recipe, device: torch.device, threads: int) -> Stream:
    """Whole padded images into crop_mirror_normalize, which crops, mirrors, normalises and casts to fp16.

    Its choices are scalars of each image, and every batch is a chunk of its own.
    """
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"
    images_NHWC = pad(dataset.train.images, recipe.crop_padding)
    labels_N = dataset.train.labels.astype(np.int64)
    augmentation, sampler = choices(recipe, dataset)
    max_offset, side = augmentation.max_offset, augmentation.resolution

    def source(info: Any) -> list[np.ndarray]:
        indices = sampler(info.iteration)
        draws = augmentation.draw(info.iteration, sampler.epoch(info.iteration), indices)
        places = [
            (draws.columns / max_offset).astype(np.float32),
            (draws.rows / max_offset).astype(np.float32),
        ]
        batch = [images_NHWC[indices], labels_N[indices], *places, draws.mirrored.astype(np.int32)]
        corners = draws.cutout_corners + np.stack((draws.rows, draws.columns), 1)
        return [*batch, corners.astype(np.float32)]

    @pipeline_def(
        batch_size=recipe.batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=dali.PREFETCH,
    )
    def pipeline() -> Any:
        images, labels, x, y, mirrored, corners = fn.external_source(
            source=source, num_outputs=6, batch=True, batch_info=True, layout=["HWC", "", "", "", "", ""]
        )
        if on_gpu:
            images, labels = images.gpu(), labels.gpu()
        fill = [float(round(255 * value)) for value in dataset.mean]
        # Before the cast: erase has no float16 kernel on a GPU.
        images = fn.erase(
            images, anchor=corners, shape=[float(recipe.cutout)] * 2, axis_names="HW", fill_value=fill
        )
        images = fn.crop_mirror_normalize(
            images,
            crop=(side, side),
            crop_pos_x=x,
            crop_pos_y=y,
            mirror=mirrored,
            mean=[255 * value for value in dataset.mean],
            std=[255 * value for value in dataset.std],
            dtype=types.FLOAT16,
            output_layout="HWC",
        )
        return images, labels

    built = pipeline()
    stream = torch.cuda.current_stream(device) if on_gpu else None
    while True:
        images, labels = (torch.from_dlpack(output.as_tensor()) for output in built.run(stream))
        yield images.permute(0, 3, 1, 2), labels


def copied_crops(dataset: Dataset, recipe: Recipe, device: torch.device, threads: int) -> Stream:
    """What fasttrain had before: crops copied out of the images, and half of them mirrored by a condition.

    The fastest on a CPU. A GPU launches a kernel for every mirrored image, and where nothing is cut out it
    copies every image once more.
    """
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"
    augmentation, sampler = choices(recipe, dataset)
    crops, labels_N = crop_views(dataset, recipe), dataset.train.labels.astype(np.int64)
    steps = max(1, dali.CHUNK_BYTES // (3 * augmentation.resolution**2) // recipe.batch_size)
    in_flight: deque[Any] = deque(maxlen=dali.IN_FLIGHT)

    def source(info: Any) -> list[np.ndarray]:
        parts = []
        for step in range(info.iteration * steps, (info.iteration + 1) * steps):
            indices = sampler(step)
            draws = augmentation.draw(step, sampler.epoch(step), indices)
            corners = draws.cutout_corners.astype(np.float32)
            batch = crops[indices, draws.rows, draws.columns], labels_N[indices]
            parts.append((*batch, draws.mirrored, corners))
        in_flight.append([np.concatenate(column) for column in zip(*parts, strict=True)])
        return in_flight[-1]

    @pipeline_def(
        batch_size=steps * recipe.batch_size,
        num_threads=threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=dali.PREFETCH,
        enable_conditionals=True,
    )
    def pipeline() -> Any:
        images, labels, mirrored, corners = fn.external_source(
            source=source,
            num_outputs=4,
            batch=True,
            batch_info=True,
            no_copy=True,
            dtype=[types.UINT8, types.INT64, types.BOOL, types.FLOAT],
            layout=["HWC", "", "", ""],
        )
        if on_gpu:
            images, labels = images.gpu(), labels.gpu()
        if mirrored:
            images = fn.flip(images)
        fill = [float(round(255 * value)) for value in dataset.mean]
        images = fn.erase(
            images, anchor=corners, shape=[float(recipe.cutout)] * 2, axis_names="HW", fill_value=fill
        )
        return images, labels

    built = pipeline()
    stream = torch.cuda.current_stream(device) if on_gpu else None
    while True:
        images, labels = (torch.from_dlpack(output.as_tensor()) for output in built.run(stream))
        size = recipe.batch_size
        yield from zip(images.permute(0, 3, 1, 2).split(size), labels.split(size), strict=True)


def dynamic_mode(dataset: Dataset, recipe: Recipe, device: torch.device) -> Stream:
    """Operators called from Python, captured as a pipeline on the first turn; every batch is a chunk.

    A captured loop knows no condition of each image, so flip takes a scalar of each.
    """
    import nvidia.dali.experimental.dynamic as dynamic

    augmentation, sampler = choices(recipe, dataset)
    crops = crop_views(dataset, recipe)
    labels_N = dataset.train.labels.astype(np.int64)
    fill = [float(round(255 * value)) for value in dataset.mean]
    steps = count()

    def source() -> tuple[Any, ...]:
        step = next(steps)
        indices = sampler(step)
        draws = augmentation.draw(step, sampler.epoch(step), indices)
        images = dynamic.as_batch(crops[indices, draws.rows, draws.columns], layout="HWC")
        others = (labels_N[indices], draws.mirrored.astype(np.int32), draws.cutout_corners.astype(np.float32))
        return images, *map(dynamic.as_batch, others)

    for images, labels, mirrored, corners in dynamic.ExternalSource(source, num_outputs=4).captured(
        recipe.batch_size
    ):
        if device.type == "cuda":
            images, labels = images.gpu(device.index or 0), labels.gpu(device.index or 0)
        images = dynamic.flip(images, horizontal=mirrored)
        images = dynamic.erase(
            images, anchor=corners, shape=[float(recipe.cutout)] * 2, axis_names="HW", fill_value=fill
        )
        yield images.torch().permute(0, 3, 1, 2), labels.torch()


def crop_views(dataset: Dataset, recipe: Recipe) -> np.ndarray:
    """View every crop of every training image without a copy: (N, rows, columns, 32, 32, 3)."""
    padded, shape = pad(dataset.train.images, recipe.crop_padding), dataset.train.images.shape[1:3]
    views = np.lib.stride_tricks.sliding_window_view(padded, shape, axis=(1, 2))
    return views.transpose(0, 1, 2, 4, 5, 3)


def choices(recipe: Recipe, dataset: Dataset) -> tuple[Augmentation, Sampler]:
    """What the recipe draws for every batch of the training images."""
    sampler = Sampler(len(dataset.train.labels), recipe.batch_size, train=True, seed=recipe.seed)
    augmentation = Augmentation(
        resolution=dataset.train.images.shape[1],
        max_offset=2 * recipe.crop_padding,
        flip=recipe.flip,
        cutout=recipe.cutout,
        seed=recipe.seed,
    )
    return augmentation, sampler


def designs(dataset: Dataset, recipe: Recipe, device: torch.device) -> dict[str, Stream]:
    """Every design's endless batches."""
    found = {
        "fasttrain's": ours(dataset, recipe, device),
        "a chunk for every batch": ours(dataset, recipe, device, CHUNK_BYTES=0, CHUNK_IMAGES=0),
        "chunks of 8,192 images": ours(
            dataset, recipe, device, CHUNK_BYTES=4 * dali.CHUNK_BYTES, CHUNK_IMAGES=8192
        ),
        "one chunk ahead, not two": ours(dataset, recipe, device, PREFETCH=1, IN_FLIGHT=3),
        "four chunks ahead": ours(dataset, recipe, device, PREFETCH=4, IN_FLIGHT=6),
        "one thread": ours(dataset, dataclasses.replace(recipe, loader_threads=1), device),
        "crops copied out, mirrored by condition": copied_crops(
            dataset, recipe, device, recipe.loader_threads
        ),
        "dynamic mode, captured": dynamic_mode(dataset, recipe, device),
        "crop_mirror_normalize, float16": all_in_one_operator(dataset, recipe, device, recipe.loader_threads),
    }
    if device.type == "cuda":
        found["images in the host's memory"] = ours(dataset, recipe, device, RESIDENT_SHARE=0.0)
    return found


def in_a_step(streams: dict[str, Stream], options: Options, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of a training step with each design's bytes, and with one reused batch."""
    step = build_step(usual_variant(device), device)
    reused = endless([random_batch(options.batch_size, device, torch.channels_last)])
    workloads: dict[str, Workload] = {
        name: partial(ms_in_a_step, stream, step, device, 2 * options.seconds)
        for name, stream in {REUSED: reused, **streams}.items()
    }
    return interleave(workloads, options.rounds)


def summarize(samples: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """A row per design; its cost in a step where that was measured."""
    stepped = samples.get("in a step", {})
    rows = []
    for name, values in samples["alone"].items():
        row: dict[str, Any] = {"design": name, "images_per_sec": statistics.median(values)}
        row["spread"] = spread(values)
        if name in stepped:
            row["step_ms"] = statistics.median(stepped[name])
            row["overhead"] = row["step_ms"] / statistics.median(stepped[REUSED]) - 1
        rows.append(row)
    return rows


def main(options: Options) -> None:
    device = pick_device(options.device)
    prepare(device, "auto")
    recipe = Recipe(batch_size=options.batch_size, loader_threads=cpu_cores())
    streams = designs(random_dataset(options.images), recipe, device)
    workloads: dict[str, Workload] = {
        name: partial(rate, stream, device, options.seconds) for name, stream in streams.items()
    }
    samples = {"alone": interleave(workloads, options.rounds)}
    if options.step or device.type == "cuda":
        # The network takes bytes: designs that deliver normalised images are measured by themselves only.
        of_bytes = {name: s for name, s in streams.items() if "normalize" not in name}
        samples["in a step"] = in_a_step(of_bytes, options, device)
    rows = summarize(samples)
    values = {"batch_size": options.batch_size, "rounds": options.rounds, "rows": rows, "samples": samples}
    path = save("designs", device, values)
    show(
        f"DALI pipelines, batch {options.batch_size}, median of {options.rounds}",
        ["design", "images/s", "spread", "ms per step", "cost"],
        [
            [
                row["design"],
                f"{row['images_per_sec']:,.0f}",
                f"±{row['spread']:.1%}",
                f"{row['step_ms']:,.2f}" if "step_ms" in row else "-",
                f"{row['overhead']:+.1%}" if "overhead" in row else "-",
            ]
            for row in rows
        ],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
