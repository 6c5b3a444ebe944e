"""The fastest public CIFAR-10 trainer beside ours: seconds and accuracy on one GPU, on the same images.

    python -m benchmarks.airbench --data-dir data [--seeds 10] [--recipe fast] [--levels 94 95 96]

They take turns. cifar10-airbench's trainers run as published (`pip install airbench`), with a network and an
optimizer of their own, on files that hold the very images that ours trains on. Each trains once before the
clock counts. Its seconds are those that it reports; ours are `train_seconds`: neither holds a test.
"""

import contextlib
import dataclasses
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.accuracy import GOALS, seconds_to
from benchmarks.harness import run, save, show
from benchmarks.stats import describe
from fasttrain import trainer
from fasttrain.data.dataset import Dataset, Split
from fasttrain.data.load_dataset import load_dataset
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe, load_recipe
from fasttrain.system.machine import pick_device

Sample = dict[str, Any]
"""One training: epochs, seconds, accuracy, accuracy_tta, and what `seconds_to` asks for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train our recipe and cifar10-airbench in turn, on one GPU."""

    recipe: str = "fast"
    """A preset or a recipe's JSON file."""
    levels: tuple[Literal[93, 94, 95, 96], ...] = (94,)
    """Which of airbench's trainers, by the accuracy on the original images that each is made for."""
    seeds: int = 10
    """Trainings of each that count."""
    data: Literal["auto", "cifar10", "synthetic"] = "auto"
    """As in fasttrain train."""
    data_dir: Path | None = None
    """As in fasttrain train."""
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] | None = None
    """Instead of the recipe's."""


