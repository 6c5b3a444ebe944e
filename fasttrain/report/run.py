"""A run, read from its folder: for the report, the comparison, and notebooks."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasttrain.errors import UserError
from fasttrain.recipe import Recipe
from fasttrain.report import plots
from fasttrain.report.pages import render
from fasttrain.report.plots import Curve, Draw, Picture
from fasttrain.system.machine import hardware_name
from fasttrain.system.program import typed
from fasttrain.system.run_folder import (
    RECIPE_FILE,
    RESULT_FILE,
    parse_object,
    read_machine,
    read_object,
    read_text,
    require_values,
    run_folder,
)

EPOCH_FIGURES = ("epoch", "train_accuracy", "test_accuracy", "seconds", "images_per_sec", "data_wait_share")
EPOCH_LOSSES = ("train_loss", "test_loss")  # null for NaN or infinity

RESULT_FIGURES = (
    *("test_accuracy", "best_test_accuracy", "best_epoch", "max_lr", "images_per_sec", "data_wait_share"),
    *("train_seconds", "test_seconds", "compile_seconds", "wall_seconds"),
)

RESULT_UNKNOWNS = ("mfu", "matmul_tflops_measured", "peak_memory_gib", "peak_resident_gib")
RESULT_OPTIONS = ("test_accuracy_views", "setup_seconds")  # if the recipe asked for it; in newer runs
RESULT_NAMES = ("dataset", "device", "loader", "precision", "compile")


@dataclass(frozen=True, kw_only=True)
class UnfinishedRun:
    """The checked content of a run's folder, as far as it has got.

    epochs: the rows of metrics.jsonl, none before the end of the first epoch.
    """

    folder: Path
    recipe: Recipe
    machine: dict[str, Any] = field(repr=False)
    epochs: list[dict[str, Any]] = field(repr=False)

    @property
    def started(self) -> str | None:
        """When it was started by the machine's clock: the folder's name says so, if it still is that."""
        try:
            moment = time.strptime(self.folder.resolve().name[:15], "%Y%m%d-%H%M%S")
        except ValueError:
            return None
        return time.strftime("%Y-%m-%d %H:%M", moment)

    @property
    def best_epoch(self) -> tuple[int, float]:
        """The epoch with the highest test accuracy, the first of several, and that accuracy."""
        best = max(self.epochs, key=lambda row: row["test_accuracy"])
        return best["epoch"], best["test_accuracy"]

    @property
    def hardware(self) -> str:
        """The run's GPU, or its CPU and cores, in a few words."""
        return hardware_name(self.machine)

    def column(self, key: str) -> list[float]:
        """Return one figure of every epoch, NaN where the file has null."""
        return [math.nan if row[key] is None else row[key] for row in self.epochs]

    def plot(self) -> Any:
        """Plot loss, accuracy and seconds of every epoch, side by side; returns a matplotlib Figure.

        A notebook displays it; `run.plot().savefig("run.png")` writes it. pyplot does not know about it.
        """
        return plots.figure([self._loss(), self._accuracy(), self._seconds()])

    def pictures(self) -> dict[str, Picture]:
        """Return the same three plots for a page: loss, accuracy, seconds."""
        return {
            "loss": plots.picture(self._loss(), "Training and test loss of every epoch"),
            "accuracy": plots.picture(self._accuracy(), "Training and test accuracy of every epoch"),
            "seconds": plots.picture(self._seconds(), "Training seconds of every epoch"),
        }

    def _loss(self) -> Draw:
        return plots.chart(self._train_and_test("loss"), x_name="epoch", y_name="loss per image")

    def _accuracy(self) -> Draw:
        curves = self._train_and_test("accuracy")
        return plots.chart(curves, x_name="epoch", y_name="accuracy", percent=True, ring=self.best_epoch)

    def _seconds(self) -> Draw:
        return plots.epoch_seconds(self.column("seconds"), self.column("data_wait_share"))

    def _train_and_test(self, figure: str) -> list[Curve]:
        epochs = self.column("epoch")
        return [
            Curve(epochs, self.column(f"{split}_{figure}"), series, split)
            for series, split in enumerate(("train", "test"))
        ]


@dataclass(frozen=True, kw_only=True)
class Run(UnfinishedRun):
    """The checked content of a finished run's folder. A notebook shows its headline figures and curves.

    lr_find: None if the LR finder was not used.
    """

    result: dict[str, Any] = field(repr=False)
    lr_find: dict[str, Any] | None = field(repr=False)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in an epoch, recovered from the first epoch's images per second."""
        first = self.epochs[0]
        return round(first["images_per_sec"] * first["seconds"] / self.recipe.batch_size)

    def _repr_html_(self) -> str:
        return render("run.html.j2", run=self, pictures=self.pictures())


def load_run(folder: Path | str) -> Run:
    """Read a run's folder. Raises UserError if it is not one, is unfinished, or has a corrupt file."""
    folder = run_folder(Path(folder))
    _require_run(folder)
    if not (folder / RESULT_FILE).is_file():
        raise UserError(
            f"{folder}: has no result.json: the run has not finished; "
            f"to resume it: {typed('train', '--resume', str(folder))}"
        )
    result = read_object(folder / "result.json")
    if "test_accuracy_flip" in result:  # its name until there was more than one view
        result["test_accuracy_views"] = result.pop("test_accuracy_flip")
    figures = [*RESULT_FIGURES, *(key for key in RESULT_OPTIONS if key in result)]
    require_values(folder / "result.json", result, figures, nullable=RESULT_UNKNOWNS, names=RESULT_NAMES)
    fallbacks = result.get("fallbacks", [])  # older runs have none
    if not isinstance(fallbacks, list) or not all(isinstance(line, str) for line in fallbacks):
        raise UserError(f"{folder / 'result.json'}: fallbacks is {fallbacks!r}; expected a list of lines")
    metrics = folder / "metrics.jsonl"
    epochs = _read_epochs(metrics)
    if not epochs:
        raise UserError(f"{metrics}: empty; expected a line per epoch")
    return Run(
        folder=folder,
        recipe=_read_recipe(folder),
        machine=read_machine(folder),
        result=result,
        epochs=epochs,
        lr_find=read_object(folder / "lr_find.json") if (folder / "lr_find.json").exists() else None,
    )


def load_unfinished(folder: Path) -> UnfinishedRun:
    """Read the folder of a run that has begun. Raises UserError if it is not one or has a corrupt file."""
    _require_run(folder)
    metrics = folder / "metrics.jsonl"
    return UnfinishedRun(
        folder=folder,
        recipe=_read_recipe(folder),
        machine=read_machine(folder),
        epochs=_read_epochs(metrics, is_growing=True) if metrics.exists() else [],
    )


def _require_run(folder: Path) -> None:
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(f"{folder}: not a run's folder; expected one that fasttrain train made")


def _read_recipe(folder: Path) -> Recipe:
    try:
        return Recipe.from_dict(read_object(folder / RECIPE_FILE))
    except UserError as error:
        raise UserError(f"{folder / RECIPE_FILE}: {error}") from error


def _read_epochs(path: Path, *, is_growing: bool = False) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl; is_growing: leave out a line that is being written."""
    text, rows = read_text(path), []
    if is_growing:
        text = text[: text.rfind("\n") + 1]
    for number, line in enumerate(text.splitlines(), start=1):
        place = f"{path} line {number}"
        rows.append(parse_object(line, place))
        require_values(place, rows[-1], EPOCH_FIGURES, nullable=EPOCH_LOSSES)
    return rows
