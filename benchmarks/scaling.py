"""How the cost grows: seconds and memory against images, batch size, epochs and the network's width.

    python -m benchmarks.scaling [--rounds 2]

Each axis varies alone and gets an exponent, the slope of log(cost) over log(value): 1 means that twice as
much costs twice as much. Random pixels stand for CIFAR-10.

Ranks share one batch, as in a recipe: -1 would be a step that takes half as long on twice as many. Each has a
GPU, or one thread of a CPU with gloo between them, which shows what the exchange of gradients costs there and
says nothing of NCCL.
"""

import dataclasses
import math
import os
import socket
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.loader import random_dataset
from benchmarks.report import OwnProcess, extra_memory_gib, interleave, run, save, show, spread
from benchmarks.step import Variant, build_step, random_batch
from fasttrain.data.build import build_loader, pick_loader
from fasttrain.data.sources.synthetic import generate
from fasttrain.distributed import join
from fasttrain.recipe import Recipe
from fasttrain.step import TrainStep
from fasttrain.system.machine import cpu_cores, pick_device
from fasttrain.system.precision import pick_compute_dtype
from fasttrain.trainer import train


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure how the cost grows. The defaults fit the device: thousands of images on a CPU, all on a GPU."""

    rounds: int = 2
    """Samples of each value, taken in turn."""
    images: tuple[int, ...] = ()
    """Images per epoch."""
    batch_sizes: tuple[int, ...] = ()
    """Images per step."""
    epochs: tuple[int, ...] = (1, 2, 4)
    """Epochs of a whole run, start to finish."""
    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Channels of the first convolution."""
    ranks: tuple[int, ...] = ()
    """Processes that share a batch."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


Workload = Callable[[], float]


def epoch_of(images: int, batch_size: int, device: torch.device) -> Workload:
    """Seconds of one epoch over so many images, loader and all."""
    recipe = Recipe(batch_size=batch_size)
    kind = pick_loader("auto", device, lambda _: None)
    loader = build_loader(random_dataset(images), recipe, train=True, kind=kind, device=device)
    step = build_step(_variant(device), device)

    def timed() -> float:
        start = time.perf_counter()
        for batch in loader:
            step(*batch)
        step.take_metrics()  # waits for the device
        return time.perf_counter() - start

    return timed


def step_of(batch_size: int, width: int, device: torch.device) -> Workload:
    """Seconds of one step."""
    variant = dataclasses.replace(_variant(device), width=width)
    step, batch = build_step(variant, device), random_batch(batch_size, device, variant.layout)
    return _timed(step, batch, device)


def _timed(
    step: TrainStep, batch: Any, device: torch.device, meet: Callable[[], object] = lambda: None
) -> Workload:
    """Seconds of a warm step on one batch. meet: called first, outside the clock."""
    repeats = 20 if device.type == "cuda" else 1

    def timed() -> float:
        meet()
        start = time.perf_counter()
        for _ in range(repeats):
            step(*batch)
        step.take_metrics()  # waits for the device
        return (time.perf_counter() - start) / repeats

    timed()
    return timed


def run_of(epochs: int, batch_size: int, data_dir: Path, device: torch.device) -> Workload:
    """Seconds of a whole run, from the images on disk to the last checkpoint."""
    recipe = Recipe(name="scaling", epochs=epochs, batch_size=batch_size)

    def timed() -> float:
        start = time.perf_counter()
        with TemporaryDirectory() as out:
            train(recipe, data_dir=data_dir, out=Path(out), device=str(device), report=False)
        return time.perf_counter() - start

    return timed


def ranks_of(count: int, batch_size: int, device: torch.device) -> Workload:
    """Seconds of one step of so many processes together, each on its share of the batch."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    ranks = [OwnProcess(rank_step, rank, count, port, batch_size, device) for rank in range(count)]

    def timed() -> float:
        with ThreadPoolExecutor(count) as threads:
            return max(threads.map(lambda rank: rank(), ranks))

    return timed


