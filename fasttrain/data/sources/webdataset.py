"""A user's own images in shards, tar files in WebDataset's layout, as a Dataset.

A sample consists of the members with one key, `<key>.<extension>`: an image (see image.SUFFIXES) and
`<key>.cls`, its class, as a name or a number. Members with other extensions are ignored.

Shards with a word of TEST_NAMES in their name, as in `pets-{train,val}-{000..009}.tar`, hold the test images;
if there are none, own_images.py splits. Nothing is unpacked: only the positions of the members are noted.
"""

import dataclasses
import glob
import hashlib
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import BinaryIO, NoReturn

from fasttrain.data.dataset import Dataset
from fasttrain.data.sources.image import SUFFIXES
from fasttrain.data.sources.own_images import CLASSES_MAX, TEST_NAMES, Sample, Source, read_decoded
from fasttrain.errors import UserError

IMAGES, LABEL = tuple(suffix[1:] for suffix in SUFFIXES), "cls"
CLASSES_FILE = "classes.txt"
SHARDS_MAX = 100_000
LABEL_BYTES_MAX = 1024
Members = dict[str, dict[str, tarfile.TarInfo]]


def read(
    pattern: Path,
    cache_dir: Path,
    *,
    resolution: int,
    skip_bad: bool = False,
    classes: Sequence[str] | None = None,
    log: Callable[[str], object] = print,
) -> Dataset:
    """Decode the shards that a pattern names, or take their pixels from the cache, as folder.read does.

    pattern: what `find_shards` takes. The split depends on `<shard>/<key>`.
    Classes are the lines of a `classes.txt` next to the shards, numbered from 0; without that file, the
    sorted names in the training samples, or the numbers from 0 to the largest.
    cache_dir: where the pixels are kept, one file per pattern and resolution.
    classes: those of a trained network, in the order of its labels, for samples that it is to be measured on:
    they may lack some of the classes, and need no training samples. They take the place of the sorted names.
    Raises UserError for bad shards or samples, or a class without images.
    """
    place = f"--data webdataset:{pattern}"
    shards = [Path(os.path.abspath(name)) for name in find_shards(str(pattern), place)]
    root = Path(os.path.commonpath([shard.parent for shard in shards]))
    source = _list(shards, root, place, classes)
    identity = ",".join(map(os.path.abspath, split_patterns(str(pattern))))
    cache = cache_dir / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]}-{resolution}.pixels"
    return read_decoded(source, cache, resolution=resolution, skip_bad=skip_bad, log=log)


def find_shards(pattern: str, place: str) -> list[str]:
    """Return every shard that a pattern names.

    pattern: one or more, separated by commas: a folder, for every .tar in it or below it, or a path with
    `{000..009}` or `{train,val}`, as expand takes it, and with `*` and `?`, as a shell takes them.
    Raises UserError for braces that are not understood, for a folder or a `*` without shards, and for a shard
    that is named twice.
    """
    shards: list[str] = []
    for one in split_patterns(pattern):
        if os.path.isdir(one):
            names = [str(path) for path in Path(one).rglob("*.tar") if not path.name.startswith(".")]
            shards += sorted(names) or _none(place, f"the folder {one} holds no .tar")
            continue
        for name in expand(one, place):
            if "*" in name or "?" in name:
                shards += sorted(glob.glob(name.replace("[", "[[]"))) or _none(place, f"no shard is {name}")
            else:
                shards.append(name)
    if len({os.path.abspath(shard) for shard in shards}) != len(shards):
        raise UserError(f"{place}: names a shard twice")
    return shards


def split_patterns(pattern: str) -> list[str]:
    r"""Split at commas outside braces, except at `\,`, unless there is a file or folder of the whole name."""
    if os.path.exists(pattern):
        return [pattern]
    parts = (part.strip().replace("\\,", ",") for part in re.split(r"(?<!\\),(?![^{}]*\})", pattern))
    return [os.path.expanduser(part) for part in parts if part]


