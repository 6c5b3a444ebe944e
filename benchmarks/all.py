"""Every benchmark in one command: `make bench` on your machine, `make gpu-report` on a machine with a GPU.

    python -m benchmarks.all                       # how fast fasttrain is here, in about 12 minutes
    python -m benchmarks.all --plan gpu --data-dir data --visit first [--airbench airbench94_muon.py]

Each part is a process of its own, writes its JSON at once, and cannot stop the next one. With --plan gpu the
parts come in order of importance and have time limits, and all together keep within --minutes: parts that no
longer fit are left out, and named. The parts are divided into visits, as GPUs are lent for minutes: `first`
needs no DALI, `dali` measures its loader, `seeds` takes the rest. --small makes all of it small enough to
test on a CPU.
"""

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from benchmarks.harness import run, show
from fasttrain.errors import UserError
from fasttrain.system.machine import cpu_cores

BENCH = ("machine", "step", "loaders", "ladder", "scaling", "start")
"""The parts of `make bench`, which need neither a GPU nor the images."""

Visit = Literal["first", "dali", "seeds"]

VISITS: dict[Visit, tuple[str, ...]] = {
    "first": (
        *("doctor", "machine", "layers", "tests-step"),
        *("short-eager", "short-graph", "short-compiled", "short-compiled-graph", "fastest"),
        *("airbench", "accuracy-speedrun"),
    ),
    "dali": ("tests-loaders", "loaders", "run-cold", "run-warm", "profile", "trace"),
    "seeds": (
        *("accuracy-default", "accuracy-fast", "ladder", "profile-speedrun", "folder", "folder-run"),
        *("start", "scaling", "step", "networks", "designs"),
    ),
}
"""The parts of `make gpu-report`, the most important first."""

MINUTES = 9
"""Of a visit: a GPU that is lent for ten needs one to start."""

TWINS = {
    *("tests-loaders", "short-graph", "short-compiled", "short-compiled-graph", "run-warm"),
    *("accuracy-fast", "accuracy-speedrun", "profile-speedrun"),
}
"""Parts that --small leaves out: on a CPU each does what another one does."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Run every benchmark."""

    plan: Literal["bench", "gpu"] = "bench"
    """bench: what a step, the loaders and a start cost. gpu: tests, trainings, accuracy and research too."""
    data_dir: Path = Path("data")
    """Folder of CIFAR-10."""
    out: Path = Path("bench-results")
    """Where logs, runs and the trace go, and the JSON files if FASTTRAIN_RESULTS names no other folder."""
    visit: Visit | None = None
    """Which parts of --plan gpu; by default all visits, one after another."""
    airbench: Path | None = None
    """cifar10-airbench's airbench94_muon.py, to train it beside ours."""
    minutes: float | None = None
    """For all parts together; by default 9 for a visit of --plan gpu, and no limit otherwise."""
    only: tuple[str, ...] = ()
    """Parts to run, by name, as after a change that concerns them; by default all."""
    small: bool = False
    """Tiny sizes that test the script on a CPU; the figures mean nothing."""


@dataclass(frozen=True)
class Part:
    """A process to run; seconds: its limit on a GPU.

    caches: folder for everything that compilers keep; by default their own. cold: empty it first.
    """

    name: str
    seconds: float
    command: list[str]
    caches: Path | None = None
    cold: bool = False


TESTS = Path(__file__).resolve().parents[1] / "tests"

ENOUGH_SECONDS = 10
"""A part that has less time left than this is not started."""


def parts(options: Options) -> list[Part]:
    """The parts of the plan that can run here, in its order."""
    if options.plan == "bench":
        found = {part.name: part for part in benchmark_parts(options)}
        return [found[name] for name in BENCH]
    found = {part.name: part for part in (*benchmark_parts(options), *training_parts(options))}
    visits = [options.visit] if options.visit else list(VISITS)
    names = [name for visit in visits for name in VISITS[visit] if name in found]
    return [found[name] for name in names if not (options.small and name in TWINS)]


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
        part("machine", 30),
        part("layers", 90, small="--batch-sizes 8 --width 8 --seconds 0"),
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
    out = options.out

    def recipe(name: str) -> list[str]:
        return ["--recipe", str(small_recipe(options)) if options.small else name]

    def fasttrain(command: str, *arguments: str, full: str = "", small: str = "") -> list[str]:
        return module(options, "fasttrain", command, *data, *arguments, full=full, small=small)

    def run_of(name: str, seconds: float, *, cold: bool = False) -> Part:
        # Compiled even where auto finds that a run is too short for it.
        full = "--compile default --loader dali"
        command = fasttrain("train", *recipe("default"), "--out", str(out / "runs"), full=full)
        return Part(name, seconds, command, caches=out / "caches", cold=cold)

    def profile(name: str, preset: str, full: str) -> Part:
        into = ["--out", str(out / name)]
        return Part(name, 60, fasttrain("profile", *recipe(preset), *into, full=full, small="--active 1"))

    trace = module(options, "benchmarks.trace", str(out / "profile" / "trace.json"))
    found = [
        Part("doctor", 30, module(options, "fasttrain", "doctor")),
        *test_parts(options),
        *short_parts(options, fasttrain, recipe("default")),
        *(accuracy_part(options, preset, recipe(preset)[1]) for preset in ("default", "fast", "speedrun")),
        run_of("run-cold", 150, cold=True),
        run_of("run-warm", 90),
        profile("profile", "default", "--compile default --loader dali --active 20"),
        Part("trace", 30, trace),
        profile("profile-speedrun", "speedrun", ""),
    ]
    if options.airbench:
        rival = ["--script", str(options.airbench), *data]
        full = "--recipe speedrun --loader tensor --compile default --seeds 5"
        # Theirs tries kernels out for longer than 80 seconds before its first training.
        found.append(Part("airbench", 300, module(options, "benchmarks.airbench", *rival, full=full)))
    images = options.data_dir / "images"
    if images.is_dir():
        folder = ["--data", f"folder:{images}", "--out", str(out / "runs"), "--epochs", "1"]
        found.append(Part("folder-run", 90, fasttrain("train", *folder)))
    return found


