"""The training loop: from a recipe to a run's folder."""

import contextlib
import dataclasses
import importlib
import math
import os
import shlex
import threading
import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fasttrain.checkpoint.file import LAST, PREVIOUS
from fasttrain.checkpoint.fingerprint import fingerprint
from fasttrain.checkpoint.manager import SaveInterval, Saver
from fasttrain.checkpoint.resume import KeptSettings, resume_from, resumed_recipe
from fasttrain.checkpoint.state import RunState
from fasttrain.checkpoint.writer import CheckpointWriter
from fasttrain.compile import cache_of, captures_graph, compile_step, payoff, pick_compile_mode
from fasttrain.data.build import build_loader, pick_loader
from fasttrain.data.dataset import Dataset
from fasttrain.data.load import load_dataset
from fasttrain.data.loader import Loader
from fasttrain.distributed import World, command, join
from fasttrain.errors import DivergedError, UserError
from fasttrain.evaluate import Evaluation, evaluate, joined
from fasttrain.lr_finder import find_max_lr
from fasttrain.model import build_model, training_flop_per_image
from fasttrain.recipe import PRESETS, Recipe, flag
from fasttrain.report.html import first_images, write_report
from fasttrain.report.run import Run, load_run
from fasttrain.step import TrainStep
from fasttrain.system.files import hold_folder, remove_temporaries
from fasttrain.system.machine import describe, hardware_name, pick_device
from fasttrain.system.metrics import WaitTimer, model_flops_utilization, peak_memory_gib, watch
from fasttrain.system.precision import DTYPES, pick_precision, prepare
from fasttrain.system.rates import measure_matmul_tflops
from fasttrain.system.run_folder import (
    MACHINE_FILE,
    RECIPE_FILE,
    RESULT_FILE,
    find_unfinished,
    new_run_folder,
    read_object,
)
from fasttrain.system.run_log import RunLog, SilentLog, require_tensorboard
from fasttrain.system.signals import catch_signals

FIRST_STEPS = 5
"""Steps after which the laptop recipe says how long the full one would take."""

SAVE_EVERY = "60s"

MAX_ROLLBACKS = 3
"""How often a diverged run may go back and halve its rate."""


