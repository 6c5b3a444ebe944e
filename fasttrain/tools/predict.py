"""`fasttrain predict`: classify any images with a checkpoint.

Shape suffixes: N images, C channels, H rows, W columns, K classes.
"""

import csv
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fasttrain.checkpoint.network import load_trained_model
from fasttrain.data.sources.image import FORMATS, SUFFIXES, decode
from fasttrain.errors import UserError
from fasttrain.model import ImageClassifier
from fasttrain.system.machine import pick_device
from fasttrain.system.precision import prepare

Format = Literal["table", "json", "csv"]


@dataclass(frozen=True)
class Prediction:
    """The prediction for one file. classes: the likeliest first, each with its probability."""

    path: Path
    classes: list[tuple[str, float]]


def predict(
    checkpoint: Path,
    paths: Sequence[Path],
    *,
    top_k: int = 3,
    device: str = "auto",
    batch_size: int = 256,
    skip: Callable[[str], object] | None = None,
) -> list[Prediction]:
    """Classify images, in the order of `find_images`, in float32, so that every device gives the same answer.

    skip: called with the reason for each file that cannot be decoded; without it, the first such file raises.
    Raises UserError for such a file, for paths without an image, or for an unusable checkpoint or number.
    """
    for flag, value in (("--top-k", top_k), ("--batch-size", batch_size)):
        if value < 1:
            raise UserError(f"{flag} {value}: expected at least 1")
    run_device, files = pick_device(device), find_images(paths)
    trained = load_trained_model(checkpoint, run_device)
    prepare(run_device, "fp32")
    predictions: list[Prediction] = []
    for start in range(0, len(files), batch_size):
        read: list[tuple[Path, np.ndarray]] = []
        for path in files[start : start + batch_size]:
            try:
                read.append((path, read_image(path, trained.model.resolution)))
            except UserError as error:
                if skip is None:
                    raise
                skip(str(error))
        if read:
            images_NHWC = torch.from_numpy(np.stack([image_HWC for _, image_HWC in read]))
            found = _classify(trained.model, images_NHWC.to(run_device), trained.classes, top_k)
            predictions += [Prediction(path, classes) for (path, _), classes in zip(read, found, strict=True)]
    if not predictions:
        raise UserError(f"none of the {len(files):,} files could be read as an image")
    return predictions


def find_images(paths: Iterable[Path]) -> list[Path]:
    """Return the given files, and for every folder the images below it (by suffix), sorted by path.

    Links to folders are not followed, unless given as a path. Raises UserError for a missing path, or for a
    folder that cannot be read or holds no image.
    """
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if not path.exists():
                raise UserError(f"{path}: no such file or folder; expected an image, or a folder of images")
            files.append(path)
            continue
        try:
            below = [
                Path(folder, name) for folder, _, names in os.walk(path, onerror=_raise) for name in names
            ]
        except OSError as error:
            raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
        found = sorted(file for file in below if file.suffix.lower() in SUFFIXES)
        if not found:
            raise UserError(f"{path}: holds no image; expected files that end with {', '.join(SUFFIXES)}")
        files += found
    if not files:
        raise UserError("no image named; expected images, or folders of images")
    return files


def _raise(error: OSError) -> None:
    raise error


def read_image(path: Path, resolution: int) -> np.ndarray:
    """Read an image as (resolution, resolution, 3) uint8. Raises UserError if it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, about odd metadata
            return decode(path, resolution, name=path.name)
    except ValueError as error:
        raise UserError(f"{path}: cannot be decoded ({error}); expected {', '.join(FORMATS)}") from error


def _classify(
    model: ImageClassifier, images_NHWC: Tensor, classes: list[str], top_k: int
) -> list[list[tuple[str, float]]]:
    with torch.inference_mode():
        probabilities_NK = model(images_NHWC.permute(0, 3, 1, 2)).softmax(1)
    best = probabilities_NK.topk(min(top_k, len(classes)))
    return [
        [(classes[label], share) for label, share in zip(labels, shares, strict=True)]
        for labels, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def show(predictions: Iterable[Prediction], format: Format) -> None:
    """Print to stdout: a table; JSON Lines, an object per image; or CSV, a row per image and class."""
    if format == "json":
        for one in predictions:
            classes = [{"class": name, "probability": share} for name, share in one.classes]
            print(json.dumps({"file": _name(one.path), "predictions": classes}))
    elif format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(["file", "rank", "class", "probability"])
        for one in predictions:
            for rank, (name, share) in enumerate(one.classes, start=1):
                writer.writerow([_name(one.path), rank, name, share])
    else:
        from rich.table import Column, Table
        from rich.text import Text

        from fasttrain.system.console import Console

        table = Table(Column("file", overflow="fold"), "class", Column("probability", justify="right"))
        for one in predictions:
            for rank, (name, share) in enumerate(one.classes):
                table.add_row(Text(_name(one.path) if rank == 0 else ""), Text(name), f"{share:.1%}")
        Console().print(table)


def _name(path: Path) -> str:
    """Return a path as text for any terminal or file; bytes that are not UTF-8 are replaced."""
    return os.fsencode(path).decode(errors="replace")
