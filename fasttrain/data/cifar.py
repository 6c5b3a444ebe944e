"""CIFAR-10's binary release: fetch it, verify it, read it.

The release (https://www.cs.toronto.edu/~kriz/cifar.html) is a folder `cifar-10-batches-bin` with five
training files and one test file. A file is a row of records of 3073 bytes: a label, then the red, green and
blue planes of a 32x32 image, row-major. The Python release holds the same pixels as pickles, which can run
code when they are opened; this one is inert.

A set is called "CIFAR-10" only if all six files have the release's SHA-256. Any other set in this layout (a
generated stand-in, a re-encoded copy) names itself in a `dataset.json` beside its files, as in
{"name": "CIFAR-10 (JPEG q75)"}.
"""

import hashlib
import http.client
import json
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fasttrain.errors import UserError
from fasttrain.files import write_json

FOLDER = "cifar-10-batches-bin"
TRAIN_FILES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST_FILE = "test_batch.bin"
FILES = (*TRAIN_FILES, TEST_FILE)
CLASSES_FILE = "batches.meta.txt"
NAME_FILE = "dataset.json"
STATISTICS_FILE = "channel_statistics.json"

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
IMAGE_SHAPE = (3, 32, 32)
RECORD_BYTES = 1 + 3 * 32 * 32

MIRRORS = ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",)
ARCHIVE_BYTES = 170_052_171
ARCHIVE_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"  # as the release's page gives it
BATCH_BYTES = 10_000 * RECORD_BYTES
CLASSES_BYTES_MAX = 4096

# The release's page gives no checksum of the files inside the archive. These are the ones that the Ruby
# package torchvision checks on every read; two unrelated projects found the same one for the test file.
RELEASE_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}

Channels = tuple[float, float, float]

# Over the pixels of the 50,000 training images, as the field quotes them (cifar10-airbench among others).
PUBLISHED_MEAN: Channels = (0.4914, 0.4822, 0.4465)
PUBLISHED_STD: Channels = (0.2470, 0.2435, 0.2616)

SILENCE_SECONDS = 10  # to connect, and between two pieces: without a network a run must fail fast
CHUNK_BYTES = 1 << 18


class DownloadError(UserError):
    """No mirror gave the release. Apart from UserError so that a caller may fall back on other data."""


@dataclass(frozen=True)
class Split:
    """images: (N, 3, 32, 32) uint8. labels: (N,) uint8."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Dataset:
    """Both splits, and the training images' mean and std per channel (red, green, blue) in units of 0..1."""

    name: str
    root: Path
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: Channels
    std: Channels


@dataclass(frozen=True)
class FileState:
    """What `fasttrain data` shows of one file. verified: its content is the release's."""

    name: str
    bytes: int
    records: int
    sha256: str
    verified: bool


def locate(data_dir: Path | None) -> Path:
    """The root folder of the data: the argument, else the environment's FASTTRAIN_DATA, else `data`."""
    return data_dir or Path(os.environ.get("FASTTRAIN_DATA") or "data")


def exists(root: Path) -> bool:
    """Whether all six files are there. Says nothing of their content."""
    folder = _folder(root)
    return all((folder / name).is_file() for name in FILES)


def read(root: Path) -> Dataset:
    """Read and validate all six files.

    root: the folder that holds `cifar-10-batches-bin`, or that folder itself. Files may have any number of
    records. Class names come from `batches.meta.txt`, or are the release's if that file is absent or empty.
    Needs one file's worth of memory beyond the result.
    Raises UserError for a missing or truncated file, a label out of range, or a name that the content belies.
    """
    folder = _folder(root)
    records_per_file = {name: _count_records(folder / name) for name in FILES}
    classes = _read_classes(folder)
    digests: dict[str, str] = {}

    def read_split(names: Sequence[str]) -> Split:
        total = sum(records_per_file[name] for name in names)
        images = np.empty((total, *IMAGE_SHAPE), np.uint8)
        labels = np.empty(total, np.uint8)
        start = 0
        for name in names:
            content = _read_bytes(folder / name)
            digests[name] = hashlib.sha256(content.data).hexdigest()
            records = content.reshape(records_per_file[name], RECORD_BYTES)
            here = slice(start, start + len(records))
            labels[here] = records[:, 0]
            images[here] = records[:, 1:].reshape(-1, *IMAGE_SHAPE)
            _check_labels(folder / name, labels[here], len(classes))
            start = here.stop
        return Split(images, labels)

    train = read_split(TRAIN_FILES)
    test = read_split((TEST_FILE,))
    name = _name(folder, digests)
    mean, std = _cached_statistics(folder, [digests[file] for file in TRAIN_FILES], train.images)
    if name == "CIFAR-10":
        _check_statistics(folder, mean, std)
    return Dataset(name, root, classes, train, test, mean, std)


