"""The options of every command: one frozen dataclass each; the flags are generated from its fields.

`fasttrain.train(recipe, **options)` takes the fields of TrainOptions, so each default is given only once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypedDict

import tyro

from fasttrain.callbacks import Callback
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe, Views, flag

if TYPE_CHECKING:
    from fasttrain.data.dataset import Dataset

DataName = Annotated[
    str, tyro.conf.arg(metavar="auto|cifar10|cifar100|synthetic|folder:PATH|webdataset:PATTERN")
]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    data: DataName = "auto"
    """auto: CIFAR-10 from the disk, else downloaded, else a generated stand-in. cifar10 and cifar100 never
    fall back. folder:PATH: your own images, a folder per class, in PATH/train and PATH/test or unsplit.
    webdataset:PATTERN: your own images in tar files: their folder, or pets-{train,val}-{000..009}.tar."""
    data_dir: Path | None = None
    """Folder of the data; by default $FASTTRAIN_DATA, else data/."""
    skip_bad: bool = False
    """Leave out files of your own that cannot be decoded, and say how many; by default they are refused."""
    hold_out: bool = False
    """To choose settings by: a tenth of each class's training images takes the place of the test images."""


@dataclass(frozen=True, kw_only=True)
class RunDataOptions:
    data: Annotated[str, tyro.conf.arg(metavar="auto|folder:PATH|webdataset:PATTERN")] = "auto"
    """auto: the run's images, where they were. folder:PATH, webdataset:PATTERN: where your own are now."""
    data_dir: Path | None = None
    """Folder of the run's images, if they have moved. Nothing is downloaded."""
    skip_bad: bool = False
    """Leave out files of your own that cannot be decoded; a run that did so does it again."""


@dataclass(frozen=True, kw_only=True)
class ShowDataOptions(DataOptions):
    """Fetch the data set if necessary, and show what is there: counts, classes, statistics, checksums."""

    resolution: int = Recipe.resolution
    """Width and height that your own images are scaled to, in pixels, as in the training."""


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    recipe: str = "auto"
    """assignment, default, fast, speedrun, laptop, or a JSON file; auto: default with a GPU, else laptop."""
    settings: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=Recipe)


@dataclass(frozen=True, kw_only=True)
class RunOptions(DataOptions):
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..., or mps, which auto does not take."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """How to train a recipe: on which images, where, and what to keep. None of it changes the recipe."""

    out: Path = Path("runs")
    """Where to create the run's folder."""
    resume: str | None = None
    """Resume an unfinished run: its folder, a checkpoint in it, or auto for the newest under --out."""
    save_every: str = "60s"
    """Steps (500) or seconds (60s) between two checkpoints; an epoch of 10 s or more also ends with one."""
    on_nan: Literal["stop", "rollback"] = "stop"
    """On NaN or inf: stop, or roll back and halve the learning rate (at most 3 times)."""
    fallback: bool = True
    """Where DALI, bf16, torch.compile, the CUDA graph, a fused optimizer or pinned memory fails on this
    machine, use the next best and say so; --no-fallback makes that an error."""
    tensorboard: bool = False
    """Write event files to the run's folder: every epoch's metrics, and a grid of augmented images."""
    report: tyro.conf.Suppress[bool] = True
    """Write report.html too; wall_seconds does not include the time for it."""
    callbacks: tyro.conf.Suppress[Sequence[Callback]] = ()
    """Told about every epoch and about the end."""
    started: tyro.conf.Suppress[float | None] = None
    """time.perf_counter() at the start of the process, for wall_seconds; by default at train()'s call."""

    @classmethod
    def of(cls, keywords: "TrainKeywords") -> "TrainOptions":
        """Return the options that these keywords give; a path may also be a str."""
        values: dict[str, Any] = dict(keywords)
        for name in ("data_dir", "out"):
            if isinstance(values.get(name), str):
                values[name] = Path(values[name])
        return cls(**values)


class TrainKeywords(TypedDict, total=False):
    """The fields of TrainOptions as keywords for type checkers; a test compares the two."""

    data: "str | Dataset"
    data_dir: Path | str | None
    skip_bad: bool
    hold_out: bool
    device: str
    out: Path | str
    resume: Path | str | None
    save_every: str
    on_nan: Literal["stop", "rollback"]
    fallback: bool
    tensorboard: bool
    report: bool
    callbacks: Sequence[Callback]
    started: float | None


