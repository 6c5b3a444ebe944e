"""`fasttrain profile`: where the time of a training goes, with torch.profiler over real steps and the loader.

Writes a trace for ui.perfetto.dev, a table of operators and the figures, and says in three sentences what
bounds the training, by how much, and what to try.
"""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType

from fasttrain.checkpoint.network import find_start, initial_model
from fasttrain.compile import cache_of, compile_step
from fasttrain.data.build_loader import build_loader, fit_batch_size
from fasttrain.data.dataset import Dataset
from fasttrain.errors import UserError
from fasttrain.loss import class_weights
from fasttrain.model import training_flop_per_image
from fasttrain.recipe import Recipe
from fasttrain.runtime import Runtime
from fasttrain.step import TrainStep
from fasttrain.system.files import write_atomically, write_json
from fasttrain.system.machine import cpu_cores, describe, hardware_name
from fasttrain.system.rates import measure_matmul_tflops
from fasttrain.system.throughput import WaitTimer

MATRIX = "convolutions and matrix products"
REST = "everything else"

GROUPS: dict[str, tuple[str, ...]] = {
    "fused by the compiler": ("compiledfxgraph", "triton"),
    "optimizer": ("adam", "multi_tensor"),
    "normalisation": ("batch_norm", "bn_fw", "bn_bw"),
    "pooling": ("pool",),
    "copies and fills": ("copy", "memcpy", "memset", "fill", "zero_"),
    MATRIX: ("conv", "mm", "gemm", "xmma", "cutlass", "nvjet", "wgrad", "dgrad", "fprop"),
    "element by element": ("clamp", "relu", "gelu", "threshold", "add", "mul", "sub", "elementwise"),
}
"""Groups of operators and kernels, by parts of their names; the first group that matches counts."""

Batch = tuple[Tensor, Tensor]

WAIT, STEP = "wait for data", "train step"
"""The named ranges in the trace, and in nsys if that is running."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The figures of the profiled steps. Shares run from 0 to 1.

    wait_share: share of the time spent waiting for the loader. idle_share: share of the time in which the GPU
    did nothing; without a GPU, share of the cores' time. group_shares: share of all operators' time, by
    group.
    matrix_ms: time for a step's matrix products at the measured matmul rate.
    """

    device: str
    precision: str
    loader: str
    compile: str
    batch_size: int
    steps: int
    step_ms: float
    wait_share: float
    idle_share: float
    group_shares: dict[str, float]
    matmul_tflops_measured: float
    matrix_ms: float

    @property
    def mfu(self) -> float:
        """Share of the measured matmul rate that the whole step reaches."""
        return self.matrix_ms / self.step_ms


