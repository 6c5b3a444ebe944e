"""Images per second of the loaders: ours, one reused batch, and what people would pick instead.

    python -m benchmarks.loader [--rounds 3] [--cores 1 2] [--batch-sizes 128 512 4096]

Three questions: how fast is each loader on so many cores, how does the batch size change that, and what does
each cost in a real training step. The work is the same for all: crop, flip, cutout, and the normalised batch
in floating point that the first convolution takes (benchmarks/peers/check.py holds them to it). Ours deliver
bytes, which the network normalises: its time for that is counted. Random pixels stand for CIFAR-10: no
loader's speed depends on what they show.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.report import interleave, run, save, show, spread
from benchmarks.step import Variant, build_step, random_batch
from fasttrain.data.build import LoaderName, build_loader, pick_loader
from fasttrain.data.dataset import Dataset, Split
from fasttrain.model import CustomResNet, build_model
from fasttrain.recipe import Recipe
from fasttrain.system.machine import cpu_cores, pick_device
from fasttrain.system.precision import pick_compute_dtype, prepare

Batches = Iterable[tuple[Tensor, Tensor]]

REUSED = "one reused batch"
WARM_UP_BATCHES = 8
"""Taken before the clock starts: what loaders have prepared while others were measured does not count."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time the loaders alone, and in a training step."""

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
    peers: bool = True
    """Also measure the packages that people would pick instead."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


def random_dataset(images: int) -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 3, 32, 32), dtype=np.uint8)
    split = Split(pixels, rng.integers(0, 10, images, dtype=np.uint8))
    return Dataset("random", Path(), tuple("0123456789"), split, split, (0.5,) * 3, (0.25,) * 3)


# --------------------------------------------------------------------------------------------- contenders


def ours(dataset: Dataset, batch_size: int, device: torch.device, threads: int) -> dict[str, Batches]:
    """Our loaders, as they deliver."""
    recipe = Recipe(batch_size=batch_size, loader_threads=threads)
    kinds: list[LoaderName] = ["tensor"]
    if pick_loader("auto", device, lambda _: None) == "dali":
        kinds.insert(0, "dali")
    return {
        f"fasttrain, {kind}": build_loader(dataset, recipe, train=True, kind=kind, device=device)
        for kind in kinds
    }


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
    images_NHWC = np.ascontiguousarray(dataset.train.images.transpose(0, 2, 3, 1))
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


def endless(batches: Batches, model: CustomResNet | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch; with a model, each batch as its first convolution takes it."""
    while True:
        for images_NCHW, labels_N in batches:
            yield (images_NCHW if model is None else model.normalize(images_NCHW)), labels_N


def rate(stream: Iterator[tuple[Tensor, Tensor]], device: torch.device, seconds: float) -> float:
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


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ------------------------------------------------------------------------------------------- the questions


def alone(options: Options, batch_size: int, cores: int, with_peers: bool) -> dict[str, Any]:
    """Every loader by itself: samples in images per second by name, and who is missing."""
    device = pick_device(options.device)
    prepare(device, "auto")
    dataset = random_dataset(options.images)
    model = build_model(Recipe(), len(dataset.classes), mean=dataset.mean, std=dataset.std).to(device)
    loaders = ours(dataset, batch_size, device, threads=cores)
    streams = {name: endless(loader, model) for name, loader in loaders.items()}
    for name, loader in ours(dataset, batch_size, device, threads=cores).items():
        streams[f"{name}, bytes"] = endless(loader)
    missing: dict[str, str] = {}
    if with_peers:
        streams[REUSED] = endless([random_batch(batch_size, device, torch.channels_last)], model)
        others, missing = theirs(dataset, batch_size, device, workers=cores)
        streams |= {name: endless(loader) for name, loader in others.items()}
    workloads: dict[str, Callable[[], float]] = {
        name: (lambda stream=stream: rate(stream, device, options.seconds))  # type: ignore[misc]
        for name, stream in streams.items()
    }
    return {"samples": interleave(workloads, options.rounds), "missing": missing}