def train(
    recipe: Recipe,
    *,
    data: str | Dataset = "auto",
    data_dir: Path | str | None = None,
    skip_bad: bool = False,
    out: Path | str = "runs",
    device: str = "auto",
    resume: str | Path | None = None,
    save_every: str = SAVE_EVERY,
    on_nan: Literal["stop", "rollback"] = "stop",
    tensorboard: bool = False,
    started: float | None = None,
    report: bool = True,
) -> Run:
    """Train one recipe and leave a run's folder; returns what is in it.

    data, data_dir, skip_bad: the images, as data.loader.load_dataset takes them; or data is a Dataset.
    resume: go on with an unfinished run of this recipe: its folder, a checkpoint in it, or auto for the
    newest under `out`.
    save_every: steps, as 500, or seconds, as 60s, between two checkpoints; an epoch ends with one too, unless
    the one before is younger than 10 s.
    on_nan: what follows a loss that is no finite number: an error, or up to three times the last checkpoint
    again at half the rate.
    tensorboard: leave event files in the folder: every epoch's metrics, and a grid of augmented images.
    started: time.perf_counter() when the process began, for wall_seconds; now, if not given.
    report: write report.html too, some seconds that wall_seconds leaves out.
    Under torchrun each of its processes calls this alike, and they train as one: each on its share of every
    batch, and the first writes the folder and speaks for all.
    Raises UserError on anything that the user can mend, and Interrupted (a KeyboardInterrupt) after the first
    SIGINT or SIGTERM, once the state is saved.
    """
    started = time.perf_counter() if started is None else started
    interval = SaveInterval.parse(save_every)
    unfinished = None if resume is None else find_unfinished(resume, Path(out))
    if tensorboard:
        require_tensorboard()
    world = join(pick_device(device))
    run_device = world.device
    checkpoints = world.broadcast(lambda: _checkpoints(unfinished, resume))
    kept = world.broadcast(lambda: KeptSettings.from_checkpoints(checkpoints))
    if unfinished is not None:
        recipe = resumed_recipe(recipe, unfinished, kept.precision)
    share = world.share(recipe.batch_size)
    precision = kept.precision
    if precision is None:
        picked = pick_precision(recipe.compute_dtype, run_device)
        precision = world.broadcast(lambda: picked)  # a CPU measures it: let no two ranks differ
    dtype = DTYPES[precision]
    prepare(run_device, precision)

    _import_meanwhile("nvidia.dali", "torch._dynamo")
    dataset = world.main_first(
        lambda: (
            data
            if isinstance(data, Dataset)
            else load_dataset(
                data,
                Path(data_dir) if data_dir else None,
                world.print,
                resolution=recipe.resolution,
                skip_bad=skip_bad,
            )
        )
    )
    # Wanted by the fingerprint: let it pass while the images are padded.
    threading.Thread(target=lambda: dataset.content_hash, name="hash").start()
    kind = pick_loader(recipe.loader, run_device, world.print)
    mode = pick_compile_mode(recipe.compile, run_device, world.print)
    parts: dict[str, Any] = {"kind": kind, "device": run_device, "shard": world.shard}
    train_loader = build_loader(dataset, recipe, train=True, **parts)
    test_loader = build_loader(dataset, recipe, train=False, **parts)

    folder = world.broadcast(lambda: unfinished or new_run_folder(Path(out), recipe.name))
    log = RunLog(folder) if world.is_main else SilentLog(folder)
    with world, _held(world, folder), _one_line_if_memory_is_full(recipe):
        machine = describe(run_device) | {"ranks": world.size}
        if checkpoints != world.broadcast(lambda: _checkpoints(unfinished, resume)):
            raise UserError(f"{folder}: another process has trained it in the meantime; resume it again")
        if unfinished is None:
            log.write(MACHINE_FILE, machine)
            log.write(RECIPE_FILE, recipe.to_dict())
        if tensorboard and world.is_main:
            log.open_tensorboard(first_images(dataset, recipe, run_device)[0])
        log.say(
            f"{recipe.name}: {dataset.name}, {recipe.epochs} epochs of {len(train_loader)} steps of "
            f"{recipe.batch_size}, {run_device.type}{f' on {world.size} ranks' if world.size > 1 else ''}, "
            f"{precision}, {train_loader.name} -> {log.folder}"
        )
        matmul_tflops = measure_matmul_tflops(run_device, dtype, seconds=0.1)  # a short look: users wait
        max_lr = recipe.max_lr
        if max_lr == "auto":  # a checkpoint knows what was found
            settings = {"kind": kind, "device": run_device, "dtype": dtype}
            max_lr = (
                math.inf
                if checkpoints
                else world.broadcast(lambda: _find_max_lr(log, dataset, recipe, settings))
            )

        torch.manual_seed(recipe.seed)
        model = build_model(recipe, len(dataset.classes), mean=dataset.mean, std=dataset.std)
        if recipe.sync_batchnorm:
            world.synchronize_batchnorm(model)
        if world.rank:
            torch.manual_seed(recipe.seed + world.rank)  # lest dropout falls alike on every rank's images
        step = TrainStep(
            model,
            recipe,
            max_lr=float(max_lr),
            total_steps=recipe.epochs * len(train_loader),
            device=run_device,
            compute_dtype=dtype,
            cuda_graph=world.size == 1 and captures_graph(recipe, run_device, mode),
            world=world,
        )
        example = _example_batch(share, recipe.resolution, run_device)
        cache = cache_of(step, hardware_name(machine), mode, share)
        if kept.compile_mode is not None:
            mode = None if kept.compile_mode == "off" else mode and kept.compile_mode
        elif mode and recipe.compile == "auto":
            own = payoff(step, cache, matmul_tflops, *example)
            gain = world.broadcast(lambda: own)
            log.say(str(gain))
            mode = mode if gain else None
        if not checkpoints or _lost(log, MACHINE_FILE):
            log.write(MACHINE_FILE, machine | {"compile": mode})
        identity = fingerprint(
            *(recipe, dataset),
            loader=kind,
            precision=precision,
            compile_mode=mode,
            device=run_device,
            world_size=world.size,
        )
        world.require_same(identity)
        run = RunState(step, train_loader, dataset, fingerprint=identity, machine=machine)
        if checkpoints:
            resume_from(checkpoints, run, log.say)
            if note := kept.precision_note(recipe.compute_dtype, run_device):
                log.say(note)
        log.rewind(run.progress.epochs)
        compile_seconds = compile_step(step, mode, cache, *example)
        if mode:
            log.say(f"compiled ({mode}) in {compile_seconds:.1f} s")
        run.add_up(started, compile_seconds=compile_seconds, matmul_tflops=matmul_tflops)

        how_to_go_on = _resume_command(
            log.folder,
            data=("auto" if isinstance(data, Dataset) else data, "auto"),
            data_dir=(data_dir, None),
            skip_bad=(skip_bad, False),
            device=(device, "auto"),
            save_every=(save_every, SAVE_EVERY),
            on_nan=(on_nan, "stop"),
            tensorboard=(tensorboard, False),
        )
        test: Evaluation | None = None
        with (
            CheckpointWriter(log.folder, run_device) as writer,
            catch_signals() as signalled,
            world.report_lost_rank(),
        ):
            world.begin()
            saver = Saver(run, writer, interval, signalled, how_to_go_on)
            saver.save()
            while run.epoch < recipe.epochs:
                try:
                    train_figures = _train_epoch(run, log, saver)
                except DivergedError as error:
                    if on_nan == "stop" or run.progress.rollbacks == MAX_ROLLBACKS:
                        raise
                    saver.roll_back()
                    log.rewind(run.progress.epochs)
                    log.say(f"{error} Back to step {step.step} with half the rate, {step.max_lr:.3g}")
                    continue
                test, test_figures = _test_epoch(step, test_loader)
                run.progress.finish_epoch({"epoch": run.epoch + 1, **train_figures, **test_figures})
                log.epoch(run.progress.epochs[-1])
                saver.end_epoch()
                saver.stop_if_asked()
            if report and test is None:  # resumed after its last epoch
                test, _ = _test_epoch(step, test_loader)

        # A peak is a maximum: measured before and after, lest a busy moment flatter the training.
        matmul_tflops = max(run.progress.matmul_tflops, measure_matmul_tflops(run_device, dtype))
        result = {
            "recipe": recipe.to_dict(),
            "dataset": dataset.name,
            "device": run_device.type,
            "ranks": world.size,
            "loader": train_loader.name,
            "precision": precision,
            "compile": mode or "off",
            "epochs": recipe.epochs,
            "max_lr": step.max_lr,
            **_figures(run, matmul_tflops),
            "peak_memory_gib": peak_memory_gib(run_device),
            "peak_resident_gib": peak_memory_gib(torch.device("cpu")),
        }
        log.write(RESULT_FILE, result)
        log.say(
            f"{dataset.name}: test accuracy {result['test_accuracy']:.2%} after {recipe.epochs} epochs "
            f"(best {result['best_test_accuracy']:.2%} at epoch {result['best_epoch']}, chosen on the test "
            f"images){_said_of_flip(result)}; {result['train_seconds']:.1f} s of training, "
            f"{result['wall_seconds']:.1f} s in all -> {log.folder}"
        )
        finished = world.broadcast(lambda: load_run(log.folder))
        world.leave()
        if test is not None and report and world.is_main:
            _report(finished, log, dataset, test, run_device)
        return finished