def join_patterns(patterns: Iterable[str]) -> str:
    """Return one pattern that split_patterns splits into these."""
    return ",".join(re.sub(r",(?![^{}]*\})", r"\\,", pattern) for pattern in patterns)


def _none(place: str, found: str) -> NoReturn:
    raise UserError(f"{place}: {found}; expected a folder or a pattern such as pets-{{train,val}}-*.tar")


def expand(pattern: str, place: str) -> list[str]:
    """Return every path that a pattern names: {08..10} stands for numbers of equal width, {a,b} for words.

    Raises UserError for braces that are neither, or for more than SHARDS_MAX shards.
    """
    choices: list[Sequence[str]] = []
    count = 1
    for text, braced in re.findall(r"([^{}]+)|\{([^{}]*)\}", pattern):
        numbers = re.fullmatch(r"(\d{1,9})\.\.(\d{1,9})", braced)
        if text:
            choices.append([text])
        elif numbers and int(numbers[1]) <= int(numbers[2]):
            first, last = int(numbers[1]), int(numbers[2])
            count *= last - first + 1
            if count <= SHARDS_MAX:
                choices.append([str(number).zfill(len(numbers[1])) for number in range(first, last + 1)])
        elif "," in braced:
            choices.append(braced.split(","))
            count *= len(choices[-1])
        else:
            raise UserError(
                f"{place}: {{{braced}}} is not understood; expected {{000..009}} or {{train,val}}"
            )
    if count > SHARDS_MAX:
        raise UserError(f"{place}: names {count:,} shards; expected at most {SHARDS_MAX:,}")
    paths = ["".join(parts) for parts in product(*choices)]
    if pattern.count("{") != pattern.count("}"):
        raise UserError(f"{place}: the braces do not match")
    return paths


def _list(shards: Sequence[Path], root: Path, place: str, known: Sequence[str] | None) -> Source:
    """Return all samples of all shards."""
    found: list[tuple[Sample, str]] = []
    bad: list[tuple[str, str]] = []
    for shard in shards:
        name = str(shard.relative_to(root))
        in_test = not set(TEST_NAMES).isdisjoint(re.findall("[a-z]+", name.lower()))
        try:
            found += _samples(shard, name, in_test, bad)
        except FileNotFoundError as error:
            raise UserError(f"{shard}: no such shard; expected those that {place} names") from error
        except OSError as error:
            bad.append((name, error.strerror or str(error)))
    own_test = any(sample.in_test for sample, _ in found)
    trained = [text for sample, text in found if not sample.in_test]
    if own_test and not trained and known is None:
        raise UserError(f"{place}: no training samples; expected shards without test or val in their names")
    classes, label_of = _classes(trained, root / CLASSES_FILE, known)
    if len(classes) < 2 or len(classes) > CLASSES_MAX:
        first = f"; {bad[0][0]}: {bad[0][1]}" if bad else ""
        raise UserError(
            f"{place}: {len(classes):,} classes in {len(trained):,} training samples{first}; "
            f"expected images with a .cls next to each, and 2 to {CLASSES_MAX:,} classes"
        )
    samples = []
    for sample, text in found:
        if text in label_of:
            samples.append(dataclasses.replace(sample, label=label_of[text]))
        else:
            bad.append((sample.name, f"unknown class {text}"))
    return Source(
        name=f"webdataset:{root.name}",
        place=place,
        root=root,
        classes=classes,
        samples=samples,
        bad=bad,
        own_test=own_test,
        for_training=known is None,
    )


