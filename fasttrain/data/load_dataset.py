"""The choice of the data set: `--data` in, a Dataset out."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fasttrain.data.dataset import Dataset, hold_out_images
from fasttrain.data.sources import cifar, folder, synthetic, webdataset
from fasttrain.data.sources.download import DownloadError, download
from fasttrain.errors import UserError
from fasttrain.options import DataOptions
from fasttrain.recipe import Recipe

OWN_IMAGES = {"folder": folder.read, "webdataset": webdataset.read}
"""The readers of a user's own images, by what precedes the colon in `--data`."""


def names_own_images(data: str) -> bool:
    """Return whether `data` names a user's own images: folder:PATH or webdataset:PATTERN."""
    return data.partition(":")[0] in OWN_IMAGES


def absolute(data: str) -> str:
    """Return the `--data` of a user's own images with absolute paths, for any working directory."""
    source, _, place = data.partition(":")
    if source == "webdataset":
        place = webdataset.join_patterns(map(os.path.abspath, webdataset.split_patterns(place)))
    else:
        place = os.path.abspath(os.path.expanduser(place))
    return f"{source}:{place}"


def load_dataset(
    data: str = "auto",
    data_dir: Path | str | None = None,
    *,
    resolution: int = Recipe.resolution,
    skip_bad: bool = False,
    hold_out: bool = False,
    classes: Sequence[str] | None = None,
    log: Callable[[str], object] = print,
) -> Dataset:
    """Load a data set; download or generate it first if it is not there yet.

    data: cifar10 and cifar100 take the files in the data folder, or download them. auto takes cifar10 or, if
    the download fails, the synthetic stand-in, and logs that. synthetic takes the stand-in. folder:PATH and
    webdataset:PATTERN take the images there, scaled to the resolution and cached as pixels in the data
    folder; with skip_bad, images that cannot be decoded are left out.
    data_dir: the data folder; by default $FASTTRAIN_DATA, else data/.
    hold_out: only the training images, a tenth of them as test images; see dataset.hold_out_images.
    classes: those of a trained network, to measure it on images of your own: labels are in their order, some
    may be missing, and test images are enough.
    Raises UserError if there is no such data set, or if its files are missing, corrupt or unreadable.
    """
    dataset = _load(data, cifar.locate(data_dir), resolution, skip_bad, classes, log)
    return hold_out_images(dataset) if hold_out else dataset


def _load(
    data: str,
    root: Path,
    resolution: int,
    skip_bad: bool,
    classes: Sequence[str] | None,
    log: Callable[[str], object],
) -> Dataset:
    """Load the whole data set, as load_dataset; root: the data folder."""
    source, _, place = data.partition(":")
    if source in OWN_IMAGES and place:
        path, cache = Path(place).expanduser(), root / "decoded"
        return OWN_IMAGES[source](
            path, cache, resolution=resolution, skip_bad=skip_bad, classes=classes, log=log
        )
    if data not in ("auto", *cifar.RELEASES, "synthetic"):
        expected = ", ".join(("auto", *cifar.RELEASES, "synthetic"))
        hint = f"; did you mean --data folder:{data}?" if Path(data).is_dir() else ""
        raise UserError(f"--data {data}: expected {expected}, folder:PATH, or webdataset:PATTERN{hint}")
    if skip_bad:
        raise UserError("--skip-bad: only for folder:PATH and webdataset:PATTERN; leave it out")
    if resolution != cifar.IMAGE_SHAPE[0]:
        raise UserError(
            f"--resolution {resolution}: the images of --data {data} have {cifar.IMAGE_SHAPE[0]} pixels a "
            "side; only those of folder:PATH and webdataset:PATTERN are scaled"
        )
    stand_in = root / synthetic.NAME
    if data != "synthetic":
        release = cifar.RELEASES.get(data, cifar.CIFAR10)
        try:
            if not cifar.exists(root, release):
                download(root, release=release)
            dataset = cifar.read(root, release)
            if data != "auto" and dataset.name == synthetic.NAME:
                raise UserError(
                    f"--data {data}: {root} holds the synthetic stand-in; choose another --data-dir"
                )
            return dataset
        except DownloadError as error:
            if data != "auto":
                raise
            log(
                f"NOT CIFAR-10: {error}. Training on a generated stand-in instead; "
                f"every result says '{synthetic.NAME}'."
            )
    synthetic.generate(stand_in)
    return cifar.read(stand_in)


def load_from_options(
    options: DataOptions,
    resolution: int,
    log: Callable[[str], object] = print,
    *,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Load the data set that a command's options name; takes classes and raises as load_dataset does.

    From Python, the options may also hold the data set itself.
    """
    if isinstance(options.data, Dataset):
        return hold_out_images(options.data) if options.hold_out else options.data
    return load_dataset(
        options.data,
        options.data_dir,
        resolution=resolution,
        skip_bad=options.skip_bad,
        hold_out=options.hold_out,
        classes=classes,
        log=log,
    )
