"""How the cost grows: seconds and memory against images, batch size, epochs and the network's width.

    python -m benchmarks.scaling [--rounds 2]

Each axis varies alone and gets an exponent, the slope of log(cost) over log(value): 1 means that twice as
much costs twice as much. Random pixels stand for CIFAR-10.

Ranks share one batch, as in a recipe: -1 would be a step that takes half as long on twice as many. Each has a
GPU, or one thread of a CPU with gloo between them, which shows what the exchange of gradients costs there and
says nothing of NCCL.
"""

import dataclasses
import os
import socket
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness import OwnProcess, Workload, extra_memory_gib, interleave, run, save, show
from benchmarks.stats import exponents, spread
from benchmarks.workloads import (
    Variant,
    build_step,
    endless,
    random_batch,
    random_dataset,
    timed_step,
    train_loader,
    usual_variant,
)
from fasttrain.data.sources.synthetic import generate
from fasttrain.distributed import World
from fasttrain.recipe import Recipe
from fasttrain.system.machine import cpu_cores, pick_device
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
    batch_size: int | None = None
    """Images per step where they do not vary; by default 512 on a GPU and 32 without one."""
    width: int = 64
    """Channels where they do not vary."""
    ranks: tuple[int, ...] = ()
    """Processes that share a batch."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


def epoch_of(images: int, batch_size: int, width: int, device: torch.device) -> Workload:
    """Seconds of one epoch over this many images, loader and all."""
    loader = train_loader(random_dataset(images), Recipe(batch_size=batch_size), device)
    step = build_step(variant(device, width), device)

    def timed() -> float:
        start = time.perf_counter()
        for batch in loader:
            step(*batch)
        step.take_metrics()  # waits for the device
        return time.perf_counter() - start

    return timed


def step_of(batch_size: int, width: int, device: torch.device) -> Workload:
    """Seconds of one step."""
    of_width = variant(device, width)
    step, batch = build_step(of_width, device), random_batch(batch_size, device, of_width.layout)
    return timed_step(step, of_width, endless([batch]), repeats=repeats(device))


def variant(device: torch.device, width: int) -> Variant:
    return usual_variant(device, width=width, cuda_graph=False)  # with several ranks there is no graph


def repeats(device: torch.device) -> int:
    """Steps of one sample."""
    return 20 if device.type == "cuda" else 1


def run_of(recipe: Recipe, data_dir: Path, device: torch.device) -> Workload:
    """Seconds of a whole run, from the images on disk to the last checkpoint."""

    def timed() -> float:
        start = time.perf_counter()
        with TemporaryDirectory() as out:
            train(recipe, data_dir=data_dir, out=Path(out), device=str(device), report=False)
        return time.perf_counter() - start

    return timed


def ranks_of(count: int, batch_size: int, width: int, device: torch.device, processes: ExitStack) -> Workload:
    """Seconds of one step of this many processes together, each on its share of the batch."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    ranks = [
        processes.enter_context(OwnProcess(rank_step, rank, count, port, batch_size, width, device))
        for rank in range(count)
    ]

    def timed() -> float:
        with ThreadPoolExecutor(count) as threads:
            return max(threads.map(lambda rank: rank(), ranks))

    return timed


def rank_step(
    rank: int, count: int, port: int, batch_size: int, width: int, device: torch.device
) -> Workload:
    """Seconds of one rank's step; for a process of its own."""
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "LOCAL_RANK": rank}
    names = meeting | {"RANK": rank, "WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in names.items()}
    torch.set_num_threads(1)
    world = World.join(device)
    of_width = variant(device, width)
    step = build_step(of_width, world.device, world)
    batch = random_batch(world.share(batch_size), world.device, torch.channels_last)
    return timed_step(step, of_width, endless([batch]), repeats=repeats(device), meet=world.barrier)


def build_axes(
    options: Options, recipe: Recipe, data_dir: Path, device: torch.device, processes: ExitStack
) -> dict[str, dict[int, Workload]]:
    """What each axis measures, by its value; recipe: the values where they do not vary."""
    on_gpu, batch_size, width = device.type == "cuda", recipe.batch_size, recipe.width
    images = options.images or ((1_000, 5_000, 50_000, 200_000) if on_gpu else (64, 256, 1_024))
    batch_sizes = options.batch_sizes or ((64, 128, 256, 512, 1024, 2048) if on_gpu else (8, 16, 32, 64, 128))
    most = torch.cuda.device_count() if on_gpu else cpu_cores()
    ranks = options.ranks or tuple(2**power for power in range(most.bit_length()))
    axes: dict[str, dict[int, Workload]] = {
        "images": {n: epoch_of(n, min(batch_size, n), width, device) for n in images},
        "batch size": {n: step_of(n, width, device) for n in batch_sizes},
        "width": {n: step_of(batch_size, n, device) for n in options.widths},
        "epochs": {
            n: run_of(dataclasses.replace(recipe, epochs=n), data_dir, device) for n in options.epochs
        },
    }
    if len(ranks) > 1:  # else there is nothing to compare
        axes["ranks"] = {n: ranks_of(n, batch_size, width, device, processes) for n in ranks}
    return axes


Key = tuple[str, int]
"""An axis and its value."""


def measure(
    axes: dict[str, dict[int, Workload]], device: torch.device, rounds: int
) -> tuple[dict[Key, float | None], dict[str, list[float]]]:
    """The memory that each needs, and its samples in seconds."""
    workloads = {(axis, value): work for axis, by_value in axes.items() for value, work in by_value.items()}
    memory = {
        # The memory of other processes is not seen from here.
        (axis, value): None if axis == "ranks" else extra_memory_gib(device, work)
        for (axis, value), work in workloads.items()
    }
    named = {f"{axis} {value}": work for (axis, value), work in workloads.items()}
    return memory, interleave(named, rounds)


def summarize(
    axes: dict[str, dict[int, Workload]], memory: dict[Key, float | None], samples: dict[str, list[float]]
) -> tuple[dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """The exponent of every axis, and a row per value."""
    fits: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
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
    return fits, rows


def main(options: Options) -> None:
    device = pick_device(options.device)
    batch_size = options.batch_size or (512 if device.type == "cuda" else 32)
    recipe = Recipe(name="scaling", batch_size=batch_size, width=options.width)
    with TemporaryDirectory() as folder, ExitStack() as processes:
        generate(Path(folder), train_count=4 * batch_size, test_count=batch_size)
        axes = build_axes(options, recipe, Path(folder), device, processes)
        memory, samples = measure(axes, device, options.rounds)
    fits, rows = summarize(axes, memory, samples)
    facts = {"batch_size": batch_size, "width": options.width, "rounds": options.rounds}
    path = save("scaling", device, facts | {"fits": fits, "rows": rows, "samples": samples})
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
