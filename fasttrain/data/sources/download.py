"""Download of a CIFAR release: mirrors, broken connections, checksums, and an untrusted archive."""

import hashlib
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from fasttrain.data.sources.cifar import exists
from fasttrain.data.sources.releases import CIFAR10, Release
from fasttrain.errors import UserError
from fasttrain.system.files import disk_errors, new_folder
from fasttrain.system.progress import show_bytes

CLASSES_BYTES_MAX = 4096
SILENCE_SECONDS = 10  # to connect, and between two chunks: without a network a run must fail fast
CHUNK_BYTES = 1 << 18


class DownloadError(UserError):
    """No mirror provided the release. A separate class, so that a caller can fall back on other data."""


def download(root: Path, mirrors: Sequence[str] | None = None, release: Release | None = None) -> None:
    """Download a release (by default CIFAR-10) into its folder in `root`, which appears only once complete.

    mirrors: URLs (http, https, file) of the archive, tried in order; by default those in the environment's
    FASTTRAIN_MIRRORS, separated by commas, else the release's own. An interrupted download resumes where it
    stopped. Does nothing if the files exist.
    Raises DownloadError if no mirror provides the release, UserError if the folder cannot be written to.
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
    with disk_errors(root):
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
                f"Put the files of {release.archive} into {target} yourself, or use --data synthetic"
            )
        _unpack(part, target, release)
        part.unlink()


# Downloading
class _MirrorError(Exception):
    """The reason why one mirror failed; never a fault of the local disk."""


def _fetch(url: str, part: Path, release: Release) -> None:
    """Complete `part` from one mirror and verify it.

    Raises _MirrorError. A `part` with wrong content is removed; one that is too short is kept, to resume
    from.
    """
    while True:
        existed = part.exists()
        _transfer(url, part, release)
        if part.stat().st_size == release.archive_bytes and _md5(part) == release.archive_md5:
            return
        part.unlink()
        # The first bytes may have come from another mirror: only blame this one for a file it sent in full.
        if not existed:
            raise _MirrorError("the content is not the release's (md5 or size differs)")


def _md5(path: Path) -> str:
    md5 = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            md5.update(chunk)
    return md5.hexdigest()


def _transfer(url: str, part: Path, release: Release) -> None:
    """Append to `part` until it has the archive's size, with new connections as long as each adds bytes."""
    with show_bytes(release.name, release.archive_bytes) as show:
        size = part.stat().st_size if part.exists() else 0
        while size < release.archive_bytes:
            before = size
            reason = _transfer_once(url, part, size, release.archive_bytes, show)
            size = part.stat().st_size
            if size <= before:
                raise _MirrorError(reason or f"it ends after {size} of {release.archive_bytes} bytes")


def _transfer_once(url: str, part: Path, offset: int, limit: int, show: Callable[[int], None]) -> str:
    """Download over one connection; returns why it broke, or "". Raises _MirrorError if it cannot start."""
    reason = ""
    with _open(url, offset) as response:
        # Only a 206 resumes where we stopped: a server without ranges, or a file, starts from the beginning.
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
        if error.code == 416 and offset:  # the server's file is shorter than our part: one of them is wrong
            return _open(url, 0)
        raise _MirrorError(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        raise _MirrorError(_reason(error)) from error


def _reason(error: Exception) -> str:
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    return str(cause) or type(cause).__name__


def _unpack(archive: Path, target: Path, release: Release) -> None:
    """Copy the release's files out of the archive by name, and ignore everything else in it.

    Never extractall: the names, links and modes in a downloaded tar file must not reach the file system.
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
                    f"{archive}: {member.name} has {size} bytes or is not a regular file; remove the archive"
                )
            with (folder / name).open("wb") as output:
                shutil.copyfileobj(content, output)
            missing.remove(name)
        if missing:
            raise DownloadError(f"{archive}: lacks {', '.join(sorted(missing))}; remove the archive")
