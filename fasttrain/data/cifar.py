"""The binary releases of CIFAR-10 and CIFAR-100: fetch one, verify it, read it.

A release (https://www.cs.toronto.edu/~kriz/cifar.html) is a folder, for CIFAR-10 `cifar-10-batches-bin` with
five training files and one test file. A file is a row of records: a label (for CIFAR-100 two, coarse and
fine, of which the fine one counts), then the red, green and blue planes of a 32x32 image, row-major. The
Python releases hold the same pixels as pickles, which can run code when they are opened; these are inert.

A set is called "CIFAR-10" only if all its files have the release's SHA-256. Any other set in this layout (a
generated stand-in, a re-encoded copy) names itself in a `dataset.json` beside its files, as in
{"name": "CIFAR-10 (JPEG q75)"}.
"""

import hashlib
import http.client
import json
import math
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
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fasttrain.errors import UserError
from fasttrain.files import write_json

NAME_FILE = "dataset.json"
STATISTICS_FILE = "channel_statistics.json"

IMAGE_SHAPE = (3, 32, 32)
CLASSES_BYTES_MAX = 4096

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class Release:
    """One published set: where it comes from, and what its files hold.

    sha256: of every file with records; the last is the test file, the others have equally many images each.
    label_bytes: before a record's pixels; the last of them is the label.
    classes: their names, should `classes_file` be lacking; empty where that file is needed.
    mean, std: over the pixels of the training images, as the field quotes them; None where nobody agrees.
    """

    name: str
    folder: str
    sha256: Mapping[str, str]
    label_bytes: int
    classes_file: str
    classes: tuple[str, ...]
    url: str
    archive_bytes: int
    archive_md5: str
    train_images: int = 50_000
    test_images: int = 10_000
    mean: Channels | None = None
    std: Channels | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.sha256)

    @property
    def train_files(self) -> tuple[str, ...]:
        return self.files[:-1]

    @property
    def test_file(self) -> str:
        return self.files[-1]

    @property
    def record_bytes(self) -> int:
        return self.label_bytes + math.prod(IMAGE_SHAPE)

    @property
    def archive(self) -> str:
        return self.url.rsplit("/", 1)[1]

    def file_bytes(self, name: str) -> int:
        is_test = name == self.test_file
        count = self.test_images if is_test else self.train_images // len(self.train_files)
        return count * self.record_bytes


# The releases' page gives the archives' md5, and no checksum of the files inside. Those are the ones that the
# Ruby package torchvision checks on every read; two unrelated projects found the same one for CIFAR-10's test
# file.
CIFAR10 = Release(
    name="CIFAR-10",
    folder="cifar-10-batches-bin",
    sha256={
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    },
    label_bytes=1,
    classes_file="batches.meta.txt",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    archive_bytes=170_052_171,
    archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
    mean=(0.4914, 0.4822, 0.4465),  # as cifar10-airbench among others
    std=(0.2470, 0.2435, 0.2616),
)
CIFAR100 = Release(
    name="CIFAR-100",
    folder="cifar-100-binary",
    sha256={
        "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
        "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
    },
    label_bytes=2,  # one of 20 coarse classes, then one of 100 fine ones
    classes_file="fine_label_names.txt",
    classes=(),
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    archive_bytes=168_513_733,
    archive_md5="03b5dce01913d631647c71ecec9e9cb8",
)
RELEASES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
"""By the names that `--data` knows."""

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
    """Both splits, and the training images' mean and std per channel (red, green, blue) in units of 0..1.

    release: the one whose files these are or imitate; None for images from elsewhere.
    """

    name: str
    root: Path
    classes: tuple[str, ...]
    train: Split
    test: Split
    mean: Channels
    std: Channels
    release: Release | None = None

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of the classes and of all images and labels: 0.2 s for CIFAR-10, once."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(np.ascontiguousarray(split.images).data)
            digest.update(np.ascontiguousarray(split.labels).data)
        return digest.hexdigest()


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