def write_images(dataset: Dataset, folder: Path) -> None:
    """The images as airbench keeps them: train.pt and test.pt, each (N, 32, 32, 3) uint8 and its labels."""
    folder.mkdir(parents=True)
    splits: dict[str, Split] = {"train": dataset.train, "test": dataset.test}
    for name, split in splits.items():
        values = {
            "images": torch.from_numpy(split.images),
            "labels": torch.from_numpy(split.labels).long(),
            "classes": list(dataset.classes),
        }
        torch.save(values, folder / f"{name}.pt")


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """airbench looks for its files below the working directory."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def theirs(package: Any, level: int, folder: Path) -> Sample:
    """One training by airbench, as the table that it prints tells it."""
    printed = io.StringIO()
    with working_in(folder), contextlib.redirect_stdout(printed):
        getattr(package, f"train{level}")(run=1)
    names = [name.strip() for name in package.utils.logging_columns_list]
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("|")]
    rows = [dict(zip(names, (cell.strip() for cell in line.split("|")[1:-1]), strict=True)) for line in lines]
    *epochs, last = rows  # the last one adds its evaluation with averaged predictions
    clock = [float(row["total_time_seconds"]) for row in epochs]
    return {
        "epochs": len(epochs),
        "seconds": clock[-1],
        "accuracy": float(last["val_acc"]),
        "accuracy_tta": float(last["tta_val_acc"]),
        "epoch_seconds": [now - before for before, now in zip([0.0, *clock], clock, strict=False)],
        "epoch_accuracy": [float(row["val_acc"]) for row in epochs],
    }


def ours(recipe: Recipe, dataset: Dataset, device: torch.device) -> Sample:
    """One training of the recipe."""
    with tempfile.TemporaryDirectory() as out:
        finished = trainer.train(recipe, data=dataset, out=Path(out), device=str(device), report=False)
    result = finished.result
    return {
        "epochs": result["epochs"],
        "seconds": result["train_seconds"],
        "accuracy": result["test_accuracy"],
        "accuracy_tta": result["test_accuracy_flip"],
        "epoch_seconds": result["epoch_seconds"],
        "epoch_accuracy": finished.column("test_accuracy"),
    }


def in_turn(trainings: dict[str, Callable[[int], Sample]], seeds: int) -> Iterator[dict[str, list[Sample]]]:
    """Train everything once to warm up and then `seeds` times; yields all samples so far after each turn.

    Each sample has its `call_seconds`; the first call's, with all that it compiles, is `first_seconds`.
    """
    first: dict[str, float] = {}
    samples: dict[str, list[Sample]] = {name: [] for name in trainings}
    for turn in range(seeds + 1):
        for name, training in trainings.items():
            start = time.perf_counter()
            sample = training(turn)
            sample["call_seconds"] = time.perf_counter() - start
            if turn:
                samples[name].append(sample | {"first_seconds": first[name]})
            else:
                first[name] = sample["call_seconds"]
        if turn:
            yield samples


def summarize(samples: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    """A row per trainer: n, mean and standard deviation of each figure, and the medians to each goal."""
    rows = []
    for name, runs in samples.items():
        row: dict[str, Any] = {"trainer": name, "epochs": runs[0]["epochs"], "n": len(runs)}
        row["first_seconds"] = runs[0]["first_seconds"]
        for key in ("seconds", "accuracy", "accuracy_tta"):
            row[key] = describe([sample[key] for sample in runs])
        for goal in GOALS:
            curves = [(sample["epoch_seconds"], sample["epoch_accuracy"]) for sample in runs]
            reached = [s for curve in curves if (s := seconds_to(goal, *curve)) is not None]
            median = describe(reached)["median"] if reached else None
            row[f"to_{goal:.0%}"] = {"seconds": median, "n": len(reached)}
        rows.append(row)
    return rows


def table(values: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, as text, of what a result file holds."""

    def figure(value: dict[str, Any], factor: float) -> str:
        spread = "" if value["stdev"] is None else f" ±{factor * value['stdev']:.2f}"
        return f"{factor * value['mean']:.2f}{spread}"

    goals = [f"{goal:.0%}" for goal in GOALS]
    columns = ["trainer", "epochs", "training s", "accuracy, %", "with averaged predictions, %"]
    columns += [f"s to {goal}" for goal in goals] + ["first call, s", "n"]
    rows = [
        [
            row["trainer"],
            str(row["epochs"]),
            figure(row["seconds"], 1),
            figure(row["accuracy"], 100),
            figure(row["accuracy_tta"], 100),
            *(
                f"{reached['seconds']:.2f} ({reached['n']} of {row['n']})" if reached["n"] else "-"
                for reached in (row[f"to_{goal}"] for goal in goals)
            ),
            f"{row['first_seconds']:.1f}",
            str(row["n"]),
        ]
        for row in values["rows"]
    ]
    return columns, rows


def main(options: Options) -> None:
    device = pick_device()
    if device.type != "cuda":
        raise UserError("cifar10-airbench needs an NVIDIA GPU, and there is none here")
    try:
        import airbench
    except ImportError as error:
        raise UserError(f"airbench: not installed ({error}): pip install -e '.[bench]'") from error
    changes: dict[str, Any] = {"test_flip": True}
    if options.compile is not None:
        changes["compile"] = options.compile
    recipe = dataclasses.replace(load_recipe(options.recipe), **changes)
    dataset = load_dataset(options.data, options.data_dir)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_images(dataset, folder / "cifar10")
        trainings: dict[str, Callable[[int], Sample]] = {
            f"fasttrain, {recipe.name}": lambda seed: ours(
                dataclasses.replace(recipe, seed=seed), dataset, device
            )
        }
        for level in options.levels:
            trainings[f"airbench{level}"] = lambda _, level=level: theirs(airbench, level, folder)  # type: ignore[misc]
        for samples in in_turn(trainings, options.seeds):  # if this is stopped, the turns so far are saved
            values = {"dataset": dataset.name, "rows": summarize(samples), "samples": samples}
            path = save("airbench", device, values)
    show(f"{dataset.name}; mean ± standard deviation", *table(values))
    print(path)


if __name__ == "__main__":
    run(main, Options)
