"""One page about one finished run: report.html in its folder, with every picture inside it.

The page asks nothing of the network and runs no script. What it cannot show, for instance because the images
are not on this disk, it replaces with a sentence that says why.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from fasttrain import plots
from fasttrain.checkpoint import load_checkpoint
from fasttrain.data import cifar, synthetic
from fasttrain.data.cifar import Dataset, Split
from fasttrain.data.loader import build_loader, pick_loader
from fasttrain.errors import UserError
from fasttrain.evaluate import Evaluation, evaluate_state
from fasttrain.files import write_atomically
from fasttrain.machine import fork_rng, hardware_name, pick_device
from fasttrain.model import CustomResNet, summary
from fasttrain.optim import one_cycle
from fasttrain.plots import Curve, Picture
from fasttrain.recipe import Recipe

SAMPLES = 24
"""Augmented training images on the page."""
MISTAKES = 24
"""Most confident mistakes on the page."""

FILES = {
    "last.pt": "checkpoint after the final epoch",
    "previous.pt": "the checkpoint before it",
    "best.pt": "checkpoint of the best epoch",
    "result.json": "the figures",
    "metrics.jsonl": "a line per epoch",
    "recipe.json": "every setting",
    "machine.json": "hardware, versions and commit",
    "lr_find.json": "the LR finder's curves",
}

EPOCH_FIGURES = ("epoch", "train_accuracy", "test_accuracy", "seconds", "images_per_sec", "data_wait_share")
EPOCH_LOSSES = ("train_loss", "test_loss")  # null where they were no number
RESULT_FIGURES = (
    *("test_accuracy", "best_test_accuracy", "best_epoch", "max_lr", "images_per_sec", "data_wait_share"),
    *("train_seconds", "test_seconds", "compile_seconds", "wall_seconds"),
)
RESULT_UNKNOWNS = ("mfu", "matmul_tflops_measured", "peak_memory_gib", "peak_resident_gib")
RESULT_NAMES = ("dataset", "device", "loader", "precision", "compile")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Missing:
    """Stands where a section's content would, and says in a sentence why there is none."""

    reason: str


@dataclass(frozen=True)
class Run:
    """What a finished run's folder says, checked. epochs: the rows of metrics.jsonl."""

    folder: Path
    recipe: Recipe
    machine: dict[str, Any]
    result: dict[str, Any]
    epochs: list[dict[str, float]]
    lr_find: dict[str, Any] | None

    @property
    def hardware(self) -> str:
        return hardware_name(self.machine)

    @property
    def steps_per_epoch(self) -> int:
        """From the first epoch's rate, which was computed from it."""
        first = self.epochs[0]
        return round(first["images_per_sec"] * first["seconds"] / self.recipe.batch_size)

    def column(self, key: str) -> list[float]:
        """One figure of every epoch, NaN where it was no number."""
        return [math.nan if row[key] is None else row[key] for row in self.epochs]


# ------------------------------------------------------------------------------------------------- reading


def load_run(folder: Path) -> Run:
    """Read a run's folder. Raises UserError if it is none, is unfinished, or if a file in it is damaged."""
    if not (folder / "recipe.json").is_file():
        raise UserError(f"{folder}: no run's folder; expected one that fasttrain train made, as runs/...")
    if not (folder / "result.json").is_file():
        raise UserError(
            f"{folder}: holds no result.json: its run has not finished, and only finished ones count"
        )
    result = _read_object(folder / "result.json")
    _require(folder / "result.json", result, RESULT_FIGURES, nullable=RESULT_UNKNOWNS, names=RESULT_NAMES)
    try:
        recipe = Recipe.from_dict(_read_object(folder / "recipe.json"))
    except UserError as error:
        raise UserError(f"{folder / 'recipe.json'}: {error}") from error
    return Run(
        folder=folder,
        recipe=recipe,
        machine=_read_object(folder / "machine.json"),
        result=result,
        epochs=_read_epochs(folder / "metrics.jsonl"),
        lr_find=_read_object(folder / "lr_find.json") if (folder / "lr_find.json").exists() else None,
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected it as fasttrain train wrote it"
        ) from error