def channel_statistics(images: np.ndarray) -> tuple[Channels, Channels]:
    """Mean and population std of each channel over all pixels, in units of 0..1.

    images: (N, 3, H, W) uint8. Exact up to the last rounding: values are counted, and the sums are integers.
    """
    means, stds = [], []
    for channel in range(3):
        counts = np.zeros(256, np.int64)
        # bincount works on a copy in 64-bit integers: a thousand images at a time keep that copy at 8 MB.
        for start in range(0, len(images), 1000):
            counts += np.bincount(images[start : start + 1000, channel].ravel(), minlength=256)
        pixels = int(counts.sum())
        total = sum(value * int(count) for value, count in enumerate(counts))
        squares = sum(value * value * int(count) for value, count in enumerate(counts))
        means.append(total / pixels / 255)
        stds.append((pixels * squares - total * total) ** 0.5 / pixels / 255)
    return _channels(means), _channels(stds)


def checksum_state(root: Path) -> list[FileState]:
    """Size, records and checksum of each file. Raises UserError for a missing or truncated one."""
    folder = _folder(root)
    states = []
    for name in FILES:
        records = _count_records(folder / name)
        sha256 = hashlib.sha256(_read_bytes(folder / name).data).hexdigest()
        verified = sha256 == RELEASE_SHA256[name]
        states.append(FileState(name, records * RECORD_BYTES, records, sha256, verified))
    return states


def download(root: Path, mirrors: Sequence[str] | None = None) -> None:
    """Fetch the release into root/cifar-10-batches-bin, which appears whole or not at all.

    mirrors: URLs (http, https, file) of cifar-10-binary.tar.gz, tried in order; else the environment's
    FASTTRAIN_MIRRORS, separated by commas; else the release's own. An interrupted download goes on where it
    stopped. Does nothing where the six files exist.
    Raises DownloadError if no mirror gave the release, UserError if the folder cannot be written.
    """
    if exists(root):
        return
    target = root / FOLDER
    if target.exists():
        raise UserError(f"{target}: exists but lacks some of {', '.join(FILES)}; move it away and try again")
    if mirrors is None:
        listed = os.environ.get("FASTTRAIN_MIRRORS", "").split(",")
        mirrors = [url.strip() for url in listed if url.strip()] or MIRRORS

    part = root / "cifar-10-binary.tar.gz.part"
    failures = []
    with _disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        for url in mirrors:
            try:
                _fetch(url, part)
                break
            except _MirrorError as error:
                failures.append(f"{url}: {error}")
        else:
            raise DownloadError(
                f"CIFAR-10 could not be downloaded ({'; '.join(failures)}). "
                f"Place the files of cifar-10-binary.tar.gz in {target} by hand, or use --data synthetic"
            )
        _unpack(part, target)
        part.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where the file is unreadable or holds anything else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes `target` when the block ends, or vanishes if it fails.

    Raises UserError if the disk refuses: full, read-only, or a `target` that has files already.
    """
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as temporary:
            folder = Path(temporary, target.name)
            folder.mkdir()
            yield folder
            # Without this a power cut after the rename could leave the finished name with empty files.
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            folder.rename(target)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        place = error.filename or path
        raise UserError(f"{place}: {reason}; check its permissions and the free space") from error


# Reading


def _folder(root: Path) -> Path:
    inner = root / FOLDER
    is_inner = not inner.is_dir() and any((root / name).is_file() for name in FILES)
    return root if is_inner else inner


def _count_records(path: Path) -> int:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected {', '.join(FILES)} there: "
            "fetch them with `python -m fasttrain data`, or name their folder with --data-dir"
        )
    size = path.stat().st_size
    if size == 0 or size % RECORD_BYTES:
        raise UserError(
            f"{path}: {size} bytes, expected a positive multiple of {RECORD_BYTES} "
            f"({BATCH_BYTES} in the release); it is truncated or of another format: "
            "remove its folder and fetch the data again"
        )
    return size // RECORD_BYTES


def _read_bytes(path: Path) -> np.ndarray:
    with _disk_errors(path):
        return np.fromfile(path, np.uint8)


def _read_classes(folder: Path) -> tuple[str, ...]:
    path = folder / CLASSES_FILE
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    return tuple(line.strip() for line in lines if line.strip()) or CLASSES


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise UserError(
            f"{path}: record {wrong[0]} has label {labels[wrong[0]]}, expected 0 to {classes - 1}; "
            "it is damaged or of another format: remove its folder and fetch the data again"
        )


def _name(folder: Path, digests: Mapping[str, str]) -> str:
    if digests == RELEASE_SHA256:
        return "CIFAR-10"
    path = folder / NAME_FILE
    if not path.is_file():
        return "CIFAR-10 (unverified)"
    name = read_json(path).get("name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f'{path}: expected {{"name": "..."}}, the name of this set')
    if name.replace("-", "").replace(" ", "").upper() == "CIFAR10":
        raise UserError(f'{path}: says "{name}", but the files are not that release: name the set otherwise')
    return name.strip()


def _cached_statistics(folder: Path, digests: list[str], images: np.ndarray) -> tuple[Channels, Channels]:
    """channel_statistics, kept beside the data under its checksums: counting takes longer than hashing."""
    path = folder / STATISTICS_FILE
    cache = read_json(path)
    with suppress(KeyError, TypeError, ValueError):  # damaged: count again
        if cache["sha256"] == digests and cache["check"] == _check(digests, cache["mean"], cache["std"]):
            return _channels(cache["mean"]), _channels(cache["std"])
    mean, std = channel_statistics(images)
    with suppress(UserError):  # a read-only data set is common, and the next run can count again
        write_json(path, {"sha256": digests, "mean": mean, "std": std, "check": _check(digests, mean, std)})
    return mean, std


def _check(*values: Iterable[object]) -> str:
    """A checksum over what the cache says: a changed digit would normalise every image wrongly, unseen."""
    return hashlib.sha256(repr([list(entries) for entries in values]).encode()).hexdigest()


def _channels(values: Iterable[float]) -> Channels:
    """Three figures within 0..1. Raises TypeError or ValueError for anything else."""
    red, green, blue = values
    if not all(0 <= value <= 1 for value in (red, green, blue)):
        raise ValueError(f"expected three figures within 0..1, got {(red, green, blue)}")
    return red, green, blue


def _check_statistics(folder: Path, mean: Channels, std: Channels) -> None:
    found = tuple(round(value, 4) for value in mean + std)
    published = PUBLISHED_MEAN + PUBLISHED_STD
    if found != published:
        raise UserError(
            f"{folder}: mean and std per channel are {found}, the release's are {published}; "
            f"remove {folder / STATISTICS_FILE} and try again"
        )


# Downloading


class _MirrorError(Exception):
    """Why one mirror failed; never a fault of the local disk."""


def _fetch(url: str, part: Path) -> None:
    """Complete `part` from one mirror and verify it.

    Raises _MirrorError. A `part` with wrong content is then gone; one that is too short stays, to go on from.
    """
    while True:
        begun = part.exists()
        _transfer(url, part)
        if part.stat().st_size == ARCHIVE_BYTES and _md5(part) == ARCHIVE_MD5:
            return
        part.unlink()
        # The first bytes may have come from another mirror: this one answers only for a file all of its own.
        if not begun:
            raise _MirrorError("its content is not the release's (md5 or size differs)")


def _md5(path: Path) -> str:
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            md5.update(chunk)
    return md5.hexdigest()


def _transfer(url: str, part: Path) -> None:
    """Append to `part` until it has the archive's size, over as many connections as bring anything new."""
    with _progress() as show:
        size = part.stat().st_size if part.exists() else 0
        while size < ARCHIVE_BYTES:
            before = size
            reason = _transfer_once(url, part, size, show)
            size = part.stat().st_size
            if size <= before:
                raise _MirrorError(reason or f"it ends after {size} of {ARCHIVE_BYTES} bytes")


