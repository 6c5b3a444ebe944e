"""Compilation of the training step: whether it pays within a run, and a cache for later processes."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fasttrain.errors import UserError, one_line
from fasttrain.model import training_flop_per_image
from fasttrain.step import TrainStep
from fasttrain.system.compiler import RUNNING_EAGER
from fasttrain.system.files import write_atomically, write_json
from fasttrain.system.memory import is_full_memory

COLD_SECONDS, WARM_SECONDS = 35.0, 2.3
"""Assumed cost of compiling until this machine has shown it: from scratch, and from the cache.

Measured on an H200 (docs/lab-notebook.md, 2026-11-29): speedrun from scratch; default, above capturing alone.
"""

COMPILER_SHARE = 0.39
"""Share that a compiler saves of an eager step's time above its matrix products.

Measured with the default recipe's step on an H200, batch 512, as a CUDA graph (docs/benchmarks.md): eager
4.71 ms, compiled 3.44, products at the measured rate 1.48.
"""

NOTHING_NEW = 1.0
"""Seconds below which nothing new was compiled: a second network in one process reuses torch's code."""


@dataclass(frozen=True, kw_only=True)
class CompileEstimate:
    """An estimate of whether compiling pays for itself within a run; true if it does.

    steps: steps left in the run. step_seconds: time of an eager step. floor_seconds: time of a step's matrix
    products at the measured rate, which no compiler changes. compile_seconds: expected time to compile.
    """

    steps: int
    step_seconds: float
    floor_seconds: float
    compile_seconds: float

    @property
    def gain_seconds(self) -> float:
        """The seconds that compiled steps save in the run."""
        return self.steps * COMPILER_SHARE * max(0.0, self.step_seconds - self.floor_seconds)

    def __bool__(self) -> bool:
        return self.gain_seconds > self.compile_seconds

    def __str__(self) -> str:
        verdict = "compiling" if self else "running eager (--compile default compiles anyway)"
        return (
            f"torch.compile: about {self.gain_seconds:.1f} s to gain in {self.steps:,} steps, about "
            f"{self.compile_seconds:.0f} s to compile; {verdict}"
        )


class CompileCache:
    """The artifacts that torch.compile made for one kind of step, in a file for later processes.

    Unlike torch's own cache in the system's temporary folder, the file can be copied to another machine of
    the same kind. Its content is run as code: keep FASTTRAIN_CACHE where no other user can write.
    device_name, settings: whatever the compiled code depends on.
    """

    def __init__(self, device_name: str, *settings: object) -> None:
        python = ".".join(map(str, sys.version_info[:2]))
        names = [torch.__version__, python, device_name, *map(str, settings)]
        key = hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]
        self._artifacts = cache_folder() / f"compile-{key}.bin"
        self._seconds = self._artifacts.with_suffix(".json")
        self._loaded = False

    @property
    def expected_seconds(self) -> float:
        """Expected time to compile, given the cache."""
        if not self._artifacts.exists():
            return COLD_SECONDS
        try:
            return float(json.loads(self._seconds.read_text(encoding="utf-8"))["warm"])
        except (OSError, ValueError, KeyError, TypeError):
            return WARM_SECONDS

    def load(self) -> None:
        """Load the file's artifacts into torch; a file that torch cannot use is ignored."""
        try:
            content = self._artifacts.read_bytes()
            self._loaded = torch.compiler.load_cache_artifacts(content) is not None
        except (OSError, RuntimeError):
            self._loaded = False

    def save(self, seconds: float) -> None:
        """Save what this process compiled in `seconds`; an error in writing the cache is ignored."""
        made = torch.compiler.save_cache_artifacts()
        if made is None or seconds < NOTHING_NEW:
            return
        try:
            self._artifacts.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._artifacts, lambda file: file.write(made[0]))
            if self._loaded:
                write_json(self._seconds, {"warm": seconds})
        except (OSError, UserError):
            return