def profile_training(
    recipe: Recipe,
    dataset: Dataset,
    *,
    device: torch.device,
    out: Path,
    wait: int = 1,
    warmup: int = 2,
    active: int | None = None,
    operators: int = 20,
) -> tuple[Profile, str]:
    """Train a few steps under the profiler; returns the figures and the table of operators.

    wait, warmup, active: steps that are not profiled, that warm up the profiler, and that count; by default
    20 count on a GPU and 3 on a CPU. All of them train at full resolution. Writes trace.json, operators.txt
    and profile.json to the folder `out`.
    Raises UserError if a batch is larger than the training set, or if `out` cannot be written.
    """
    on_gpu = device.type == "cuda"
    recipe = fit_batch_size(dataclasses.replace(recipe, early_scale=1.0), dataset, log=print)
    active = active or (20 if on_gpu else 3)
    runtime = Runtime.resolve(recipe, device)
    loader = build_loader(dataset, recipe, train=True, device=device, loader=runtime.loader)
    matmul_tflops = measure_matmul_tflops(device, runtime.dtype)
    torch.manual_seed(recipe.seed)
    step = TrainStep(
        initial_model(dataset, find_start(recipe, dataset)),
        recipe,
        runtime,
        max_lr=0.01 if recipe.max_lr == "auto" else recipe.max_lr,
        total_steps=max(wait + warmup + active, 2),
        class_weights_K=class_weights(dataset, recipe),
    )
    batches = chain.from_iterable(repeat(loader))
    cache = cache_of(step, hardware_name(describe(device)), runtime.compile_mode, recipe.batch_size)
    compile_mode, _ = compile_step(step, runtime.compile_mode, cache, *next(batches))
    profiler, clock, wait_seconds = _watch(step, batches, wait, warmup, active)

    matmul_tflops = max(matmul_tflops, measure_matmul_tflops(device, runtime.dtype))
    flop = training_flop_per_image(step.model) * recipe.batch_size
    busy = _device_busy_seconds(profiler.events()) if on_gpu else clock.cpu_seconds / cpu_cores()
    found = Profile(
        device=device.type,
        precision=runtime.precision,
        loader=loader.name,
        compile=compile_mode or "off",
        batch_size=recipe.batch_size,
        steps=active,
        step_ms=1000 * clock.seconds / active,
        wait_share=wait_seconds / clock.seconds,
        idle_share=max(0.0, 1 - busy / clock.seconds),
        group_shares=_group_shares(profiler.key_averages(), on_gpu),
        matmul_tflops_measured=matmul_tflops,
        matrix_ms=flop / matmul_tflops / 1e9,
    )
    table = profiler.key_averages().table(
        sort_by="self_device_time_total" if on_gpu else "self_cpu_time_total",
        row_limit=operators,
        max_name_column_width=60,
    )
    _write(out, profiler, found, table, describe(device))
    return found, table


def _watch(
    step: TrainStep, batches: Iterator[Batch], wait: int, warmup: int, active: int
) -> tuple[Any, "_Clock", float]:
    """Train wait + warmup + active steps; returns torch's profiler, and of the active ones clock and wait."""
    from torch.profiler import ProfilerActivity, profile, schedule

    device, clock, waited_before = step.device, _Clock(), 0.0
    timer = WaitTimer(batches, device)
    timed_batches = iter(timer)
    with profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"),
        schedule=schedule(wait=wait, warmup=warmup, active=active, repeat=1),
        profile_memory=True,
    ) as profiler:
        for number in range(wait + warmup + active):
            if number == wait + warmup:
                step.take_metrics()  # waits for the device: the clock starts with nothing queued
                clock.start()
                waited_before = timer.wait_seconds
            with _range(WAIT, device):
                batch = next(timed_batches)
            with _range(STEP, device):
                step(*batch)
            if number == wait + warmup + active - 1:
                step.take_metrics()
                clock.stop()
            profiler.step()
    return profiler, clock, timer.wait_seconds - waited_before


