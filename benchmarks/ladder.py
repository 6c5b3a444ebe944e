"""From the training assignment's way to ours, one rung at a time: real steps with their data.

    python -m benchmarks.ladder [--rounds 3] [--batch-size 512]

Every rung keeps what the rungs before it brought. All take turns, each with a network, an optimizer and a
loader of its own; on a CPU in processes of their own, since one rung changes how a process gets its memory.
"""

import dataclasses
import statistics
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.harness import OwnProcess, Workload, extra_memory_gib, interleave, run, save, show
from benchmarks.loaders import Batches, ours, theirs
from benchmarks.stats import spread
from benchmarks.workloads import Variant, build_step, endless, flop_per_image, random_dataset, timed_step
from fasttrain.system.machine import cpu_cores, pick_device
from fasttrain.system.precision import DTYPES, pick_precision, set_fp32_precision
from fasttrain.system.rates import measure_matmul_tflops


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time training steps from the usual way to ours."""

    rounds: int = 3
    """Samples of each rung, taken in turn."""
    batch_size: int | None = None
    """Images per step; by default 512 on a GPU and 128 without one."""
    images: int = 10_000
    """Size of the data set."""
    width: int = 64
    """Channels of the network's first convolution."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    compiled: bool = False
    """Also compile on a CPU, where fasttrain runs eager (a GPU always has that rung)."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    name: str
    variant: Variant
    loader: str


def rungs(options: Options, device: torch.device, usual: str, best: str) -> list[Rung]:
    """The ladder, bottom first. usual, best: the loaders' names."""
    half = pick_precision("auto", device)
    variant = Variant(
        precision="fp32",
        layout=torch.contiguous_format,
        fused=False,
        keep_memory=False,
        cudnn_benchmark=False,
        width=options.width,
    )
    ladder = [Rung(name=f"float32, NCHW, eager, Adam, {usual}", variant=variant, loader=usual)]

    def climb(name: str, loader: str | None = None, **changes: Any) -> None:
        below = ladder[-1]
        variant = dataclasses.replace(below.variant, **changes)
        ladder.append(Rung(name=f"+ {name}", variant=variant, loader=loader or below.loader))

    on_gpu = device.type == "cuda"
    climb("channels_last", layout=torch.channels_last)
    if on_gpu:
        climb("TF32", tf32=True)
    if half != "fp32":
        climb(str(DTYPES[half]).removeprefix("torch."), precision=half)
    if on_gpu:
        climb("cuDNN's kernels timed", cudnn_benchmark=True)
    climb("fused Adam", fused=True)
    if not on_gpu:
        climb("freed memory kept", keep_memory=True)
    if options.compiled or on_gpu:
        climb("torch.compile", compile_mode="default")
    if on_gpu:
        climb("CUDA graph", cuda_graph=True)
    if best != usual:
        climb(f"{best} loader", loader=best)
    return ladder


def climbed(rung: Rung, images: int, batch_size: int, device: torch.device) -> Workload:
    """Warm steps with their data; each call returns the milliseconds of one."""
    variant = rung.variant
    step, stream = build_step(variant, device), endless(loaders(images, batch_size, device)[rung.loader])
    in_layout = ((images.contiguous(memory_format=variant.layout), labels) for images, labels in stream)
    repeats = 20 if device.type == "cuda" else 2
    seconds = timed_step(step, variant, in_layout, repeats=repeats)
    return lambda: 1000 * seconds()


def loaders(images: int, batch_size: int, device: torch.device) -> dict[str, Batches]:
    """The usual way first, our best last; without albumentations our torch loader is the usual way."""
    dataset, cores = random_dataset(images), cpu_cores()
    mine = ours(dataset, batch_size, device, threads=cores)
    usual, _ = theirs(dataset, batch_size, device, workers=cores, wanted=["albumentations"])
    return usual | dict(reversed(mine.items()))


def matmul_name(variant: Variant) -> str:
    return f"matmul {'torch.tf32' if variant.tf32 and variant.dtype == torch.float32 else variant.dtype}"


def matmul_tflops(variant: Variant, device: torch.device) -> float:
    """The rate of matrix products in a variant's own precision."""
    set_fp32_precision(variant.tf32)
    return measure_matmul_tflops(device, variant.dtype)


def measure(
    ladder: list[Rung], images: int, batch_size: int, device: torch.device, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Samples of every rung and of the matmul rates, and the memory that each rung's steps need."""
    workloads: dict[str, Workload] = {}
    memory: dict[str, float | None] = {}
    with ExitStack() as processes:
        for rung in ladder:
            of_rung = (rung, images, batch_size, device)
            if device.type == "cpu":
                process = processes.enter_context(OwnProcess(climbed, *of_rung))
                workloads[rung.name], memory[rung.name] = process, process.extra_memory_gib(device)
            else:
                workloads[rung.name] = climbed(*of_rung)
                memory[rung.name] = extra_memory_gib(device, workloads[rung.name])
        for variant in (rung.variant for rung in ladder):
            workloads[matmul_name(variant)] = partial(matmul_tflops, variant, device)
        return interleave(workloads, rounds), memory


def summarize(
    ladder: list[Rung], samples: dict[str, list[float]], memory: dict[str, float | None], batch_size: int
) -> list[dict[str, Any]]:
    """A row per rung, with its speed-up over the rung below and over the lowest."""
    rows: list[dict[str, Any]] = []
    for rung in ladder:
        step_ms = statistics.median(samples[rung.name])
        flop = flop_per_image(rung.variant.width) * batch_size
        peak = max(samples[matmul_name(rung.variant)])  # a peak is a maximum
        rows.append(
            {
                "rung": rung.name,
                "step_ms": step_ms,
                "spread": spread(samples[rung.name]),
                "speed_up": rows[-1]["step_ms"] / step_ms if rows else 1.0,
                "speed_up_in_all": rows[0]["step_ms"] / step_ms if rows else 1.0,
                "tflops": flop / step_ms / 1e9,
                "mfu": flop / step_ms / 1e9 / peak,
                "memory_gib": memory[rung.name],
            }
        )
    return rows


def main(options: Options) -> None:
    device = pick_device(options.device)
    batch_size = options.batch_size or (512 if device.type == "cuda" else 128)
    usual, *_, best = loaders(options.images, batch_size, device)
    ladder = rungs(options, device, usual, best)
    samples, memory = measure(ladder, options.images, batch_size, device, options.rounds)
    rows = summarize(ladder, samples, memory, batch_size)
    facts = {"batch_size": batch_size, "width": options.width, "rounds": options.rounds}
    path = save("ladder", device, facts | {"rows": rows, "samples": samples})
    show(
        f"steps with their data, batch {batch_size}, median of {options.rounds}",
        ["rung", "ms", "spread", "this rung", "in all", "TFLOP/s", "of matmul rate", "memory GiB"],
        [
            [
                row["rung"],
                f"{row['step_ms']:,.1f}",
                f"±{row['spread']:.1%}",
                f"{row['speed_up']:.2f}x",
                f"{row['speed_up_in_all']:.2f}x",
                f"{row['tflops']:.3f}",
                f"{row['mfu']:.0%}",
                "-" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}",
            ]
            for row in rows
        ],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
