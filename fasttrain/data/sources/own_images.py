"""A user's own images, decoded once: checked, split, and kept as pixels that the next run maps into memory.

folder.py and webdataset.py list the images; this module turns them into a Dataset. Each image is decoded
once, before the training, by several threads, at the training's resolution. So images that cannot be decoded
are reported before the training begins, and loaders, augmentation, reports and resumed runs work as on
CIFAR-10.

Pillow decodes: it reads all formats, says what is wrong with each bad file, and shrinks a large JPEG
while decoding it. Plain JPEGs that have the right resolution already go to DALI's CPU decoder (jpeg.py),
which is faster and produces the same pixels, so that `fasttrain predict` sees what was trained on.
"""

import hashlib
import io
import math
import mmap
import os
import struct
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL

from fasttrain.data.dataset import Channels, Dataset, Split, channel_statistics
from fasttrain.data.sources.image import decode
from fasttrain.data.sources.jpeg import BATCH_SIZE, decode_plain, is_plain
from fasttrain.errors import UserError
from fasttrain.system.files import write_atomically
from fasttrain.system.machine import cpu_cores
from fasttrain.system.progress import show_count

CLASSES_MAX = 1000
"""The most classes: their confusion matrix has a million cells."""

TEST_NAMES = ("test", "val", "valid", "validation")
"""What the test images' folder or shards are called, in upper or lower case."""

TEST_ONE_IN = 5
"""Without any of these, one in five images of every class is a test image."""

FILE_BYTES_MAX = 1 << 28
"""The largest image file; threads read a file as a whole."""

CACHE_VARIABLE = "FASTTRAIN_CACHE_GIB"
"""The environment variable that limits the size of a cache, in GiB; by default 1."""

READ_BYTES = 1 << 20

DECODER = f"1, Pillow {PIL.__version__}"
"""Part of a cache's key; raise the number when image.py produces other pixels."""

NAMED = 3
"""How many bad files a message names."""

# A cache is one file: the pixels; the key, and the mean and std of the training images; the SHA-256 of these.
FACTS, DIGEST_BYTES = struct.Struct("<32s6d"), 32


@dataclass(frozen=True, slots=True, eq=False)  # hashed by identity
class Sample:
    """One image: `size` bytes at `offset` in the file at `path`.

    name: its name in messages. key: decides its position and its split, in the same way on every machine.
    """

    name: str
    key: str
    label: int
    in_test: bool
    path: str
    offset: int
    size: int
    mtime_ns: int

    @property
    def order(self) -> bytes:
        """A hash of the key, by which samples are put in random order."""
        return hashlib.sha256(os.fsencode(self.key)).digest()


@dataclass(frozen=True, kw_only=True)
class Source:
    """The images of one folder or one set of shards, as they were found.

    place: the user's name for it, such as --data folder:PATH. bad: names of files that cannot be images, and
    why. own_test: whether the source has test images; if not, one in five of every class becomes one.
    for_training: whether every class needs a training image; otherwise test images are enough.
    """

    name: str
    place: str
    root: Path
    classes: tuple[str, ...]
    samples: Sequence[Sample]
    bad: Sequence[tuple[str, str]]
    own_test: bool
    for_training: bool


def read_decoded(
    source: Source, cache: Path, *, resolution: int, skip_bad: bool, log: Callable[[str], object]
) -> Dataset:
    """Decode the images of a source, or take their pixels from the cache.

    If the source has no test images, the fifth of every class whose keys have the lowest SHA-256, but at
    least one image, is used for the test. Both splits are in the order of those hashes.
    cache: the file to keep the pixels in, up to FASTTRAIN_CACHE_GIB (1), and only if no file is bad. It is
    mapped, so it may be larger than the memory, and is valid as long as names, sizes and modification times
    stay the same.
    skip_bad: leave out files that cannot be decoded, and log how many; otherwise they are refused by name.
    Mean and standard deviation are those of the test images if there are no others.
    Raises UserError for bad files, a class without images, or more pixels than memory and cache can take.
    """
    train, test = _split(source.samples, len(source.classes), own_test=source.own_test)
    if not source.bad:
        _require_images(train, test, source)
    planned = [*train, *test]
    shape = (len(planned), resolution, resolution, 3)
    key = _key(planned, shape)
    images: np.ndarray | None = None
    undecodable: dict[int, str] = {}
    found = None if source.bad else _read_cache(cache, key, shape)
    if found is None:
        images, undecodable = _decode_to_file(source, planned, len(train), cache, key, shape)
        found = _read_cache(cache, key, shape) if images is None and not source.bad else None
    if found is None:
        if images is None:
            _require_memory(math.prod(shape), source.place)
            images = np.zeros(shape, np.uint8)
            undecodable = _decode(planned, images, source.name)
        bad = sorted([*source.bad, *((planned[row].name, why) for row, why in undecodable.items())])
        if bad:
            _refuse_or_log(bad, source, skip_bad=skip_bad, log=log)
            row_of = {sample: row for row, sample in enumerate(planned) if row not in undecodable}
            train, test = _split(list(row_of), len(source.classes), own_test=source.own_test)
            _require_images(train, test, source)
            _require_memory(math.prod(shape), source.place)
            images = images[[row_of[sample] for sample in (*train, *test)]]
        found = images, channel_statistics(images[: len(train) or None])
    images, (mean, std) = found
    if source.for_training and not all(std):
        raise UserError(f"{source.place}: a colour channel is the same in every pixel of the training images")
    labels = np.array([sample.label for sample in (*train, *test)])
    labels = labels.astype(np.min_scalar_type(len(source.classes) - 1))
    count = len(train)
    return Dataset(
        source.name,
        source.root,
        source.classes,
        Split(images[:count], labels[:count]),
        Split(images[count:], labels[count:]),
        mean,
        std,
    )


