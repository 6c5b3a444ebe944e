"""The choice of the data set and of its loaders."""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fasttrain.data import cifar, folder, synthetic, webdataset
from fasttrain.data.batches import Loader
from fasttrain.data.cifar import Dataset, Split
from fasttrain.data.padding import LazyWindows, pad
from fasttrain.data.sampler import WHOLE, Augmentation, Sampler, Shard, first_flips
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe

LoaderKind = Literal["dali", "tensor"]
OWN_IMAGES = {"folder": folder.read, "webdataset": webdataset.read}
"""What `--data` begins with, before a colon, where the images are a user's own; and who reads them."""

PADDED_GIB_MAX = 4
"""Images that take more with their border stay where they are, and are padded batch by batch."""
EVAL_BATCH_SIZE = 1000
"""Divides CIFAR-10's 10,000 test images, so that every batch has one shape."""


def open_dataset(
    data: str,
    data_dir: Path | None,
    announce: Callable[[str], object],
    *,
    resolution: int = Recipe.resolution,
    skip_bad: bool = False,
) -> Dataset:
    """The data set that `data` asks for, downloaded or generated where it is not there yet.

    cifar10, cifar100: the files in the data folder, else a download. auto: cifar10, and where the download
    fails, the synthetic stand-in, announced. synthetic: the stand-in. folder:PATH, webdataset:PATTERN: the
    images there, scaled to the resolution and cached as pixels in the data folder; with skip_bad those that
    cannot be decoded are left out.
    Raises UserError if there is no such data set, or if its files are not as they should be.
    """
    root = cifar.locate(data_dir)
    kind, _, place = data.partition(":")
    if kind in OWN_IMAGES and place:
        path, cache = Path(place).expanduser(), root / "decoded"
        return OWN_IMAGES[kind](path, cache, resolution=resolution, skip_bad=skip_bad, announce=announce)
    if data not in ("auto", *cifar.RELEASES, "synthetic"):
        expected = ", ".join(("auto", *cifar.RELEASES, "synthetic"))
        raise UserError(f"--data {data}: expected {expected}, folder:PATH, or webdataset:PATTERN")
    if skip_bad:
        raise UserError("--skip-bad: only folder:PATH and webdataset:PATTERN have files to leave out")
    if resolution != cifar.IMAGE_SHAPE[-1]:
        raise UserError(
            f"--resolution {resolution}: the images of --data {data} have {cifar.IMAGE_SHAPE[-1]} pixels a "
            "side; only those of folder:PATH and webdataset:PATTERN are scaled"
        )
    stand_in = root / synthetic.NAME
    if data != "synthetic":
        release = cifar.RELEASES.get(data, cifar.CIFAR10)
        try:
            if not cifar.exists(root, release):
                cifar.download(root, release=release)
            dataset = cifar.read(root, release)
            if data != "auto" and dataset.name == synthetic.NAME:
                raise UserError(f"--data {data}: {root} holds the stand-in; name another --data-dir")
            return dataset
        except cifar.DownloadError as error:
            if data != "auto":
                raise
            announce(
                f"NOT CIFAR-10: {error}. Training on a generated stand-in instead; "
                f"every result says '{synthetic.NAME}'."
            )
    synthetic.generate(stand_in)
    return cifar.read(stand_in)


def pick_loader(requested: str, device: torch.device, announce: Callable[[str], object]) -> LoaderKind:
    """DALI where it is installed and drives this device, else the pure-torch loader, announced in one line.

    Raises UserError if DALI was asked for and cannot be had.
    """
    if requested == "tensor":
        return "tensor"
    reason = _dali_missing(device)
    if reason is None:
        return "dali"
    if requested == "dali":
        raise UserError(f"--loader dali: {reason}; take --loader tensor")
    announce(f"loader: {reason}; using the pure-torch loader")
    return "tensor"


def _dali_missing(device: torch.device) -> str | None:
    if device.type not in ("cpu", "cuda"):
        return f"DALI does not run on {device.type}"
    try:
        from fasttrain.data.dali import dali_version

        dali_version()
    except ImportError as error:
        if platform.system() != "Linux":
            return f"DALI has no wheel for {platform.system()}"
        return f"DALI is not installed ({error})"
    return None


