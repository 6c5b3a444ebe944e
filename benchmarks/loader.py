"""Images per second of the loaders, alone: DALI and the pure-torch loader, one augmentation at a time.

    python -m benchmarks.loader [--rounds 5] [--batch-size 512]

Random images stand for CIFAR-10: no loader's speed depends on what the pixels show.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.report import interleave, run, save, show, spread
from fasttrain.data.cifar import Dataset, Split
from fasttrain.data.loader import build_loader, pick_loader
from fasttrain.machine import pick_device
from fasttrain.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the loaders alone."""

    rounds: int = 5
    """Samples of each loader, taken in turn."""
    batch_size: int = 512
    """Images per batch."""
    images: int = 50_000
    """Size of the data set."""
    threads: int = 2
    """DALI's worker threads."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


def random_dataset(images: int) -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8)
    split = Split(pixels, rng.integers(0, 10, images, dtype=np.uint8))
    return Dataset("random", Path(), tuple("0123456789"), split, split, (0.5,) * 3, (0.25,) * 3)


def rate(batches: Iterator[tuple[Tensor, Tensor]], device: torch.device, seconds: float = 1.0) -> float:
    """Images per second over about `seconds`, each batch touched on the device."""
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        for _, labels in islice(batches, 20):
            count += len(labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return count / elapsed


def endless(
    kind: Literal["dali", "tensor"], dataset: Dataset, recipe: Recipe, device: torch.device
) -> Iterator:
    loader = build_loader(dataset, recipe, train=True, kind=kind, device=device)
    while True:
        yield from loader


def main(options: Options) -> None:
    device = pick_device(options.device)
    dataset = random_dataset(options.images)
    augmented = Recipe(batch_size=options.batch_size, loader_threads=options.threads)
    plain = dataclasses.replace(augmented, crop_padding=0, flip=False, cutout=0)
    kinds: list[Literal["dali", "tensor"]] = ["tensor"]
    if pick_loader("auto", device, print) == "dali":
        kinds.insert(0, "dali")
    streams = {
        f"{kind}, {name}": endless(kind, dataset, recipe, device)
        for kind in kinds
        for name, recipe in (
            ("crop + flip + cutout", augmented),
            ("crop + flip", dataclasses.replace(augmented, cutout=0)),
            ("not augmented", plain),
        )
    }
    for stream in streams.values():
        next(stream)  # builds the pipeline
    workloads: dict[str, Callable[[], float]] = {
        name: (lambda stream=stream: rate(stream, device))  # type: ignore[misc]
        for name, stream in streams.items()
    }
    samples = interleave(workloads, options.rounds)
    rows: list[dict[str, Any]] = [
        {"loader": name, "images_per_sec": statistics.median(values), "spread": spread(values)}
        for name, values in samples.items()
    ]
    path = save(
        "loader",
        device,
        {
            "batch_size": options.batch_size,
            "threads": options.threads,
            "images": options.images,
            "rounds": options.rounds,
            "rows": rows,
            "samples": samples,
        },
    )
    show(
        f"loaders alone, batch {options.batch_size}, median of {options.rounds}",
        ["loader", "images/s", "spread"],
        [[row["loader"], f"{row['images_per_sec']:,.0f}", f"±{row['spread']:.1%}"] for row in rows],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
