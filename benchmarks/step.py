"""One training step as fasttrain takes it, on one fixed batch, beside the matmul rate of the same round.

    python -m benchmarks.step [--rounds 5] [--batch-sizes 128 512] [--compiled]

All variants take turns.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.report import OwnProcess, interleave, run, save, show, spread
from fasttrain.distributed import World
from fasttrain.model import CustomResNet, build_model, training_flop_per_image
from fasttrain.recipe import Recipe
from fasttrain.step import TrainStep
from fasttrain.system.machine import pick_device
from fasttrain.system.precision import pick_compute_dtype, prepare, set_fp32_precision
from fasttrain.system.rates import measure_matmul_tflops


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time one training step."""

    rounds: int = 5
    """Samples of each variant, taken in turn."""
    batch_sizes: tuple[int, ...] = (128, 512)
    """Images per step."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    compiled: bool = False
    """Also time the compiled step on a CPU, where fasttrain runs eager (a GPU always has it)."""


def unchanged(model: CustomResNet) -> None:
    """The network as it is."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to take the step; the defaults are fasttrain's, but for the precision."""

    dtype: torch.dtype
    layout: torch.memory_format = torch.channels_last
    fused: bool = True
    compile_mode: str | None = None
    cuda_graph: bool = False
    """On a GPU, the whole step as one launch."""
    tf32: bool = False
    """On a GPU, let float32 products round their inputs."""
    change: Callable[[CustomResNet], None] = unchanged
    """Made to the network, in place, before it trains."""
    width: int = 64
    keep_memory: bool = True
    """On a CPU; it holds for the whole process."""


def build_step(variant: Variant, device: torch.device, world: World | None = None) -> TrainStep:
    """A training step of this variant, with a network of its own; world: who shares it."""
    if variant.keep_memory:
        prepare(device, "auto")
    torch.manual_seed(0)
    recipe = Recipe(width=variant.width)
    model = build_model(recipe, num_classes=10)
    variant.change(model)
    step = TrainStep(
        model,
        recipe,
        max_lr=0.01,
        total_steps=10**9,
        device=device,
        compute_dtype=variant.dtype,
        cuda_graph=variant.cuda_graph and device.type == "cuda",
        world=world,
    )
    if variant.compile_mode:
        step.compile(variant.compile_mode)
    model.to(memory_format=variant.layout)  # type: ignore[call-overload]  # torch's stubs lack it
    if not variant.fused:
        kept = ("params", "weight_decay", "lr_scale")
        groups = [{key: group[key] for key in kept} for group in step.optimizer.param_groups]
        step.optimizer = torch.optim.AdamW(groups, lr=step.max_lr)
    return step


def random_batch(batch_size: int, device: torch.device, layout: torch.memory_format) -> Any:
    images = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    return images.contiguous(memory_format=layout), torch.randint(10, (batch_size,), device=device)


def timed_step(variant: Variant, batch_size: int, device: torch.device) -> Callable[[], float]:
    """A warm training step on one fixed batch; each call returns its milliseconds."""
    step = build_step(variant, device)
    batch = random_batch(batch_size, device, variant.layout)
    repeats = 20 if device.type == "cuda" else 1

    def timed() -> float:
        set_fp32_precision(variant.tf32)  # it holds for the whole process
        start = time.perf_counter()
        for _ in range(repeats):
            step(*batch)
        step.take_metrics()  # waits for the device
        return 1000 * (time.perf_counter() - start) / repeats

    timed()
    return timed


def summarize(
    samples: dict[str, list[float]], modes: Sequence[str], batch_sizes: Sequence[int], dtype: torch.dtype
) -> list[dict[str, Any]]:
    """A row per mode and batch size. The matmul rate is the best of the run: a peak is a maximum."""
    flop, peak = training_flop_per_image(build_model(Recipe(), num_classes=10)), max(samples["matmul"])
    rows = []
    for batch_size in batch_sizes:
        for name in modes:
            values = samples[f"{name}, {batch_size}"]
            tflops = [flop * batch_size / step_ms / 1e9 for step_ms in values]
            rows.append(
                {
                    "variant": f"{str(dtype).removeprefix('torch.')}, channels_last, {name}",
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
    half = pick_compute_dtype("auto", device)
    modes = {"eager": Variant(dtype=half)}
    if device.type == "cpu":
        modes["eager, freed memory returned"] = Variant(dtype=half, keep_memory=False)
    if options.compiled or device.type == "cuda":
        modes["compiled"] = Variant(dtype=half, compile_mode="default")
    if device.type == "cuda":
        modes["eager, CUDA graph"] = Variant(dtype=half, cuda_graph=True)
        modes["compiled, CUDA graph"] = Variant(dtype=half, compile_mode="default", cuda_graph=True)
        modes["compiled, the compiler's graphs"] = Variant(dtype=half, compile_mode="reduce-overhead")
    workloads: dict[str, Callable[[], float]] = {}
    for batch_size in options.batch_sizes:
        for name, variant in modes.items():
            workloads[f"{name}, {batch_size}"] = (
                timed_step(variant, batch_size, device)
                if variant.keep_memory
                else OwnProcess(timed_step, variant, batch_size, device)
            )
    workloads["matmul"] = lambda: measure_matmul_tflops(device, half)
    samples = interleave(workloads, options.rounds)

    rows = summarize(samples, list(modes), options.batch_sizes, half)
    path = save("step", device, {"rounds": options.rounds, "rows": rows, "samples": samples})
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