def exists(root: Path, release: Release | None = None) -> bool:
    """Whether all files of the release, else CIFAR-10, are there. Says nothing of their content."""
    release = release or CIFAR10
    folder = _folder(root, release)
    return all((folder / name).is_file() for name in release.files)


def read(root: Path, release: Release | None = None) -> Dataset:
    """Read and validate all files of the release, else CIFAR-10.

    root: the folder that holds the release's, or that folder itself. Files may have any number of records.
    Class names come from its file of them, or are the release's if that file is absent or empty.
    Needs one file's worth of memory beyond the result.
    Raises UserError for a missing or truncated file, a label out of range, or a name that the content belies.
    """
    release = release or CIFAR10
    folder = _folder(root, release)
    records_per_file = {name: _count_records(folder / name, release) for name in release.files}
    classes = _read_classes(folder, release)
    digests: dict[str, str] = {}

    def read_split(names: Sequence[str]) -> Split:
        total = sum(records_per_file[name] for name in names)
        images = np.empty((total, *IMAGE_SHAPE), np.uint8)
        labels = np.empty(total, np.uint8)
        start = 0
        for name in names:
            content = _read_bytes(folder / name)
            digests[name] = hashlib.sha256(content.data).hexdigest()
            records = content.reshape(records_per_file[name], release.record_bytes)
            here = slice(start, start + len(records))
            labels[here] = records[:, release.label_bytes - 1]
            images[here] = records[:, release.label_bytes :].reshape(-1, *IMAGE_SHAPE)
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


def checksum_state(root: Path, release: Release | None = None) -> list[FileState]:
    """Size, records and checksum of each file of the release, else CIFAR-10.

    Raises UserError for a missing or truncated one.
    """
    release = release or CIFAR10
    folder = _folder(root, release)
    states = []
    for name in release.files:
        records = _count_records(folder / name, release)
        sha256 = hashlib.sha256(_read_bytes(folder / name).data).hexdigest()
        verified = sha256 == release.sha256[name]
        states.append(FileState(name, records * release.record_bytes, records, sha256, verified))
    return states


def download(root: Path, mirrors: Sequence[str] | None = None, release: Release | None = None) -> None:
    """Fetch the release, else CIFAR-10, into its folder in `root`, which appears whole or not at all.

    mirrors: URLs (http, https, file) of the archive, tried in order; else those of the environment's
    FASTTRAIN_MIRRORS, separated by commas; else the release's own. An interrupted download goes on where it
    stopped. Does nothing where the files exist.
    Raises DownloadError if no mirror gave the release, UserError if the folder cannot be written.
    """
    release = release or CIFAR10
    if exists(root, release):
        return
    target = root / release.folder
    if target.exists():
        raise UserError(
            f"{target}: exists but lacks some of {', '.join(release.files)}; move it away and try again"
        )
    if mirrors is None:
        listed = os.environ.get("FASTTRAIN_MIRRORS", "").split(",")
        mirrors = [url.strip() for url in listed if url.strip()] or [release.url]

    part = root / f"{release.archive}.part"
    failures = []
    with _disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        for url in mirrors:
            try:
                _fetch(url, part, release)
                break
            except _MirrorError as error:
                failures.append(f"{url}: {error}")
        else:
            raise DownloadError(
                f"{release.name} could not be downloaded ({'; '.join(failures)}). "
                f"Place the files of {release.archive} in {target} by hand, or use --data synthetic"
            )
        _unpack(part, target, release)
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


def _folder(root: Path, release: Release) -> Path:
    inner = root / release.folder
    is_inner = not inner.is_dir() and any((root / name).is_file() for name in release.files)
    return root if is_inner else inner