def rank_step(rank: int, count: int, port: int, batch_size: int, device: torch.device) -> Workload:
    """Seconds of one rank's step; for a process of its own."""
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "LOCAL_RANK": rank}
    names = meeting | {"RANK": rank, "WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    world = join(device)
    variant = _variant(device)
    step = build_step(variant, world.device, world)
    batch = random_batch(world.share(batch_size), world.device, variant.layout)
    return _timed(step, batch, device, meet=lambda: world.maximum(0))  # all begin at the same time


def _variant(device: torch.device) -> Variant:
    mode = "default" if device.type == "cuda" else None
    return Variant(dtype=pick_compute_dtype("auto", device), compile_mode=mode)


def exponents(values: list[int], samples: list[list[float]]) -> list[float]:
    """The fitted slope of log(seconds) over log(value), one for every round."""
    logs = [math.log(value) for value in values]
    return [float(np.polyfit(logs, np.log(column), 1)[0]) for column in zip(*samples, strict=True)]


def main(options: Options) -> None:
    device = pick_device(options.device)
    on_gpu = device.type == "cuda"
    batch_size = 512 if on_gpu else 32
    images = options.images or ((1_000, 5_000, 50_000, 200_000) if on_gpu else (64, 256, 1_024))
    most = torch.cuda.device_count() if on_gpu else cpu_cores()
    ranks = options.ranks or tuple(2**power for power in range(most.bit_length()))
    batch_sizes = options.batch_sizes or ((64, 128, 256, 512, 1024, 2048) if on_gpu else (8, 16, 32, 64, 128))
    with TemporaryDirectory() as folder:
        data_dir = Path(folder)
        generate(data_dir, train_count=4 * batch_size, test_count=batch_size)
        axes: dict[str, dict[int, Workload]] = {
            "images": {n: epoch_of(n, min(batch_size, n), device) for n in images},
            "batch size": {n: step_of(n, 64, device) for n in batch_sizes},
            "width": {n: step_of(batch_size, n, device) for n in options.widths},
            "epochs": {n: run_of(n, batch_size, data_dir, device) for n in options.epochs},
        }
        if len(ranks) > 1:  # else there is nothing to compare
            axes["ranks"] = {n: ranks_of(n, batch_size, device) for n in ranks}
        rows: list[dict[str, Any]] = []
        memory = {
            # What other processes hold is not seen from here.
            (axis, value): None if axis == "ranks" else extra_memory_gib(device, workload)
            for axis, workloads in axes.items()
            for value, workload in workloads.items()
        }
        samples = interleave(
            {
                f"{axis} {value}": workload
                for axis, workloads in axes.items()
                for value, workload in workloads.items()
            },
            options.rounds,
        )
    fits: dict[str, dict[str, Any]] = {}
    for axis, workloads in axes.items():
        columns = [samples[f"{axis} {value}"] for value in workloads]
        slopes = exponents(list(workloads), columns)
        fits[axis] = {"exponent": statistics.median(slopes), "range": [min(slopes), max(slopes)]}
        for value, column in zip(workloads, columns, strict=True):
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    "seconds": statistics.median(column),
                    "spread": spread(column),
                    "memory_gib": memory[axis, value],
                }
            )
    values = {"batch_size": batch_size, "rounds": options.rounds, "fits": fits, "rows": rows}
    path = save("scaling", device, values | {"samples": samples})
    show(
        f"cost, median of {options.rounds}",
        ["axis", "value", "seconds", "spread", "memory GiB", "exponent"],
        [
            [
                row["axis"],
                f"{row['value']:,}",
                f"{row['seconds']:.4g}",
                f"±{row['spread']:.1%}",
                "-" if row["memory_gib"] is None else f"{row['memory_gib']:.3f}",
                f"{fits[row['axis']]['exponent']:.2f}",
            ]
            for row in rows
        ],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