def _parse_object(text: str, place: object) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{place}: torn or foreign; expected a JSON object as fasttrain train wrote it")
    return values


def _read_object(path: Path) -> dict[str, Any]:
    return _parse_object(_read_text(path), path)


def _read_epochs(path: Path) -> list[dict[str, float]]:
    lines = _read_text(path).splitlines()
    if not lines:
        raise UserError(f"{path}: empty; expected a line per epoch")
    rows = []
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        rows.append(_parse_object(line, place))
        _require(place, rows[-1], EPOCH_FIGURES, nullable=EPOCH_LOSSES)
    return rows


def _require(
    place: object,
    values: dict[str, Any],
    figures: Sequence[str],
    *,
    nullable: Sequence[str] = (),
    names: Sequence[str] = (),
) -> None:
    """Raise UserError unless all these keys hold what the page formats: numbers, or null, or text."""
    kinds: dict[str, Any] = dict.fromkeys(figures, (int, float))
    kinds |= dict.fromkeys(nullable, (int, float, type(None)))
    kinds |= dict.fromkeys(names, str)
    for key, kind in kinds.items():
        if key not in values or not isinstance(values[key], kind):
            found = repr(values[key]) if key in values else "missing"
            raise UserError(f"{place}: {key} is {found}; expected it as fasttrain train wrote it")


# ----------------------------------------------------------------------------------------------- the command


def report(folder: Path, *, data_dir: Path | None = None, device: str = "auto") -> Path:
    """Write a finished run's report.html anew; returns the file.

    The figures of the test images come from evaluating last.pt again. Nothing is downloaded or generated:
    without the run's images, or without last.pt, their sections are left out.
    Raises UserError if there is no finished run, or if it cannot be written.
    """
    run = load_run(folder)
    run_device = pick_device(device)
    dataset = _given(run.result["dataset"], lambda name: _find_dataset(name, data_dir))
    evaluation = _given(
        dataset, lambda images: evaluate_state(load_checkpoint(folder / "last.pt"), images, run_device)
    )
    return write_report(run, dataset, evaluation, device=run_device)


def _find_dataset(name: str, data_dir: Path | None) -> Dataset:
    """The data set of this name in the data folder, or the stand-in that is kept inside it."""
    root = cifar.locate(data_dir)
    for folder in (root, root / synthetic.NAME):
        if cifar.exists(folder):
            dataset = cifar.read(folder)
            if dataset.name == name:
                return dataset
    raise UserError(f"{root} does not hold the run's images, {name}: name their folder with --data-dir")


def _given(value: T | Missing, make: Callable[[T], R | Missing]) -> R | Missing:
    """What `make` makes of a value; the reason, where the value is missing or a UserError says so."""
    if isinstance(value, Missing):
        return value
    try:
        return make(value)
    except UserError as error:
        return Missing(str(error))


# ------------------------------------------------------------------------------------------------- the page


def write_report(
    run: Run, dataset: Dataset | Missing, evaluation: Evaluation | Missing, *, device: torch.device
) -> Path:
    """Write the page from what is at hand; returns the file. An older one stays until this is whole."""
    path = run.folder / "report.html"
    write_page(
        path,
        "report.html.j2",
        run=run,
        loss=_loss_picture(run),
        accuracy=_accuracy_picture(run),
        schedule=_schedule_picture(run),
        seconds=plots.epoch_seconds(
            run.column("seconds"), run.column("data_wait_share"), alt="Training seconds of every epoch"
        ),
        lr_find=_given(run, _lr_find_picture),
        samples=_given(dataset, lambda images: _samples(images, run.recipe, device)),
        tests=_given(dataset, lambda images: _given(evaluation, lambda found: _tests(images, found))),
        summary=_given(dataset, lambda images: _summary(run.recipe, len(images.classes))),
        files={name: text for name, text in FILES.items() if (run.folder / name).exists()},
    )
    return path


