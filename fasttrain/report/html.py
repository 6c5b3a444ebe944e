"""One page about a run: report.html in its folder, with every picture embedded.

The page loads nothing from the network and runs no script. A section that cannot be shown, for instance
because the images are not on this disk, is replaced by a sentence that says why.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fasttrain.data.build_loader import build_loader, pick_loader
from fasttrain.data.dataset import Dataset, Split
from fasttrain.data.load_dataset import names_own_images
from fasttrain.data.run_images import RunImages
from fasttrain.data.sources import cifar, synthetic
from fasttrain.errors import UserError, one_line
from fasttrain.evaluation import Evaluation
from fasttrain.model import build_model
from fasttrain.optim import one_cycle
from fasttrain.recipe import Recipe
from fasttrain.report import plots
from fasttrain.report.network_table import summary
from fasttrain.report.pages import Missing, render, write_page
from fasttrain.report.plots import Picture
from fasttrain.report.run import Run, UnfinishedRun
from fasttrain.report.settings import base_preset, changed_settings, train_command
from fasttrain.system.fallbacks import Fallbacks
from fasttrain.system.files import is_held, write_atomically
from fasttrain.system.program import typed
from fasttrain.system.rng import fork_rng
from fasttrain.system.run_folder import ERROR_FILE, RESULT_FILE

SAMPLES = 24
"""Augmented training images on the page."""

MISTAKES = 24
"""Most confident mistakes on the page."""

MANY_CLASSES = 40
"""From so many classes on, a list of the most frequent confusions takes the place of their matrix."""

LISTED = 20
"""Then: how many confusions are listed, and how many of the worst classes."""

FILES = {
    "last.pt": "checkpoint after the final epoch",
    "previous.pt": "the checkpoint before it",
    "best.pt": "checkpoint of the best epoch",
    "result.json": "the figures",
    "metrics.jsonl": "a line per epoch",
    "recipe.json": "every setting",
    "machine.json": "hardware, versions, commit, precision and compile mode",
    "data.json": "the images, and where they were",
    "lr_find.json": "the LR finder's curves",
    "trace.json": "the profiler's trace, for ui.perfetto.dev",
}

MARKS = {
    "samples": 'alt="an augmented training image"',
    "tests": "<h3>Confusion",
    "summary": "<summary>Layer by layer</summary>",
}
"""What a page contains if, and only if, it shows this section."""

T = TypeVar("T")
R = TypeVar("R")


def given(value: T | Missing, make: Callable[[T], R | Missing]) -> R | Missing:
    """Return `make(value)`, or a Missing if the value is missing or `make` raises a UserError."""
    if isinstance(value, Missing):
        return value
    try:
        return make(value)
    except UserError as error:
        return Missing(str(error))


def write_report(
    run: Run, dataset: Dataset | Missing, evaluation: Evaluation | Missing, *, device: torch.device
) -> Path:
    """Write the page, with a sentence for each part that is missing; returns its path.

    An older page stays until the new one is complete. Raises UserError if it cannot be written, or if there
    is a page that shows something that is missing now.
    """
    path = run.folder / "report.html"
    sections = {
        "samples": given(dataset, lambda images: _samples(images, run.recipe, device)),
        "tests": given(dataset, lambda images: given(evaluation, lambda found: _tests(images, found))),
        "summary": given(dataset, lambda images: _summary(run.recipe, len(images.classes))),
    }
    _require_no_less(path, sections)
    write_page(
        path,
        "report.html.j2",
        run=run,
        is_synthetic=synthetic.names_stand_in(run.result["dataset"]),
        is_comparable=_is_comparable(run.result["dataset"]),
        **settings_of(run),
        **run.pictures(),
        schedule=_schedule_picture(run),
        lr_find=given(run, _lr_find_picture),
        **sections,
        files={name: text for name, text in FILES.items() if (run.folder / name).exists()},
    )
    return path


def try_report(run: Run, dataset: Dataset, evaluation: Evaluation, device: torch.device) -> str:
    """Write the page of a run that has just finished; returns a line that says where, or why not."""
    try:
        return f"report -> {write_report(run, dataset, evaluation, device=device)}"
    except Exception as error:
        return f"no report.html ({one_line(error)}); try again: {typed('report', str(run.folder))}"


def settings_of(run: UnfinishedRun) -> dict[str, Any]:
    """Return a page's content about the run's settings."""
    changed, every = changed_settings(run.recipe), run.recipe.to_dict()
    return {
        "command": train_command(run.recipe, RunImages.of_run(run.folder)),
        "base": base_preset(run.recipe),
        "changed": changed,
        "unchanged": {key: value for key, value in every.items() if key not in changed},
    }


def progress_page(run: UnfinishedRun, refresh_seconds: int | None = None) -> str:
    """Return the HTML of a page about a run as far as it has got.

    refresh_seconds: after so many seconds the browser asks for it again; None: never.
    """
    images = RunImages.of_run(run.folder)
    return render(
        "progress.html.j2",
        run=run,
        is_training=is_held(run.folder),
        has_error=(run.folder / ERROR_FILE).exists(),
        resume=typed("train", "--resume", str(run.folder)),
        **settings_of(run),
        pictures=run.pictures() if run.epochs else {},
        dataset=images.name if images else None,
        is_synthetic=images is not None and synthetic.names_stand_in(images.name),
        refresh_seconds=refresh_seconds,
    )


def write_progress(run: UnfinishedRun) -> Path:
    """Write report.html of a run that has not finished, marked as such; returns its path.

    Raises UserError if there is the page of a finished run.
    """
    path, text = run.folder / "report.html", progress_page(run)
    _require_no_less(path, dict.fromkeys(MARKS, Missing(f"the run has no {RESULT_FILE}")))
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def _is_comparable(dataset_name: str) -> bool:
    """Return whether the images are a verified release, or of the user's own, and imitate none."""
    return names_own_images(dataset_name) or dataset_name in {one.name for one in cifar.RELEASES.values()}


