"""The options of every command: one frozen dataclass each, from whose fields the flags are generated.

`fasttrain.train(recipe, **options)` takes the fields of TrainOptions too: each default stands here once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fasttrain.errors import UserError
from fasttrain.recipe import Recipe

DataName = Annotated[
    str, tyro.conf.arg(metavar="auto|cifar10|cifar100|synthetic|folder:PATH|webdataset:PATTERN")
]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    data: DataName = "auto"
    """auto: CIFAR-10 on disk, else downloaded, else a generated stand-in. cifar10 and cifar100 never
    fall back. folder:PATH: your own images, a folder per class, in PATH/train and PATH/test or unsplit.
    webdataset:PATTERN: your own images in tar files, as pets-{train,val}-{000..009}.tar."""
    data_dir: Path | None = None
    """Folder of the data; by default $FASTTRAIN_DATA, else data/."""
    skip_bad: bool = False
    """Leave out files of your own that cannot be decoded, and say how many; else they are refused."""


@dataclass(frozen=True, kw_only=True)
class ShowDataOptions(DataOptions):
    """Fetch the data set if need be, and show what is there: counts, classes, statistics, checksums."""

    resolution: int = Recipe.resolution
    """Pixels of a side that your own images are scaled to, as the training will."""


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    recipe: str = "auto"
    """assignment, default, fast, speedrun, laptop, or a JSON file; auto: default with a GPU, else laptop."""
    settings: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=Recipe)


@dataclass(frozen=True, kw_only=True)
class RunOptions(DataOptions):
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """How a recipe is trained: on which images, where, and what is kept. None of it changes the recipe."""

    out: Path = Path("runs")
    """Where run folders are made."""
    resume: str | None = None
    """Resume an unfinished run: its folder, a checkpoint in it, or auto for the newest under --out."""
    save_every: str = "60s"
    """Steps (500) or seconds (60s) between two checkpoints; an epoch of 10 s or more also ends with one."""
    on_nan: Literal["stop", "rollback"] = "stop"
    """On a loss of NaN or inf: stop, or roll back and halve the learning rate (at most 3 times)."""
    tensorboard: bool = False
    """Leave event files in the run's folder: every epoch's metrics, and a grid of augmented images."""
    report: tyro.conf.Suppress[bool] = True
    """Write report.html too; the seconds that takes are not in wall_seconds."""
    started: tyro.conf.Suppress[float | None] = None
    """time.perf_counter() when the process began, for wall_seconds; by default when train() is called."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand(TrainOptions, RecipeOptions):
    """Train a network and leave a run's folder: figures, log and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class FindLrOptions(RunOptions, RecipeOptions):
    """Suggest a peak learning rate: the loss over rising rates, repeated."""

    start_lr: float = 1e-2
    """Lowest rate tried."""
    end_lr: float = 10.0
    """Highest rate tried."""
    num_iter: int = 200
    """Steps from the lowest to the highest."""
    repeats: int = 3
    """Independent tries; the suggestion is their median."""
    plot: Path = Path("lr_find.png")
    """The picture of the curves to write."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(DataOptions):
    """Measure a checkpoint on every test image."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's last.pt or best.pt."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    mistakes: int = 5
    """How many of the most confident mistakes to list."""
    flip: bool = False
    """Print a second accuracy, from the mean logits of each image and its mirror image."""


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Classify images from anywhere with a checkpoint, each scaled to its resolution."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's last.pt or best.pt."""
    images: tyro.conf.Positional[tuple[Path, ...]]
    """JPEG, PNG, BMP or WebP files, or folders of them at any depth."""
    top_k: int = 3
    """How many classes to name per image."""
    format: Literal["table", "json", "csv"] = "table"
    """json: an object per line and image. csv: a row per image and class."""
    skip_bad: bool = False
    """Skip files that cannot be decoded, and name them on stderr."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    batch_size: int = 256
    """Images at a time."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a checkpoint's network for use elsewhere, float32, verified against the checkpoint."""

    checkpoint: tyro.conf.Positional[Path]
    """A run's last.pt or best.pt."""
    format: Literal["safetensors", "torch-export", "onnx"]
    """safetensors: the weights. torch-export, onnx: the graph too, for any number of images."""
    out: Path
    """The file to write: .safetensors, .pt2 or .onnx. What it needs is told beside it, in a .json."""
    input: Literal["pixels", "normalized"] = "pixels"
    """pixels: uint8, and the network normalises them. normalized: float32, and the caller has."""
    data: Annotated[str, tyro.conf.arg(metavar="auto|folder:PATH|webdataset:PATTERN")] = "auto"
    """The test images to verify on. auto: what --data-dir holds, else random pixels."""
    data_dir: Path | None = None
    """Folder of the test images to verify on; by default $FASTTRAIN_DATA, else data/. Never downloaded."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Write a finished run's report.html anew: one page, with every picture inside it."""

    run: tyro.conf.Positional[Path]
    """The run's folder, as runs/..."""
    data: Annotated[str, tyro.conf.arg(metavar="auto|folder:PATH|webdataset:PATTERN")] = "auto"
    """auto: what --data-dir holds. folder:PATH, webdataset:PATTERN: the images of a run on those."""
    data_dir: Path | None = None
    """Folder of the data; by default $FASTTRAIN_DATA, else data/. Nothing is downloaded."""
    skip_bad: bool = False
    """Leave out files of your own that cannot be decoded, as the run did."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare finished runs on one page; runs that differ only in their seed form a group."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the runs, as runs/..."""
    out: Path = Path("compare.html")
    """The page to write."""


@dataclass(frozen=True, kw_only=True)
class SummaryOptions:
    """Print the network layer by layer, the shape after every block, its cost, and an epoch's least time."""

    device: str = "auto"
    """Where the matmul rate is measured: auto, cpu, cuda, cuda:1, ..."""
    resolution: int = Recipe.resolution
    """Pixels of an image's side."""


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Say what is installed, what will be used, what is missing and how to mend it."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, kw_only=True)
class ProfileOptions(RunOptions, RecipeOptions):
    """Show where the time goes: train a few steps under torch.profiler, loader and all."""

    out: Path = Path("runs/profile")
    """Folder of trace.json, operators.txt and profile.json; older ones in it are replaced."""
    wait: int = 1
    """Steps before the profiler looks."""
    warmup: int = 2
    """Steps that warm it up."""
    active: int | None = None
    """Steps that count; by default 20 on a GPU and 3 without one."""
    operators: int = 20
    """How many operators to list."""

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("wait", self.wait, 0),
            ("warmup", self.warmup, 1),
            ("active", self.active, 1),
        ):
            if value is not None and value < least:
                raise UserError(f"--{flag} {value}: expected at least {least}")
