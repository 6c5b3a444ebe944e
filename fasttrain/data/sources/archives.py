"""What is downloaded or lies in the data folder, as the files of the binary release."""

import gzip
import hashlib
import io
import itertools
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fasttrain.data.sources import image, python_release
from fasttrain.data.sources.releases import IMAGE_SHAPE, Archive, Release
from fasttrain.errors import one_line
from fasttrain.system.files import new_folder

MEMBERS_MAX = 100
"""A release's tar file has ten members at most; tarfile remembers every one it meets."""

SLACK_BYTES = 1 << 20
"""For headers, names of classes and such."""

Files = Iterator[tuple[str, bytes]]
"""The files of a release: a name and the content."""


def unpack(archive: Archive, paths: Sequence[Path], target: Path, release: Release, *, verify: bool) -> None:
    """Write the release's files into `target`, which appears only once they are complete.

    paths: the archive's files, or for a Python release the folder that holds its pickles.
    verify: whether every file must have the release's SHA-256.
    Raises ValueError, saying what is wrong, if the content is not the release's, UserError for a full disk.
    """
    missing = set(release.files)
    with new_folder(target) as folder:
        for name, content in READERS[archive.form](archive, paths, release):
            if verify and hashlib.sha256(content).hexdigest() != release.sha256[name]:
                raise ValueError(f"{name} would not have the release's SHA-256")
            (folder / name).write_bytes(content)
            missing.discard(name)
        if missing:
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        (folder / release.classes_file).write_text("\n".join(release.classes) + "\n", "utf-8")


def _binary(archive: Archive, paths: Sequence[Path], release: Release) -> Files:
    sizes = {name: release.file_bytes(name) for name in release.files}
    for name, content in _members(paths[0], archive, sizes):
        if len(content) != sizes[name]:
            raise ValueError(f"{name} has {len(content)} bytes, expected {sizes[name]}")
        yield name, content


def _python(archive: Archive, paths: Sequence[Path], release: Release) -> Files:
    pickles = {name.removesuffix(".bin"): name for name in release.files}
    # A pickle also names the file that each image came from.
    sizes = {
        pickled: release.file_bytes(name) + 100 * release.file_images(name) + SLACK_BYTES
        for pickled, name in pickles.items()
    }
    read = _entries if paths[0].is_dir() else _members
    for pickled, content in read(paths[0], archive, sizes):
        name = pickles[pickled]
        try:
            records = python_release.read(content, release.file_images(name), release)
        except ValueError as error:
            raise ValueError(f"{pickled}: {error}") from error
        yield name, records.tobytes()


def _parquet(archive: Archive, paths: Sequence[Path], release: Release) -> Files:
    """Read the training rows, in which the release's files follow one another, and the test rows.

    Which file comes where, the SHA-256 of its rows tells: on Hugging Face it is 4, 3, 2, 5 and 1.
    """
    names = {sha256: name for name, sha256 in release.sha256.items()}
    for path, files in zip(paths, (release.train_files, (release.test_file,)), strict=True):
        images = release.file_images(files[0])
        records = _parquet_records(path, images * len(files), release)
        for start in range(0, len(records), images):
            content = records[start : start + images].tobytes()
            sha256 = hashlib.sha256(content).hexdigest()
            if sha256 not in names:
                raise ValueError(
                    f"rows {start} to {start + images - 1} of {path.name} are no file of the release"
                )
            yield names.pop(sha256), content


def _parquet_records(path: Path, rows: int, release: Release) -> np.ndarray:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if table.metadata.num_rows != rows:
                raise ValueError(f"{path.name} has {table.metadata.num_rows} rows, expected {rows}")
            if not _has_release_columns(table.schema_arrow, release):
                labels = " and ".join(release.labels)
                raise ValueError(f"{path.name}: expected img.bytes, of bytes, and {labels}, of integers")
            records, start = np.empty((rows, release.record_bytes), np.uint8), 0
            for batch in table.iter_batches(1000, columns=["img.bytes", *release.labels]):
                here = slice(start, start + batch.num_rows)
                for column, label in enumerate(release.labels):
                    records[here, column] = batch.column(label).to_numpy()
                for row, content in enumerate(batch.column("img").field("bytes"), start):
                    pixels = image.decode(io.BytesIO(content.as_py()), IMAGE_SHAPE[0])
                    records[row, release.label_bytes :] = pixels.transpose(2, 0, 1).ravel()
                start = here.stop
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path.name}: {one_line(error)}") from error
    return records


def _has_release_columns(schema: Any, release: Release) -> bool:
    """Whether a pyarrow schema has an integer column for each label, and the pictures' bytes."""
    from pyarrow import types

    kinds = {field.name: field.type for field in schema}
    pictures = kinds.get("img")
    if pictures is None or not types.is_struct(pictures) or pictures.get_field_index("bytes") < 0:
        return False
    labels = [kinds.get(label) for label in release.labels]
    return types.is_binary(pictures.field("bytes").type) and all(
        kind and types.is_integer(kind) for kind in labels
    )


READERS: dict[str, Callable[[Archive, Sequence[Path], Release], Files]] = {
    "binary": _binary,
    "python": _python,
    "parquet": _parquet,
}


def _entries(folder: Path, archive: Archive, sizes: dict[str, int]) -> Files:
    """Yield the files of these names in a folder. sizes: the most bytes that each may have, by name."""
    for name, most in sizes.items():
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > most:
            raise ValueError(f"{name} has {path.stat().st_size} bytes, expected at most {most}")
        yield name, path.read_bytes()


def _members(path: Path, archive: Archive, sizes: dict[str, int]) -> Files:
    """Yield the members of these names in the folder of a tar.gz, and ignore everything else in it.

    Never extractall: the names, links and modes in a downloaded tar file must not reach the file system.
    sizes: the most bytes that each may have, by name.
    """
    try:
        with (
            _BoundedGzip(path, sum(sizes.values()) + SLACK_BYTES) as unzipped,
            # As a stream, tarfile reads in blocks, and whatever a header claims ends at the bound.
            tarfile.open(fileobj=unzipped, mode="r|") as tar,
        ):
            for member in itertools.islice(tar, MEMBERS_MAX):
                name = PurePosixPath(member.name).name
                if name not in sizes or PurePosixPath(member.name) != PurePosixPath(archive.folder, name):
                    continue
                if member.size > sizes[name] or not member.isreg():
                    expected = f"expected a regular file with at most {sizes[name]}"
                    raise ValueError(f"{name} has {member.size} bytes; {expected}")
                content = tar.extractfile(member)
                assert content is not None  # it is a regular file
                yield name, content.read()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"not a complete tar.gz ({error})") from error


class _BoundedGzip(gzip.GzipFile):
    """A gzip file that ends in an error after `most` bytes: a small one can hold any number."""

    def __init__(self, path: Path, most: int) -> None:
        super().__init__(path)
        self._left = most

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self._left -= len(content)
        if self._left < 0:
            raise tarfile.ReadError("larger than the release")
        return content