def in_a_step(options: Options, batch_size: int, cores: int) -> dict[str, Any]:
    """Every loader under real training: samples in milliseconds per step by name."""
    device = pick_device(options.device)
    dataset = random_dataset(options.images)
    dtype = pick_compute_dtype("auto", device)
    on_gpu = device.type == "cuda"
    mode = "default" if on_gpu else None
    step = build_step(Variant(dtype=dtype, compile_mode=mode, cuda_graph=on_gpu), device)
    loaders: dict[str, Batches] = {REUSED: [random_batch(batch_size, device, torch.channels_last)]}
    loaders |= ours(dataset, batch_size, device, threads=cores)
    if options.peers:
        loaders |= theirs(dataset, batch_size, device, workers=cores)[0]

    def timed(stream: Iterator[tuple[Tensor, Tensor]]) -> float:
        steps = 0
        time.sleep(1)  # the loader measured before goes on until its queue is full
        step(*next(stream))
        _wait(device)
        start = time.perf_counter()
        while time.perf_counter() - start < 4 * options.seconds:
            step(*next(stream))
            steps += 1
        _wait(device)
        return 1000 * (time.perf_counter() - start) / steps

    streams = {name: endless(loader) for name, loader in loaders.items()}
    workloads: dict[str, Callable[[], float]] = {
        name: (lambda stream=stream: timed(stream))  # type: ignore[misc]
        for name, stream in streams.items()
    }
    return {"samples": interleave(workloads, options.rounds)}


def on_cores(cores: int, question: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Ask in a process of its own that may use only so many cores, with all threads and children."""
    if not hasattr(os, "sched_setaffinity"):
        return question(*args)
    available = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(available)[:cores])
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(question, *args).result()
    finally:
        os.sched_setaffinity(0, available)


# --------------------------------------------------------------------------------------------------- main


def main(options: Options) -> None:
    device = pick_device(options.device)
    everything = cpu_cores()
    counts = options.cores or tuple(
        sorted(
            {2**power for power in range(everything.bit_length()) if 2**power <= everything} | {everything}
        )
    )
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for cores in counts:
        found = on_cores(cores, alone, options, options.batch_size, cores, options.peers)
        samples[f"alone, {cores} cores"], missing = found["samples"], found["missing"]
        rows += [_rates(name, values, cores=cores) for name, values in found["samples"].items()]
        _save(device, options, rows, samples, missing)  # whatever ends this early leaves the rest behind
    for batch_size in options.batch_sizes:
        found = on_cores(everything, alone, options, batch_size, everything, False)
        samples[f"alone, batch {batch_size}"] = found["samples"]
        rows += [_rates(name, values, batch_size=batch_size) for name, values in found["samples"].items()]
    step_batch_size = options.step_batch_size or (512 if device.type == "cuda" else 128)
    found = on_cores(everything, in_a_step, options, step_batch_size, everything)
    samples[f"in a step of {step_batch_size}"] = found["samples"]
    baseline = statistics.median(found["samples"][REUSED])
    for name, values in found["samples"].items():
        step_ms = statistics.median(values)
        row = {"loader": name, "step_batch_size": step_batch_size, "step_ms": step_ms}
        rows.append(row | {"spread": spread(values), "overhead": step_ms / baseline - 1})
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
        ]
        + [[f"{name}: {reason}", *[""] * 6] for name, reason in missing.items()],
    )
    print(path)


def _save(
    device: torch.device,
    options: Options,
    rows: list[dict[str, Any]],
    samples: dict[str, Any],
    missing: dict[str, str],
) -> Path:
    values = {"batch_size": options.batch_size, "images": options.images, "rounds": options.rounds}
    return save("loader", device, values | {"rows": rows, "missing": missing, "samples": samples})


def _rates(name: str, values: list[float], **axis: int) -> dict[str, Any]:
    return {"loader": name, **axis, "images_per_sec": statistics.median(values), "spread": spread(values)}


if __name__ == "__main__":
    run(main, Options)
