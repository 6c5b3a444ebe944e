"""The fastest public CIFAR-10 trainer beside ours: seconds and accuracy on one machine, on the same images.

    python -m benchmarks.airbench --script airbench94_muon.py --data-dir data [--seeds 10] [--recipe fast]

The script is cifar10-airbench's (github.com/KellerJordan/cifar10-airbench; its package lacks it) and runs as
published, in a process of its own, on files that hold the very images that ours trains on. There are two
clocks: training alone, and training with the evaluation of the trained network, predictions averaged, which
is the time that airbench names. Neither counts the tests between epochs.

On a GPU they take turns, and each trains once before the clock counts. On a CPU, for which the script was not
made, both train eagerly, in the precision that fasttrain picks there, at the same time, each on half of the
cores; they swap these after every training.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from types import ModuleType
from typing import Any, Literal
from unittest import mock

import torch
from torch import nn

from benchmarks import peers
from benchmarks.accuracy import GOALS, seconds_to
from benchmarks.harness import OwnProcess, require_counts, run, save, show, side_by_side
from benchmarks.stats import describe
from benchmarks.workloads import training_flop
from fasttrain import trainer
from fasttrain.data.dataset import Dataset, Split
from fasttrain.data.load_dataset import load_dataset
from fasttrain.errors import UserError
from fasttrain.model import training_flop_per_image
from fasttrain.recipe import Recipe, load_recipe
from fasttrain.system.machine import pick_device
from fasttrain.system.precision import DTYPES, autocast, pick_precision, prepare

Sample = dict[str, Any]
"""One training: epochs, its seconds and accuracies, and what `seconds_to` asks for."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train our recipe and cifar10-airbench's script on one machine."""

    script: Path
    """airbench94_muon.py, as published."""
    recipe: str = "speedrun"
    """A preset or a recipe's JSON file."""
    seeds: int = 10
    """Trainings of each that count."""
    data: Literal["auto", "cifar10", "synthetic"] = "auto"
    """As in fasttrain train."""
    data_dir: Path | None = None
    """As in fasttrain train."""
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] | None = None
    """Instead of the recipe's."""
    loader: Literal["auto", "dali", "tensor"] | None = None
    """Instead of the recipe's."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    out: Path = Path("runs/airbench")
    """Where the folders of our trainings go, one for each seed."""

    def __post_init__(self) -> None:
        require_counts(seeds=self.seeds)


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


class _Clock:
    """In the place of torch.cuda.Event where there is no GPU."""

    def __init__(self, enable_timing: bool) -> None:
        self._seconds = 0.0

    def record(self) -> None:
        self._seconds = time.perf_counter()

    def elapsed_time(self, end: "_Clock") -> float:
        return 1000 * (end._seconds - self._seconds)


@contextlib.contextmanager
def without_gpu() -> Iterator[None]:
    """Let a script that was made for a GPU and float16 keep everything on the CPU, in float32."""
    load = torch.load
    replacements: list[tuple[Any, str, Any]] = [
        (torch.cuda, "Event", _Clock),
        (torch.cuda, "synchronize", lambda: None),
        (torch, "load", lambda path, **_: load(path)),
        (torch.Tensor, "half", torch.Tensor.float),
        (nn.Module, "half", lambda module: module),
        (nn.Module, "cuda", lambda module: module),
        (nn.Module, "compile", lambda module, **_: None),
        (torch, "compile", lambda function: function),
    ]
    with contextlib.ExitStack() as patches:
        for owner, name, value in replacements:
            patches.enter_context(mock.patch.object(owner, name, value))
        yield


def load_script(path: Path) -> ModuleType:
    """The script as a module: its main program does not run. Raises UserError if it is not airbench's."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--script {path}: expected airbench94_muon.py")
    module = importlib.util.module_from_spec(spec)
    try:
        if importlib.util.find_spec("torchvision"):
            peers.load("torchvision")  # with the remedy for a wheel that does not fit torch
        with mock.patch.object(sys, "argv", [str(path)]):  # it reads its own text
            spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--script {path}: cannot be loaded ({error})") from error
    for name in ("CifarNet", "main", "logging_columns_list"):
        if not hasattr(module, name):
            raise UserError(f"--script {path}: it has no {name}; expected airbench94_muon.py")
    return module