def typed_flags(options: TrainOptions, *names: str) -> list[str]:
    """Return the flags that give these options their values, without those that have their default.

    A value that cannot be typed, such as a data set from Python, is left out.
    """
    words = []
    for name in names:
        value, default = getattr(options, name), getattr(TrainOptions, name)
        if value != default and isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        elif value != default and isinstance(value, str | Path):
            words += [flag(name), str(value)]
    return words


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainOptions, RecipeOptions):
    """Train a network and write a run's folder: figures, log and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class FindLrOptions(RunOptions, RecipeOptions):
    """Suggest a peak learning rate from the loss over rising rates, in several tries."""

    start_lr: float | None = None
    """Lowest rate to try; by default 1e-4, with the recipe assignment 1e-2."""
    end_lr: float = 10.0
    """Highest rate to try."""
    num_iter: int | None = None
    """Steps from the lowest to the highest; by default 200, or as many as three minutes allow."""
    repeats: int | None = None
    """Independent tries; the suggestion is their median. By default 3, or 2 if those take too long."""
    plot: Path = Path("lr_find.png")
    """Where to write the plot of the curves."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions):
    """Measure a checkpoint on every image of a split: by default the test images of its own run."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, or a checkpoint such as its best.pt; latest: the newest finished run in runs/."""
    data: DataName = "auto"
    """auto: the run's own images. Any other value as in training: other images with the same classes."""
    split: Literal["test", "train", "all"] = "test"
    """Which images to measure on; all: a folder of new images as a whole, for instance."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..., or mps, which auto does not take."""
    mistakes: int = 5
    """How many of the most confident mistakes to list."""
    views: Views = "none"
    """Print a second accuracy, from the mean logits of several views of each image: mirror or shifts, as a
    recipe's --test-views."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Classify any images with a checkpoint; they are scaled to the network's resolution."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, or a checkpoint such as its best.pt; latest: the newest finished run in runs/."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """JPEG, PNG, BMP, WebP, GIF or TIFF files, or folders of them at any depth."""
    top_k: int = 3
    """How many classes to name per image."""
    format: Literal["table", "json", "csv"] = "table"
    """json: a line with an object per image. csv: a row per image and class."""
    skip_bad: bool = False
    """Skip files that cannot be decoded, and name them on stderr."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..., or mps, which auto does not take."""
    batch_size: int = 256
    """Images at a time."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(RunDataOptions):
    """Write a checkpoint's network for use elsewhere, in float32.

    It is compared with the checkpoint first: on the run's test images or, without them, on random pixels.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A run's folder, or a checkpoint such as its best.pt; latest: the newest finished run in runs/."""
    out: Path
    """The file to write: .safetensors, .pt2 or .onnx. A .json next to it describes input and output."""
    format: Literal["safetensors", "torch-export", "onnx"] | None = None
    """safetensors: the weights. torch-export, onnx: the graph too, for any number of images. By default, what
    --out ends with."""
    input: Literal["pixels", "normalized"] = "pixels"
    """pixels: uint8, normalised by the network. normalized: float32, normalised by the caller."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions(RunDataOptions):
    """Write a run's report.html again: one page, with every picture embedded."""

    run: tyro.conf.Positional[Path]
    """The run's folder; latest: the newest finished one in runs/."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..., or mps, which auto does not take."""


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Show a run's page in the browser, and follow the run while it trains."""

    run: tyro.conf.Positional[Path] = Path("latest")
    """The run's folder; latest: the newest in runs/, finished or not."""
    port: int = 8000
    """Where the page is: http://127.0.0.1:PORT, for this machine alone; 0 takes any that is free."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare finished runs on one page; runs that differ only in their seed form a group."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """The runs' folders, such as runs/*."""
    out: Path = Path("compare.html")
    """The page to write."""


@dataclass(frozen=True, kw_only=True)
class SummaryOptions(RecipeOptions):
    """Print a recipe's network layer by layer, every block's shape, its cost, and an epoch's least time."""

    device: str = "auto"
    """Where to measure the matmul rate: auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Say what is installed, what will be used, what is missing and how to fix it."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..., or mps, which auto does not take."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(RunOptions, RecipeOptions):
    """Show where the time goes: train a few steps under torch.profiler, including the loader."""

    out: Path = Path("runs/profile")
    """Folder for trace.json, operators.txt and profile.json; older ones are replaced."""
    wait: int = 1
    """Steps before the profiler starts."""
    warmup: int = 2
    """Steps that warm up the profiler."""
    active: int | None = None
    """Steps to profile; by default 20 on a GPU and 3 on a CPU."""
    operators: int = 20
    """How many operators to list."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("wait", self.wait, 0),
            ("warmup", self.warmup, 1),
            ("active", self.active, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"{flag(name)} {value}: expected at least {least}")