def _split(
    samples: Sequence[Sample], num_classes: int, *, own_test: bool
) -> tuple[list[Sample], list[Sample]]:
    """Return training and test samples, each in the order of their keys' hashes."""
    in_order = sorted(samples, key=lambda sample: sample.order)
    if own_test:
        parts = ([sample for sample in in_order if sample.in_test == in_test] for in_test in (False, True))
        train, test = parts
        return train, test
    of_class = np.bincount([sample.label for sample in in_order], minlength=num_classes)
    left = np.maximum(1, of_class // TEST_ONE_IN)
    train, test = [], []
    for sample in in_order:
        (test if left[sample.label] > 0 else train).append(sample)
        left[sample.label] -= 1
    return train, test


def _require_images(train: Sequence[Sample], test: Sequence[Sample], source: Source) -> None:
    """Raise UserError if there is no test image, or if a class has no image to train on but needs one."""
    counts = np.zeros(len(source.classes), int)
    for sample in train:
        counts[sample.label] += 1
    for label, name in enumerate(source.classes):
        if source.for_training and not counts[label]:
            least = "one to train on" if source.own_test else "two, one of them for the test"
            usable = 0 if source.own_test else sum(sample.label == label for sample in test)
            found = f"the class {name} has {usable} usable images"
            raise UserError(f"{source.place}: {found}; expected at least {least}; add some or remove it")
    if not test:
        raise UserError(f"{source.place}: no usable test images")


def _refuse_or_log(
    bad: Sequence[tuple[str, str]], source: Source, *, skip_bad: bool, log: Callable[[str], object]
) -> None:
    first = [f"{name if name.isprintable() else ascii(name)} ({reason})" for name, reason in bad[:NAMED]]
    names = ", ".join(first) + (", ..." if len(bad) > NAMED else "")
    count = f"{len(bad):,} of {len(source.samples) + len(source.bad):,} files"
    if not skip_bad:
        raise UserError(
            f"{source.place}: {count} cannot be used: {names}; fix or remove them, or add --skip-bad"
        )
    log(f"{source.place}: left out {count}: {names}")


# Decoding
def _decode(samples: Sequence[Sample], images: np.ndarray, name: str) -> dict[int, str]:
    """Fill `images`, (N, H, W, 3) uint8; returns what is wrong with each image not decoded, by its row."""
    resolution = images.shape[1]
    bad: dict[int, str] = {}

    def decode_one(row: int, content: bytes) -> None:
        try:
            images[row] = decode(io.BytesIO(content), resolution, name=samples[row].name)
        except ValueError as error:
            bad[row] = str(error)

    def decode_some(start: int) -> None:
        plain: dict[int, bytes] = {}
        for row, sample in enumerate(samples[start : start + BATCH_SIZE], start):
            try:
                content = _content(sample)
            except ValueError as error:
                bad[row] = str(error)
                continue
            if is_plain(content, resolution):
                plain[row] = content
            else:
                decode_one(row, content)
        try:
            if plain:
                images[list(plain)] = decode_plain([*plain.values()])
        except (ImportError, RuntimeError):  # no DALI, or it fails on one of the files
            for row, content in plain.items():
                decode_one(row, content)

    executor = ThreadPoolExecutor(cpu_cores())  # Pillow's decoders release the GIL
    with warnings.catch_warnings(), show_count(name, len(samples)) as show:
        warnings.simplefilter("ignore")  # Pillow's, about odd metadata
        try:
            starts = range(0, len(samples), BATCH_SIZE)
            for start, _ in zip(starts, executor.map(decode_some, starts), strict=True):
                show(min(start + BATCH_SIZE, len(samples)))
        finally:
            executor.shutdown(cancel_futures=True)  # Ctrl-C must not wait for the rest
    return bad


def _content(sample: Sample) -> bytes:
    """Read the bytes of an image. Raises ValueError if they are too many or cannot be read."""
    if sample.size > FILE_BYTES_MAX:
        raise ValueError(f"{sample.size:,} bytes, over the limit of {FILE_BYTES_MAX:,}")
    try:
        with open(sample.path, "rb") as file:
            file.seek(sample.offset)
            return file.read(sample.size)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


# The cache
class _NotForTheCacheError(Exception):
    """Some images could not be decoded, so the file must not become the cache."""


def _decode_to_file(
    source: Source, samples: Sequence[Sample], train: int, cache: Path, key: bytes, shape: tuple[int, ...]
) -> tuple[np.ndarray | None, dict[int, str]]:
    """Decode into a file and make it the cache, if there is room for it and no image is bad.

    Returns None if the images are in the cache now, or if there was no room; otherwise the images, mapped
    from an unlinked file, and what is wrong with the bad ones. The first `train` samples are the training
    images.
    """
    images, bad = None, {}

    def write(file: BinaryIO) -> None:
        nonlocal images, bad
        if hasattr(os, "posix_fallocate"):  # fail on a full disk now, instead of being killed later
            os.posix_fallocate(file.fileno(), 0, math.prod(shape))
        else:
            file.truncate(math.prod(shape))
        pixels = np.memmap(file, np.uint8, "r+", shape=shape)
        bad = _decode(samples, pixels, source.name)
        if bad or source.bad:
            images = pixels
            raise _NotForTheCacheError
        mean, std = channel_statistics(pixels[: train or None])
        facts = FACTS.pack(key, *mean, *std)
        digest = hashlib.sha256(pixels.data)
        digest.update(facts)
        pixels.flush()
        file.seek(0, os.SEEK_END)
        file.write(facts + digest.digest())

    if 0 < math.prod(shape) <= _cache_bytes_max():
        with suppress(OSError, UserError, _NotForTheCacheError):  # a full or read-only disk
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, write)
    return images, bad