def _count_records(path: Path, release: Release) -> int:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; expected {', '.join(release.files)} there: "
            "fetch them with `python -m fasttrain data`, or name their folder with --data-dir"
        )
    size = path.stat().st_size
    if size == 0 or size % release.record_bytes:
        raise UserError(
            f"{path}: {size} bytes, expected a positive multiple of {release.record_bytes} "
            f"({release.file_bytes(path.name)} in the release); it is truncated or of another format: "
            "remove its folder and fetch the data again"
        )
    return size // release.record_bytes


def _read_bytes(path: Path) -> np.ndarray:
    with _disk_errors(path):
        return np.fromfile(path, np.uint8)


def _read_classes(folder: Path, release: Release) -> tuple[str, ...]:
    path = folder / release.classes_file
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    classes = tuple(line.strip() for line in lines if line.strip()) or release.classes
    if not classes:
        raise UserError(f"{path}: no names of classes; expected one a line: fetch the data again")
    return classes


def _check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise UserError(
            f"{path}: record {wrong[0]} has label {labels[wrong[0]]}, expected 0 to {classes - 1}; "
            "it is damaged or of another format: remove its folder and fetch the data again"
        )


def _name(folder: Path, digests: Mapping[str, str], release: Release) -> str:
    if digests == release.sha256:
        return release.name
    path = folder / NAME_FILE
    if not path.is_file():
        return f"{release.name} (unverified)"
    name = read_json(path).get("name")
    if not isinstance(name, str) or not name.strip():
        raise UserError(f'{path}: expected {{"name": "..."}}, the name of this set')
    if name.replace("-", "").replace(" ", "").lower() in RELEASES:
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


# Downloading


class _MirrorError(Exception):
    """Why one mirror failed; never a fault of the local disk."""


def _fetch(url: str, part: Path, release: Release) -> None:
    """Complete `part` from one mirror and verify it.

    Raises _MirrorError. A `part` with wrong content is then gone; one that is too short stays, to go on from.
    """
    while True:
        begun = part.exists()
        _transfer(url, part, release)
        if part.stat().st_size == release.archive_bytes and _md5(part) == release.archive_md5:
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


def _transfer(url: str, part: Path, release: Release) -> None:
    """Append to `part` until it has the archive's size, over as many connections as bring anything new."""
    with _progress(release) as show:
        size = part.stat().st_size if part.exists() else 0
        while size < release.archive_bytes:
            before = size
            reason = _transfer_once(url, part, size, release.archive_bytes, show)
            size = part.stat().st_size
            if size <= before:
                raise _MirrorError(reason or f"it ends after {size} of {release.archive_bytes} bytes")


def _transfer_once(url: str, part: Path, offset: int, limit: int, show: Callable[[int], None]) -> str:
    """One connection. Returns why it broke off midway, or nothing. Raises _MirrorError if it never began."""
    reason = ""
    with _open(url, offset) as response:
        # Only a 206 goes on where we stopped: a server without ranges, or a file, begins at the beginning.
        resumed = getattr(response, "status", None) == 206
        with part.open("ab" if resumed else "wb") as output:
            while output.tell() <= limit:
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
def _progress(release: Release) -> Iterator[Callable[[int], None]]:
    """Yield a function that shows how many bytes are there; it shows nothing unless stderr is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(release.name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("download", total=release.archive_bytes)
        yield lambda size: progress.update(task, completed=size)


def _unpack(archive: Path, target: Path, release: Release) -> None:
    """Copy the release's files out of the archive, by name; nothing else in it is looked at.

    Never extractall: a downloaded tar's names, links and modes are not to be trusted with the file system.
    """
    with new_folder(target) as folder, tarfile.open(archive, "r:gz") as tar:
        missing = {*release.files, release.classes_file}
        for member in tar:
            path = PurePosixPath(member.name)
            name = path.name
            if path != PurePosixPath(release.folder, name) or name not in missing:
                continue
            size = member.size
            is_names = name == release.classes_file
            right_size = size <= CLASSES_BYTES_MAX if is_names else size == release.file_bytes(name)
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
