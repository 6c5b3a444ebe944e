"""Damaged and lying files of images: pictures, shards, releases, pickles and the cache of pixels."""

import functools
import io
import json
import os
import pickle
import random
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from PIL import Image

from fasttrain.data.dataset import Dataset
from fasttrain.data.sources import archives, folder, image, python_release, webdataset
from fasttrain.data.sources.releases import Archive
from fasttrain.errors import UserError
from tests.helpers import parquet, pickle2, small_files, small_release, tar_gz
from tests.soak.damage import damage_bytes

SIDE = 32
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
HUGE = (2**31 - 1, 2**16 - 1, 20_000)
"""Sides that a file may claim: the last is under most formats' limits, and over ours."""


class BadImages:
    """Damages one file of a kind at a time; each method in `kinds` returns whether it was read as it should.

    A reader may also raise UserError. Formats without a checksum may give other pixels, never anything else.
    """

    rng: random.Random

    def __init__(self, work: Path) -> None:
        self.work = work
        self.release = small_release()
        *train, test = small_files().values()
        self.parquet = parquet(train), parquet([test])
        self.folder, self.shards, self.cache = work / "pets", work / "shards", work / "cache"
        for split, name, seed in (("train", "cat", 0), ("train", "dog", 1), ("test", "cat", 2)):
            path = self.folder / split / name / f"{seed}.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(picture("PNG", seed))
        self.shards.mkdir()
        self.shard = shard([(f"{seed}.png", picture("PNG", seed)) for seed in range(4)])
        self.content_hash = self._read_folder().content_hash

    def kinds(self) -> list[Callable[[], bool]]:
        return [
            *(self.picture, self.lying_picture, self.shard_bytes, self.hostile_shard, self.release_archive),
            *(self.pickle_bytes, self.hostile_pickle, self.pixel_cache),
            *(self.parquet_bytes, self.hostile_parquet),
        ]

    def picture(self) -> bool:
        kind = self.rng.choice(FORMATS)
        good = picture(kind, self.rng.randrange(5))
        found = decoded(damage_bytes(good, self.rng))
        return kind != "PNG" or np.array_equal(found, decoded(good))  # it has checksums

    def lying_picture(self) -> bool:
        """It claims sides that its bytes do not hold: the memory must not be reserved for them."""
        lies = (png_of_side, gif_of_side, jpeg_of_side, bmp_of_side, webp_of_side, png_with_a_bomb)
        decoded(self.rng.choice(lies)(self.rng.choice(HUGE)))
        return False

    def shard_bytes(self) -> bool:
        (self.shards / "0.tar").write_bytes(damage_bytes(self.shard, self.rng))
        return self._read_shards()

    def hostile_shard(self) -> bool:
        """Members that are links, devices, or lie outside; names that escape; sizes beyond the file."""
        info = tarfile.TarInfo(
            self.rng.choice(("../../escaped.png", str(self.work / "escaped.png"), "4.png", "a/../4.png"))
        )
        info.type = self.rng.choice((tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE))
        info.linkname = self.rng.choice(("/etc/passwd", "0.png", "../0.png"))
        info.size = self.rng.choice((0, 1, 2**33, 2**62))
        header = info.tobuf(self.rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
        (self.shards / "0.tar").write_bytes(header + self.shard)
        return self._read_shards() and not list(self.work.parent.rglob("escaped*"))

    def release_archive(self) -> bool:
        members = {f"{self.release.binary.folder}/{name}": content for name, content in small_files().items()}
        return self._unpacks(self.release.binary, damage_bytes(tar_gz(members), self.rng))

    def parquet_bytes(self) -> bool:
        train, test = self.parquet
        return self._unpacks(self.release.parquet, damage_bytes(train, self.rng), test)

    def hostile_parquet(self) -> bool:
        """Columns that are missing, of another type or another length; pictures that lie."""
        train, test = self.parquet
        return self._unpacks(self.release.parquet, changed_parquet(train, self.rng), test)

    def _unpacks(self, archive: Archive, *contents: bytes) -> bool:
        """Whether these files of the release give its images, and nothing else."""
        target, paths = self.work / "release", []
        for number, content in enumerate(contents):
            paths.append(self.work / f"archive-{number}")
            paths[-1].write_bytes(content)
        shutil.rmtree(target, ignore_errors=True)
        try:
            archives.unpack(archive, paths, target, self.release, verify=True)
        except ValueError as error:
            if target.exists():
                return False
            raise UserError(str(error)) from error
        return all((target / name).read_bytes() == content for name, content in small_files().items())

    def pickle_bytes(self) -> bool:
        return self._reads_pickle(damage_bytes(pickle2(batch()), self.rng))

    def hostile_pickle(self) -> bool:
        """A program in place of a value. Nothing that it asks for may happen."""
        marker = self.work / "executed"
        program = self.rng.choice((Program(os.mkdir, str(marker)), Program(os.system, f"touch '{marker}'")))
        key = self.rng.choice((b"labels", b"data", b"other"))
        try:
            self._reads_pickle(pickle.dumps(batch() | {key: program}, protocol=self.rng.randrange(6)))
        finally:
            assert not marker.exists(), "a pickle's program was run"
        return False  # it must not get this far

    def pixel_cache(self) -> bool:
        [path] = self.cache.glob("*.pixels")
        path.write_bytes(damage_bytes(path.read_bytes(), self.rng))
        return self._read_folder().content_hash == self.content_hash

    def _read_folder(self) -> Dataset:
        return folder.read(self.folder, self.cache, resolution=SIDE, log=lambda _: None)

    def _read_shards(self) -> bool:
        found = webdataset.read(self.shards, self.cache / "shards", resolution=SIDE, log=lambda _: None)
        return found.train.images.shape[1:] == (SIDE, SIDE, 3) and len(found.classes) == 2

    def _reads_pickle(self, content: bytes) -> bool:
        images = len(batch()[b"labels"])
        try:
            found = python_release.read(content, images, self.release)
        except ValueError as error:
            raise UserError(str(error)) from error
        return found.shape == (images, self.release.record_bytes)


class Program:
    """Pickled, it is a call of a function."""

    def __init__(self, function: Callable[[str], Any], argument: str) -> None:
        self.function, self.argument = function, argument

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return self.function, (self.argument,)


def changed_parquet(content: bytes, rng: random.Random) -> bytes:
    """The same file with one of its two columns, img and label, gone or of another kind."""
    table = pyarrow.parquet.read_table(io.BytesIO(content))
    rows, name = table.num_rows, rng.choice(table.column_names)
    columns = {column: table[column] for column in table.column_names}
    pictures = [{"bytes": png_of_side(rng.choice(HUGE)), "path": "../../escaped"}] * rows
    changes: list[Any] = [
        *([[]] * rows, [None] * rows, ["7"] * rows, [float("nan")] * rows, [2**40] * rows, [-1] * rows),
        *([{"bytes": None}] * rows, [{"bytes": b""}] * rows, [{"bytes": 7}] * rows, pictures),
    ]
    if (place := rng.randrange(len(changes) + 3)) < len(changes):
        columns[name] = pyarrow.array(changes[place])
    elif place == len(changes):
        del columns[name]
    elif place == len(changes) + 1:
        columns = {column: values[: rows // 2] for column, values in columns.items()}
    else:
        columns = {column: pyarrow.nulls(10**7, values.type) for column, values in columns.items()}
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


def decoded(content: bytes) -> np.ndarray:
    try:
        found = image.decode(io.BytesIO(content), SIDE)
    except ValueError as error:
        raise UserError(str(error)) from error
    assert found.shape == (SIDE, SIDE, 3) and found.dtype == np.uint8
    return found


def picture(kind: str, seed: int) -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE + 8 * (seed % 2), SIDE, 3), np.uint8)
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def shard(images: list[tuple[str, bytes]]) -> bytes:
    """A tar file of these images, each with a class."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for index, (name, pixels) in enumerate(images):
            label = json.dumps(index % 2).encode()
            for member, value in ((name, pixels), (f"{Path(name).stem}.cls", label)):
                info = tarfile.TarInfo(member)
                info.size = len(value)
                tar.addfile(info, io.BytesIO(value))
    return content.getvalue()


def batch() -> dict[bytes, Any]:
    """A batch of the Python release."""
    return {b"labels": [7, 0, 9], b"data": np.zeros((3, 3072), np.uint8)}


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(side: int, extra: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    rows = (b"\0" + bytes(3 * SIDE)) * SIDE
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_of_side(side: int) -> bytes:
    return png(side)


@functools.cache
def png_with_a_bomb(_: int) -> bytes:
    """A small picture whose comment unpacks to 200 MB."""
    return png(SIDE, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200_000_000), 9)))


def gif_of_side(side: int) -> bytes:
    lie = struct.pack("<HH", *[min(side, 2**16 - 1)] * 2)
    content = picture("GIF", 0)
    frame = content.index(b"\x2c\0\0\0\0") + 5
    return content[:6] + lie + content[10:frame] + lie + content[frame + 4 :]


def jpeg_of_side(side: int) -> bytes:
    content = picture("JPEG", 0)
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", *[min(side, 65_500)] * 2) + content[place + 4 :]


def bmp_of_side(side: int) -> bytes:
    content = picture("BMP", 0)
    return content[:18] + struct.pack("<ii", side, -side) + content[26:]


def webp_of_side(side: int) -> bytes:
    """The extended format, whose canvas may have 2^24 pixels a side."""
    canvas = struct.pack("<I", min(side, 2**24) - 1)[:3] * 2
    header = b"VP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + canvas
    content = header + picture("WEBP", 0)[12:]
    return b"RIFF" + struct.pack("<I", 4 + len(content)) + b"WEBP" + content
