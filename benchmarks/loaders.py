"""Images per second of the loaders: ours, one reused batch, and what people would pick instead.

    python -m benchmarks.loaders [--rounds 3] [--cores 1 2] [--batch-sizes 128 512 4096]

Three questions: what does each loader cost in a real training step, how fast is it by itself on one core,
two, four, ..., and how does the batch size change that. The work is the same for all: crop, flip, cutout, and
the normalised batch in floating point that the first convolution takes (benchmarks/peers/check.py verifies
it). Ours deliver bytes, which the network normalises: its time for that is counted. Random pixels stand for
CIFAR-10: no loader's speed depends on the picture.
"""

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.harness import Workload, interleave, on_cores, run, save, say, show
from benchmarks.stats import spread
from benchmarks.workloads import (
    Batch,
    build_step,
    endless,
    loader_names,
    network,
    random_batch,
    random_dataset,
    train_loader,
    usual_variant,
)
from fasttrain.data.dataset import Dataset
from fasttrain.recipe import Recipe
from fasttrain.step import TrainStep
from fasttrain.system.machine import cpu_cores, pick_device
from fasttrain.system.precision import prepare

Batches = Iterable[Batch]

REUSED = "one reused batch"
WARM_UP_BATCHES = 8
"""Taken before the clock starts: batches prepared while others were measured do not count."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the loaders by themselves, and in a training step."""

    rounds: int = 3
    """Samples of each loader, taken in turn."""
    seconds: float = 0.5
    """Length of a sample."""
    batch_size: int = 512
    """Images per batch where the cores vary."""
    batch_sizes: tuple[int, ...] = (128, 512, 2048)
    """Images per batch where they vary."""
    cores: tuple[int, ...] = ()
    """How many cores; by default 1, 2, 4, ... and all."""
    step_batch_size: int | None = None
    """Images per training step; by default 512 on a GPU and 128 without one."""
    images: int = 50_000
    """Size of the data set."""
    width: int = 64
    """Channels of the first convolution, in the training step."""
    peers: bool = True
    """Also measure the packages that people would pick instead."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


# ----------------------------------------------------------------------------------------------- contenders


def ours(dataset: Dataset, batch_size: int, device: torch.device, threads: int) -> dict[str, Batches]:
    """Our loaders, as they deliver."""
    recipe = Recipe(batch_size=batch_size, loader_threads=threads)
    names = loader_names(device)
    return {f"fasttrain, {name}": train_loader(dataset, recipe, device, name) for name in names}


def theirs(
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    workers: int,
    wanted: Iterable[str] = tuple(peers.PEERS),
) -> tuple[dict[str, Batches], dict[str, str]]:
    """Those of the wanted peers that are installed, and for the others the reason why not."""
    loaders: dict[str, Batches] = {}
    missing: dict[str, str] = {}
    images_NHWC = dataset.train.images
    for peer in wanted:
        name = peers.PEERS[peer]
        try:
            module = peers.load(peer)
        except ImportError as error:
            missing[name] = str(error)
            continue
        loaders[name] = module.batches(
            images_NHWC,
            dataset.train.labels,
            batch_size=batch_size,
            workers=workers,
            mean=dataset.mean,
            std=dataset.std,
            device=device,
        )
    return loaders, missing


def rate(stream: Iterator[Batch], device: torch.device, seconds: float) -> float:
    """Images per second over about `seconds`, once the stream flows."""
    for _ in islice(stream, WARM_UP_BATCHES):
        pass
    _wait(device)
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        _, labels_N = next(stream)
        count += len(labels_N)
    _wait(device)
    return count / (time.perf_counter() - start)


def ms_in_a_step(stream: Iterator[Batch], step: TrainStep, device: torch.device, seconds: float) -> float:
    """Milliseconds of a training step with its data, over about `seconds`."""
    time.sleep(1)  # the loader measured before fills its queue first
    step(*next(stream))
    _wait(device)
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step(*next(stream))
        steps += 1
    _wait(device)
    return 1000 * (time.perf_counter() - start) / steps


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# -------------------------------------------------------------------------------------------- the questions


def by_itself(options: Options, batch_size: int, cores: int, with_peers: bool) -> dict[str, Any]:
    """Every loader by itself: samples in images per second by name, and who is missing."""
    device = pick_device(options.device)
    prepare(device, "auto")
    dataset = random_dataset(options.images)
    model = network(mean=dataset.mean, std=dataset.std).to(device)
    loaders = ours(dataset, batch_size, device, threads=cores)
    streams = {name: endless(loader, model) for name, loader in loaders.items()}
    for name, loader in ours(dataset, batch_size, device, threads=cores).items():
        streams[f"{name}, bytes"] = endless(loader)
    missing: dict[str, str] = {}
    if with_peers:
        streams[REUSED] = endless([random_batch(batch_size, device, torch.channels_last)], model)
        others, missing = theirs(dataset, batch_size, device, workers=cores)
        streams |= {name: endless(loader) for name, loader in others.items()}
    workloads: dict[str, Workload] = {
        name: partial(rate, stream, device, options.seconds) for name, stream in streams.items()
    }
    return {"samples": interleave(workloads, options.rounds), "missing": missing}


def in_a_step(options: Options, batch_size: int, cores: int) -> dict[str, Any]:
    """Every loader under real training: samples in milliseconds per step by name."""
    device = pick_device(options.device)
    dataset = random_dataset(options.images)
    loaders: dict[str, Batches] = {REUSED: [random_batch(batch_size, device, torch.channels_last)]}
    loaders |= ours(dataset, batch_size, device, threads=cores)
    if options.peers:
        loaders |= theirs(dataset, batch_size, device, workers=cores)[0]
    workloads: dict[str, Workload] = {}
    for name, loader in loaders.items():
        # A step of its own: some yield bytes, others floats, and a captured step takes only one of these.
        step = build_step(usual_variant(device, width=options.width), device)
        workloads[name] = partial(ms_in_a_step, endless(loader), step, device, 4 * options.seconds)
    return {"samples": interleave(workloads, options.rounds)}


# --------------------------------------------------------------------------------------------------- main


def core_counts(cores: int) -> tuple[int, ...]:
    """1, 2, 4, ... and all."""
    return tuple(sorted({2**power for power in range(cores.bit_length())} | {cores}))


def main(options: Options) -> None:
    device = pick_device(options.device)
    everything = cpu_cores()
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    missing: dict[str, str] = {}
    step_batch_size = options.step_batch_size or (512 if device.type == "cuda" else 128)
    found = on_cores(everything, in_a_step, options, step_batch_size, everything)
    samples[f"in a step of {step_batch_size}"] = found["samples"]
    baseline = statistics.median(found["samples"][REUSED])
    for name, values in found["samples"].items():
        step_ms = statistics.median(values)
        row = {"loader": name, "step_batch_size": step_batch_size, "step_ms": step_ms}
        rows.append(row | {"spread": spread(values), "overhead": step_ms / baseline - 1})
    _save(device, options, rows, samples, missing)  # if a later part fails, this is there
    for cores in options.cores or core_counts(everything):
        found = on_cores(cores, by_itself, options, options.batch_size, cores, options.peers)
        samples[f"alone, {cores} cores"], missing = found["samples"], found["missing"]
        rows += [_rates(name, values, cores=cores) for name, values in found["samples"].items()]
        _save(device, options, rows, samples, missing)
    for batch_size in options.batch_sizes:
        found = on_cores(everything, by_itself, options, batch_size, everything, False)
        samples[f"alone, batch {batch_size}"] = found["samples"]
        rows += [_rates(name, values, batch_size=batch_size) for name, values in found["samples"].items()]
    path = _save(device, options, rows, samples, missing)
    show(
        f"loaders, median of {options.rounds}",
        ["loader", "cores", "batch", "images/s", "ms per step", "cost", "spread"],
        [
            [
                row["loader"],
                str(row.get("cores", everything)),
                str(row.get("step_batch_size", row.get("batch_size", options.batch_size))),
                f"{row['images_per_sec']:,.0f}" if "images_per_sec" in row else "",
                f"{row['step_ms']:,.1f}" if "step_ms" in row else "",
                f"{row['overhead']:+.1%}" if "overhead" in row else "",
                f"±{row['spread']:.1%}",
            ]
            for row in rows
        ],
    )
    for name, reason in missing.items():
        say(f"{name}: {reason}")
    print(path)


def _save(
    device: torch.device,
    options: Options,
    rows: list[dict[str, Any]],
    samples: dict[str, Any],
    missing: dict[str, str],
) -> Path:
    facts = {"batch_size": options.batch_size, "images": options.images, "width": options.width}
    facts |= {"rounds": options.rounds}
    return save("loader", device, facts | {"rows": rows, "missing": missing, "samples": samples})


def _rates(name: str, values: list[float], **axis: int) -> dict[str, Any]:
    return {"loader": name, **axis, "images_per_sec": statistics.median(values), "spread": spread(values)}


if __name__ == "__main__":
    run(main, Options)