def test_parts(options: Options) -> list[Part]:
    """The tests that need a GPU: those of a step, and those that need DALI too."""

    def tests(name: str, seconds: float, *files: str) -> Part:
        # -v: every outcome is printed at once, so it is known even if the tests are stopped early.
        flags = ["-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider"]
        paths = [str(TESTS / f"test_{file}.py") for file in files]
        return Part(name, seconds, module(options, "pytest", *flags, *paths))

    of_a_step = ["ema"] if options.small else ["machine", "rates", "ema", "proof", "step"]
    return [tests("tests-step", 120, *of_a_step), tests("tests-loaders", 60, "loader", "trainer")]


def short_parts(options: Options, fasttrain: Callable[..., list[str]], default: list[str]) -> list[Part]:
    """Three epochs in each way to take a step, and the whole training in the fastest; all without DALI."""
    short, data = options.out / "short", ["--data-dir", str(options.data_dir)]
    ways = {
        "eager": (30, "--compile off --no-cuda-graph"),
        "graph": (30, "--compile off"),
        "compiled": (75, "--compile default --no-cuda-graph"),
        "compiled-graph": (45, "--compile default"),
    }
    runs = ["--loader", "tensor", "--out", str(short)]
    parts = [
        Part(f"short-{way}", seconds, fasttrain("train", *default, *runs, full=f"--epochs 3 {flags}"))
        for way, (seconds, flags) in ways.items()
    ]
    whole = ["--short", str(short), *data, "--out", str(options.out / "runs")]
    return [*parts, Part("fastest", 60, module(options, "benchmarks.fastest", *whole, small="--epochs 1"))]


def accuracy_part(options: Options, preset: str, recipe: str) -> Part:
    """A preset over five seeds; the speedrun, of the first visit, without DALI."""
    wanted = ["--mode", "final", "--presets", recipe, "--data-dir", str(options.data_dir)]
    wanted += ["--out", str(options.out / "accuracy")]
    full = "--seeds 5 --compile default" + " --loader tensor" * (preset == "speedrun")
    command = module(options, "benchmarks.accuracy", *wanted, full=full, small="--seeds 1")
    return Part(f"accuracy-{preset}", 150, command)


def small_recipe(options: Options) -> Path:
    path = options.out / "small.json"
    path.write_text('{"batch_size": 8, "epochs": 1, "width": 8}')
    return path


def main(options: Options) -> None:
    if options.visit and options.plan != "gpu":
        raise UserError(f"--visit {options.visit}: expected with --plan gpu")
    options.out.mkdir(parents=True, exist_ok=True)
    everything = parts(options)
    names = [part.name for part in everything]
    for name in options.only:
        if name not in names:
            raise UserError(f"--only {name!r}: expected some of {', '.join(map(repr, names))}")
    visits = 1 if options.visit else len(VISITS)
    minutes = options.minutes or (visits * MINUTES if options.plan == "gpu" else math.inf)
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
    if part.caches and part.cold:
        shutil.rmtree(part.caches, ignore_errors=True)
    process = subprocess.Popen(
        part.command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        # Unbuffered: when a part is stopped, its log has all that it said.
        env=os.environ | {"FASTTRAIN_RESULTS": results_folder(out), "PYTHONUNBUFFERED": "1"} | caches(part),
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


def caches(part: Part) -> dict[str, str]:
    """The variables that say where torch's compiler, Triton and fasttrain keep what was compiled."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FASTTRAIN_CACHE")
    return {name: str(part.caches.resolve() / name.lower()) for name in names} if part.caches else {}


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
