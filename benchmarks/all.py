"""Every benchmark in one command: `make bench` on your machine, `make gpu-report` in one visit to a GPU.

    python -m benchmarks.all                       # how fast fasttrain is here, in about 12 minutes
    python -m benchmarks.all --plan gpu --data-dir data [--only step ladder]

Each part is a process of its own, writes its JSON at once, and cannot stop the next one. With --plan gpu the
parts come in order of importance and have time limits, and all together keep within --minutes: parts that no
longer fit are left out, and named. --small makes all of it small enough to test on a CPU.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from benchmarks.harness import run, show
from fasttrain.errors import UserError
from fasttrain.system.machine import cpu_cores

BENCH = ("machine", "step", "loaders", "ladder", "scaling", "start")
"""The parts of `make bench`, which need neither a GPU nor the images."""

GPU = (
    *("machine", "tests", "run-cold", "run-warm", "accuracy-default", "loaders", "step", "ladder"),
    *(
        "accuracy-fast",
        "accuracy-speedrun",
        "airbench",
        "profile",
        "folder",
        "folder-run",
        "designs",
        "start",
    ),
    *("networks", "scaling"),
)
"""The parts of `make gpu-report`, the most important first."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run every benchmark."""

    plan: Literal["bench", "gpu"] = "bench"
    """bench: what a step, the loaders and a start cost. gpu: tests, trainings, accuracy and research too."""
    data_dir: Path = Path("data")
    """Folder of CIFAR-10."""
    out: Path = Path("bench-results")
    """Where logs, runs and the trace go, and the JSON files if FASTTRAIN_RESULTS names no other folder."""
    minutes: float | None = None
    """For all parts together; by default 8 with --plan gpu, and no limit otherwise."""
    only: tuple[str, ...] = ()
    """Parts to run, by name, as after a change that concerns them; by default all."""
    small: bool = False
    """Tiny sizes that test the script on a CPU; the figures mean nothing."""


@dataclass(frozen=True)
class Part:
    """A process to run; seconds: its limit on a GPU."""

    name: str
    seconds: float
    command: list[str]


ENOUGH_SECONDS = 10
"""A part that has less time left than this is not started."""


def parts(options: Options) -> list[Part]:
    """The parts of the plan that can run here, in its order."""
    if options.plan == "bench":
        found = {part.name: part for part in benchmark_parts(options)}
        return [found[name] for name in BENCH]
    found = {part.name: part for part in (*benchmark_parts(options), *training_parts(options))}
    return [found[name] for name in GPU if name in found]


def module(options: Options, name: str, *arguments: str, full: str = "", small: str = "") -> list[str]:
    """The command of a Python module; full: its options with --plan gpu, small: with --small."""
    more = small if options.small else full if options.plan == "gpu" else ""
    return [sys.executable, "-m", name, *arguments, *more.split()]


def benchmark_parts(options: Options) -> list[Part]:
    """The parts that measure speed on random pixels."""

    def part(name: str, seconds: float, full: str = "", small: str = "", folder: str = "") -> Part:
        return Part(name, seconds, module(options, f"benchmarks.{folder}{name}", full=full, small=small))

    tiny_loaders = "--rounds 1 --images 64 --seconds 0.1 --cores 1 --no-peers "
    tiny_loaders += "--width 8 --batch-size 8 --batch-sizes 8 --step-batch-size 8"
    tiny_folder = "--rounds 1 --cores 1 --small 1000 --photos 20 --seconds 0.1"
    tiny_designs = "--rounds 1 --seconds 0.1 --images 64 --batch-size 8"
    tiny_scaling = "--rounds 1 --width 8 --batch-size 8 "
    tiny_scaling += "--images 32 64 --batch-sizes 4 8 --epochs 1 2 --widths 8 16"
    return [
        part("machine", 60),
        part("loaders", 120, f"--cores {cpu_cores()} --batch-sizes 512", tiny_loaders),
        part("step", 120, "--batch-sizes 512", "--rounds 1 --width 8 --batch-sizes 8"),
        part("ladder", 120, small="--rounds 1 --width 8 --batch-size 8 --images 64"),
        part("folder", 60, small=tiny_folder, folder="research."),
        part("designs", 120, "--rounds 3", tiny_designs, folder="research."),
        part("start", 90, small="--rounds 1 --images 100"),
        part("networks", 300, small="--rounds 1 --batch-size 8 --width 8", folder="research."),
        part("scaling", 120, small=tiny_scaling),
    ]


