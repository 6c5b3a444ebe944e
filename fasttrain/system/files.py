"""Atomic writes, so that a reader never sees half a file; and a lock that one process holds on a folder."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fasttrain.errors import UserError, WriteError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write` on a temporary file, and rename it to `path` once it is complete and on the disk.

    If anything fails, an older file of that name stays as it was. Raises WriteError if the folder cannot be
    written to or the disk is full.
    """
    with _write_errors(path):
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(descriptor, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's files are private
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)  # a signal can come just after the rename
            raise
        _sync_folder(path.parent)


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or the nearest of its parents that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def require_writable(folder: Path, place: str) -> None:
    """Raise UserError if files cannot be created in this folder, or it is not there; before a long work.

    place: the flag and its value, for the message.
    """
    if not folder.is_dir():
        raise UserError(f"{place}: {folder} is not a folder; create it, or choose another")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = f"{folder} cannot be written to ({error.strerror})"
        raise UserError(f"{place}: {reason}; choose another folder") from error


def link_atomically(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy where the file system has no hard links.

    An older `target` stays until the new one is complete. Raises WriteError as write_atomically does.
    """
    temporary = target.with_name(f".{target.name}-link")
    with _write_errors(target):
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            with source.open("rb") as original:
                write_atomically(target, lambda file: shutil.copyfileobj(original, file))
            return
        os.replace(temporary, target)
        _sync_folder(target.parent)


def quarantine(path: Path) -> Path:
    """Rename an unusable file, so that nothing mistakes it for a good one; returns the new path."""
    aside = path.with_name(f"{path.name}.unusable")
    with _write_errors(path):
        os.replace(path, aside)
    return aside


def remove_temporaries(folder: Path) -> None:
    """Remove the temporary files that a killed process left behind."""
    for path in folder.glob(".*.*-*"):
        with _write_errors(path):
            path.unlink(missing_ok=True)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Lock this folder against other processes; the lock ends with the process, however it dies.

    Raises UserError if another process holds the lock. Does nothing where folders cannot be locked (Windows).
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.1)  # perhaps is_held is looking
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder}: another process is training it; wait until it ends") from error
        yield
    finally:
        os.close(descriptor)


def is_held(folder: Path) -> bool | None:
    """Return whether a process holds this folder; None where folders cannot be locked (Windows)."""
    if os.name != "posix":
        return None
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for a moment: closing it gives it back
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write `values` as indented JSON, atomically."""
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise WriteError(
            f"{path}: cannot be written ({reason}); free some space or choose another folder"
        ) from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut; does nothing on Windows, where folders cannot be opened."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `target` when the block ends, or is removed if that fails.

    Raises UserError if the disk is full or read-only, or if `target` already has files in it.
    """
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".new-", dir=target.parent) as temporary:
            folder = Path(temporary, target.name)
            folder.mkdir()
            yield folder
            # Without this, a power cut after the rename could leave empty files under the final name.
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            folder.rename(target)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Within the block, an OSError becomes a UserError that names its file, or `path` if it has none."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        place = error.filename or path
        raise UserError(f"{place}: {reason}; check the permissions and the free space") from error
