"""A folder of a user's own images, a folder per class, as the data set that every loader takes.

    PATH/train/<class>/*, PATH/test/<class>/*    (or PATH/val in place of PATH/test)
    PATH/<class>/*                               split here: of every class, one in five are test images

Every image is decoded once, up front, by several threads, and kept as 32x32 pixels, the size that the network
is made for. So whatever cannot be decoded is named before the training begins, and loaders, augmentation,
reports and resumed runs work as on CIFAR-10. The pixels are cached, so that the next run starts at once.

Pillow decodes: it takes all four formats, says of each file what is wrong with it, and shrinks a large JPEG
while decoding it. DALI stops at the first bad file without naming it, and decodes at full size.
"""

import hashlib
import os
import stat
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL

from fasttrain.data.cifar import IMAGE_SHAPE, Dataset, Split, channel_statistics
from fasttrain.data.image import decode
from fasttrain.errors import UserError
from fasttrain.files import write_atomically
from fasttrain.machine import cpu_cores

CLASSES_MAX = 256
"""Labels are bytes."""
TEST_ONE_IN = 5
CHUNK = 64
"""Images that a thread decodes at a time."""
CACHE_BYTES_MAX = 1 << 30
DECODER = f"1, Pillow {PIL.__version__}"
"""Part of a cache's key; raise the number when data/image.py makes other pixels."""
NAMED = 3
"""How many bad files a message names."""

TRAIN, TEST = "train", ("test", "val")


@dataclass(frozen=True)
class _File:
    """One file of a class. fault: why it cannot be an image, or nothing."""

    path: Path
    label: int
    in_test: bool
    size: int
    mtime_ns: int
    fault: str = ""

    @property
    def order(self) -> bytes:
        """Orders files at random, yet on every machine alike: a hash of `<class>/<name>`."""
        return hashlib.sha256(os.fsencode(f"{self.path.parent.name}/{self.path.name}")).digest()


def read(
    root: Path, cache_dir: Path, *, skip_bad: bool = False, announce: Callable[[str], object] = print
) -> Dataset:
    """Decode the folder, or take its pixels from the cache.

    How an image becomes 32x32 pixels: data/image.py. Without folders `train` and `test` (or `val`) the
    test images are, of every class, the fifth whose `<class>/<name>` have the lowest SHA-256, at least one.
    Both splits are in the order of those hashes. Names that begin with a dot are left alone.
    cache_dir: where <hash of the path>.npz is kept: pixels of up to 1 GiB, of a folder without bad files. It
    counts as long as names, sizes and times of modification are the same.
    skip_bad: leave out files that cannot be decoded, and announce how many; else they are refused by name.
    Raises UserError for bad files, a class without images, or a folder of another layout.
    """
    place = f"--data folder:{root}"
    root = Path(os.path.abspath(root))
    name = f"folder:{root.name}"
    try:
        classes, files, own_test = _list(root, place)
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror})") from error

    cache = cache_dir / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.npz"
    key = _key(files)
    images = _read_cache(cache, key, len(files))
    if images is None:
        images, bad = _decode(files, name)
        if bad:
            _refuse_or_announce(bad, files, root, place, skip_bad=skip_bad, announce=announce)
            images = np.delete(images, list(bad), axis=0)
            files = [file for index, file in enumerate(files) if index not in bad]
        else:
            _write_cache(cache, key, images)

    train, test = _split(files, classes, place, own_test=own_test)
    labels = np.array([file.label for file in files], np.uint8)
    mean, std = channel_statistics(images[train])
    if not all(std):
        raise UserError(f"{place}: a colour channel is the same in every pixel of the training images")
    return Dataset(
        name, root, classes, Split(images[train], labels[train]), Split(images[test], labels[test]), mean, std
    )


# Listing