def build_loader(
    dataset: Dataset,
    recipe: Recipe,
    *,
    train: bool,
    kind: LoaderKind,
    device: torch.device,
    shard: Shard = WHOLE,
) -> Loader:
    """The loader for the training images (shuffled, augmented) or for the test images (as they are).

    shard: a rank's part: of every training batch, or of the test images as a whole. Put together in the order
    of the ranks, the parts are what one rank would get, to the last bit.
    Raises UserError if the batch is larger than the training set, if a rank gets no test image, or if the
    images are not of the recipe's size.
    """
    split = dataset.train if train else _part(dataset.test, shard)
    batch_size = recipe.batch_size if train else min(EVAL_BATCH_SIZE, len(split.labels))
    if batch_size > len(split.labels):
        raise UserError(
            f"--batch-size {batch_size}: {dataset.name} has {len(split.labels)} training images, take fewer"
        )
    own = shard if train else WHOLE
    size = split.images.shape[-1]
    if size != recipe.resolution:
        raise UserError(
            f"--resolution {recipe.resolution}: the images of {dataset.name} have {size} pixels a side"
        )
    padding, flip = (recipe.crop_padding, recipe.flip) if train else (0, False)
    alternates = flip and recipe.flip_order == "alternating"
    settings: dict[str, Any] = {
        "images_NHWC": _padded(split, padding, kind),
        "labels_N": split.labels,
        "sampler": Sampler(len(split.labels), batch_size, train=train, seed=recipe.seed, shard=own),
        "augmentation": Augmentation(
            crop=size,
            room=2 * padding,
            flip=flip,
            cutout=recipe.cutout if train else 0,
            seed=recipe.seed,
            shard=own,
            first_flips=first_flips(len(split.labels), recipe.seed) if alternates else None,
        ),
        "fill": tuple(round(255 * value) for value in dataset.mean),
        "device": device,
    }
    if kind == "dali":
        from fasttrain.data.dali import DaliLoader

        return DaliLoader(**settings, threads=recipe.loader_threads)
    from fasttrain.data.tensor import TensorLoader

    return TensorLoader(**settings)


def _padded(split: Split, padding: int, kind: LoaderKind) -> np.ndarray | LazyWindows:
    """The images as the loader takes them. Raises UserError if they are too large for it."""
    side = split.images.shape[-1] + 2 * padding
    gib = 3 * side * side * len(split.labels) / 2**30
    if gib <= PADDED_GIB_MAX:
        return pad(split.images, padding)
    if kind == "dali":
        return LazyWindows(split.images, padding)
    raise UserError(f"--loader tensor: holds all images in memory, here {gib:,.1f} GiB; take --loader dali")


def _part(test: Split, shard: Shard) -> Split:
    """A rank's test images: consecutive, each on one rank alone, however many there are."""
    count = len(test.labels)
    if count < shard.size:
        raise UserError(f"{count} test images for {shard.size} ranks: start fewer")
    first, end = (count * rank // shard.size for rank in (shard.rank, shard.rank + 1))
    return Split(test.images[first:end], test.labels[first:end])


def show_dataset(dataset: Dataset) -> None:
    """Print what is on disk: a release's files and checksums, counts per class, mean, standard deviation."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{dataset.name} in {dataset.root}", markup=False)
    if dataset.release:
        files = Table("file", "records", "bytes", "checksum")
        for state in cifar.checksum_state(dataset.root, dataset.release):
            checksum = "verified" if state.verified else "not the release"
            files.add_row(state.name, f"{state.records:,}", f"{state.bytes:,}", checksum)
        console.print(files)
    classes = Table("class", "training images", "test images")
    for index, name in enumerate(dataset.classes):
        counts = [int((split.labels == index).sum()) for split in (dataset.train, dataset.test)]
        classes.add_row(escape(name), *(f"{count:,}" for count in counts))
    statistics = Table("channel", "mean", "standard deviation", title="training images, 0 to 1")
    for channel, mean, std in zip(("red", "green", "blue"), dataset.mean, dataset.std, strict=True):
        statistics.add_row(channel, f"{mean:.4f}", f"{std:.4f}")
    console.print(classes)
    console.print(statistics)