def in_precision(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the network compute its matrix products in this precision, its parameters staying float32."""
    forward = model.forward

    def autocast_forward(*args: Any, **settings: Any) -> torch.Tensor:
        with autocast(torch.device("cpu"), dtype):
            return forward(*args, **settings)

    model.forward = autocast_forward


def theirs(script: Path, folder: Path, device: torch.device) -> Callable[[], Sample]:
    """The script's trainer, set up as its main program does it; each call trains once.

    folder: cifar10/ in it holds the images. On a GPU the first training warms up, with random labels.
    """
    on_cpu = device.type == "cpu"

    def place() -> contextlib.AbstractContextManager[None]:
        return without_gpu() if on_cpu else contextlib.nullcontext()

    with place():
        module = load_script(script)
        model = module.CifarNet().cuda().to(memory_format=torch.channels_last)
        model.compile(mode="max-autotune")
    images = len(torch.load(folder / "cifar10" / "train.pt")["labels"])
    flop_per_epoch = images * training_flop_per_image(model, 32)
    if on_cpu:
        prepare(device, "auto")
        in_precision(model, DTYPES[pick_precision("auto", device)])
    runs = count() if on_cpu else chain(["warmup"], count())

    def training() -> Sample:
        with place(), working_in(folder), contextlib.redirect_stdout(io.StringIO()) as printed:
            module.main(next(runs), model)
        sample = read_table(module.logging_columns_list, printed.getvalue())
        return sample | {"flop": sample["epochs"] * flop_per_epoch}

    return training


def read_table(columns: Sequence[str], printed: str) -> Sample:
    """One training by airbench, as the table that it prints tells it."""
    names = [name.strip() for name in columns]
    [clock_name] = [name for name in names if name.endswith("time_seconds")]
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    rows = [dict(zip(names, (cell.strip() for cell in line.split("|")[1:-1]), strict=True)) for line in lines]
    *epochs, last = rows  # the last one adds its evaluation with averaged predictions
    clock = [float(row[clock_name]) for row in epochs]
    return {
        "epochs": len(epochs),
        "seconds": clock[-1],
        "seconds_with_test": float(last[clock_name]),
        "accuracy": float(last["val_acc"]),
        "accuracy_tta": float(last["tta_val_acc"]),
        "epoch_seconds": [now - before for before, now in zip([0.0, *clock], clock, strict=False)],
        "epoch_accuracy": [float(row["val_acc"]) for row in epochs],
    }


def ours(recipe: Recipe, dataset: Dataset, device: torch.device, out: Path, seed: int) -> Sample:
    """One training of the recipe; its folder stays in `out`, in one for the seed, without its checkpoints."""
    recipe, out = dataclasses.replace(recipe, seed=seed), out / f"seed-{seed}"
    finished = trainer.train(recipe, data=dataset, out=out, device=str(device), report=False)
    for checkpoint in finished.folder.glob("*.pt"):
        checkpoint.unlink()
    result = finished.result
    return {
        "epochs": result["epochs"],
        "flop": training_flop(finished),
        "seconds": result["train_seconds"],
        "seconds_with_test": result["train_seconds"] + finished.column("test_seconds")[-1],
        "accuracy": result["test_accuracy"],
        "accuracy_tta": result["test_accuracy_views"],
        "epoch_seconds": result["epoch_seconds"],
        "epoch_accuracy": finished.column("test_accuracy"),
    }


def our_training(recipe: Recipe, options: Options, device: torch.device, seed: int) -> Sample:
    """As `ours`, from what another process can be given."""
    return ours(recipe, load_dataset(options.data, options.data_dir), device, options.out, seed)


def their_training(script: Path, folder: Path, device: torch.device, seed: int) -> Sample:
    """As `theirs`, once and with a seed, which the script leaves to torch."""
    training = theirs(script, folder, device)
    torch.manual_seed(seed)
    return training()


def on_halves(trainings: dict[str, Callable[[int], Sample]], seeds: int) -> Iterator[dict[str, list[Sample]]]:
    """Train side by side with seeds 0, 1, ...; yields all samples so far after each pair."""
    samples: dict[str, list[Sample]] = {name: [] for name in trainings}
    for seed in range(seeds):
        questions = {name: functools.partial(training, seed) for name, training in trainings.items()}
        for name, sample in side_by_side(questions, swap=bool(seed % 2)).items():
            samples[name].append(sample)
        yield samples


def in_turn(trainings: dict[str, Callable[[int], Sample]], seeds: int) -> Iterator[dict[str, list[Sample]]]:
    """Train everything `seeds` times, after once to warm up; yields all samples so far after each turn.

    Each sample has its `call_seconds`; the first call's, with all that it compiles, is `first_seconds`.
    """
    first: dict[str, float] = {}
    samples: dict[str, list[Sample]] = {name: [] for name in trainings}
    for turn in range(-1, seeds):
        for name, training in trainings.items():
            start = time.perf_counter()
            sample = training(max(turn, 0))
            sample["call_seconds"] = time.perf_counter() - start
            first.setdefault(name, sample["call_seconds"])
            if turn >= 0:
                samples[name].append(sample | {"first_seconds": first[name]})
        if turn >= 0:
            yield samples


def summarize(samples: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    """A row per trainer: n, mean and standard deviation of each figure, and the medians to each goal."""
    rows = []
    for name, runs in samples.items():
        row: dict[str, Any] = {"trainer": name, "epochs": runs[0]["epochs"], "n": len(runs)}
        row["first_seconds"] = runs[0].get("first_seconds")
        row["flop"] = runs[0]["flop"]
        for key in ("seconds", "seconds_with_test", "accuracy", "accuracy_tta"):
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
    columns = [
        "trainer",
        "epochs",
        "PFLOP",
        "training s",
        "with its test, s",
        "accuracy, %",
        "with averaged predictions, %",
    ]
    columns += [f"s to {goal}" for goal in goals] + ["first call, s", "n"]
    rows = [
        [
            row["trainer"],
            str(row["epochs"]),
            f"{row['flop'] / 1e15:.3f}",
            figure(row["seconds"], 1),
            figure(row["seconds_with_test"], 1),
            figure(row["accuracy"], 100),
            figure(row["accuracy_tta"], 100),
            *(
                f"{reached['seconds']:.2f} ({reached['n']} of {row['n']})" if reached["n"] else "-"
                for reached in (row[f"to_{goal}"] for goal in goals)
            ),
            "-" if row["first_seconds"] is None else f"{row['first_seconds']:.1f}",
            str(row["n"]),
        ]
        for row in values["rows"]
    ]
    return columns, rows


def main(options: Options) -> None:
    device = pick_device(options.device)
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {device}: cifar10-airbench needs an NVIDIA GPU, or runs on a CPU")
    with without_gpu():  # which imports it anywhere
        load_script(options.script)  # refuse a mistake before training anything
    named = {"compile": options.compile, "loader": options.loader}
    changes: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
    recipe = dataclasses.replace(load_recipe(options.recipe), test_views="shifts", **changes)
    dataset = load_dataset(options.data, options.data_dir)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_images(dataset, folder / "cifar10")
        script = options.script.resolve()
        names = f"fasttrain, {recipe.name}", script.stem
        pair: tuple[Callable[[int], Sample], Callable[[int], Sample]]
        if device.type == "cpu":
            pair = (
                functools.partial(our_training, recipe, options, device),
                functools.partial(their_training, script, folder, device),
            )
            train_all, how = on_halves, "side by side, each on half of the cores"
        else:
            rival = stack.enter_context(OwnProcess(theirs, script, folder, device))  # it stays compiled
            pair = lambda seed: ours(recipe, dataset, device, options.out, seed), lambda _: rival()
            train_all, how = in_turn, "in turn, after one of each that warms up"
        turns = train_all(dict(zip(names, pair, strict=True)), options.seeds)
        facts = {"dataset": dataset.name, "how": how, "precision": pick_precision("auto", device)}
        for samples in turns:  # if this is stopped, the trainings so far are saved
            values = facts | {"rows": summarize(samples), "samples": samples}
            path = save("airbench", device, values)
    show(f"{dataset.name}; mean ± standard deviation", *table(values))
    print(path)


if __name__ == "__main__":
    run(main, Options)