def _figures(run: RunState, matmul_tflops: float) -> dict[str, Any]:
    """The figures of a finished run, all of its processes together."""
    progress, recipe = run.progress, run.step.recipe
    rows, best = progress.epochs, progress.best_epoch
    train_seconds = sum(row["seconds"] for row in rows)
    images_per_sec = recipe.epochs * len(run.loader) * recipe.batch_size / train_seconds
    flip = {"test_accuracy_flip": rows[-1]["test_accuracy_flip"]} if recipe.test_flip else {}
    return {
        "test_accuracy": rows[-1]["test_accuracy"],
        **flip,
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "epoch_seconds": [row["seconds"] for row in rows],
        "train_seconds": train_seconds,
        "test_seconds": sum(row["test_seconds"] for row in rows),
        "compile_seconds": progress.compile_seconds,
        "wall_seconds": run.wall_seconds,
        "resumed": progress.resumed,
        "changes": progress.changes,
        "rollbacks": progress.rollbacks,
        "images_per_sec": images_per_sec,
        "data_wait_share": sum(row["data_wait_share"] * row["seconds"] for row in rows) / train_seconds,
        "mfu": model_flops_utilization(
            images_per_sec, _flop_per_image(run.step), matmul_tflops * run.world.size
        ),
        "matmul_tflops_measured": matmul_tflops,
    }


