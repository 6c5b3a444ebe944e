"""A fault campaign: training runs are killed and resumed, files are damaged and read, memory is watched.

    python -m tests.soak                        # what `make soak` runs, and the reliability table reports
    python -m tests.soak --faults 5 --bad-inputs 100 --epochs 20

Everything is drawn from a fixed seed. Figures go where those of benchmarks go (benchmarks/README.md).
"""

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.harness import run, save, show
from benchmarks.stats import describe
from benchmarks.workloads import loader_names
from fasttrain.data.sources import synthetic
from fasttrain.errors import UserError
from tests.soak.corrupt import bad_input_campaign
from tests.soak.kill import KillCampaign
from tests.soak.memory import memory_campaign

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kill and resume training runs, damage and read files, and count what goes wrong."""

    faults: int = 65
    """Signals sent to training processes: four SIGKILLs to every SIGTERM."""
    bad_inputs: int = 1000
    """Damaged files tried."""
    epochs: int = 200
    """Epochs of the run whose memory is watched."""
    seed: int = 0
    """Seeds the moments of the signals and the damage."""


def main(options: Options) -> None:
    torch.set_num_threads(1)  # a process whose torch has threads must not fork
    loader_names(CPU)  # imports DALI once, for all forks
    rng = random.Random(options.seed)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        synthetic.generate(work / "data", train_count=64, test_count=40)
        memory = memory_campaign(work / "data", work, options.epochs)
        killed = dataclasses.asdict(KillCampaign(work / "data", work, options.faults, rng)())
        damaged = bad_input_campaign(work, options.bad_inputs, rng)
    figures: dict[str, Any] = {
        "lost_seconds": describe(killed.pop("lost")),
        "bad_inputs": damaged,
        "memory_mib": memory,
        "seed": options.seed,
    }
    figures = killed | figures
    path = save("soak", CPU, figures)
    show("faults", ["figure", "value"], [[key, str(value)] for key, value in figures.items()])
    print(path)
    if damaged["wrong"] or not killed["runs"] == killed["recovered"] == killed["bit_equal"]:
        raise UserError(
            "soak: not every run was recovered bit for bit, or a damaged file was mistaken for a good one"
        )
    if memory["second"] > 1.05 * memory["first"]:
        raise UserError(f"soak: memory grew from {memory['first']:.0f} to {memory['second']:.0f} MiB")


if __name__ == "__main__":
    run(main, Options)