def _read_cache(
    path: Path, key: bytes, shape: tuple[int, ...]
) -> tuple[np.ndarray, tuple[Channels, Channels]] | None:
    """Map the pixels, and return them with the training images' mean and std; None if corrupt or outdated."""
    size = math.prod(shape)
    digest = hashlib.sha256()
    with suppress(OSError), path.open("rb") as file:
        if os.fstat(file.fileno()).st_size != size + FACTS.size + DIGEST_BYTES:
            return None
        file.seek(size)
        facts = file.read(FACTS.size)
        found, *figures = FACTS.unpack(facts)
        if found != key:
            return None
        file.seek(0)
        for start in range(
            0, size, READ_BYTES
        ):  # read, not mapped: mapped pages count as the process's memory
            digest.update(file.read(min(READ_BYTES, size - start)))
        digest.update(facts)
        file.seek(FACTS.size, os.SEEK_CUR)
        if file.read() == digest.digest():
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):  # otherwise the system reads ahead 30 images for each one
                mapped.madvise(mmap.MADV_RANDOM)
            images = np.frombuffer(mapped, np.uint8).reshape(shape)
            return images, (tuple(figures[:3]), tuple(figures[3:]))
    return None


def _key(samples: Sequence[Sample], shape: tuple[int, ...]) -> bytes:
    """Return a hash of everything that decides the pixels and their order."""
    digest = hashlib.sha256(f"{DECODER}, {shape}".encode())
    for sample in samples:
        identity = (sample.name, sample.label, sample.in_test, sample.offset, sample.size, sample.mtime_ns)
        digest.update(ascii(identity).encode())
    return digest.digest()


def _cache_bytes_max() -> int:
    text = os.environ.get(CACHE_VARIABLE) or "1"
    try:
        return int(float(text) * 2**30)
    except (ValueError, OverflowError) as error:
        raise UserError(
            f"{CACHE_VARIABLE}={text}: expected how many GiB of pixels to cache, such as 1"
        ) from error


def _require_memory(size: int, place: str) -> None:
    """Raise UserError if `size` bytes of pixels would take more than half of the memory."""
    with suppress(AttributeError, ValueError, OSError):  # not on Windows
        if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
            gib = size / 2**30
            raise UserError(
                f"{place}: the decoded images, {gib:,.1f} GiB, would fill the memory; "
                f"{CACHE_VARIABLE}={math.ceil(gib)} keeps them on the disk of --data-dir, if no file is bad"
            )
