"""`fasttrain evaluate`: a checkpoint's accuracy, figures per class, and the most confident mistakes."""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np
import torch

from fasttrain.checkpoint.network import TrainedModel, load_trained_model
from fasttrain.data.build_loader import build_loader
from fasttrain.data.dataset import Dataset, Split
from fasttrain.data.load_dataset import load_dataset, load_from_options, names_own_images
from fasttrain.data.run_images import find_dataset
from fasttrain.errors import UserError
from fasttrain.evaluation import Evaluation, evaluate
from fasttrain.options import DataOptions, EvaluateOptions
from fasttrain.recipe import Views
from fasttrain.runtime import Runtime
from fasttrain.system.machine import pick_device
from fasttrain.system.precision import evaluation_precision

SplitName = Literal["test", "train", "all"]


def evaluate_model(
    trained: TrainedModel,
    dataset: Dataset,
    device: torch.device,
    *,
    split: SplitName = "test",
    views: Views = "none",
) -> Evaluation:
    """Measure a checkpoint's network on every image of a split, as its training did on the test images.

    Uses the training's precision if the device has it (see precision.evaluation_precision), and the
    training's mean and standard deviation, which the model holds. split: all takes the training images first,
    and then the test images. views: as in evaluate.
    Raises UserError if the checkpoint's classes are not the data set's, or if the split is empty.
    """
    trained.require_classes_of(dataset)
    images = _images_of(dataset, split)
    if not len(images.labels):
        raise UserError(f"--split {split}: {dataset.name} has no such images")
    precision = evaluation_precision(trained.precision, device)
    runtime = Runtime.resolve(trained.recipe, device, precision=precision, trains=False)
    loader = build_loader(
        dataclasses.replace(dataset, test=images),
        trained.recipe,
        train=False,
        device=device,
        loader=runtime.loader,
    )
    return evaluate(trained.model, loader, runtime, views=views)


class Measurement(NamedTuple):
    """A checkpoint, the images it was measured on, and what came out."""

    trained: TrainedModel
    dataset: Dataset
    device: torch.device
    evaluation: Evaluation


def measure(options: EvaluateOptions) -> Measurement:
    """Measure a checkpoint on every image of a split: of the images that the options name, else its run's.

    Raises UserError if the checkpoint cannot be read, or if its classes are not the data set's.
    """
    device = pick_device(options.device)
    trained = load_trained_model(options.checkpoint, device)
    dataset = _load(trained, options)
    evaluation = evaluate_model(trained, dataset, device, split=options.split, views=options.views)
    return Measurement(trained, dataset, device, evaluation)


def evaluate_checkpoint(options: EvaluateOptions) -> Evaluation:
    """Measure a checkpoint on every image of a split; print accuracy, figures per class and mistakes.

    Also prints the test accuracy that the training measured on the same weights, if any. Raises UserError as
    `measure` does.
    """
    from rich.markup import escape
    from rich.table import Table

    from fasttrain.system.console import Console

    trained, dataset, device, result = measure(options)
    split = options.split
    precision = evaluation_precision(trained.precision, device)
    console = Console(soft_wrap=True)
    console.print(
        f"{dataset.name}: {'' if split == 'all' else f'{split} '}accuracy {result.accuracy:.2%}, "
        f"loss {result.loss:.4f} over {'all ' if split == 'all' else ''}{len(result.labels_N):,} images, in "
        f"{precision}; epoch {trained.epoch} of {trained.path}",
        markup=False,
    )
    if trained.metrics is not None:
        note = f"the training itself measured {trained.metrics['test_accuracy']:.2%}"
        note += f" on {'' if split == 'test' else 'the test images of '}{trained.images.name}"
        if trained.precision not in (None, precision):
            note += f", in {trained.precision}, which does not work on {device}; rounding moves a few images"
        console.print(note, markup=False)
    if result.accuracy_views is not None:
        console.print(
            f"with averaged predictions ({options.views}): {result.accuracy_views:.2%}", markup=False
        )
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
    in_train = {"test": 0, "train": len(result.labels_N), "all": len(dataset.train.labels)}[split]
    for index in result.misclassified()[: options.mistakes].tolist():
        truth, found = dataset.classes[result.labels_N[index]], dataset.classes[result.predictions_N[index]]
        place = f"training image {index}" if index < in_train else f"test image {index - in_train}"
        confidence = result.confidences_N[index]
        console.print(f"{place}: {truth}, mistaken for {found} at {confidence:.1%}", markup=False)
    return result


def _load(trained: TrainedModel, options: DataOptions) -> Dataset:
    """Return the images that the options name, else the run's own; a release is downloaded if necessary."""
    resolution = trained.recipe.resolution
    if options.hold_out:
        raise UserError("--hold-out: is for training; a run that held images out is measured on them anyway")
    if options.data != "auto":
        return load_from_options(options, resolution, classes=trained.classes)
    data_dir, skip_bad = options.data_dir, options.skip_bad
    try:
        return find_dataset(trained.images, data_dir=data_dir, skip_bad=skip_bad, resolution=resolution)
    except UserError:
        if names_own_images(trained.images.name):
            raise
        return load_dataset(resolution=resolution, **trained.images.options("auto", data_dir, skip_bad))


def _images_of(dataset: Dataset, split: SplitName) -> Split:
    if split != "all":
        return dataset.train if split == "train" else dataset.test
    parts = dataset.train, dataset.test
    return Split(
        np.concatenate([part.images for part in parts]), np.concatenate([part.labels for part in parts])
    )
