"""Everything worth measuring on a GPU in one visit, the most important first.

    python -m benchmarks.gpu_report --data-dir data --out benchmarks/results [--only designs step]

Each part is a process of its own with a time limit, writes its JSON at once, and cannot stop the next one.
All together keep within --minutes: whatever does not fit any more is left out, and named. On a machine
without a GPU every part runs on the CPU; --small makes them small enough to prove the script there.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import run, show
from fasttrain.errors import UserError
from fasttrain.system.machine import cpu_cores


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure everything in one visit."""

    data_dir: Path = Path("data")
    """Folder of CIFAR-10."""
    out: Path = Path("benchmarks/results")
    """Where JSON files, logs, the run and the trace go."""
    minutes: float = 8.0
    """For all parts together."""
    only: tuple[str, ...] = ()
    """Parts to run, by name, as after a change that concerns them; by default all."""
    small: bool = False
    """Tiny sizes that prove the script on a CPU; the figures mean nothing."""


ENOUGH_SECONDS = 10
"""A part that has less left than this is not begun."""


def parts(options: Options) -> list[tuple[str, int, list[str]]]:
    """Name, limit in seconds and command of every part, in order of importance.

    The limits are a GPU's; --small has only that of all parts together.
    """
    small = options.small

    def module(name: str, *arguments: str, full: str = "", tiny: str = "") -> list[str]:
        return [sys.executable, "-m", name, *arguments, *(tiny if small else full).split()]

    data = ["--data-dir", str(options.data_dir)]
    recipe = options.out / "small.json"
    if small:
        recipe.write_text('{"batch_size": 8, "epochs": 1, "width": 8}')

    def of_recipe(name: str) -> list[str]:
        return ["--recipe", str(recipe) if small else name]

    # Compiled whatever auto would say of one run: the figures are those of a machine whose cache is warm.
    compiled = "--compile default"
    runs = ["--out", str(options.out / "runs")]
    train = module("fasttrain", "train", *of_recipe("default"), *data, *runs, full=compiled)

    def seeds(recipe: str) -> list[str]:
        return module(
            "benchmarks.train", *of_recipe(recipe), *data, full=f"--seeds 5 {compiled}", tiny="--seeds 1"
        )

    # The first wants a GPU and a package, the second the images as files too.
    airbench = [("airbench", 120, module("benchmarks.airbench", *data, full=f"--seeds 5 {compiled}"))]
    images = options.data_dir / "images"
    of_files = module("fasttrain", "train", "--data", f"folder:{images}", *data, *runs, "--epochs", "1")
    return [
        ("machine", 60, module("benchmarks.machine")),
        # -v: each outcome is told at once, whatever ends the tests early.
        ("tests", 200, module("pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider")),
        ("run, cold", 150, train),
        ("run, warm", 90, train),
        ("seeds", 120, seeds("default")),
        (
            "loader",
            120,
            module(
                "benchmarks.loader",
                full=f"--cores {cpu_cores()} --batch-sizes 512",
                tiny="--rounds 1 --images 64 --seconds 0.1 --cores 1 --no-peers "
                "--batch-size 8 --batch-sizes 8 --step-batch-size 8",
            ),
        ),
        (
            "step",
            120,
            module("benchmarks.step", full="--batch-sizes 512", tiny="--rounds 1 --batch-sizes 8"),
        ),
        ("ladder", 120, module("benchmarks.ladder", tiny="--rounds 1 --batch-size 8 --images 64")),
        ("fast", 120, seeds("fast")),
        ("speedrun", 120, seeds("speedrun")),
        *airbench * (not small),
        (
            "profile",
            90,
            module(
                *("fasttrain", "profile", *of_recipe("default"), *data),
                *("--out", str(options.out / "profile")),
                full=compiled,
                tiny="--active 1",
            ),
        ),
        (
            "folder",
            60,
            module("benchmarks.folder", tiny="--rounds 1 --cores 1 --small 1000 --photos 20 --seconds 0.1"),
        ),
        *[("folder run", 90, of_files)] * images.is_dir(),
        (
            "designs",
            120,
            module(
                "benchmarks.designs",
                full="--rounds 3",
                tiny="--rounds 1 --seconds 0.1 --images 64 --batch-size 8",
            ),
        ),
        ("start", 90, module("benchmarks.start", tiny="--rounds 1 --images 100")),
        # Compiles each of its networks anew.
        ("networks", 300, module("benchmarks.networks", tiny="--rounds 1 --batch-size 8 --width 8")),
        (
            "scaling",
            120,
            module(
                "benchmarks.scaling",
                tiny="--rounds 1 --images 32 64 --batch-sizes 4 8 --epochs 1 2 --widths 8 16",
            ),
        ),
    ]


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    deadline = time.perf_counter() + 60 * options.minutes
    everything = parts(options)
    names = [name for name, *_ in everything]
    for name in options.only:
        if name not in names:
            raise UserError(f"--only {name!r}: expected some of {', '.join(map(repr, names))}")
    for name, limit, command in everything:
        if options.only and name not in options.only:
            continue
        log = options.out / f"{name.replace(', ', '-')}.log"
        left = deadline - time.perf_counter()
        if left < ENOUGH_SECONDS:
            rows.append([name, f"left out: {options.minutes:g} minutes are over", "-", "-"])
            continue
        print(f"{name}: {' '.join(command[1:])}", file=sys.stderr)
        start = time.perf_counter()
        outcome = run_part(command, left if options.small else min(limit, left), log, options.out)
        rows.append([name, outcome, f"{time.perf_counter() - start:.1f}", str(log)])
    show("parts", ["part", "outcome", "seconds", "log"], rows)
    if any(outcome != "done" for _, outcome, _, _ in rows):
        sys.exit(1)


def run_part(command: list[str], limit: float, log: Path, results: Path) -> str:
    """Run one part with its output in `log`; returns done, or what became of it."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Unbuffered: what a part said stays in its log when it is killed.
            env=os.environ | {"FASTTRAIN_RESULTS": str(results.resolve()), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
            return "done" if status == 0 else f"exit status {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
            return f"stopped after {limit:.0f} s"


if __name__ == "__main__":
    run(main, Options)
