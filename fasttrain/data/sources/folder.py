"""A folder of a user's own images, with one folder per class, as a Dataset.

PATH/train/<class>/*, PATH/test/<class>/*    (see TRAIN_NAMES and TEST_NAMES)
PATH/<class>/*                               split by own_images.py: one image in five is a test image
"""

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

from fasttrain.data.dataset import Dataset
from fasttrain.data.sources.image import SUFFIXES, UNREAD_SUFFIXES, is_image
from fasttrain.data.sources.own_images import CLASSES_MAX, TEST_NAMES, Sample, Source, read_decoded
from fasttrain.errors import UserError

TRAIN_NAMES = ("train", "training")

SYSTEM_FOLDERS = ("__MACOSX",)

KINDS_NAMED = 5
"""How many kinds of files that are left out a message names."""

EXPECTED = "expected folder:PATH with PATH/<class>/*, or PATH/train/<class>/* and PATH/test/<class>/*"
Log = Callable[[str], object]


def read(
    root: Path,
    cache_dir: Path,
    *,
    resolution: int,
    skip_bad: bool = False,
    classes: Sequence[str] | None = None,
    log: Log = print,
) -> Dataset:
    """Decode the folder's images, or take their pixels from the cache; see own_images.read_decoded.

    The split depends on `<class>/<name>`. Files that are no images by their names, or without an ending by
    their content, are left out, and so is everything hidden; one line logs how many.
    cache_dir: where the pixels are kept, one file per folder and resolution.
    classes: those of a trained network, in the order of its labels, for images that it is to be measured on:
    the folder may lack some of them, and PATH/train altogether. By default the training split's folders.
    Raises UserError for bad files, a class without images, or a folder with another layout.
    """
    place = f"--data folder:{root}"
    root = Path(os.path.abspath(root))
    try:
        source = _list(root, place, classes, log)
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror})") from error
    cache = cache_dir / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}-{resolution}.pixels"
    return read_decoded(source, cache, resolution=resolution, skip_bad=skip_bad, log=log)


def looks_like_classes(root: Path) -> bool:
    """Return whether a folder, or its training split, holds two folders with images by the files' names.

    Folders that cannot be read do not count.
    """

    def entries(folder: Path) -> Sequence[Path]:
        try:
            return list(folder.iterdir())
        except OSError:
            return []

    def holds_images(folder: Path) -> bool:
        return any(path.suffix.lower() in SUFFIXES for path in entries(folder))

    splits = [folder for folder in entries(root) if folder.name.lower() in TRAIN_NAMES]
    return any(sum(map(holds_images, entries(folder))) >= 2 for folder in (root, *splits))


def _list(root: Path, place: str, known: Sequence[str] | None, log: Log) -> Source:
    """Return the classes and every image in their folders. Raises OSError if a folder cannot be read."""
    if not root.is_dir():
        raise UserError(f"{place}: no such folder; {EXPECTED}")
    real = root.resolve()
    parts = _splits(root, real, place, needs_train=known is None, log=log)
    classes = tuple(_folders(parts[0][0], real) if known is None else known)
    if len(classes) < 2 or len(classes) > CLASSES_MAX:
        found = f"{len(classes)} class folders in {parts[0][0]}"
        raise UserError(f"{place}: {found}; {EXPECTED}, with 2 to {CLASSES_MAX} classes")
    samples: list[Sample] = []
    bad: list[tuple[str, str]] = []
    left_out: Counter[str] = Counter()
    for folder, in_test in parts:
        left_out.update(_kind(entry) for entry in _entries(folder) if not entry.is_dir())
        present = _folders(folder, real)
        unknown = [name for name in present if name not in classes]
        if unknown:
            lacks = "without training images" if known is None else "that the network was not trained on"
            raise UserError(f"{folder / unknown[0]}: a class {lacks}; remove or move it")
        for name in present:
            label, inside = classes.index(name), str((folder / name).relative_to(root))
            for entry in _entries(folder / name):
                if not _may_be_image(entry):
                    left_out[_kind(entry)] += 1
                    continue
                sample_name = os.path.join(inside, entry.name)
                status = _examine(entry, real)
                if isinstance(status, str):
                    bad.append((sample_name, status))
                    continue
                sample = Sample(
                    name=sample_name,
                    key=f"{name}/{entry.name}",
                    label=label,
                    in_test=in_test,
                    path=entry.path,
                    offset=0,
                    size=status.st_size,
                    mtime_ns=status.st_mtime_ns,
                )
                samples.append(sample)
    if left_out:
        kinds = [f"{count:,} {kind}" for kind, count in left_out.most_common(KINDS_NAMED)]
        more = ", ..." if len(left_out) > KINDS_NAMED else ""
        log(f"{place}: left out {left_out.total():,} other files: {', '.join(kinds)}{more}")
    return Source(
        name=f"folder:{root.name}",
        place=place,
        root=root,
        classes=classes,
        samples=samples,
        bad=bad,
        own_test=parts[-1][1],
        for_training=known is None,
    )


