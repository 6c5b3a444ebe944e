"""A recipe over n seeds: accuracy, seconds per epoch, cold and warm wall seconds, distance to the hardware.

    python -m benchmarks.train --recipe default --seeds 5 --data-dir data

The first run is cold: its wall seconds count from the start of this process and hold imports and compiling.
"""

import dataclasses
import statistics
import time

STARTED = time.perf_counter()

from dataclasses import dataclass  # noqa: E402
from itertools import accumulate  # noqa: E402
from pathlib import Path  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402
from typing import Any, Literal  # noqa: E402

from benchmarks.report import run, save, show  # noqa: E402
from fasttrain.recipe import load_recipe  # noqa: E402
from fasttrain.system.machine import pick_device  # noqa: E402
from fasttrain.trainer import train  # noqa: E402

GOALS = (0.90, 0.94)
"""Test accuracies; n says how many of the runs reached one."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train a recipe over n seeds."""

    recipe: str = "default"
    """A preset or a recipe's JSON file."""
    seeds: int = 5
    """Seeds 0, 1, ... each train once."""
    epochs: int | None = None
    """Instead of the recipe's."""
    data: Literal["auto", "cifar10", "synthetic"] = "auto"
    """As in fasttrain train."""
    data_dir: Path | None = None
    """As in fasttrain train."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] | None = None
    """Instead of the recipe's."""


def seconds_to(goal: float, result: dict[str, Any]) -> float | None:
    """Training seconds up to the first epoch whose test accuracy reaches the goal; None if none does."""
    seconds = accumulate(result["epoch_seconds"])
    return next((s for s, a in zip(seconds, result["epoch_accuracy"], strict=True) if a >= goal), None)


def summarize(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Median, range and n of each figure over the runs."""
    figures: dict[str, list[float]] = {
        "test accuracy": [result["test_accuracy"] for result in results],
        "seconds per epoch": [seconds for result in results for seconds in result["epoch_seconds"]],
        "train seconds": [result["train_seconds"] for result in results],
        "compile seconds, cold": [results[0]["compile_seconds"]],
        "wall seconds, cold": [results[0]["wall_seconds"]],
        "wall seconds, later runs": [result["wall_seconds"] for result in results[1:]],
        "data wait share": [result["data_wait_share"] for result in results],
        **{
            f"train seconds to {goal:.0%}": [
                seconds for result in results if (seconds := seconds_to(goal, result)) is not None
            ]
            for goal in GOALS
        },
        "mfu": [result["mfu"] for result in results if result["mfu"] is not None],
    }
    return [
        {
            "figure": figure,
            "mean": statistics.mean(values),
            "stdev": statistics.stdev(values) if len(values) > 1 else None,
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "n": len(values),
        }
        for figure, values in figures.items()
        if values
    ]


def main(options: Options) -> None:
    device = pick_device(options.device)
    recipe = load_recipe(options.recipe)
    if options.epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=options.epochs)
    if options.compile is not None:
        recipe = dataclasses.replace(recipe, compile=options.compile)
    results: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        with TemporaryDirectory() as out:
            finished = train(
                dataclasses.replace(recipe, seed=seed),
                data=options.data,
                data_dir=options.data_dir,
                out=Path(out),
                device=options.device,
                started=STARTED if seed == 0 else None,
                report=False,
            )
            results.append(finished.result | {"epoch_accuracy": finished.column("test_accuracy")})
        rows = summarize(results)  # saved after every run: whatever ends this early leaves the runs so far
        path = save(f"train-{recipe.name}", device, {"rows": rows, "samples": results})
    show(
        f"{recipe.name} on {results[0]['dataset']}, {recipe.epochs} epochs",
        ["figure", "mean", "stdev", "min", "max", "n"],
        [
            [
                row["figure"],
                f"{row['mean']:.4f}",
                "-" if row["stdev"] is None else f"{row['stdev']:.4f}",
                f"{row['min']:.4f}",
                f"{row['max']:.4f}",
                str(row["n"]),
            ]
            for row in rows
        ],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