def cache_of(step: TrainStep, hardware: str, compile_mode: str | None, batch_size: int) -> CompileCache:
    """Return the cache for steps like this one, on this hardware.

    batch_size: images per step in this process.
    """
    recipe = step.recipe
    network = (recipe.network, recipe.width, recipe.activation, recipe.dropout, recipe.bn_momentum)
    loss = (recipe.label_smoothing, recipe.class_weights)
    shape = (batch_size, recipe.resolution)
    return CompileCache(hardware, step.compute_dtype, compile_mode, *shape, *network, *loss)


def compile_step(
    step: TrainStep,
    compile_mode: str | None,
    cache: CompileCache,
    images_NCHW: Tensor,
    labels_N: Tensor,
) -> tuple[str | None, float]:
    """Compile a step, starting from the cache, and capture it as a CUDA graph if its runtime says so.

    compile_mode: None for a step that is only captured.
    Returns the mode in use, None if the step runs eagerly because compiling failed, and the seconds taken.
    Raises UserError if compiling fails and the recipe asks for a mode, or there are several ranks.
    """
    if compile_mode is None:
        return None, step.warm_up(images_NCHW, labels_N)
    cache.load()
    step.compile(compile_mode)
    start = time.perf_counter()
    try:
        seconds = step.warm_up(images_NCHW, labels_N)
    except Exception as error:  # Dynamo, Inductor, Triton and the C compiler raise all kinds
        if isinstance(error, UserError) or is_full_memory(error):
            raise
        # One of several ranks cannot change its mind alone: the others wait for its gradients.
        if step.recipe.compile != "auto" or step.world.size > 1:
            raise UserError(f"--compile {compile_mode}: {one_line(error)}; or use --compile off") from error
        step.fallbacks(f"torch.compile: {one_line(error)}", RUNNING_EAGER)
        step.compile(None)
        step.warm_up(images_NCHW, labels_N)
        return None, time.perf_counter() - start
    if step.world.local_rank == 0:
        cache.save(seconds)
    return compile_mode, seconds


def pick_final_mode(
    step: TrainStep,
    compile_mode: str | None,
    cache: CompileCache,
    matmul_tflops: float,
    example: tuple[Tensor, Tensor],
    *,
    kept: str | None,
    log: Callable[[str], object],
) -> str | None:
    """Choose the mode to compile a run's steps in; None means eager.

    compile_mode: the mode that this machine allows. kept: the mode that the run was started with, or off;
    None for a new run. With auto, a new run compiles only if that pays within its steps, and logs the
    estimate.
    example: images_NCHW and labels_N to time a step on.
    """
    if kept is not None:
        return None if kept == "off" else compile_mode and kept
    if compile_mode is None or step.recipe.compile != "auto":
        return compile_mode
    own = estimate_compile(step, cache, matmul_tflops, *example)
    estimate = step.world.broadcast(lambda: own)
    log(str(estimate))
    return compile_mode if estimate else None


def estimate_compile(
    step: TrainStep, cache: CompileCache, matmul_tflops: float, images_NCHW: Tensor, labels_N: Tensor
) -> CompileEstimate:
    """Estimate the gain and the cost of compiling this step, by timing a few dozen steps and undoing them."""
    flop = training_flop_per_image(step.model) * len(labels_N)
    return CompileEstimate(
        steps=step.total_steps - step.step,
        step_seconds=step.measure_seconds(images_NCHW, labels_N),
        floor_seconds=flop / matmul_tflops / 1e12,
        compile_seconds=cache.expected_seconds,
    )


def example_batch(batch_size: int, resolution: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a batch with the loaders' shape, dtype and strides, to compile and time a step on.

    Noise, not zeros: on zeros a GPU draws less power and computes faster.
    """
    noise = torch.Generator(device).manual_seed(0)
    shape = (batch_size, resolution, resolution, 3)
    images_NHWC = torch.randint(256, shape, generator=noise, dtype=torch.uint8, device=device)
    labels_N = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return images_NHWC.permute(0, 3, 1, 2), labels_N


def cache_folder() -> Path:
    """Return FASTTRAIN_CACHE or, by default, fasttrain/ in the user's cache folder."""
    named = os.environ.get("FASTTRAIN_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrain"
