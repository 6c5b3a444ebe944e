"""One training step as fasttrain takes it, on one fixed batch, beside the matmul rate of the same round.

    python -m benchmarks.step [--rounds 5] [--batch-sizes 128 512] [--compiled]

All variants take turns.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.harness import OwnProcess, Workload, interleave, run, save, show
from benchmarks.stats import spread
from benchmarks.workloads import Variant, build_step, endless, flop_per_image, random_batch, timed_step
from fasttrain.system.machine import pick_device
from fasttrain.system.precision import DTYPES, pick_precision
from fasttrain.system.rates import measure_matmul_tflops


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time one training step."""

    rounds: int = 5
    """Samples of each variant, taken in turn."""
    batch_sizes: tuple[int, ...] = (128, 512)
    """Images per step."""
    width: int = 64
    """Channels of the network's first convolution."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    compiled: bool = False
    """Also time the compiled step on a CPU, where fasttrain runs eager (a GPU always has it)."""


def variants(options: Options, device: torch.device) -> dict[str, Variant]:
    """The ways to take the step on this device, by name."""
    eager = Variant(precision=pick_precision("auto", device), width=options.width)
    compiled = dataclasses.replace(eager, compile_mode="default")
    modes = {"eager": eager}
    if device.type == "cpu":
        modes["eager, freed memory returned"] = dataclasses.replace(eager, keep_memory=False)
    if options.compiled or device.type == "cuda":
        modes["compiled"] = compiled
    if device.type == "cuda":
        modes["eager, CUDA graph"] = dataclasses.replace(eager, cuda_graph=True)
        modes["compiled, CUDA graph"] = dataclasses.replace(compiled, cuda_graph=True)
        modes["compiled, the compiler's graphs"] = dataclasses.replace(eager, compile_mode="reduce-overhead")
    return modes


def step_ms(variant: Variant, batch_size: int, device: torch.device) -> Workload:
    """A warm training step on one fixed batch; each call returns its milliseconds."""
    step, batch = build_step(variant, device), random_batch(batch_size, device, variant.layout)
    repeats = 20 if device.type == "cuda" else 1
    seconds = timed_step(step, variant, endless([batch]), repeats=repeats)
    return lambda: 1000 * seconds()


def summarize(
    samples: dict[str, list[float]], modes: dict[str, Variant], batch_sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """A row per mode and batch size. The matmul rate is the best of the run: a peak is a maximum."""
    peak = max(samples["matmul"])
    rows = []
    for batch_size in batch_sizes:
        for name, variant in modes.items():
            flop = flop_per_image(variant.width)
            values = samples[f"{name}, {batch_size}"]
            tflops = [flop * batch_size / milliseconds / 1e9 for milliseconds in values]
            rows.append(
                {
                    "variant": f"{str(variant.dtype).removeprefix('torch.')}, channels_last, {name}",
                    "batch_size": batch_size,
                    "step_ms": statistics.median(values),
                    "spread": spread(values),
                    "images_per_sec": 1000 * batch_size / statistics.median(values),
                    "tflops": statistics.median(tflops),
                    "mfu": statistics.median(tflops) / peak,
                    "mfu_range": [min(tflops) / peak, max(tflops) / peak],
                }
            )
    return rows


def main(options: Options) -> None:
    device = pick_device(options.device)
    half = DTYPES[pick_precision("auto", device)]
    modes = variants(options, device)
    workloads: dict[str, Workload] = {}
    with ExitStack() as processes:
        for batch_size in options.batch_sizes:
            for name, variant in modes.items():
                workloads[f"{name}, {batch_size}"] = (
                    step_ms(variant, batch_size, device)
                    if variant.keep_memory
                    else processes.enter_context(OwnProcess(step_ms, variant, batch_size, device))
                )
        workloads["matmul"] = lambda: measure_matmul_tflops(device, half)
        samples = interleave(workloads, options.rounds)

    rows = summarize(samples, modes, options.batch_sizes)
    facts = {"rounds": options.rounds, "width": options.width}
    path = save("step", device, facts | {"rows": rows, "samples": samples})
    show(
        f"one training step, median of {options.rounds}",
        ["variant", "batch", "ms", "spread", "images/s", "TFLOP/s", "of matmul rate"],
        [
            [
                row["variant"],
                str(row["batch_size"]),
                f"{row['step_ms']:,.1f}",
                f"±{row['spread']:.1%}",
                f"{row['images_per_sec']:,.0f}",
                f"{row['tflops']:.3f}",
                f"{row['mfu']:.0%}",
            ]
            for row in rows
        ],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
