"""Where the time of a few training steps goes: torch.profiler over the real loader and the real step.

    python -m benchmarks.profile [--steps 3] [--recipe default] [--trace runs/trace.json]

Prints the operators with the most time of their own, and writes a trace for ui.perfetto.dev. Random images
stand for CIFAR-10: no kernel's speed depends on what the pixels show.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from benchmarks.loader import random_dataset
from benchmarks.report import run
from fasttrain.data.loader import build_loader, pick_loader
from fasttrain.errors import UserError
from fasttrain.machine import pick_compute_dtype, pick_device
from fasttrain.model import CustomResNet
from fasttrain.recipe import load_recipe
from fasttrain.step import TrainStep, pick_compile_mode


@dataclass(frozen=True, kw_only=True)
class Options:
    """Profile a few training steps."""

    steps: int = 3
    """Steps recorded, after two that warm up."""
    recipe: str = "default"
    """A preset or a recipe's JSON file."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    operators: int = 20
    """How many operators to list."""
    trace: Path = Path("runs/trace.json")
    """Where the trace goes."""


def main(options: Options) -> None:
    device = pick_device(options.device)
    recipe = load_recipe(options.recipe)
    dtype = pick_compute_dtype(recipe.compute_dtype, device)
    kind = pick_loader(recipe.loader, device, print)
    dataset = random_dataset(recipe.batch_size * (options.steps + 2))
    loader = build_loader(dataset, recipe, train=True, kind=kind, device=device)
    step = TrainStep(
        CustomResNet(),
        recipe,
        max_lr=0.01,
        total_steps=options.steps + 2,
        device=device,
        compute_dtype=dtype,
        compile_mode=pick_compile_mode(recipe.compile, device, print),
    )
    batches = iter(loader)
    for images_NCHW, labels_N in islice(batches, 2):
        step(images_NCHW, labels_N)
    step.take_metrics()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        for images_NCHW, labels_N in islice(batches, options.steps):
            step(images_NCHW, labels_N)
        step.take_metrics()
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=options.operators, max_name_column_width=60))
    try:
        options.trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(options.trace))
    except OSError as error:
        raise UserError(f"--trace {options.trace}: cannot be written ({error}); name another file") from error
    print(f"trace: {options.trace} (open it in ui.perfetto.dev)")


if __name__ == "__main__":
    run(main, Options)