def _require_no_less(path: Path, sections: dict[str, Any]) -> None:
    """Raise UserError if the page that is there shows a section that is missing now."""
    page = path.read_text("utf-8", "replace") if path.is_file() else ""
    for name, content in sections.items():
        if isinstance(content, Missing) and MARKS[name] in page:
            raise UserError(
                f"{path}: left as it is, since a new page would show less ({content.reason}); "
                "remove it to have that page all the same"
            )


def _schedule_picture(run: Run) -> Picture:
    total_steps = run.recipe.epochs * run.steps_per_epoch
    lrs, betas = [], []
    for step in range(total_steps):
        lr, beta1 = one_cycle(step, total_steps, run.result["max_lr"], run.recipe)
        lrs.append(lr)
        if beta1 is not None:
            betas.append(beta1)
    return plots.picture(plots.schedule(lrs, betas or None), f"Learning rate over {total_steps} steps")


def _lr_find_picture(run: Run) -> Picture:
    max_lr = run.result["max_lr"]
    if run.lr_find is None:
        raise UserError(f"The recipe sets the peak rate, {max_lr:g}, so the LR finder was not used.")
    try:
        curves = [(curve["lrs"], curve["losses"]) for curve in run.lr_find["curves"]]
    except (KeyError, TypeError) as error:
        raise UserError("lr_find.json does not hold the LR finder's curves.") from error
    alt = f"Loss over rising learning rates, with {max_lr:.3g} marked"
    return plots.picture(plots.lr_find(curves, max_lr), alt)


def first_images(dataset: Dataset, recipe: Recipe, device: torch.device) -> tuple[Tensor, Tensor, str]:
    """Return the first training images as the recipe's loader augments them.

    Returns images_NCHW (uint8), labels_N (int64) and the loader's name.
    """
    count = min(SAMPLES, len(dataset.train.labels))
    few = Split(dataset.train.images[:count], dataset.train.labels[:count])
    loader = build_loader(
        dataclasses.replace(dataset, train=few),
        dataclasses.replace(recipe, batch_size=count),
        train=True,
        device=device,
        loader=pick_loader(recipe.loader, device, Fallbacks(lambda _: None)),
    )
    images_NCHW, labels_N = next(iter(loader))
    return images_NCHW, labels_N, loader.name


def _samples(dataset: Dataset, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Return the page's content about the augmented training images."""
    images_NCHW, labels_N, loader_name = first_images(dataset, recipe, device)
    images_NHWC = images_NCHW.permute(0, 2, 3, 1).cpu().numpy()
    return {
        "loader": loader_name,
        "images": [
            {"uri": plots.image_uri(image_HWC), "label": dataset.classes[label]}
            for image_HWC, label in zip(images_NHWC, labels_N.tolist(), strict=True)
        ],
    }


def _tests(dataset: Dataset, evaluation: Evaluation) -> dict[str, Any]:
    """Return the page's content about the test images: counts, figures per class, mistakes."""
    classes = dataset.classes
    has_many = len(classes) >= MANY_CLASSES
    per_class = [
        (name, figures, "-" if figures.taken_for is None else classes[figures.taken_for])
        for name, figures in zip(classes, evaluation.per_class(len(classes)), strict=True)
    ]
    worst = sorted((row for row in per_class if row[1].images), key=lambda row: row[1].recall or 0.0)
    return {
        "images": len(evaluation.labels_N),
        "accuracy": evaluation.accuracy,
        "top5_accuracy": evaluation.top5_accuracy if has_many else None,
        "macro_f1": evaluation.macro_f1(len(classes)),
        "classes": classes,
        "confusion": None if has_many else evaluation.confusion_KK(len(classes)).tolist(),
        "confusions": [
            (classes[truth], classes[prediction], number)
            for truth, prediction, number in evaluation.top_confusions(len(classes), LISTED)
        ],
        "per_class": per_class,
        "worst": worst[:LISTED],
        "mistakes": [
            {
                "uri": plots.image_uri(dataset.test.images[index]),
                "truth": classes[evaluation.labels_N[index]],
                "prediction": classes[evaluation.predictions_N[index]],
                "confidence": evaluation.confidences_N[index].item(),
            }
            for index in evaluation.misclassified()[:MISTAKES].tolist()
        ],
    }


def _summary(recipe: Recipe, num_classes: int) -> str:
    with fork_rng(torch.device("cpu")):  # a new network takes its weights from the global generator
        return summary(build_model(recipe, num_classes))
