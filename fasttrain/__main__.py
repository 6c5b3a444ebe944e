"""The command line: `fasttrain VERB` or `python -m fasttrain VERB`. Parses, delegates, nothing else."""

import sys
import time

STARTED = time.perf_counter()  # before the slow imports: they are part of what a user waits for

import argparse  # noqa: E402
import os  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from dataclasses import dataclass, field  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Annotated, Any, Literal, TypeVar  # noqa: E402

from fasttrain.errors import Interrupted, UserError  # noqa: E402
from fasttrain.recipe import Recipe, load_recipe  # noqa: E402

import tyro  # noqa: E402  isort: skip

T = TypeVar("T")


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
class RunOptions(DataOptions):
    recipe: str = "auto"
    """assignment, default, fast, record, laptop, or a JSON file; auto: default with a GPU, else laptop."""
    settings: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=Recipe)
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunOptions):
    """Train a network and leave a run's folder: figures, log and checkpoints."""

    out: Path = Path("runs")
    """Where run folders are made."""
    resume: str | None = None
    """Go on with an unfinished run: its folder, a checkpoint in it, or auto for the newest under --out."""
    save_every: str = "60s"
    """Steps, as 500, or seconds, as 60s, between two checkpoints; epochs of 10 s and more end with one."""
    on_nan: Literal["stop", "rollback"] = "stop"
    """A loss that is no finite number: stop, or go back to the last checkpoint with half the rate, thrice."""
    tensorboard: bool = False
    """Leave event files in the run's folder: every epoch's metrics, and a grid of augmented images."""


@dataclass(frozen=True, kw_only=True)
class FindLrOptions(RunOptions):
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
    """Go on past files that cannot be decoded, and name them on stderr."""
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
    """Set finished runs side by side on one page; runs that differ in their seed alone form a group."""

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
class ProfileOptions(RunOptions):
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


def train(args: Sequence[str]) -> int:
    options = _parse_run(TrainOptions, "train", args)
    from fasttrain.trainer import train

    train(
        options.settings,
        data=options.data,
        data_dir=options.data_dir,
        skip_bad=options.skip_bad,
        out=options.out,
        device=options.device,
        resume=options.resume,
        save_every=options.save_every,
        on_nan=options.on_nan,
        tensorboard=options.tensorboard,
        started=STARTED,
    )
    return 0


def find_lr(args: Sequence[str]) -> int:
    options = _parse_run(FindLrOptions, "find-lr", args)
    from fasttrain.tools.find_lr import find_lr

    find_lr(
        options.settings,
        data=options.data,
        data_dir=options.data_dir,
        skip_bad=options.skip_bad,
        device=options.device,
        start_lr=options.start_lr,
        end_lr=options.end_lr,
        num_iter=options.num_iter,
        repeats=options.repeats,
        plot=options.plot,
    )
    return 0


def summary(args: Sequence[str]) -> int:
    options = _parse(SummaryOptions, "summary", args)
    from fasttrain.model import build_model
    from fasttrain.report.summary import epoch_floor, summary
    from fasttrain.system.machine import pick_device

    device = pick_device(options.device)
    model = build_model(Recipe(resolution=options.resolution), num_classes=10)
    print(summary(model))
    print(epoch_floor(model, device))
    return 0


def evaluate(args: Sequence[str]) -> int:
    options = _parse(EvaluateOptions, "evaluate", args)
    from fasttrain.data.load import load_dataset
    from fasttrain.tools.evaluate_checkpoint import evaluate_checkpoint

    evaluate_checkpoint(
        options.checkpoint,
        lambda resolution: load_dataset(
            options.data, options.data_dir, print, resolution=resolution, skip_bad=options.skip_bad
        ),
        device=options.device,
        mistakes=options.mistakes,
        flip=options.flip,
    )
    return 0