def _classes(
    trained: Iterable[str], file: Path, known: Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the names of the classes, and the label that each text in a .cls stands for.

    trained: the texts of the training samples. known: the classes of a trained network. A number in a .cls
    counts the lines of the file, if there is one, and the network's classes otherwise.
    """
    texts = set(trained)
    numbers = all(text.isdigit() for text in texts)
    if file.is_file() or known is not None:
        names = known or ()
        if file.is_file():
            names = [line for line in map(str.strip, file.read_text("utf-8", "replace").splitlines()) if line]
        classes = tuple(names if known is None else known)
        by_name = {name: label for label, name in enumerate(classes)}
        by_number = {str(number): by_name[name] for number, name in enumerate(names) if name in by_name}
        return classes, by_number | by_name
    if texts and numbers:
        classes = tuple(str(label) for label in range(min(max(map(int, texts)), CLASSES_MAX) + 1))
    else:
        classes = tuple(sorted(texts))
    return classes, {name: label for label, name in enumerate(classes)}


def _samples(shard: Path, name: str, in_test: bool, bad: list[tuple[str, str]]) -> list[tuple[Sample, str]]:
    """Return a shard's samples, still unlabelled, each with the text of its .cls; bad ones go to `bad`.

    Raises OSError if the file cannot be read.
    """
    if not shard.is_file() and shard.exists():
        bad.append((name, "not a regular file"))  # a pipe would block forever
        return []
    found = []
    with shard.open("rb") as file:
        status = os.fstat(file.fileno())
        for key, members in _members(file, name, bad).items():
            images = [member for extension, member in members.items() if extension in IMAGES]
            if not images:
                if LABEL in members:
                    bad.append((f"{name}: {key}", f"no image; expected one of {', '.join(IMAGES)}"))
                continue
            image = images[0]
            where = f"{name}: {image.name}"
            if len(images) > 1:
                bad.append((where, f"{len(images)} images with one key"))
            elif image.size == 0:
                bad.append((where, "empty"))
            elif LABEL not in members:
                bad.append((where, f"no label; expected {key}.{LABEL} next to it"))
            elif (text := _text(file, members[LABEL])) is None:
                bad.append(
                    (f"{name}: {members[LABEL].name}", "no label; expected the name or number of a class")
                )
            else:
                sample = Sample(
                    name=where,
                    key=f"{shard.name}/{key}",
                    label=0,
                    in_test=in_test,
                    path=str(shard),
                    offset=image.offset_data,
                    size=image.size,
                    mtime_ns=status.st_mtime_ns,
                )
                found.append((sample, text))
    return found


def _members(file: BinaryIO, name: str, bad: list[tuple[str, str]]) -> Members:
    """Return the complete members of a shard that belong to samples, by key and extension."""
    members: Members = {}
    size = os.fstat(file.fileno()).st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # uncompressed: images are read in place
            for member in tar:
                folder, _, last = member.name.rpartition("/")
                stem, _, extension = last.partition(".")
                extension = extension.lower()
                if not stem or member.isdir() or extension not in (*IMAGES, LABEL):
                    continue
                mine = members.setdefault(f"{folder}/{stem}" if folder else stem, {})
                where = f"{name}: {member.name}"
                if member.offset_data + member.size > size:
                    bad.append((where, "truncated"))
                elif not member.isreg() or member.issparse():
                    bad.append((where, "not a regular file"))
                elif extension in mine:
                    bad.append((where, "its key occurs twice"))
                else:
                    mine[extension] = member
            end = tar.offset
    except tarfile.TarError as error:
        bad.append((name, f"not a complete, uncompressed tar file: {error}"))
        return members
    file.seek(end)
    if (
        file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE
    ):  # tarfile takes any garbage for the end
        bad.append((name, f"truncated or corrupt after {end:,} bytes"))
    return members


def _text(file: BinaryIO, label: tarfile.TarInfo) -> str | None:
    """Read a label: one printable line, a number without leading zeros; None if it is neither."""
    if label.size > LABEL_BYTES_MAX:
        return None
    file.seek(label.offset_data)
    text = file.read(label.size).decode("utf-8", "replace").strip()
    if text.isascii() and text.isdigit():
        return str(int(text))
    return text if text and text.isprintable() and "\ufffd" not in text else None
