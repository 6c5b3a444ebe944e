"""A folder of a user's own images, a folder per class, as the data set that every loader takes.

PATH/train/<class>/*, PATH/test/<class>/*    (or PATH/val in place of PATH/test)
PATH/<class>/*                               split by data/decoded.py: one in five are test images
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from fasttrain.data.dataset import Dataset
from fasttrain.data.sources.pixel_cache import CLASSES_MAX, Sample, Source, read_decoded
from fasttrain.errors import UserError

TRAIN, TEST = "train", ("test", "val")


def read(
    root: Path,
    cache_dir: Path,
    *,
    resolution: int,
    skip_bad: bool = False,
    log: Callable[[str], object] = print,
) -> Dataset:
    """Decode the folder, or take its pixels from the cache, as data/decoded.py does.

    The split depends on `<class>/<name>`. Names that begin with a dot are left alone.
    cache_dir: where the pixels are kept, a file per folder and resolution.
    Raises UserError for bad files, a class without images, or a folder of another layout.
    """
    place = f"--data folder:{root}"
    root = Path(os.path.abspath(root))
    try:
        source = _list(root, place)
    except OSError as error:
        raise UserError(f"{error.filename or root}: cannot be read ({error.strerror})") from error
    cache = cache_dir / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}-{resolution}.pixels"
    return read_decoded(source, cache, resolution=resolution, skip_bad=skip_bad, log=log)


def _list(root: Path, place: str) -> Source:
    """The classes and all that lies in their folders.

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
    samples: list[Sample] = []
    bad: list[tuple[str, str]] = []
    for folder, in_test in parts:
        present = _folders(folder, real)
        unknown = [name for name in present if name not in classes]
        if unknown:
            raise UserError(f"{folder / unknown[0]}: a class without training images; remove or move it")
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
        own_test=len(parts) > 1,
    )


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


def _examine(entry: os.DirEntry[str], real: Path) -> os.stat_result | str:
    """The size and time of an image to decode, or why it can be none."""
    try:
        status = entry.stat()
    except OSError as error:  # a link that leads nowhere, or in a circle
        return error.strerror or str(error)
    if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(real):
        return "a link that leads out of the folder"
    if stat.S_ISDIR(status.st_mode):
        return "a folder inside a class"
    if not stat.S_ISREG(status.st_mode):
        return "no plain file"
    if status.st_size == 0:
        return "empty"
    return status