def predict(args: Sequence[str]) -> int:
    options = _parse(PredictOptions, "predict", args)
    from fasttrain.tools.predict import predict, show

    skipped: list[str] = []

    def skip(reason: str) -> None:
        print(reason, file=sys.stderr)
        skipped.append(reason)

    predictions = predict(
        options.checkpoint,
        options.images,
        top_k=options.top_k,
        device=options.device,
        batch_size=options.batch_size,
        skip=skip if options.skip_bad else None,
    )
    try:
        show(predictions, options.format)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head -1` has seen enough; Python would complain again when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if skipped:
        print(f"files skipped: {len(skipped):,}", file=sys.stderr)
    return 0


def export(args: Sequence[str]) -> int:
    options = _parse(ExportOptions, "export", args)
    from fasttrain.tools.export import export

    card = export(
        options.checkpoint,
        options.format,
        options.out,
        input=options.input,
        data=options.data,
        data_dir=options.data_dir,
    )
    print(f"network -> {options.out}, described in {card}")
    return 0


def report(args: Sequence[str]) -> int:
    options = _parse(ReportOptions, "report", args)
    from fasttrain.tools.report import report

    path = report(
        options.run,
        data=options.data,
        data_dir=options.data_dir,
        skip_bad=options.skip_bad,
        device=options.device,
    )
    print(f"report -> {path}")
    return 0


def compare(args: Sequence[str]) -> int:
    options = _parse(CompareOptions, "compare", args)
    from fasttrain.report.compare import compare

    compare(options.runs, options.out)
    print(f"comparison -> {options.out}")
    return 0


def profile(args: Sequence[str]) -> int:
    options = _parse_run(ProfileOptions, "profile", args)
    from fasttrain.data.load import load_dataset
    from fasttrain.system.machine import pick_device
    from fasttrain.tools.profiler import profile_training, sentences

    found, table = profile_training(
        options.settings,
        load_dataset(
            options.data,
            options.data_dir,
            print,
            resolution=options.settings.resolution,
            skip_bad=options.skip_bad,
        ),
        device=pick_device(options.device),
        out=options.out,
        wait=options.wait,
        warmup=options.warmup,
        active=options.active,
        operators=options.operators,
    )
    print(table)
    print(*sentences(found), sep="\n")
    print(f"trace -> {options.out / 'trace.json'}, for ui.perfetto.dev")
    return 0


def data(args: Sequence[str]) -> int:
    @dataclass(frozen=True, kw_only=True)
    class Options(DataOptions):
        """Fetch the data set if need be, and show what is there: counts, classes, statistics, checksums."""

        resolution: int = Recipe.resolution
        """Pixels of a side that your own images are scaled to, as the training will."""

    options = _parse(Options, "data", args)
    from fasttrain.data.load import load_dataset
    from fasttrain.tools.show_data import show_dataset

    resolution = Recipe(resolution=options.resolution).resolution  # checked
    show_dataset(
        load_dataset(options.data, options.data_dir, print, resolution=resolution, skip_bad=options.skip_bad)
    )
    return 0


def doctor(args: Sequence[str]) -> int:
    options = _parse(DoctorOptions, "doctor", args)
    from fasttrain.tools.doctor import doctor

    return doctor(options.device)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "train a network and leave a run's folder"),
    "find-lr": (find_lr, "suggest a peak learning rate"),
    "summary": (summary, "print the network layer by layer, and what it costs"),
    "evaluate": (evaluate, "measure a checkpoint on the test images"),
    "predict": (predict, "classify images from anywhere with a checkpoint"),
    "export": (export, "write a network for use elsewhere: safetensors, torch.export, ONNX"),
    "report": (report, "write a run's page, report.html"),
    "compare": (compare, "set several runs side by side on one page"),
    "profile": (profile, "show where the time of a training goes"),
    "data": (data, "fetch the data set and show what is there"),
    "doctor": (doctor, "say what is installed and what is missing"),
}


def _parse(options: type[T], verb: str, args: Sequence[str], default: Any = tyro.MISSING_NONPROP) -> T:
    """The dataclass filled from the flags; prints help or what is wrong and exits, as tyro does."""
    return tyro.cli(options, prog=f"fasttrain {verb}", args=args, default=default)


R = TypeVar("R", bound=RunOptions)


def _parse_run(options: type[R], verb: str, args: Sequence[str]) -> R:
    """Like _parse, but the chosen recipe supplies the defaults of all the recipe's flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", default="auto")
    first.add_argument("--device", default="auto")
    first.add_argument("--resume")
    first.add_argument("--out", type=Path, default=Path("runs"))
    known, _ = first.parse_known_args(args)
    asks_for_help = any(flag in ("-h", "--help") for flag in args)
    name = known.recipe
    if known.resume and options is TrainOptions:
        from fasttrain.system.run_folder import RECIPE_FILE, find_unfinished

        if name != "auto":
            raise UserError(f"--recipe {name}: a resumed run keeps its own; leave it out")
        name = str(find_unfinished(known.resume, known.out) / RECIPE_FILE)
    elif name == "auto":
        name = "default" if asks_for_help or _on_gpu(known.device) else "laptop"
    return _parse(options, verb, args, default=options(recipe=known.recipe, settings=load_recipe(name)))


def _on_gpu(device: str) -> bool:
    from fasttrain.system.machine import pick_device

    return pick_device(device).type == "cuda"


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 2 for a user's mistake, 130 or 143 when interrupted."""
    parser = argparse.ArgumentParser(
        prog="fasttrain",
        description="The fastest honest way to train an image classifier on one GPU.",
        epilog="commands:\n" + "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="command", help="one of the commands below")
    args = list(sys.argv[1:] if args is None else args)
    command = parser.parse_args(args[:1]).command
    rank = os.environ.get("RANK", "0")  # where torchrun has started several
    place = command if rank == "0" else f"{command}, rank {rank}"
    try:
        return COMMANDS[command][0](args[1:])
    except UserError as error:
        print(f"fasttrain {place}: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        if rank == "0":  # all stop alike
            print(f"fasttrain {command}: {stop}", file=sys.stderr)
        return stop.status
    except KeyboardInterrupt:
        said = "; fasttrain train --resume auto goes on where it was last saved" if command == "train" else ""
        print(f"fasttrain {command}: interrupted{said}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