def _list(root: Path, place: str) -> tuple[tuple[str, ...], list[_File], bool]:
    """The classes, all that lies in their folders, and whether test images have a folder of their own.

    Raises OSError where a folder cannot be read.
    """
    expected = "expected folder:PATH with PATH/<class>/*, or PATH/train/<class>/* and PATH/test/<class>/*"
    if not root.is_dir():
        raise UserError(f"{place}: no such folder; {expected}")
    real = root.resolve()
    parts = [(root, False)]
    # A folder of that name may be a class as well, if it holds images rather than classes.
    if TRAIN in _folders(root, real) and _folders(root / TRAIN, real):
        tests = [name for name in TEST if (root / name).is_dir()]
        if not tests:
            raise UserError(f"{place}: has train, but neither test nor val beside it; {expected}")
        parts = [(root / TRAIN, False), (root / tests[0], True)]

    classes = tuple(_folders(parts[0][0], real))
    if len(classes) < 2 or len(classes) > CLASSES_MAX:
        found = f"{len(classes)} folders of classes in {parts[0][0]}"
        raise UserError(f"{place}: {found}; {expected}, with 2 to {CLASSES_MAX} classes")
    files = []
    for folder, in_test in parts:
        present = _folders(folder, real)
        unknown = [name for name in present if name not in classes]
        if unknown:
            raise UserError(f"{folder / unknown[0]}: a class without training images; remove or move it")
        for name in present:
            label = classes.index(name)
            files += [_examine(entry, label, in_test, real) for entry in _entries(folder / name)]
    return classes, files, len(parts) > 1


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What lies in a folder, by name, without what systems hide there."""
    with os.scandir(folder) as entries:
        yield from sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)


def _folders(folder: Path, real: Path) -> list[str]:
    names = [entry.name for entry in _entries(folder) if entry.is_dir()]
    for name in names:
        if not (folder / name).resolve().is_relative_to(real):
            raise UserError(
                f"{folder / name}: a link that leads out of {real}; put the images themselves there"
            )
        if not name.isprintable():  # undecodable bytes too: the name goes into results and pages
            raise UserError(f"{folder / name!r}: expected a printable name in UTF-8; rename the folder")
    return names


def _examine(entry: os.DirEntry[str], label: int, in_test: bool, real: Path) -> _File:
    path = Path(entry.path)
    try:
        status = entry.stat()
    except OSError as error:  # a link that leads nowhere, or in a circle
        return _File(path, label, in_test, 0, 0, error.strerror or str(error))
    fault = ""
    if entry.is_symlink() and not path.resolve().is_relative_to(real):
        fault = "a link that leads out of the folder"
    elif stat.S_ISDIR(status.st_mode):
        fault = "a folder inside a class"
    elif not stat.S_ISREG(status.st_mode):
        fault = "no plain file"
    elif status.st_size == 0:
        fault = "empty"
    return _File(path, label, in_test, status.st_size, status.st_mtime_ns, fault)


def _refuse_or_announce(
    bad: dict[int, str],
    files: Sequence[_File],
    root: Path,
    place: str,
    *,
    skip_bad: bool,
    announce: Callable[[str], object],
) -> None:
    first = [f"{files[index].path.relative_to(root)} ({bad[index]})" for index in sorted(bad)[:NAMED]]
    more = ", ..." if len(bad) > NAMED else ""
    names = ", ".join(first).encode(errors="backslashreplace").decode() + more
    count = f"{len(bad):,} of {len(files):,} files"
    if not skip_bad:
        raise UserError(f"{place}: {count} cannot be used: {names}; mend or remove them, or add --skip-bad")
    announce(f"{place}: left out {count}: {names}")


def _split(
    files: Sequence[_File], classes: Sequence[str], place: str, *, own_test: bool
) -> tuple[list[int], list[int]]:
    """Indices of the training and of the test images. Raises UserError for a class without any."""
    in_order = sorted(range(len(files)), key=lambda index: files[index].order)
    test = {index for index in in_order if files[index].in_test}
    of_class: dict[int, list[int]] = {label: [] for label in range(len(classes))}
    for index in in_order:
        if index not in test:
            of_class[files[index].label].append(index)
    for label, mine in of_class.items():
        count = 0 if own_test else max(1, len(mine) // TEST_ONE_IN)
        if len(mine) <= count:
            least = "one to train on" if own_test else "two, one of them for the test"
            found = f"the class {classes[label]} has {len(mine)} usable images"
            raise UserError(f"{place}: {found}; expected at least {least}")
        test.update(mine[:count])
    if not test:
        raise UserError(f"{place}: no usable test images")
    return [index for index in in_order if index not in test], [index for index in in_order if index in test]


# Decoding


def _decode(files: Sequence[_File], name: str) -> tuple[np.ndarray, dict[int, str]]:
    """(N, 3, 32, 32) uint8, and what is wrong with the files that could not be decoded, by index."""
    from rich.console import Console
    from rich.progress import Progress

    images = np.zeros((len(files), *IMAGE_SHAPE), np.uint8)

    def decode_some(start: int) -> list[tuple[int, str]]:
        found = []
        for index, file in enumerate(files[start : start + CHUNK], start):
            if file.fault:
                found.append((index, file.fault))
                continue
            try:
                images[index] = decode(file.path).transpose(2, 0, 1)
            except ValueError as error:
                found.append((index, str(error)))
        return found

    bad: dict[int, str] = {}
    executor = ThreadPoolExecutor(cpu_cores())  # Pillow's decoders let go of the interpreter lock
    with (
        warnings.catch_warnings(),
        Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
    ):
        warnings.simplefilter("ignore")  # Pillow's, of odd metadata
        task = progress.add_task(name, total=len(files))
        try:
            for found in executor.map(decode_some, range(0, len(files), CHUNK)):
                bad.update(found)
                progress.advance(task, CHUNK)
        finally:
            executor.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the rest
    return images, bad


# The cache


def _key(files: Sequence[_File]) -> str:
    digest = hashlib.sha256(DECODER.encode())
    for file in files:
        digest.update(repr((file.path.parts[-3:], file.size, file.mtime_ns)).encode())
    return digest.hexdigest()


def _read_cache(path: Path, key: str, count: int) -> np.ndarray | None:
    """The pixels, if this file holds those of just these images; its checksum is verified on the way."""
    damaged = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)
    with suppress(*damaged), np.load(path, allow_pickle=False) as content:
        if str(content["key"]) == key:
            images = content["images"]
            if images.dtype == np.uint8 and images.shape == (count, *IMAGE_SHAPE):
                return images
    return None


def _write_cache(path: Path, key: str, images: np.ndarray) -> None:
    if images.nbytes <= CACHE_BYTES_MAX:
        with suppress(UserError, OSError):  # a full or read-only disk: the next run decodes again
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: np.savez(file, key=key, images=images))
