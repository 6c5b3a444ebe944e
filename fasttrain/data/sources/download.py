"""A CIFAR release for the data folder: from files placed there by hand, else from one of several places.

The sources are tried in order. One that is dead, wrong or slow is left for the next; if all that work are
slow, the fastest of them is asked again and may take its time.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

from fasttrain.data.sources.archives import unpack
from fasttrain.data.sources.cifar import exists
from fasttrain.data.sources.folder import looks_like_classes
from fasttrain.data.sources.releases import CIFAR10, Release, Source
from fasttrain.data.sources.transfer import SLOW_BYTES_PER_S, Pace, SlowError, SourceError, transfer
from fasttrain.errors import UserError
from fasttrain.system.files import disk_errors
from fasttrain.system.progress import note


class DownloadError(UserError):
    """No source provided the release. A separate class, so that a caller can fall back on other data."""


def download(root: Path, mirrors: Sequence[str] | None = None, release: Release | None = None) -> None:
    """Put a release (by default CIFAR-10) into its folder in `root`, which appears only once complete.

    An archive of the release that lies in `root` already, or the folder of the Python release, is taken
    without a download, and stays.
    mirrors: URLs (http, https, file) to try before the release's own sources; by default those in the
    environment's FASTTRAIN_MIRRORS, separated by commas. See mirror.
    An interrupted download resumes where it stopped. Does nothing if the files exist.
    Raises DownloadError if no source provides the release; UserError if the folder cannot be written to, or
    holds damaged files or other images.
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
        mirrors = [url.strip() for url in os.environ.get("FASTTRAIN_MIRRORS", "").split(",") if url.strip()]
    with disk_errors(root):
        if _take_placed(root, target, release):
            return
        if looks_like_classes(root):
            raise UserError(
                f"{root}: holds folders of images; to train on them use --data folder:{root}, "
                f"or choose another --data-dir for {release.name}"
            )
        root.mkdir(parents=True, exist_ok=True)
        _try_sources([mirror(url, release) for url in mirrors] + [*release.sources], root, target, release)
        for archive in release.archives:
            for file in archive.files:
                _part(root, file.name).unlink(missing_ok=True)


def mirror(url: str, release: Release) -> Source:
    """Return the source that a URL stands for, by its last part.

    *.parquet is the training images, next to the test images whose name has test in place of train; *python*
    is the Python release, anything else the binary one.
    """
    place, _, name = url.rpartition("/")
    if ".parquet" in name:
        return Source(release.parquet, (url, f"{place}/{name.replace('train', 'test')}"))
    return Source(release.python if "python" in name else release.binary, (url,))


def _take_placed(root: Path, target: Path, release: Release) -> bool:
    """Unpack what was placed in the data folder by hand; returns whether there was anything."""
    pickles = release.python.folder
    places = [
        (release.binary, root / release.binary.files[0].name),
        (release.python, root / release.python.files[0].name),
        (release.python, root if root.resolve().name == pickles else root / pickles),
    ]
    for archive, path in places:
        if path.exists():
            note(f"{release.name}: taken from {path}")
            try:
                unpack(archive, [path], target, release, verify=False)
            except ValueError as error:
                raise UserError(
                    f"{path}: {error}; put a good copy there, or move it away to download {release.name}"
                ) from error
            return True
    return False


def _try_sources(sources: Sequence[Source], root: Path, target: Path, release: Release) -> None:
    """Fill `target` from the first source that can. Raises DownloadError."""
    failures: dict[Source, str] = {}
    slow: dict[Source, float] = {}
    for source in sources:
        try:
            return _obtain(source, Pace(SLOW_BYTES_PER_S), root, target, release)
        except SourceError as error:
            failures[source] = str(error)
            if isinstance(error, SlowError):
                slow[source] = error.rate
            note(f"{release.name}: left {source.name}: {error}")
    for source in sorted(slow, key=lambda source: -slow[source]):
        try:
            return _obtain(source, Pace(0), root, target, release)
        except SourceError as error:
            failures[source] = str(error)
    hosts: dict[str, dict[str, None]] = {}  # without a network, all have one reason
    for source, reason in failures.items():
        hosts.setdefault(reason, {})[source.name] = None
    reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in hosts.items())
    raise DownloadError(
        f"{release.name} could not be downloaded ({reasons}). Put {release.binary.files[0].name} or "
        f"{release.python.files[0].name} into {root} yourself, or use --data synthetic"
    )


def _obtain(source: Source, pace: Pace, root: Path, target: Path, release: Release) -> None:
    """Download all files of a source and unpack them. Raises SourceError."""
    archive = source.archive
    if archive.form == "parquet" and importlib.util.find_spec("pyarrow") is None:
        raise SourceError("its Parquet files need pyarrow, which is not installed")
    parts = [_part(root, file.name) for file in archive.files]
    for url, file, part in zip(source.urls, archive.files, parts, strict=True):
        transfer(url, file, part, pace, f"{file.name} from {source.name}")
    note(f"{release.name}: unpacking")
    try:
        unpack(archive, parts, target, release, verify=True)
    except ValueError as error:
        for part in parts:
            part.unlink()
        raise SourceError(str(error)) from error


def _part(root: Path, name: str) -> Path:
    """Return where a file is downloaded to; copies of one archive go on where another stopped."""
    return root / f"{name}.part"
