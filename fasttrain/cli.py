"""The command line: `fasttrain COMMAND` or `python -m fasttrain COMMAND`. Only parses and delegates."""

import time

STARTED = time.perf_counter()  # before the slow imports: the user waits for them too

import argparse  # noqa: E402
import dataclasses  # noqa: E402
import difflib  # noqa: E402
import io  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any, TypeVar  # noqa: E402

import tyro  # noqa: E402

from fasttrain import __version__  # noqa: E402
from fasttrain.errors import Interrupted, TrainingInterrupted, UserError  # noqa: E402
from fasttrain.options import (  # noqa: E402
    CompareOptions,
    DataOptions,
    DoctorOptions,
    EvaluateOptions,
    ExportOptions,
    FindLrOptions,
    PredictOptions,
    ProfileOptions,
    RecipeOptions,
    ReportOptions,
    ShowDataOptions,
    SummaryOptions,
    TrainCommand,
    TrainOptions,
    WatchOptions,
)
from fasttrain.recipe import Recipe, load_recipe  # noqa: E402
from fasttrain.system.console import silence_stdout  # noqa: E402
from fasttrain.system.files import nearest_existing, require_writable  # noqa: E402
from fasttrain.system.revision import source_revision  # noqa: E402
from fasttrain.system.signals import leave_on_signals  # noqa: E402

if TYPE_CHECKING:
    from fasttrain.data.dataset import Dataset

T = TypeVar("T")
R = TypeVar("R", bound=RecipeOptions)


def train(args: Sequence[str]) -> int:
    options = _parse_recipe(TrainCommand, "train", args)
    with leave_on_signals():
        from fasttrain.trainer import train

    names = [field.name for field in dataclasses.fields(TrainOptions)]
    train(options.settings, **{name: getattr(options, name) for name in names} | {"started": STARTED})
    return 0


def find_lr(args: Sequence[str]) -> int:
    options = _parse_recipe(FindLrOptions, "find-lr", args)
    with leave_on_signals():
        from fasttrain.tools.find_lr import find_lr

    find_lr(options.settings, options)
    return 0


def summary(args: Sequence[str]) -> int:
    options = _parse_recipe(SummaryOptions, "summary", args)
    with leave_on_signals():
        from fasttrain.model import build_model
        from fasttrain.report.network_table import epoch_floor, summary
        from fasttrain.system.machine import pick_device

    device = pick_device(options.device)
    model = build_model(options.settings, num_classes=10)
    print(summary(model))
    print(epoch_floor(model, device))
    return 0


def evaluate(args: Sequence[str]) -> int:
    options = _parse(EvaluateOptions, "evaluate", args)
    with leave_on_signals():
        from fasttrain.tools.evaluate_checkpoint import evaluate_checkpoint

    evaluate_checkpoint(options)
    return 0


def predict(args: Sequence[str]) -> int:
    options = _parse(PredictOptions, "predict", args)
    with leave_on_signals():
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
    show(predictions, options.format)
    sys.stdout.flush()
    if skipped:
        print(f"files skipped: {len(skipped):,}", file=sys.stderr)
    return 0


def export(args: Sequence[str]) -> int:
    options = _parse(ExportOptions, "export", args)
    with leave_on_signals():
        from fasttrain.tools.export import export

    card = export(**vars(options))
    print(f"network -> {options.out}, described in {card}")
    return 0


def report(args: Sequence[str]) -> int:
    options = _parse(ReportOptions, "report", args)
    with leave_on_signals():
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


def watch(args: Sequence[str]) -> int:
    options = _parse(WatchOptions, "watch", args)
    with leave_on_signals():
        from fasttrain.tools.watch import watch

    watch(options.run, port=options.port)
    return 0


def compare(args: Sequence[str]) -> int:
    options = _parse(CompareOptions, "compare", args)
    with leave_on_signals():
        from fasttrain.report.compare import compare

    compare(options.runs, options.out)
    print(f"comparison -> {options.out}")
    return 0


