"""What a user waits for before anything happens: `--help`, and a process's start up to its first step.

    python -m benchmarks.start [--rounds 5]

Every sample is a process of its own, on a small stand-in for the images; nothing is compiled.
"""

import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.harness import Workload, interleave, run, save, show
from benchmarks.stats import spread
from fasttrain.data.sources.synthetic import generate
from fasttrain.system.machine import pick_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time how long fasttrain takes to start."""

    rounds: int = 5
    """Samples of each, taken in turn."""
    images: int = 50_000
    """Training images: reading and padding them is part of the start."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""


FIRST_STEP = """
import sys, time
from pathlib import Path
from fasttrain import trainer
from fasttrain.recipe import Recipe
from fasttrain.step import TrainStep

class FirstStep(Exception):
    pass

def call(self, images_NCHW, labels_N):
    take(self, images_NCHW, labels_N)
    self.take_metrics()
    print("FIRST STEP", time.time())
    raise FirstStep

take, TrainStep.__call__ = TrainStep.__call__, call
recipe = Recipe(batch_size=16, compile="off")
try:
    trainer.train(recipe, data_dir=Path(sys.argv[1]), out=Path(sys.argv[2]), device=sys.argv[3], report=False)
except FirstStep:
    sys.exit(0)
sys.exit("the training ended without a step")
"""


def seconds(*command: str) -> float:
    """Seconds until a process has ended well."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, env=os.environ)
    return time.perf_counter() - start


def seconds_to_first_step(*arguments: str) -> float:
    """Seconds from the start of a process to the end of its first training step."""
    start = time.time()
    command = [sys.executable, "-c", FIRST_STEP, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FIRST STEP")]
    return float(line.split()[-1]) - start


def main(options: Options) -> None:
    device = pick_device(options.device)
    with TemporaryDirectory() as data, TemporaryDirectory() as out:
        generate(Path(data), train_count=options.images, test_count=max(10, options.images // 5))
        workloads: dict[str, Workload] = {
            "python, doing nothing": lambda: seconds("-c", ""),
            "import torch": lambda: seconds("-c", "import torch"),
            "fasttrain --help": lambda: seconds("-m", "fasttrain", "--help"),
            "fasttrain train --help": lambda: seconds("-m", "fasttrain", "train", "--help"),
            "fasttrain train, to its first step": lambda: seconds_to_first_step(data, out, str(device)),
        }
        samples = interleave(workloads, options.rounds)
    rows: list[dict[str, Any]] = [
        {"start": name, "seconds": statistics.median(values), "spread": spread(values)}
        for name, values in samples.items()
    ]
    values = {"rounds": options.rounds, "images": options.images, "rows": rows, "samples": samples}
    path = save("start", device, values)
    show(
        f"seconds from a process's start, median of {options.rounds}",
        ["process", "seconds", "spread"],
        [[row["start"], f"{row['seconds']:.2f}", f"±{row['spread']:.1%}"] for row in rows],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