def _flop_per_image(step: TrainStep) -> float:
    """What a training step does for an image, the mean over all steps."""
    total = step.total_steps
    sides = Counter(step.recipe.training_resolution(number, total) for number in range(total))
    return sum(n * training_flop_per_image(step.model, side) for side, n in sides.items()) / total


def _said_of_flip(result: dict[str, Any]) -> str:
    flip = result.get("test_accuracy_flip")
    return "" if flip is None else f"; {flip:.2%} with each image's mirror image taken into account"


def _train_epoch(run: RunState, log: RunLog, saver: Saver) -> dict[str, float]:
    """Train the epoch under way to its end, from its beginning or from where it was resumed."""
    step, loader, progress, epoch = run.step, run.loader, run.progress, run.epoch + 1
    left = epoch * len(loader) - step.step
    timer = WaitTimer(islice(loader, left))
    timer.wait_seconds = progress.wait_seconds
    start = time.perf_counter() - progress.seconds

    def figures() -> dict[str, float]:
        """What can be said of the epoch so far without waiting for the device."""
        seconds = time.perf_counter() - start
        peeked = step.peek_metrics()
        return {
            **(dict(zip(("train_loss", "train_accuracy"), peeked, strict=True)) if peeked else {}),
            "images_per_sec": (step.step - run.epoch * len(loader)) * step.recipe.batch_size / seconds,
            "data_wait_share": timer.wait_seconds / seconds,
        }

    title = f"epoch {epoch}/{step.recipe.epochs}"
    with watch(timer, lambda seconds: log.say(_waiting(loader, step.step, seconds))):
        for images_NCHW, labels_N in log.steps(timer, left, title, figures):
            step(images_NCHW, labels_N)
            if _is_laptop(step.recipe) and step.step == min(FIRST_STEPS, step.total_steps):
                _announce_full_recipe(log, loader, step, (time.perf_counter() - start) / step.step)
            if saver.wanted():
                run.require_finite()  # waits for the device: the clock below is the device's
                progress.seconds, progress.wait_seconds = time.perf_counter() - start, timer.wait_seconds
                saver.save()
                saver.stop_if_asked()
    run.require_finite()
    loss, accuracy = step.take_metrics()  # waits for the device: only now the epoch is over
    seconds = time.perf_counter() - start
    return {
        "train_loss": loss,
        "train_accuracy": accuracy,
        "lr": step.lr,
        "seconds": seconds,
        "images_per_sec": len(loader) * step.recipe.batch_size / seconds,
        "data_wait_share": timer.wait_seconds / seconds,
    }


def _is_laptop(recipe: Recipe) -> bool:
    """Whether the full recipe can be estimated from this one: another width costs something else."""
    return recipe.name == "laptop" and recipe.width == PRESETS["default"].width


def _announce_full_recipe(log: RunLog, loader: Loader, step: TrainStep, seconds: float) -> None:
    """Say what the full recipe would take, from the seconds of one of the first steps."""
    full, images = PRESETS["default"], loader.sampler.count
    side = step.recipe.training_resolution(0, step.total_steps)
    seconds *= training_flop_per_image(step.model) / training_flop_per_image(step.model, side)
    minutes = full.epochs * images * seconds / step.recipe.batch_size / 60
    log.say(
        f"No GPU: this is the short laptop recipe. The full one, {full.epochs} epochs, would take about "
        f"{minutes:.0f} minutes here: fasttrain train --recipe {full.name}"
    )


