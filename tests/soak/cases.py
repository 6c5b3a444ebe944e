"""What the fault campaign trains: every preset in small, both loaders, every kind of images, and ranks."""

import dataclasses
import functools
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fasttrain.data.dataset import Dataset
from fasttrain.data.sources import cifar, synthetic
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.system.precision import pick_precision


@dataclass(frozen=True)
class Case:
    """A recipe, the flags that say where its images are, and on how many ranks it trains."""

    recipe: Recipe
    data: tuple[str, ...]
    ranks: int = 1


def cases(work: Path) -> list[Case]:
    """Make the images under `work`, 64 to train on and 40 to test on, and return what to train on them."""
    synthetic.generate(work / "data", train_count=64, test_count=40)
    dataset = cifar.read(work / "data")
    write_folder(dataset, work / "folder")
    write_shards(dataset, work / "shards")
    release, folder, shards = (
        ("--data-dir", str(work / "data"), *flags)
        for flags in (
            (),
            ("--data", f"folder:{work / 'folder'}"),
            ("--data", f"webdataset:{work / 'shards'}"),
        )
    )
    return [
        Case(small("default", loader="dali", dropout=0.1), release),
        Case(small("speedrun", loader="tensor"), release),
        Case(small("fast", loader="dali"), folder),
        Case(small("assignment", loader="tensor", max_lr=0.02), shards),
        Case(small("laptop", loader="dali"), shards),
        Case(small("fast", loader="tensor", compute_dtype="fp32", early_scale=0.5), folder),
        Case(small("speedrun", loader="dali", compute_dtype="fp32"), release, ranks=2),
        Case(small("default", loader="tensor", ema_epochs=0.5), folder, ranks=3),
        Case(small("laptop", loader="tensor", compile="default"), release),
    ]


def small(preset: str, **fields: Any) -> Recipe:
    """The preset as three epochs of a narrow network in batches that 2 and 3 ranks can share.

    In this machine's precision, measured once: each run would measure it, and on busy cores choose another.
    """
    shape = {"name": "soak", "epochs": 3, "batch_size": 12, "width": 4, "compute_dtype": precision_here()}
    return dataclasses.replace(PRESETS[preset], **{**shape, **fields})


@functools.cache
def precision_here() -> str:
    return pick_precision("auto", torch.device("cpu"))


def write_folder(dataset: Dataset, folder: Path) -> None:
    """Every image as folder/<split>/<class>/<number>.png."""
    for split, index, label, content in _pictures(dataset):
        path = folder / split / dataset.classes[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_shards(dataset: Dataset, folder: Path) -> None:
    """A tar file for each split, with a picture and a .cls for every image."""
    folder.mkdir()
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for of, index, label, content in _pictures(dataset):
                if of != split:
                    continue
                for name, value in ((f"{index}.png", content), (f"{index}.cls", str(label).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(value)
                    tar.addfile(info, io.BytesIO(value))


def _pictures(dataset: Dataset) -> list[tuple[str, int, int, bytes]]:
    """Split, number, label and PNG of every image."""

    def png(pixels: np.ndarray) -> bytes:
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        return content.getvalue()

    return [
        (name, index, int(split.labels[index]), png(split.images[index]))
        for name, split in (("train", dataset.train), ("test", dataset.test))
        for index in range(len(split.labels))
    ]
