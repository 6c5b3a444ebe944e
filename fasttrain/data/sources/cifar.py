"""The binary releases of CIFAR-10 and CIFAR-100: verify one and read it.

A release (https://www.cs.toronto.edu/~kriz/cifar.html) is a folder; CIFAR-10's is `cifar-10-batches-bin`,
with five training files and one test file. A file is a sequence of images of fixed length: a label (for
CIFAR-100 two, coarse and fine, of which the fine one is used), then the red, green and blue planes of a 32x32
image, row-major. The release's other forms hold the same pixels: archives.py makes these files of them.

A data set is called "CIFAR-10" only if all its files have the release's SHA-256. Any other data set in this
layout (a generated stand-in, a re-encoded copy) gives its own name in a `dataset.json` next to its files,
such as {"name": "CIFAR-10 (JPEG q75)"}.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.data.dataset import Dataset, Split, as_channels, channel_statistics
from fasttrain.data.sources.releases import CIFAR10, IMAGE_SHAPE, PLANES_SHAPE, RELEASES, Channels, Release
from fasttrain.errors import UserError
from fasttrain.system.files import disk_errors, write_json

NAME_FILE = "dataset.json"
STATISTICS_FILE = "channel_statistics.json"


@dataclass(frozen=True)
class FileState:
    """The facts that `fasttrain data` shows about one file.

    records: images in the file. verified: whether its SHA-256 is the release's.
    """

    name: str
    bytes: int
    records: int
    sha256: str
    verified: bool


def locate(data_dir: Path | str | None) -> Path:
    """Return the data folder: the argument, else the environment's FASTTRAIN_DATA, else `data`."""
    return Path(data_dir) if data_dir else Path(os.environ.get("FASTTRAIN_DATA") or "data")


def exists(root: Path, release: Release | None = None) -> bool:
    """Return whether all files of a release (by default CIFAR-10) exist; their content is not checked."""
    release = release or CIFAR10
    folder = _folder(root, release)
    return all((folder / name).is_file() for name in release.files)


def read(root: Path, release: Release | None = None) -> Dataset:
    """Read and validate all files of a release (by default CIFAR-10).

    root: the release's folder, or the folder that holds it. Files may hold any number of images.
    Class names come from the release's file of names; if that is missing or empty, from `release`.
    Needs the memory of one file on top of the result.
    Raises UserError for a missing or truncated file, a label out of range, or a set that claims to be a
    release and is not.
    """
    release = release or CIFAR10
    folder = _folder(root, release)
    images_per_file = {name: _count_records(folder / name, release) for name in release.files}
    classes = _read_classes(folder, release)
    digests: dict[str, str] = {}

    def read_split(names: Sequence[str]) -> Split:
        total = sum(images_per_file[name] for name in names)
        images = np.empty((total, *IMAGE_SHAPE), np.uint8)
        labels = np.empty(total, np.uint8)
        start = 0
        for name in names:
            content = _read_bytes(folder / name)
            digests[name] = hashlib.sha256(content.data).hexdigest()
            rows = content.reshape(images_per_file[name], release.record_bytes)
            here = slice(start, start + len(rows))
            labels[here] = rows[:, release.label_bytes - 1]
            planes = rows[:, release.label_bytes :].reshape(-1, *PLANES_SHAPE)
            images[here] = planes.transpose(0, 2, 3, 1)
            _check_labels(folder / name, labels[here], len(classes))
            start = here.stop
        return Split(images, labels)

    train = read_split(release.train_files)
    test = read_split((release.test_file,))
    name = _name(folder, digests, release)
    mean, std = _cached_statistics(folder, [digests[file] for file in release.train_files], train.images)
    if name == release.name:
        _check_statistics(folder, mean, std, release)
    return Dataset(name, root, classes, train, test, mean, std, release)


def checksum_state(root: Path, release: Release | None = None) -> list[FileState]:
    """Return size, number of images and checksum of each file of a release (by default CIFAR-10).

    Raises UserError for a missing or truncated file.
    """
    release = release or CIFAR10
    folder = _folder(root, release)
    states = []
    for name in release.files:
        images = _count_records(folder / name, release)
        sha256 = hashlib.sha256(_read_bytes(folder / name).data).hexdigest()
        verified = sha256 == release.sha256[name]
        states.append(FileState(name, images * release.record_bytes, images, sha256, verified))
    return states


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file is unreadable or holds anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


# Reading
def _folder(root: Path, release: Release) -> Path:
    inner = root / release.folder
    is_inner = not inner.is_dir() and any((root / name).is_file() for name in release.files)
    return root if is_inner else inner


def _count_records(path: Path, release: Release) -> int:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected {', '.join(release.files)} there: "
            "download them with `python -m fasttrain data`, or name their folder with --data-dir"
        )
    size = path.stat().st_size
    if size == 0 or size % release.record_bytes:
        raise UserError(
            f"{path}: {size} bytes, expected a positive multiple of {release.record_bytes} "
            f"({release.file_bytes(path.name)} in the release); it is truncated or in another format: "
            "remove its folder and download the data again"
        )
    return size // release.record_bytes


def _read_bytes(path: Path) -> np.ndarray:
    with disk_errors(path):
        return np.fromfile(path, np.uint8)


def _read_classes(folder: Path, release: Release) -> tuple[str, ...]:
    path = folder / release.classes_file
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    return tuple(line.strip() for line in lines if line.strip()) or release.classes


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise UserError(
            f"{path}: image {wrong[0]} has label {labels[wrong[0]]}, expected 0 to {classes - 1}; "
            "the file is corrupt or in another format: remove its folder and download the data again"
        )


def _name(folder: Path, digests: Mapping[str, str], release: Release) -> str:
    if digests == release.sha256:
        return release.name
    path = folder / NAME_FILE
    if not path.is_file():
        return f"{release.name} (unverified)"
    name = read_json(path).get("name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f'{path}: expected {{"name": "..."}}, the name of this data set')
    if name.replace("-", "").replace(" ", "").lower() in RELEASES:
        raise UserError(f'{path}: says "{name}", but the files are not that release: choose another name')
    return name.strip()


def _cached_statistics(folder: Path, digests: list[str], images: np.ndarray) -> tuple[Channels, Channels]:
    """Return channel_statistics, cached next to the data with its checksums: hashing is faster."""
    path = folder / STATISTICS_FILE
    cache = read_json(path)
    with suppress(KeyError, TypeError, ValueError):  # corrupt: count again
        if cache["sha256"] == digests and cache["check"] == _check(digests, cache["mean"], cache["std"]):
            return as_channels(cache["mean"]), as_channels(cache["std"])
    mean, std = channel_statistics(images)
    with suppress(UserError):  # the folder is often read-only, and the next run can count again
        write_json(path, {"sha256": digests, "mean": mean, "std": std, "check": _check(digests, mean, std)})
    return mean, std


def _check(*values: Iterable[object]) -> str:
    """Return a checksum of the cache's content: one changed digit would silently normalise images wrongly."""
    return hashlib.sha256(repr([list(entries) for entries in values]).encode()).hexdigest()


def _check_statistics(folder: Path, mean: Channels, std: Channels, release: Release) -> None:
    if release.mean is None or release.std is None:
        return
    found = tuple(round(value, 4) for value in mean + std)
    published = release.mean + release.std
    if found != published:
        raise UserError(
            f"{folder}: mean and std per channel are {found}, the release's are {published}; "
            f"remove {folder / STATISTICS_FILE} and try again"
        )