def _test_epoch(step: TrainStep, loader: Loader) -> tuple[Evaluation, dict[str, float]]:
    start = time.perf_counter()
    step.world.broadcast_buffers(step.eval_model)
    part = evaluate(step.eval_model, loader, step.device, step.compute_dtype, flip=step.recipe.test_flip)
    test = joined(step.world.gather(part))
    return test, {
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        **({} if test.accuracy_flip is None else {"test_accuracy_flip": test.accuracy_flip}),
        "test_seconds": time.perf_counter() - start,
    }


def _report(run: Run, log: RunLog, dataset: Dataset, test: Evaluation, device: torch.device) -> None:
    """Write report.html from the last epoch's evaluation. The run is finished: nothing here may fail it."""
    try:
        log.say(f"report -> {write_report(run, dataset, test, device=device)}")
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        log.say(f"no report.html ({reason}); try again: fasttrain report {log.folder}")


def _find_max_lr(log: RunLog, dataset: Dataset, recipe: Recipe, settings: dict[str, Any]) -> float:
    log.say("max_lr auto: trying rising rates on networks of their own first")
    search = find_max_lr(dataset, recipe, announce=log.say, **settings)
    log.write("lr_find.json", {"max_lr": search.suggestion, **dataclasses.asdict(search)})
    log.say(f"max_lr {search}")
    return search.suggestion


def _lost(log: RunLog, name: str) -> bool:
    """Whether a JSON file of the run is missing or torn, which is reported in a line."""
    try:
        read_object(log.folder / name)
    except UserError as error:
        log.say(f"{error}; writing a new one that describes this machine")
        return True
    return False


def _checkpoints(folder: Path | None, resume: str | Path | None) -> list[Path]:
    """The checkpoints to go on from, the preferred one first; none where the run has to begin."""
    if folder is None or resume is None:
        return []
    named = Path(resume)
    return (
        [named]
        if named.is_file()
        else [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    )


def _resume_command(folder: Path, **options: tuple[object, object]) -> str:
    """What to type to go on with this run; options: (value, default), left out where they are the same."""
    words = ["train", "--resume", str(folder)]
    for name, (value, default) in options.items():
        if value != default:
            words += [flag(name)] if value is True else [flag(name), str(value)]
    return shlex.join(command(words))


@contextlib.contextmanager
def _held(world: World, folder: Path) -> Iterator[None]:
    """The run's folder in the hands of the first rank, cleared of what a killed process left half-written."""
    if not world.is_main:
        yield
        return
    with hold_folder(folder):
        remove_temporaries(folder)
        yield


def _waiting(loader: Loader, step: int, seconds: float) -> str:
    stacks = f"; to see every thread's stack: kill -USR1 {os.getpid()}" if os.name == "posix" else ""
    return f"no batch from {loader.name} for {seconds:.0f} s, after step {step}; still waiting{stacks}"


def _import_meanwhile(*modules: str) -> None:
    """Import what will be needed on a thread, while the images are read and padded.

    The data path needs DALI, and the first optimizer torch._dynamo: half a second each, or more.
    """

    def work() -> None:
        for module in modules:
            with contextlib.suppress(ImportError, OSError):  # whoever needs it says what is missing
                importlib.import_module(module)

    threading.Thread(target=work, name="imports").start()


@contextlib.contextmanager
def _one_line_if_memory_is_full(recipe: Recipe) -> Iterator[None]:
    """Turn torch's, numpy's and DALI's ways of saying so into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error).lower()
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "can't allocate memory" not in said and "out of memory" not in said:
            raise
        size, half = recipe.batch_size, max(2, recipe.batch_size // 2)
        raise UserError(f"--batch-size {size}: the memory is full; try --batch-size {half}") from error


def _example_batch(batch_size: int, resolution: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of the loaders' shape, dtype and strides, to compile and time on without taking one from them.

    Noise, not zeros: on zeros a GPU draws less power and computes faster.
    """
    noise = torch.Generator(device).manual_seed(0)
    shape = (batch_size, resolution, resolution, 3)
    images_NHWC = torch.randint(256, shape, generator=noise, dtype=torch.uint8, device=device)
    labels_N = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return images_NHWC.permute(0, 3, 1, 2), labels_N