def sentences(found: Profile) -> list[str]:
    """Say in three sentences what bounds this training, by how much, and what to try."""
    matrix_share = found.group_shares.get(MATRIX, 0.0)
    others = {name: share for name, share in found.group_shares.items() if name not in (MATRIX, REST)}
    largest = max(others, key=lambda name: others[name], default=REST)
    if found.wait_share > 0.1:
        return [
            f"The loader bounds this training: it waits for data {found.wait_share:.0%} of the time.",
            _without(found, found.wait_share),
            "Try more --loader-threads; python -m benchmarks.loaders measures the loader by itself.",
        ]
    if found.idle_share > 0.2 and found.device == "cuda":
        return [
            f"The host bounds this training: the GPU is idle {found.idle_share:.0%} of the time.",
            _without(found, found.idle_share),
            "See in the trace what it waits for; a step is one launch unless --no-cuda-graph. Or try a "
            "larger --batch-size.",
        ]
    if found.idle_share > 0.2:
        return [
            f"The cores work for this training only {1 - found.idle_share:.0%} of the time: other processes "
            "use them, or some of the training's work runs in a single thread.",
            _without(found, found.idle_share),
            "Try an idle machine, then a larger --batch-size; the trace shows what leaves the cores idle.",
        ]
    if matrix_share >= 0.5:
        first = f"Arithmetic bounds this training: {MATRIX} take {matrix_share:.0%} of all operators' time."
    else:
        first = f"Memory traffic bounds this training: {MATRIX} take only {matrix_share:.0%} of all time."
    second = (
        f"At the measured matmul rate they need {found.matrix_ms:,.1f} ms of a step's {found.step_ms:,.1f}: "
        f"the step as a whole runs at {found.mfu:.0%} of that rate."
    )
    if found.precision in ("fp32", "tf32"):
        third = "Try --compute-dtype auto: half precision multiplies faster if the hardware has it."
    elif found.mfu > 0.8:
        third = "There is little left to gain in the step: a shorter schedule (fewer --epochs) saves more."
    elif found.compile == "off" and found.device == "cuda":
        third = f"Try --compile default, which fuses the rest, such as {largest} ({others[largest]:.0%})."
    else:
        third = f"After the products {largest} costs most ({others.get(largest, 0.0):.0%}): look there first."
    return [first, second, third]


def _without(found: Profile, lost_share: float) -> str:
    return (
        f"Without that, its {found.step_ms:,.1f} ms a step would be {found.step_ms * (1 - lost_share):,.1f}."
    )


class _Clock:
    """Wall-clock and CPU seconds of the steps that count."""

    def start(self) -> None:
        self.seconds, self.cpu_seconds = -time.perf_counter(), -time.process_time()

    def stop(self) -> None:
        self.seconds += time.perf_counter()
        self.cpu_seconds += time.process_time()


@contextmanager
def _range(name: str, device: torch.device) -> Iterator[None]:
    """Mark a named range in the trace and, on a GPU, for nsys."""
    with torch.profiler.record_function(name):
        if device.type != "cuda":
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield


def _is_range(event: Any, name: str) -> bool:
    """Return whether a profiler's event is a named range, ours or another's, and no kernel or operator.

    torch lists the ranges of the host once more among the GPU's kernels. A CPU's time in compiled code has
    no operators, only such a range of the compiler's: there, only our own and the profiler's are left out.
    """
    if event.device_type == DeviceType.CUDA:
        return bool(event.is_user_annotation)
    return name in (WAIT, STEP) or name.startswith("ProfilerStep")


def _group_shares(averages: Any, on_gpu: bool) -> dict[str, float]:
    """Return each group's share of all operators' own time, the largest first."""
    seconds: dict[str, float] = {}
    for average in averages:
        if _is_range(average, average.key) or (on_gpu and average.device_type != DeviceType.CUDA):
            continue  # an operator's time is that of its kernels, which are listed separately
        name = average.key.lower()
        group = next((group for group, parts in GROUPS.items() if any(p in name for p in parts)), REST)
        own = average.self_device_time_total if on_gpu else average.self_cpu_time_total
        seconds[group] = seconds.get(group, 0.0) + own
    total = sum(seconds.values()) or 1.0
    return {group: seconds[group] / total for group in sorted(seconds, key=lambda g: -seconds[g])}


def _device_busy_seconds(events: Any) -> float:
    """Return the seconds in which at least one kernel or copy was running on the GPU."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type == DeviceType.CUDA and not _is_range(event, event.name)
    )
    busy, reached = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy / 1e6


def _write(out: Path, profiler: Any, found: Profile, table: str, machine: dict[str, object]) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        part = out / ".trace.json"
        profiler.export_chrome_trace(str(part))
        part.replace(out / "trace.json")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); choose another") from error
    write_atomically(out / "operators.txt", lambda file: file.write(table.encode()))
    values = {"machine": machine, **dataclasses.asdict(found), "mfu": found.mfu}
    write_json(out / "profile.json", values | {"sentences": sentences(found)})