def training_parts(options: Options) -> list[Part]:
    """The parts that train on the images, with the tests that need a GPU."""
    data = ["--data-dir", str(options.data_dir)]
    runs = ["--out", str(options.out / "runs")]
    # Compiled even where auto finds that one run is too short for it: figures are those of a warm cache.
    compiled = "--compile default"

    def recipe(name: str) -> str:
        return str(small_recipe(options)) if options.small else name

    def fasttrain(command: str, *arguments: str, full: str = "", small: str = "") -> list[str]:
        return module(options, "fasttrain", command, *data, *arguments, full=full, small=small)

    def accuracy(preset: str) -> Part:
        out = ["--out", str(options.out / "accuracy")]
        wanted = ["--mode", "final", "--presets", recipe(preset), *data, *out]
        full, small = f"--seeds 5 {compiled}", "--seeds 1"
        return Part(
            f"accuracy-{preset}", 120, module(options, "benchmarks.accuracy", *wanted, full=full, small=small)
        )

    train = fasttrain("train", "--recipe", recipe("default"), *runs, full=compiled)
    profile = ["--recipe", recipe("default"), "--out", str(options.out / "profile")]
    # -v: every outcome is printed at once, so it is known even if the tests are stopped early.
    flags = ["-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
    found = [
        Part("tests", 200, module(options, "pytest", *flags, small="tests/test_ema.py")),
        Part("run-cold", 150, train),
        Part("run-warm", 90, train),
        *map(accuracy, ("default", "fast", "speedrun")),
        Part("profile", 90, fasttrain("profile", *profile, full=compiled, small="--active 1")),
    ]
    if not options.small:  # its package needs a GPU
        airbench = module(options, "benchmarks.airbench", *data, full=f"--seeds 5 {compiled}")
        found.append(Part("airbench", 120, airbench))
    images = options.data_dir / "images"
    if images.is_dir():
        folder = fasttrain("train", "--data", f"folder:{images}", *runs, "--epochs", "1")
        found.append(Part("folder-run", 90, folder))
    return found


def small_recipe(options: Options) -> Path:
    path = options.out / "small.json"
    path.write_text('{"batch_size": 8, "epochs": 1, "width": 8}')
    return path


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    everything = parts(options)
    names = [part.name for part in everything]
    for name in options.only:
        if name not in names:
            raise UserError(f"--only {name!r}: expected some of {', '.join(map(repr, names))}")
    minutes = options.minutes or (8 if options.plan == "gpu" else math.inf)
    deadline = time.perf_counter() + 60 * minutes
    limited = options.plan == "gpu" and not options.small
    rows = []
    for part in everything:
        if options.only and part.name not in options.only:
            continue
        left = deadline - time.perf_counter()
        if left < ENOUGH_SECONDS:
            rows.append([part.name, f"left out: {minutes:g} minutes are over", "-"])
            continue
        print(f"{part.name}: {' '.join(part.command[1:])}", file=sys.stderr)
        start = time.perf_counter()
        outcome = run_part(part, min(part.seconds, left) if limited else left, options.out)
        rows.append([part.name, outcome, f"{time.perf_counter() - start:.1f}"])
    show("parts", ["part", "outcome", "seconds"], rows)
    print(f"logs: {options.out}")
    if any(outcome != "done" for _, outcome, _ in rows):
        sys.exit(1)


def run_part(part: Part, limit: float, out: Path) -> str:
    """Run one part, showing its output and keeping it in its log; returns done, or how it ended."""
    process = subprocess.Popen(
        part.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Unbuffered: when a part is stopped, its log has all that it said.
        env=os.environ | {"FASTTRAIN_RESULTS": results_folder(out), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    assert process.stdout
    copier = threading.Thread(target=copy_lines, args=(process.stdout, out / f"{part.name}.log"))
    copier.start()
    try:
        status = process.wait(None if limit == math.inf else limit)
        return "done" if status == 0 else f"exit status {status}"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and whatever processes it has left behind
        process.wait()
        copier.join()


def results_folder(out: Path) -> str:
    return os.environ.get("FASTTRAIN_RESULTS") or str(out.resolve())


def copy_lines(output: IO[str], log: Path) -> None:
    with log.open("w", encoding="utf-8") as file, output:
        for line in output:
            file.write(line)
            file.flush()
            print(line, end="", flush=True)


if __name__ == "__main__":
    run(main, Options)
