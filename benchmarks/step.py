"""Milliseconds of one training step: from fp32 in torch's default layout to what `fasttrain train` runs.

    python -m benchmarks.step [--rounds 3] [--batch-size 512] [--compiled]

All variants take turns in one process; each is given beside the matmul rate measured in the same round.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.report import interleave, run, save, show, spread
from fasttrain.machine import measure_matmul_tflops, pick_compute_dtype, pick_device
from fasttrain.model import CustomResNet, training_flop_per_image
from fasttrain.recipe import Recipe
from fasttrain.step import TrainStep


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time one training step, one rung at a time."""

    rounds: int = 3
    """Samples of each variant, taken in turn."""
    batch_size: int = 512
    """Images per step."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    compiled: bool = False
    """Also time the compiled step on a CPU, where fasttrain runs eager (a GPU always has it)."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    name: str
    dtype: torch.dtype
    layout: torch.memory_format
    compile_mode: str | None = None


def variants(device: torch.device, half: torch.dtype, compiled: bool) -> list[Variant]:
    """The rungs, from the usual way to ours."""
    half_name = str(half).removeprefix("torch.")
    rungs = [
        Variant(name="float32, NCHW, eager", dtype=torch.float32, layout=torch.contiguous_format),
        Variant(name="float32, channels_last, eager", dtype=torch.float32, layout=torch.channels_last),
        Variant(name=f"{half_name}, NCHW, eager", dtype=half, layout=torch.contiguous_format),
        Variant(name=f"{half_name}, channels_last, eager", dtype=half, layout=torch.channels_last),
    ]
    if compiled or device.type == "cuda":
        rungs.append(
            dataclasses.replace(
                rungs[-1], name=f"{half_name}, channels_last, compiled", compile_mode="default"
            )
        )
    return rungs


def timed_step(variant: Variant, batch_size: int, device: torch.device) -> Callable[[], float]:
    """A warm training step on one fixed batch; each call returns its milliseconds."""
    torch.manual_seed(0)
    model = CustomResNet()
    step = TrainStep(
        model,
        Recipe(),
        max_lr=0.01,
        total_steps=10**9,
        device=device,
        compute_dtype=variant.dtype,
        compile_mode=variant.compile_mode,
    )
    model.to(memory_format=variant.layout)  # type: ignore[call-overload]  # torch's stubs lack it
    images = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    images = images.contiguous(memory_format=variant.layout)
    labels = torch.randint(10, (batch_size,), device=device)
    repeats = 20 if device.type == "cuda" else 1

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            step(images, labels)
        step.take_metrics()  # waits for the device
        return 1000 * (time.perf_counter() - start) / repeats

    timed()
    return timed


def main(options: Options) -> None:
    device = pick_device(options.device)
    half = pick_compute_dtype("auto", device)
    rungs = variants(device, half, options.compiled)
    workloads: dict[str, Callable[[], float]] = {
        rung.name: timed_step(rung, options.batch_size, device) for rung in rungs
    }
    for dtype in dict.fromkeys(rung.dtype for rung in rungs):
        workloads[f"matmul {dtype}"] = lambda dtype=dtype: measure_matmul_tflops(device, dtype)  # type: ignore[misc]
    samples = interleave(workloads, options.rounds)

    flop = training_flop_per_image(CustomResNet()) * options.batch_size
    first = statistics.median(samples[rungs[0].name])
    rows: list[dict[str, Any]] = []
    for rung in rungs:
        step_ms = statistics.median(samples[rung.name])
        tflops = flop / step_ms / 1e9
        rows.append(
            {
                "variant": rung.name,
                "step_ms": step_ms,
                "spread": spread(samples[rung.name]),
                "speed_up": first / step_ms,
                "tflops": tflops,
                "mfu": tflops / statistics.median(samples[f"matmul {rung.dtype}"]),
            }
        )
    path = save(
        "step",
        device,
        {
            "batch_size": options.batch_size,
            "rounds": options.rounds,
            "rows": rows,
            "samples": samples,
        },
    )
    show(
        f"one training step, batch {options.batch_size}, median of {options.rounds}",
        ["variant", "ms", "spread", "speed-up", "TFLOP/s", "of matmul rate"],
        [
            [
                row["variant"],
                f"{row['step_ms']:,.1f}",
                f"±{row['spread']:.1%}",
                f"{row['speed_up']:.2f}x",
                f"{row['tflops']:.3f}",
                f"{row['mfu']:.0%}",
            ]
            for row in rows
        ],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
