"""A folder of a user's own images, with one folder per class, as a Dataset.

PATH/train/<class>/*, PATH/test/<class>/*    (or PATH/val instead of PATH/test)
PATH/<class>/*                               split by pixel_cache.py: one image in five is a test image
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fasttrain.data.dataset import Dataset
from fasttrain.data.sources.pixel_cache import CLASSES_MAX, Sample, Source, read_decoded
from fasttrain.errors import UserError

TRAIN, TEST = "train", ("test", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def read(
    root: Path,
    cache_dir: Path,
    *,
    resolution: int,
    skip_bad: bool = False,
    classes: Sequence[str] | None = None,
    log: Callable[[str], object] = print,
) -> Dataset:
    """Decode the folder's images, or take their pixels from the cache; see pixel_cache.read_decoded.

    The split depends on `<class>/<name>`. Names that begin with a dot are ignored.
    cache_dir: where the pixels are kept, one file per folder and resolution.
    classes: those of a trained network, in the order of its labels, for images that it is to be measured on:
    the folder may lack some of them, and PATH/train altogether. By default the training split's folders.
    Raises UserError for bad files, a class without images, or a folder with another layout.
    """
    place = f"--data folder:{root}"
    root = Path(os.path.abspath(root))
    try:
        source = _list(root, place, classes)
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror})") from error
    cache = cache_dir / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}-{resolution}.pixels"
    return read_decoded(source, cache, resolution=resolution, skip_bad=skip_bad, log=log)


def looks_like_classes(root: Path) -> bool:
    """Return whether a folder, or `train` in it, holds two folders with images, going by the files' names.

    Folders that cannot be read do not count.
    """

    def entries(folder: Path) -> Sequence[Path]:
        try:
            return list(folder.iterdir())
        except OSError:
            return []

    def holds_images(folder: Path) -> bool:
        return any(path.suffix.lower() in SUFFIXES for path in entries(folder))

    return any(sum(map(holds_images, entries(folder))) >= 2 for folder in (root, root / TRAIN))


def _list(root: Path, place: str, known: Sequence[str] | None) -> Source:
    """Return the classes and everything in their folders. Raises OSError if a folder cannot be read."""
    expected = "expected folder:PATH with PATH/<class>/*, or PATH/train/<class>/* and PATH/test/<class>/*"
    if not root.is_dir():
        raise UserError(f"{place}: no such folder; {expected}")
    real = root.resolve()
    parts = [(root, False)]
    # A folder named train that holds images, not folders, is an ordinary class.
    if TRAIN in _folders(root, real) and _folders(root / TRAIN, real):
        tests = [name for name in TEST if (root / name).is_dir()]
        if not tests:
            raise UserError(f"{place}: has train, but neither test nor val next to it; {expected}")
        parts = [(root / TRAIN, False), (root / tests[0], True)]
    elif known is not None:
        parts = [(root / name, True) for name in TEST if name in _folders(root, real)][:1] or parts

    classes = tuple(_folders(parts[0][0], real) if known is None else known)
    if len(classes) < 2 or len(classes) > CLASSES_MAX:
        found = f"{len(classes)} class folders in {parts[0][0]}"
        raise UserError(f"{place}: {found}; {expected}, with 2 to {CLASSES_MAX} classes")
    samples: list[Sample] = []
    bad: list[tuple[str, str]] = []
    for folder, in_test in parts:
        present = _folders(folder, real)
        unknown = [name for name in present if name not in classes]
        if unknown:
            lacks = "without training images" if known is None else "that the network was not trained on"
            raise UserError(f"{folder / unknown[0]}: a class {lacks}; remove or move it")
        for name in present:
            label, inside = classes.index(name), str((folder / name).relative_to(root))
            for entry in _entries(folder / name):
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


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield a folder's entries, sorted by name, without hidden ones."""
    with os.scandir(folder) as entries:
        yield from sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)


def _folders(folder: Path, real: Path) -> list[str]:
    names = [entry.name for entry in _entries(folder) if entry.is_dir()]
    for name in names:
        if not (folder / name).resolve().is_relative_to(real):
            raise UserError(
                f"{folder / name}: a link that leads out of {real}; put the images themselves in its place"
            )
        if not name.isprintable():  # undecodable bytes too: the name goes into results and pages
            raise UserError(f"{folder / name!r}: not a printable name in UTF-8; rename the folder")
    return names


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