def write_page(path: Path, template: str, **content: Any) -> None:
    """Render a template with everything escaped, and write it atomically. Raises UserError on a full disk."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("fasttrain"),
        autoescape=True,  # class and recipe names are whatever someone wrote into a file
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["as"] = lambda value, form: "unknown" if value is None else format(value, form)
    pages.tests["missing"] = lambda value: isinstance(value, Missing)
    text = pages.get_template(template).render(light=plots.LIGHT, dark=plots.DARK, **content)
    write_atomically(path, lambda file: file.write(text.encode()))


def _loss_picture(run: Run) -> Picture:
    epochs = run.column("epoch")
    return plots.chart(
        [
            Curve(epochs, run.column("train_loss"), 0, "train"),
            Curve(epochs, run.column("test_loss"), 1, "test"),
        ],
        x_name="epoch",
        y_name="loss per image",
        alt="Training and test loss of every epoch",
    )


def _accuracy_picture(run: Run) -> Picture:
    epochs = run.column("epoch")
    return plots.chart(
        [
            Curve(epochs, run.column("train_accuracy"), 0, "train"),
            Curve(epochs, run.column("test_accuracy"), 1, "test"),
        ],
        x_name="epoch",
        y_name="accuracy",
        alt="Training and test accuracy of every epoch",
        percent=True,
    )


def _schedule_picture(run: Run) -> Picture:
    total_steps = run.recipe.epochs * run.steps_per_epoch
    lrs, betas = [], []
    for step in range(total_steps):
        lr, beta1 = one_cycle(step, total_steps, run.result["max_lr"], run.recipe)
        lrs.append(lr)
        if beta1 is not None:
            betas.append(beta1)
    return plots.schedule(lrs, betas or None, alt=f"Learning rate over {total_steps} steps")


def _lr_find_picture(run: Run) -> Picture:
    max_lr = run.result["max_lr"]
    if run.lr_find is None:
        raise UserError(f"The recipe names its peak rate, {max_lr:g}: the LR finder was not asked.")
    try:
        curves = [
            Curve(curve["lrs"], curve["losses"], series, f"try {series + 1}")
            for series, curve in enumerate(run.lr_find["curves"])
        ]
    except (KeyError, TypeError) as error:
        raise UserError("lr_find.json does not hold the LR finder's curves.") from error
    return plots.chart(
        curves,
        x_name="learning rate",
        y_name="smoothed loss",
        alt=f"Loss over rising learning rates, with {max_lr:.3g} marked",
        log_x=True,
        mark_x=max_lr,
    )


def _samples(dataset: Dataset, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The first training images as the recipe's loader augments them."""
    count = min(SAMPLES, len(dataset.train.labels))
    few = Split(dataset.train.images[:count], dataset.train.labels[:count])
    loader = build_loader(
        dataclasses.replace(dataset, train=few),
        dataclasses.replace(recipe, batch_size=count),
        train=True,
        kind=pick_loader(recipe.loader, device, lambda _: None),
        device=device,
    )
    images_NCHW, labels_N = next(iter(loader))
    return {
        "loader": loader.name,
        "images": [
            {"uri": plots.image_uri(image_HWC), "label": dataset.classes[label]}
            for image_HWC, label in zip(
                images_NCHW.permute(0, 2, 3, 1).cpu().numpy(), labels_N.tolist(), strict=True
            )
        ],
    }


def _tests(dataset: Dataset, evaluation: Evaluation) -> dict[str, Any]:
    """What the page says about the test images: counts, figures of every class, mistakes."""
    classes = dataset.classes
    return {
        "images": len(evaluation.labels_N),
        "accuracy": evaluation.accuracy,
        "classes": classes,
        "confusion": evaluation.confusion_KK(len(classes)).tolist(),
        "per_class": evaluation.per_class(len(classes)),
        "mistakes": [
            {
                "uri": plots.image_uri(dataset.test.images[index].transpose(1, 2, 0)),
                "truth": classes[evaluation.labels_N[index]],
                "prediction": classes[evaluation.predictions_N[index]],
                "confidence": evaluation.confidences_N[index].item(),
            }
            for index in evaluation.misclassified()[:MISTAKES].tolist()
        ],
    }


def _summary(recipe: Recipe, num_classes: int) -> str:
    with fork_rng(torch.device("cpu")):  # a new network draws its weights from the global generator
        return summary(CustomResNet(num_classes, recipe.dropout))
