"""The whole training in the way that was fastest in short ones: eager or compiled, step by step or captured.

    python -m benchmarks.fastest --short runs/short --epochs 24

The short runs are those of `python -m benchmarks.all --plan gpu --visit first`. The first epoch of each warms
up and does not count.
"""

import dataclasses
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import require_counts, run, save
from fasttrain import trainer
from fasttrain.errors import UserError
from fasttrain.report.run import Run, load_run
from fasttrain.system.machine import pick_device
from fasttrain.system.run_folder import RESULT_FILE


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train in the way of the fastest of some short runs."""

    short: Path
    """Folder of the short runs' folders."""
    epochs: int = 24
    """Epochs of the whole training."""
    data_dir: Path | None = None
    """As in fasttrain train."""
    out: Path = Path("runs")
    """As in fasttrain train."""

    def __post_init__(self) -> None:
        require_counts(epochs=self.epochs)


def epoch_seconds(short: Run) -> float:
    """The median of a run's epochs, but for the first if there are others."""
    seconds = short.result["epoch_seconds"]
    return statistics.median(seconds[1:] or seconds)


def way(short: Run) -> dict[str, Any]:
    """A short run's figures: how its steps were taken, and how long they took."""
    keys = ("compile", "cuda_graph", "loader", "epoch_seconds", "compile_seconds", "mfu", "peak_memory_gib")
    return {
        **{key: short.result[key] for key in keys},
        "seconds": epoch_seconds(short),
        "images_per_sec": short.steps_per_epoch * short.recipe.batch_size / epoch_seconds(short),
    }


def main(options: Options) -> None:
    runs = [load_run(path.parent) for path in sorted(options.short.glob(f"*/{RESULT_FILE}"))]
    if not runs:
        raise UserError(f"--short {options.short}: no finished run is in it")
    for short in runs:
        print(f"{epoch_seconds(short):.3f} s an epoch: {short.folder.name}", file=sys.stderr)
    recipe = runs[0].recipe
    facts = {"recipe": recipe.name, "batch_size": recipe.batch_size, "precision": runs[0].result["precision"]}
    save("ways", pick_device("auto"), facts | {"rows": [way(short) for short in runs]})
    fastest = min(runs, key=epoch_seconds)
    # auto would judge again: the mode is the one that was fast.
    recipe = dataclasses.replace(fastest.recipe, epochs=options.epochs, compile=fastest.result["compile"])
    trainer.train(recipe, data_dir=options.data_dir, out=options.out)


if __name__ == "__main__":
    run(main, Options)