def profile(args: Sequence[str]) -> int:
    options = _parse_recipe(ProfileOptions, "profile", args)
    with leave_on_signals():
        from fasttrain.system.machine import pick_device
        from fasttrain.tools.profiler import profile_training, sentences

    require_writable(nearest_existing(options.out), f"--out {options.out}")
    found, table = profile_training(
        options.settings,
        _load(options, options.settings.resolution),
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
    options = _parse(ShowDataOptions, "data", args)
    with leave_on_signals():
        from fasttrain.tools.show_data import show_dataset

    show_dataset(_load(options, Recipe(resolution=options.resolution).resolution))  # checked by Recipe
    return 0


def doctor(args: Sequence[str]) -> int:
    options = _parse(DoctorOptions, "doctor", args)
    with leave_on_signals():
        from fasttrain.tools.doctor import doctor

    return doctor(options.device)


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "train a network and write a run's folder"),
    "find-lr": (find_lr, "suggest a peak learning rate"),
    "summary": (summary, "print the network layer by layer, and what it costs"),
    "evaluate": (evaluate, "measure a checkpoint on the test images"),
    "predict": (predict, "classify any images with a checkpoint"),
    "export": (export, "write a network for use elsewhere: safetensors, torch.export, ONNX"),
    "watch": (watch, "follow a run in the browser while it trains"),
    "report": (report, "write a run's page, report.html"),
    "compare": (compare, "compare several runs on one page"),
    "profile": (profile, "show where the time of a training goes"),
    "data": (data, "fetch the data set and show what is there"),
    "doctor": (doctor, "say what is installed, what is missing and how to fix it"),
}


def _load(options: DataOptions, resolution: int) -> "Dataset":
    from fasttrain.data.load_dataset import load_from_options

    return load_from_options(options, resolution)


def _parse(options: type[T], command: str, args: Sequence[str], default: Any = tyro.MISSING_NONPROP) -> T:
    """Fill the dataclass from the flags; like tyro, print help or the error and exit where that applies."""
    return tyro.cli(options, prog=f"fasttrain {command}", args=args, default=default)


def _parse_recipe(options: type[R], command: str, args: Sequence[str]) -> R:
    """Like _parse, but the chosen recipe provides the defaults of all recipe flags."""
    first = argparse.ArgumentParser(
        f"fasttrain {command}", f"fasttrain {command} [flags]", add_help=False, allow_abbrev=False
    )
    first.add_argument("--recipe", default="auto")
    first.add_argument("--device", default="auto")
    first.add_argument("--resume")
    first.add_argument("--out", type=Path, default=Path("runs"))
    known, _ = first.parse_known_args(args)
    name = known.recipe
    if known.resume and options is TrainCommand:
        from fasttrain.system.run_folder import RECIPE_FILE, find_unfinished

        if name != "auto":
            raise UserError(f"--recipe {name}: a resumed run keeps its recipe; leave this flag out")
        name = str(find_unfinished(known.resume, known.out) / RECIPE_FILE)
    elif name == "auto":
        name = "default" if _on_gpu(known.device) else "laptop"
    return _parse(options, command, args, default=options(recipe=known.recipe, settings=load_recipe(name)))


def _on_gpu(device: str) -> bool:
    with leave_on_signals():
        from fasttrain.system.machine import pick_device

    return pick_device(device).type == "cuda"


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 2 for a user's mistake, 128 + its number after a signal.

    args: by default those of the process.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that an ASCII terminal cannot show
    first, *rest = [*(sys.argv[1:] if args is None else args)] or ["help"]
    if first == "help":
        first, *rest = [*rest, "--help"]
    command = _command(first)
    rank = os.environ.get("RANK", "0")  # set by torchrun
    try:
        status = COMMANDS[command][0](rest)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head -1` has seen enough
        silence_stdout()
        return 0
    except UserError as error:
        line, status = str(error), 2
    except Interrupted as stop:
        line, status = str(stop), stop.status
        if isinstance(stop, TrainingInterrupted) and rank != "0":
            return status  # all ranks stop at once, and one line is enough
    except KeyboardInterrupt:
        line, status = "SIGINT: stopped", 130
    place = command if rank == "0" else f"{command}, rank {rank}"
    print(f"fasttrain {place}: {' '.join(line.splitlines())}", file=sys.stderr)
    return status


class _ShowVersion(argparse.Action):
    """Prints the version, and the commit if it is known, which git is only asked for here."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        commit, is_dirty = source_revision()
        changed = ", changed since" if is_dirty else ""
        print(f"fasttrain {__version__}" + (f" ({commit:.12}{changed})" if commit else ""))
        parser.exit()


def _command(typed: str) -> str:
    """Return the command that was typed; print help or an error and exit where that applies."""
    parser = argparse.ArgumentParser(
        prog="fasttrain",
        usage="fasttrain COMMAND [flags]",
        description="Train an image classifier fast, and know how fast that is.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
        + "\n\n`fasttrain COMMAND --help` lists a command's flags, and their values on this machine.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_ShowVersion, nargs=0, help="show the version and its commit")
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of the commands below")
    command = parser.parse_args([typed]).command
    if command not in COMMANDS:
        near = difflib.get_close_matches(typed, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        parser.error(f"no command {typed!r}; {hint}")
    return str(command)
