"""Which images a run was trained on: written to its folder, and found again from there."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.data.dataset import HELD_OUT, Dataset, hold_out_images
from fasttrain.data.load_dataset import absolute, load_dataset, names_own_images
from fasttrain.data.sources import cifar, synthetic
from fasttrain.errors import UserError
from fasttrain.options import DataOptions
from fasttrain.recipe import Recipe
from fasttrain.system.run_folder import DATA_FILE, read_object


@dataclass(frozen=True, kw_only=True)
class RunImages:
    """The images of one run, which their SHA-256 identifies, and where they were.

    name: the data set's. sha256: its content_hash; None if the run does not say, and only the name can be
    compared. data, data_dir, skip_bad: as load_dataset takes them, for any working directory; data is None if
    the run does not say.
    """

    name: str
    sha256: str | None = None
    data: str | None = None
    data_dir: str | None = None
    skip_bad: bool = False

    @classmethod
    def of(cls, dataset: Dataset, options: DataOptions) -> "RunImages":
        """Describe a data set that was loaded with these options; `options.data` may be the set itself."""
        data: str | None = options.data
        root = cifar.locate(options.data_dir).absolute()
        if isinstance(options.data, Dataset):
            data, root = ("auto", dataset.root) if dataset.release else (None, root)
        elif names_own_images(options.data):
            data = absolute(options.data)
        elif dataset.root.absolute() == root / synthetic.NAME:
            data = "synthetic"  # auto, or the name itself
        if data == "auto" and not synthetic.names_stand_in(dataset.name):  # a resumed run must not fall back
            data = next((key for key, one in cifar.RELEASES.items() if one == dataset.release), data)
        return cls(
            name=dataset.name,
            sha256=dataset.content_hash,
            data=data,
            data_dir=str(root.absolute()),
            skip_bad=options.skip_bad,
        )

    @classmethod
    def of_run(cls, folder: Path) -> "RunImages | None":
        """Read what a run's folder says; None if it says nothing, or nothing that can be read."""
        try:
            values = read_object(folder / DATA_FILE)
            images = cls(**values)
        except (UserError, TypeError):
            return None
        kinds: dict[str, Any] = {
            "name": str,
            "sha256": str,
            "data": str | None,
            "data_dir": str,
            "skip_bad": bool,
        }
        return images if all(isinstance(values.get(key), kind) for key, kind in kinds.items()) else None

    @property
    def hold_out(self) -> bool:
        """Whether a tenth of the training images took the place of the test images."""
        return self.name.endswith(HELD_OUT)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and their values, ready for JSON."""
        return dataclasses.asdict(self)

    def options(self, data: str, data_dir: Path | None, skip_bad: bool) -> dict[str, Any]:
        """Return what to load the images with: these options or, where they say nothing, what the run says.

        A data folder that is not there any more is not taken. Raises UserError if nobody says where a user's
        own images are.
        """
        if data != "auto":
            return {"data": data, "data_dir": data_dir, "skip_bad": skip_bad, "hold_out": self.hold_out}
        if self.data is None and names_own_images(self.name):
            kind = self.name.partition(":")[0]
            raise UserError(f"the run's images are {self.name}: say where they are with --data {kind}:...")
        if data_dir is None and self.data_dir is not None and Path(self.data_dir).is_dir():
            data_dir = Path(self.data_dir)
        data, skip_bad = self.data or data, skip_bad or self.skip_bad
        return {"data": data, "data_dir": data_dir, "skip_bad": skip_bad, "hold_out": self.hold_out}

    def are(self, dataset: Dataset) -> bool:
        """Return whether a data set holds these images, whatever it is called now."""
        return dataset.name == self.name if self.sha256 is None else dataset.content_hash == self.sha256

    def require(self, dataset: Dataset, place: object) -> None:
        """Raise UserError, which begins with `place`, if a data set does not hold these images."""
        if self.are(dataset):
            return
        found = dataset.name
        if found == self.name:
            found = f"another set of that name (SHA-256 {dataset.content_hash:.12}, not {self.sha256:.12})"
        raise UserError(f"{place}: the run was trained on {self.name}, and this is {found}")


def find_dataset(
    images: RunImages,
    data: str = "auto",
    data_dir: Path | None = None,
    *,
    skip_bad: bool = False,
    resolution: int = Recipe.resolution,
) -> Dataset:
    """Return a run's images, from where the run says they were, or from where the options say they are.

    data: auto, folder:PATH or webdataset:PATTERN. Nothing is downloaded or generated.
    Raises UserError if the images are not there.
    """
    if data != "auto" and not names_own_images(data):
        raise UserError(f"--data {data}: expected auto, folder:PATH or webdataset:PATTERN")
    options = images.options(data, data_dir, skip_bad)
    place = options["data"]
    if not names_own_images(place):
        return _find_release(images, cifar.locate(options["data_dir"]), typed=data_dir is not None)
    try:
        dataset = load_dataset(resolution=resolution, **options)
    except UserError as error:
        if place == data:
            raise
        moved = (
            f"if the run's images have moved, say where they are with --data {place.partition(':')[0]}:..."
        )
        raise UserError(f"{error}; {moved}") from error
    images.require(dataset, f"--data {place}")
    return dataset


def _find_release(images: RunImages, root: Path, *, typed: bool) -> Dataset:
    """Return the run's release from a data folder or, if the user did not name that, from the usual one."""
    usual = cifar.locate(None)
    damaged: UserError | None = None
    for folder in [root] if typed else dict.fromkeys((root, usual)):
        places = [(folder, release) for release in cifar.RELEASES.values()]
        for place, release in (*places, (folder / synthetic.NAME, cifar.CIFAR10)):
            try:
                if not cifar.exists(place, release):
                    continue
                dataset = cifar.read(place, release)
                if images.are(dataset := hold_out_images(dataset) if images.hold_out else dataset):
                    return dataset
            except UserError as error:  # perhaps of another release than the run's
                damaged = damaged or error
    raise damaged or UserError(
        f"{root} does not hold the run's images, {images.name}: name their folder with --data-dir"
    )