def _transfer_once(url: str, part: Path, offset: int, show: Callable[[int], None]) -> str:
    """One connection. Returns why it broke off midway, or nothing. Raises _MirrorError if it never began."""
    reason = ""
    with _open(url, offset) as response:
        # Only a 206 goes on where we stopped: a server without ranges, or a file, begins at the beginning.
        resumed = getattr(response, "status", None) == 206
        with part.open("ab" if resumed else "wb") as output:
            while output.tell() <= ARCHIVE_BYTES:
                try:
                    chunk = response.read(CHUNK_BYTES)
                except (OSError, http.client.HTTPException) as error:
                    reason = _reason(error)
                    break
                if not chunk:
                    break
                output.write(chunk)
                show(output.tell())
    return reason


def _open(url: str, offset: int) -> Any:
    if not url.startswith(("http://", "https://", "file://")):
        raise _MirrorError("not a http, https or file URL")
    headers = {"User-Agent": "fasttrain"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=SILENCE_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and offset:  # its file is shorter than our part: one of them is wrong
            return _open(url, 0)
        raise _MirrorError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _MirrorError(_reason(error)) from error


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(cause) or type(cause).__name__


@contextmanager
def _progress() -> Iterator[Callable[[int], None]]:
    """Yield a function that shows how many bytes are there; it shows nothing unless stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("CIFAR-10"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("download", total=ARCHIVE_BYTES)
        yield lambda size: progress.update(task, completed=size)


def _unpack(archive: Path, target: Path) -> None:
    """Copy the release's files out of the archive, by name; nothing else in it is looked at.

    Never extractall: a downloaded tar's names, links and modes are not to be trusted with the file system.
    """
    with new_folder(target) as folder, tarfile.open(archive, "r:gz") as tar:
        missing = {*FILES, CLASSES_FILE}
        for member in tar:
            path = PurePosixPath(member.name)
            name = path.name
            if path != PurePosixPath(FOLDER, name) or name not in missing:
                continue
            size = member.size
            right_size = size <= CLASSES_BYTES_MAX if name == CLASSES_FILE else size == BATCH_BYTES
            content = tar.extractfile(member) if member.isreg() and right_size else None
            if content is None:
                raise DownloadError(
                    f"{archive}: {member.name} has {size} bytes or is no plain file; remove the archive"
                )
            with (folder / name).open("wb") as output:
                shutil.copyfileobj(content, output)
            missing.remove(name)
        if missing:
            raise DownloadError(f"{archive}: it lacks {', '.join(sorted(missing))}; remove the archive")
