"""Whether torch.compile pays within a run, and what it leaves for the next process."""

import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.model import training_flop_per_image
from fasttrain.recipe import Recipe
from fasttrain.step import TrainStep
from fasttrain.system.files import write_atomically, write_json

COLD_SECONDS, WARM_SECONDS = 40.0, 6.0
"""What compiling is taken to cost before this machine has shown it: anew, and from the cache."""


NOTHING_NEW = 1.0
"""Seconds; a second network of one process compiles in less, since torch has its code already."""


@dataclass(frozen=True, kw_only=True)
class CompileEstimate:
    """Whether compiling can pay for itself within a run.

    steps: of the run. step_seconds: of one as it is. floor_seconds: of one at the rate of matrix products
    alone, which no compiler goes below. compile_seconds: what compiling should take.
    """

    steps: int
    step_seconds: float
    floor_seconds: float
    compile_seconds: float

    @property
    def most_seconds(self) -> float:
        """More than this cannot be gained."""
        return self.steps * max(0.0, self.step_seconds - self.floor_seconds)

    def __bool__(self) -> bool:
        return self.most_seconds > self.compile_seconds

    def __str__(self) -> str:
        verdict = "compiling" if self else "running eager (--compile default compiles all the same)"
        return (
            f"torch.compile: at most {self.most_seconds:.1f} s to gain in {self.steps:,} steps, about "
            f"{self.compile_seconds:.0f} s to compile: {verdict}"
        )


class CompileCache:
    """What torch.compile made for one kind of step, in a file that later processes begin with.

    Other than torch's own cache in the system's temporary folder, it can be carried to another machine of the
    same kind. As a program's own files it is trusted: keep FASTTRAIN_CACHE where nobody else writes.
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
        """What compiling should take now."""
        if not self._artifacts.exists():
            return COLD_SECONDS
        try:
            return float(json.loads(self._seconds.read_text(encoding="utf-8"))["warm"])
        except (OSError, ValueError, KeyError, TypeError):
            return WARM_SECONDS

    def load(self) -> None:
        """Give torch what is in the file. One that torch cannot use is as good as none."""
        try:
            content = self._artifacts.read_bytes()
            self._loaded = torch.compiler.load_cache_artifacts(content) is not None
        except (OSError, RuntimeError):
            self._loaded = False

    def save(self, seconds: float) -> None:
        """Keep what this process compiled in so many seconds. A folder that cannot be written is no error."""
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


def cache_of(step: TrainStep, hardware: str, mode: str | None, batch_size: int) -> CompileCache:
    """The cache of what torch.compile makes of steps like this one, on this hardware.

    batch_size: images that a step of this process takes.
    """
    recipe = step.recipe
    shape = (batch_size, recipe.resolution, recipe.width, recipe.activation)
    return CompileCache(hardware, step.compute_dtype, mode, *shape)


def compile_step(
    step: TrainStep,
    mode: str | None,
    cache: CompileCache,
    images_NCHW: Tensor,
    labels_N: Tensor,
) -> float:
    """Compile a step with whatever the cache holds for it, and capture it where that is wanted.

    mode: None captures only. Returns the seconds that it took.
    """
    if mode is None:
        return step.warm_up(images_NCHW, labels_N)
    cache.load()
    step.compile(mode)
    seconds = step.warm_up(images_NCHW, labels_N)
    if step.world.local_rank == 0:
        cache.save(seconds)
    return seconds


def pick_final_mode(
    step: TrainStep,
    recipe: Recipe,
    mode: str | None,
    cache: CompileCache,
    matmul_tflops: float,
    example: tuple[Tensor, Tensor],
    *,
    kept: str | None,
    log: Callable[[str], object],
) -> str | None:
    """The mode to compile a run's steps in, None for eager.

    mode: what this machine can do. kept: what the run began with, or off; None for a new run. With auto a
    new run compiles only if that can pay within its steps, which is logged in a line.
    """
    if kept is not None:
        return None if kept == "off" else mode and kept
    if mode is None or recipe.compile != "auto":
        return mode
    own = estimate_compile(step, cache, matmul_tflops, *example)
    estimate = step.world.broadcast(lambda: own)
    log(str(estimate))
    return mode if estimate else None


def estimate_compile(
    step: TrainStep, cache: CompileCache, matmul_tflops: float, images_NCHW: Tensor, labels_N: Tensor
) -> CompileEstimate:
    """What compiling this step can gain and should cost. Takes a few dozen steps, which leave no trace."""
    flop = training_flop_per_image(step.model) * len(labels_N)
    return CompileEstimate(
        steps=step.total_steps - step.step,
        step_seconds=step.measure_seconds(images_NCHW, labels_N),
        floor_seconds=flop / matmul_tflops / 1e12,
        compile_seconds=cache.expected_seconds,
    )


def example_batch(batch_size: int, resolution: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of the loaders' shape, dtype and strides, to compile and time on without taking one from them.

    Noise, not zeros: on zeros a GPU draws less power and computes faster.
    """
    noise = torch.Generator(device).manual_seed(0)
    shape = (batch_size, resolution, resolution, 3)
    images_NHWC = torch.randint(256, shape, generator=noise, dtype=torch.uint8, device=device)
    labels_N = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return images_NHWC.permute(0, 3, 1, 2), labels_N


def cache_folder() -> Path:
    """FASTTRAIN_CACHE, or fasttrain in the user's folder for caches."""
    named = os.environ.get("FASTTRAIN_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrain"