def _splits(root: Path, real: Path, place: str, *, needs_train: bool, log: Log) -> list[tuple[Path, bool]]:
    """Return the folders that hold the class folders, each with whether its images are test images."""
    names = _folders(root, real)
    # A folder named train that holds images, not folders, is an ordinary class.
    trains = [name for name in _named(TRAIN_NAMES, names) if _folders(root / name, real)]
    tests = _named(TEST_NAMES, names)
    alone = not needs_train and bool(tests) and bool(_folders(root / tests[0], real))
    if not trains and not alone:
        return [(root, False)]
    if not tests:
        raise UserError(
            f"{place}: has {trains[0]}, but none of {', '.join(TEST_NAMES)} next to it; {EXPECTED}"
        )
    rivals = trains if len(trains) > 1 else [name for name in tests if name.lower() == tests[0].lower()]
    if len(rivals) > 1:
        raise UserError(f"{place}: has both {rivals[0]} and {rivals[1]}; keep one of them")
    for name in tests[1:]:
        log(f"{place}: left out {name}: the test images are those in {tests[0]}")
    return [*((root / name, False) for name in trains), (root / tests[0], True)]


def _named(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the names that are one of the words but for their case, in the words' order."""
    return [name for word in words for name in names if name.lower() == word]


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield a folder's entries, sorted by name."""
    with os.scandir(folder) as entries:
        yield from sorted(entries, key=lambda entry: entry.name)


def _folders(folder: Path, real: Path) -> list[str]:
    names = [entry.name for entry in _entries(folder) if entry.is_dir() and not _is_hidden(entry)]
    for name in names:
        if not (folder / name).resolve().is_relative_to(real):
            raise UserError(
                f"{folder / name}: a link that leads out of {real}; put the images themselves in its place"
            )
        if not name.isprintable():  # undecodable bytes too: the name goes into results and pages
            raise UserError(f"{folder / name!r}: not a printable name in UTF-8; rename the folder")
    return names


def _is_hidden(entry: os.DirEntry[str]) -> bool:
    return entry.name.startswith(".") or entry.name in SYSTEM_FOLDERS


def _suffix(entry: os.DirEntry[str]) -> str:
    return PurePath(entry.name).suffix.lower()


def _may_be_image(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry of a class counts as an image, or at least as a mistake to report."""
    if _is_hidden(entry):
        return False
    suffix = _suffix(entry)
    if suffix in SUFFIXES or suffix in UNREAD_SUFFIXES or os.path.isdir(entry.path):
        return True
    return not suffix and os.path.isfile(entry.path) and is_image(Path(entry.path))


def _kind(entry: os.DirEntry[str]) -> str:
    """Return what to call a file that is left out."""
    suffix = _suffix(entry)
    if _is_hidden(entry) or not suffix:
        return "hidden" if _is_hidden(entry) else "without an ending"
    if suffix in SUFFIXES:
        return f"{suffix} outside the class folders"
    return suffix if suffix.isprintable() else ascii(suffix)


def _examine(entry: os.DirEntry[str], real: Path) -> os.stat_result | str:
    """Return the status of a file to decode, or the reason why it cannot be an image."""
    try:
        status = entry.stat()
    except OSError as error:  # a broken link, or a circular one
        return error.strerror or str(error)
    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(real):
        return "a link that leads out of the folder"
    if stat.S_ISDIR(status.st_mode):
        return "a folder inside a class"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_size == 0:
        return "empty"
    return status
