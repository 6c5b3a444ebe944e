"""`fasttrain evaluate`: a checkpoint's accuracy, figures per class, and the most confident mistakes."""

from collections.abc import Callable
from pathlib import Path

import torch

from fasttrain.checkpoint.network import TrainedModel, load_model
from fasttrain.data.build_loader import build_loader
from fasttrain.data.dataset import Dataset
from fasttrain.errors import UserError
from fasttrain.evaluate import Evaluation, evaluate
from fasttrain.runtime import Runtime
from fasttrain.system.machine import pick_device
from fasttrain.system.precision import evaluation_precision


def evaluate_model(
    trained: TrainedModel, dataset: Dataset, device: torch.device, *, flip: bool = False
) -> Evaluation:
    """Measure a checkpoint's network on every test image, as its training did.

    Uses the training's precision if the device has it (see precision.evaluation_precision), and the
    training's mean and standard deviation, which the model holds. flip: also classify each image's mirror
    image.
    Raises UserError if the checkpoint's classes are not the data set's.
    """
    trained.require_classes_of(dataset)
    precision = evaluation_precision(trained.precision, device)
    runtime = Runtime.resolve(trained.recipe, device, precision=precision, trains=False)
    loader = build_loader(dataset, trained.recipe, train=False, device=device, loader=runtime.loader)
    return evaluate(trained.model, loader, runtime, flip=flip)


def evaluate_checkpoint(
    path: Path,
    load_dataset: Callable[[int], Dataset],
    *,
    device: str = "auto",
    mistakes: int = 5,
    flip: bool = False,
) -> Evaluation:
    """Measure a checkpoint on every test image; print accuracy, figures per class and confident mistakes.

    Also prints the accuracy that the training measured on the same weights, if any.
    load_dataset: called with the checkpoint's resolution. mistakes: how many to print.
    flip: print a second accuracy, from each image and its mirror image.
    Raises UserError if the checkpoint cannot be read, or if its classes are not the data set's.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    run_device = pick_device(device)
    trained = load_model(path, run_device)
    dataset = load_dataset(trained.recipe.resolution)
    try:
        result = evaluate_model(trained, dataset, run_device, flip=flip)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error

    precision = evaluation_precision(trained.precision, run_device)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{dataset.name}: test accuracy {result.accuracy:.2%}, loss {result.loss:.4f} over "
        f"{len(result.labels_N):,} images, in {precision}; epoch {trained.epoch} of {path}",
        markup=False,
    )
    if trained.metrics is not None:
        note = f"the training itself measured {trained.metrics['test_accuracy']:.2%} on {trained.dataset}"
        if trained.precision not in (None, precision):
            note += (
                f", in {trained.precision}, which does not work on {run_device}; rounding moves a few images"
            )
        console.print(note, markup=False)
    if result.accuracy_flip is not None:
        console.print(f"with each image's mirror image: {result.accuracy_flip:.2%}", markup=False)
    table = Table("class", "images", "recall", "precision", "most often mistaken for")
    for name, figures in zip(dataset.classes, result.per_class(len(dataset.classes)), strict=True):
        table.add_row(
            escape(name),
            f"{figures.images:,}",
            "-" if figures.recall is None else f"{figures.recall:.2%}",
            "-" if figures.precision is None else f"{figures.precision:.2%}",
            "-" if figures.taken_for is None else escape(dataset.classes[figures.taken_for]),
        )
    console.print(table)
    for index in result.misclassified()[:mistakes].tolist():
        truth, found = dataset.classes[result.labels_N[index]], dataset.classes[result.predictions_N[index]]
        confidence = result.confidences_N[index]
        console.print(f"test image {index}: {truth}, mistaken for {found} at {confidence:.1%}", markup=False)
    return result
