"""Everything worth measuring on a GPU in one visit, the most important first.

    python -m benchmarks.gpu_report --data-dir data --out benchmarks/results

Each part is a process of its own with a time limit, writes its JSON at once, and cannot stop the next one. On
a machine without a GPU every part runs on the CPU; --small makes them small enough to prove the script there.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import run, show


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure everything in one visit."""

    data_dir: Path = Path("data")
    """Folder of CIFAR-10."""
    out: Path = Path("benchmarks/results")
    """Where JSON files, logs, the run and the trace go."""
    small: bool = False
    """Tiny sizes that prove the script on a CPU; the figures mean nothing."""


def parts(options: Options) -> list[tuple[str, int, list[str]]]:
    """Name, limit in seconds and command of every part, in order of importance."""
    python = [sys.executable, "-m"]
    data = ["--data-dir", str(options.data_dir)]
    epochs = ["--epochs", "1"] if options.small else []
    batch = ["--batch-size", "8"] if options.small else []
    runs = ["--out", str(options.out / "runs")]
    train = [*python, "fasttrain", "train", "--recipe", "default", *data, *runs, *epochs, *batch]
    seeds = ["--seeds", "1" if options.small else "5"]
    tiny = ["--rounds", "1"] if options.small else []
    tiny_loader = ["--images", "64", "--seconds", "0.1", "--batch-sizes", "8", "--step-batch-size", "8"]
    tiny_loader = [*tiny, *tiny_loader, "--cores", "1", "--no-peers"] if options.small else []
    tiny_step = [*tiny, "--batch-sizes", "8"] if options.small else []
    tiny_ladder = [*tiny, "--images", "64"] if options.small else []
    tiny_scaling = ["--images", "32", "64", "--batch-sizes", "4", "8", "--epochs", "1", "2"]
    tiny_scaling = [*tiny, *tiny_scaling, "--widths", "8", "16"] if options.small else []
    recipe = options.out / "small.json"
    if options.small:
        recipe.write_text('{"batch_size": 8, "epochs": 1}')
    small_recipe = ["--recipe", str(recipe)] if options.small else []
    profile = ["--out", str(options.out / "profile"), *(["--active", "1"] if options.small else [])]
    return [
        ("machine", 120, [*python, "benchmarks.machine"]),
        ("tests", 240, [*python, "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]),
        ("run", 240, train),
        ("loader", 240, [*python, "benchmarks.loader", *batch, *tiny_loader]),
        ("step", 180, [*python, "benchmarks.step", *tiny_step]),
        ("ladder", 180, [*python, "benchmarks.ladder", *batch, *tiny_ladder]),
        ("seeds", 300, [*python, "benchmarks.train", *small_recipe, *seeds, *data]),
        ("profile", 120, [*python, "fasttrain", "profile", "--recipe", "default", *data, *batch, *profile]),
        ("scaling", 180, [*python, "benchmarks.scaling", *tiny_scaling]),
        ("start", 120, [*python, "benchmarks.start", *tiny, *(["--images", "100"] if options.small else [])]),
    ]


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, limit, command in parts(options):
        log = options.out / f"{name}.log"
        print(f"{name}: {' '.join(command[1:])}", file=sys.stderr)
        start = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"FASTTRAIN_RESULTS": str(options.out.resolve())},
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
                outcome = "done" if status == 0 else f"exit status {status}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
                process.wait()
                outcome = f"stopped after {limit} s"
        rows.append([name, outcome, f"{time.perf_counter() - start:.1f}", str(log)])
    show("parts", ["part", "outcome", "seconds", "log"], rows)
    if any(outcome != "done" for _, outcome, _, _ in rows):
        sys.exit(1)


if __name__ == "__main__":
    run(main, Options)
