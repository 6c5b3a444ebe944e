"""When torch.compile pays, what it leaves for the next process, and when a step is recorded."""

import hashlib
import json
import os
import platform
import shutil
import sys
import sysconfig
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


OWN_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which torch.compile records CUDA graphs of its own."""


def pick_compile_mode(requested: str, device: torch.device, announce: Callable[[str], object]) -> str | None:
    """torch.compile's mode, or None for eager.

    auto compiles on a GPU and stays eager on a CPU, where no gain was measured that would pay for compiling
    (benchmarks/LOG.md). Where no compiler is there, falls back to eager and says so in one line.
    """
    if requested == "off" or (requested == "auto" and device.type == "cpu"):
        return None
    reason = compiler_available(device)
    if reason is not None:
        announce(f"torch.compile: {reason}; running eager")
        return None
    return "default" if requested == "auto" else requested


def captures_graph(recipe: Recipe, device: torch.device, compile_mode: str | None) -> bool:
    """Whether the whole step is recorded as a CUDA graph of ours."""
    return recipe.cuda_graph and device.type == "cuda" and compile_mode not in OWN_GRAPHS


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
    """Compile a step with whatever the cache holds for it, and record it where that is wanted.

    mode: None records alone. Returns the seconds that it took.
    """
    if mode is None:
        return step.warm_up(images_NCHW, labels_N)
    cache.load()
    step.compile(mode)
    seconds = step.warm_up(images_NCHW, labels_N)
    if step.world.local_rank == 0:
        cache.save(seconds)
    return seconds


def payoff(
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


def cache_folder() -> Path:
    """FASTTRAIN_CACHE, or fasttrain in the user's folder for caches."""
    named = os.environ.get("FASTTRAIN_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fasttrain"


def compiler_available(device: torch.device) -> str | None:
    """None if torch.compile can work on this device, else the reason and the remedy in one line."""
    # Imported here: they take a second, and only a few commands ask.
    from torch._dynamo import is_dynamo_supported
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch.utils._triton import has_triton

    if not is_dynamo_supported():
        return f"torch {torch.__version__} cannot compile on Python {platform.python_version()}"
    if device.type == "cuda":
        if not has_triton():
            return "no Triton for this GPU: pip install triton (needs compute capability 7.0)"
        # Triton compiles a small C launcher for every kernel.
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "no C compiler: install gcc, or set CC"
    elif device.type == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler: install g++, or set CXX"
    else:
        return f"fasttrain does not compile for {device.type}"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no Python.h: install Python's development files (python3-dev)"
    return None
