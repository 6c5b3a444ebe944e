"""The training loop: from a recipe to a run's folder."""

import contextlib
import dataclasses
import math
import os
import threading
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from typing_extensions import Unpack

from fasttrain.callbacks import CallbackList
from fasttrain.checkpoint.fingerprint import fingerprint
from fasttrain.checkpoint.manager import CheckpointManager, SaveInterval
from fasttrain.checkpoint.network import find_start, initial_model
from fasttrain.checkpoint.resume import ResumePoint, restore_latest, resume_command, say_how_to_resume
from fasttrain.checkpoint.state import RunState
from fasttrain.checkpoint.writer import CheckpointWriter
from fasttrain.compile import cache_of, compile_step, example_batch, pick_final_mode
from fasttrain.data.build_loader import build_loader, fit_batch_size
from fasttrain.data.dataset import Dataset
from fasttrain.data.load_dataset import load_from_options
from fasttrain.data.loader import Loader
from fasttrain.data.run_images import RunImages
from fasttrain.distributed import World
from fasttrain.errors import DivergedError
from fasttrain.evaluation import Evaluation, concat, evaluate
from fasttrain.full_recipe import estimate_full_recipe, is_laptop
from fasttrain.loss import class_weights
from fasttrain.lr_finder import find_max_lr
from fasttrain.options import TrainKeywords, TrainOptions
from fasttrain.recipe import Recipe
from fasttrain.report.html import first_images, try_report
from fasttrain.report.run import Run, load_run
from fasttrain.runtime import Runtime, agree_on_precision, import_in_background
from fasttrain.step import TrainStep
from fasttrain.system.fallbacks import Fallbacks
from fasttrain.system.files import hold_folder, nearest_existing, remove_temporaries, require_writable
from fasttrain.system.gpu import why_no_gpu
from fasttrain.system.machine import describe, hardware_name, pick_device
from fasttrain.system.memory import peak_memory_gib, report_full_memory
from fasttrain.system.rates import glance_at_matmul_tflops, measure_matmul_tflops
from fasttrain.system.run_folder import (
    DATA_FILE,
    MACHINE_FILE,
    RECIPE_FILE,
    RESULT_FILE,
    find_unfinished,
    machine_is_lost,
    new_run_folder,
)
from fasttrain.system.run_log import RunLog, SilentLog, require_tensorboard
from fasttrain.system.signals import catch_signals
from fasttrain.system.throughput import WaitTimer, watch

MAX_ROLLBACKS = 3
"""How many times a diverged run may be rolled back, its learning rate halved each time."""


def train(recipe: Recipe, **options: Unpack[TrainKeywords]) -> Run:
    """Train a recipe and write a run's folder; returns its content as a Run.

    options: the fields of options.TrainOptions, which describes them; `data` may also be a Dataset, and a
    path a str.
    Under torchrun, every process calls this with the same arguments, and they train together: each on its
    share of every batch; the first writes the folder and prints.
    Raises UserError for a mistake that the user can fix, and Interrupted (a KeyboardInterrupt) after the
    first SIGINT or SIGTERM, once the state is saved.
    """
    opts = TrainOptions.of({"started": time.perf_counter(), **options})
    SaveInterval.parse(opts.save_every)  # refuse a mistake before doing anything
    unfinished = None if opts.resume is None else find_unfinished(opts.resume, Path(opts.out))
    if unfinished is None:
        require_writable(nearest_existing(Path(opts.out)), f"--out {opts.out}")
    if opts.tensorboard:
        require_tensorboard()
    world = World.join(pick_device(opts.device))
    origin = world.broadcast(lambda: ResumePoint.find(unfinished, opts.resume, world.device))
    recipe, opts = origin.recipe(recipe), origin.options(opts)
    world.share(recipe.batch_size)  # refuse a batch that cannot be divided
    fallbacks = Fallbacks(world.print, allowed=opts.fallback)
    if opts.device == "auto" and (reason := why_no_gpu()):
        fallbacks(reason, "training on the CPU")
    precision = origin.working_precision(world.device) or agree_on_precision(recipe, world, fallbacks)

    import_in_background("nvidia.dali", "torch._dynamo")
    dataset = world.main_first(lambda: load_from_options(opts, recipe.resolution, log=world.print))
    origin.require_images(dataset)
    recipe = fit_batch_size(recipe if unfinished else find_start(recipe, dataset), dataset, log=world.print)
    world.share(recipe.batch_size)
    hashing = threading.Thread(target=lambda: dataset.content_hash, name="hash")
    hashing.start()  # the run's record needs the hash: compute it while the images are padded
    runtime = Runtime.resolve(
        recipe, world.device, precision=precision, num_ranks=world.size, fallbacks=fallbacks
    )
    where: dict[str, Any] = {"device": world.device, "loader": runtime.loader, "shard": world.shard}
    train_loader = build_loader(dataset, recipe, train=True, **where)
    test_loader = build_loader(dataset, recipe, train=False, **where)

    hashing.join()
    folder = world.broadcast(lambda: unfinished or new_run_folder(Path(opts.out), recipe.name))
    log = RunLog(folder) if world.is_main else SilentLog(folder)
    held = hold_folder(folder) if world.is_main else contextlib.nullcontext()
    with world, held, report_full_memory(recipe.batch_size):
        if world.is_main:
            remove_temporaries(folder)  # what a killed process left half-written
        origin.require_unchanged(world)
        trainer = Trainer(recipe, opts, world, runtime, dataset, train_loader, test_loader, log)
        with say_how_to_resume(folder, opts), world.report_lost_rank():
            trainer.prepare(origin)
            test = trainer.fit()
            run = trainer.finish()
        world.close()
        if test is not None and opts.report and world.is_main:
            log.print(try_report(run, dataset, test, world.device))
        trainer.callbacks.on_train_end(run.result)
        return run


class Trainer:
    """One run, from its first step or a checkpoint to its last epoch.

    Call prepare, fit and finish once each, in this order; `state` exists from prepare on.
    """

    state: RunState

    def __init__(
        self,
        recipe: Recipe,
        options: TrainOptions,
        world: World,
        runtime: Runtime,
        dataset: Dataset,
        train_loader: Loader,
        test_loader: Loader,
        log: RunLog,
    ) -> None:
        self.recipe, self.options, self.world, self.runtime = recipe, options, world, runtime
        self.dataset, self.train_loader, self.test_loader, self.log = dataset, train_loader, test_loader, log
        self.machine = describe(world.device) | {"ranks": world.size}
        if not runtime.fallbacks.lines:  # the next process has to say its own
            self.machine["precision"] = runtime.precision
        self.callbacks = CallbackList(options.callbacks if world.is_main else ())

    def prepare(self, origin: ResumePoint) -> None:
        """Build the step, restore the checkpoint if there is one, and compile and capture if that pays."""
        recipe, runtime, log = self.recipe, self.runtime, self.log
        images = RunImages.of(self.dataset, self.options).to_dict()
        if not origin.checkpoints:
            log.write(DATA_FILE, images)
        if origin.folder is None:
            log.write(MACHINE_FILE, self.machine)
            log.write(RECIPE_FILE, recipe.to_dict())
        if self.options.tensorboard and self.world.is_main:
            log.open_tensorboard(first_images(self.dataset, recipe, runtime.device)[0])
        log.print(self._headline())
        matmul_tflops = glance_at_matmul_tflops(runtime.device, runtime.dtype)  # `finish` takes longer
        step = self._build_step(is_resumed=bool(origin.checkpoints))
        share = self.world.share(recipe.batch_size)
        example = example_batch(share, recipe.resolution, runtime.device)
        cache = cache_of(step, hardware_name(self.machine), runtime.compile_mode, share)
        kept, wanted = origin.compile_mode, runtime.compile_mode
        compile_mode = pick_final_mode(step, wanted, cache, matmul_tflops, example, kept=kept, log=log.print)
        self.runtime = dataclasses.replace(runtime, compile_mode=compile_mode)
        if not origin.checkpoints or machine_is_lost(log.folder, log.print):
            log.write(MACHINE_FILE, self.machine | {"compile": compile_mode})
        identity = fingerprint(recipe, self.dataset, self.runtime, self.world.size)
        self.world.require_same(identity)
        self.state = RunState(
            step, self.train_loader, self.dataset, fingerprint=identity, machine=self.machine
        )
        if origin.checkpoints:
            restore_latest(origin.checkpoints, self.state, log.print)
            log.write(DATA_FILE, images)  # they may have moved
        if note := origin.precision_note(recipe.compute_dtype, runtime.device):
            log.print(note)
        log.rewind(self.state.progress.epochs)
        found_mode, compile_seconds = compile_step(step, compile_mode, cache, *example)
        if found_mode != compile_mode:
            self._run_eagerly(compile_mode)
        elif compile_mode:
            log.print(f"compiled ({compile_mode}) in {compile_seconds:.1f} s")
        for line in self.state.keep_fallbacks(self.runtime.fallbacks.lines):
            log.print(line)
        setup_seconds = self._start_loaders()
        started = self.options.started or time.perf_counter()
        self.state.add_up(
            started,
            compile_seconds=compile_seconds,
            setup_seconds=setup_seconds,
            matmul_tflops=matmul_tflops,
        )

    def fit(self) -> Evaluation | None:
        """Train the remaining epochs; returns the last evaluation, or None if there was no need for one.

        Raises DivergedError on NaN or infinity, and Interrupted after a signal.
        """
        state, opts, test = self.state, self.options, None
        self.world.begin()
        with (
            CheckpointWriter(self.log.folder, self.runtime.device) as writer,
            catch_signals() as stop_signal,
            self.world.report_lost_rank(),
        ):
            checkpoints = CheckpointManager(
                state,
                writer,
                SaveInterval.parse(opts.save_every),
                stop_signal=stop_signal,
                resume_command=resume_command(self.log.folder, opts),
            )
            checkpoints.save()
            if state.step.step == 0 and is_laptop(self.recipe, state.step.device):
                images = self.train_loader.sampler.count
                self.log.print(estimate_full_recipe(state.step, images, opts))
            while state.epoch < self.recipe.epochs:
                try:
                    train_metrics = self.train_epoch(checkpoints)
                except DivergedError as error:
                    self._roll_back(checkpoints, error)
                    continue
                test, test_metrics = self.test_epoch()
                state.progress.finish_epoch({"epoch": state.epoch + 1, **train_metrics, **test_metrics})
                self.log.epoch(state.progress.epochs[-1])
                checkpoints.end_of_epoch()
                self.callbacks.on_epoch_end(state.progress.epochs[-1])
                checkpoints.stop_if_asked()
            if opts.report and test is None:  # resumed after its last epoch
                test, _ = self.test_epoch()
        return test

    def train_epoch(self, checkpoints: CheckpointManager) -> dict[str, float]:
        """Train the current epoch from its start, or from where it was resumed; returns its metrics."""
        state, step, loader = self.state, self.state.step, self.train_loader
        progress, epoch = state.progress, state.epoch + 1
        left = epoch * len(loader) - step.step
        timer = WaitTimer(islice(loader, left), self.runtime.device, progress.wait_seconds)
        start = time.perf_counter() - progress.seconds

        def live_metrics() -> dict[str, float]:
            """Return the figures of the epoch so far that are known without waiting for the device."""
            seconds = time.perf_counter() - start
            peeked = step.peek_metrics()
            return {
                **(dict(zip(("train_loss", "train_accuracy"), peeked, strict=True)) if peeked else {}),
                "images_per_sec": (step.step - state.epoch * len(loader)) * self.recipe.batch_size / seconds,
                "data_wait_share": timer.wait_seconds / seconds,
            }

        title = f"epoch {epoch}/{self.recipe.epochs}"
        with watch(timer, self._warn_of_wait):
            for images_NCHW, labels_N in self.log.steps(timer, left, title, live_metrics):
                step(images_NCHW, labels_N)
                if checkpoints.due():
                    state.require_finite()  # waits for the device, so that the clock below includes its work
                    progress.seconds = time.perf_counter() - start
                    progress.wait_seconds = timer.wait_seconds
                    checkpoints.save()
                    checkpoints.stop_if_asked()
        state.require_finite()
        loss, accuracy = step.take_metrics()  # waits for the device: only now is the epoch over
        seconds = time.perf_counter() - start
        return {
            "train_loss": loss,
            "train_accuracy": accuracy,
            "lr": step.lr,
            "seconds": seconds,
            "images_per_sec": len(loader) * self.recipe.batch_size / seconds,
            "data_wait_share": timer.wait_seconds / seconds,
        }

    def test_epoch(self) -> tuple[Evaluation, dict[str, float]]:
        """Evaluate every test image, each on one rank; returns the evaluation and metrics of all ranks."""
        start = time.perf_counter()
        model = self.state.step.eval_model
        self.world.broadcast_buffers(model)
        is_last = self.state.epoch + 1 >= self.recipe.epochs
        views = self.recipe.test_views if is_last else "none"
        test = concat(self.world.gather(evaluate(model, self.test_loader, self.runtime, views=views)))
        return test, {**test.metrics, "test_seconds": time.perf_counter() - start}

    def finish(self) -> Run:
        """Write result.json, print a summary, and return the run, read from its folder."""
        runtime, log = self.runtime, self.log
        for line in self.state.keep_fallbacks(runtime.fallbacks.lines):
            log.print(line)
        # The peak rate is the maximum of measurements before and after: a low one would overstate the MFU.
        matmul_tflops = max(
            self.state.progress.matmul_tflops, measure_matmul_tflops(runtime.device, runtime.dtype)
        )
        result = {
            "recipe": self.recipe.to_dict(),
            "dataset": self.dataset.name,
            "device": runtime.device.type,
            "ranks": self.world.size,
            "loader": self.train_loader.name,
            "precision": runtime.precision,
            "compile": runtime.compile_mode or "off",
            "cuda_graph": self.state.step.captures,
            "epochs": self.recipe.epochs,
            "max_lr": self.state.step.max_lr,
            **self.state.figures(matmul_tflops),
            "peak_memory_gib": peak_memory_gib(runtime.device),
            "peak_resident_gib": peak_memory_gib(torch.device("cpu")),
        }
        log.write(RESULT_FILE, result)
        averaged = ""
        if "test_accuracy_views" in result:
            averaged = f"; {result['test_accuracy_views']:.2%} with averaged predictions"
        log.print(
            f"{self.dataset.name}: test accuracy {result['test_accuracy']:.2%} after {self.recipe.epochs} "
            f"epochs (best {result['best_test_accuracy']:.2%} at epoch {result['best_epoch']}, chosen on the "
            f"test images){averaged}; {result['train_seconds']:.1f} s of training, "
            f"{result['wall_seconds']:.1f} s in total -> {log.folder}"
        )
        return self.world.broadcast(lambda: load_run(log.folder))

    def _headline(self) -> str:
        recipe, runtime, ranks = self.recipe, self.runtime, self.world.size
        on_ranks = f" on {ranks} ranks" if ranks > 1 else ""
        return (
            f"{recipe.name}: {self.dataset.name}, {recipe.epochs} epochs of {len(self.train_loader)} steps "
            f"of {recipe.batch_size}, {runtime.device.type}{on_ranks}, {runtime.precision}, "
            f"{self.train_loader.name} -> {self.log.folder}"
        )

    def _build_step(self, *, is_resumed: bool) -> TrainStep:
        """Build the seeded network and its step. A resumed run takes the peak rate from its checkpoint."""
        recipe, world, dataset, max_lr = self.recipe, self.world, self.dataset, self.recipe.max_lr
        if max_lr == "auto":
            max_lr = math.inf if is_resumed else world.broadcast(self._find_max_lr)
        torch.manual_seed(recipe.seed)
        model = initial_model(dataset, recipe, self.log.print, is_resumed=is_resumed)
        if recipe.sync_batchnorm:
            world.synchronize_batchnorm(model)
        if world.rank:
            torch.manual_seed(recipe.seed + world.rank)  # otherwise dropout would be the same on every rank
        return TrainStep(
            model,
            recipe,
            self.runtime,
            max_lr=float(max_lr),
            total_steps=recipe.epochs * len(self.train_loader),
            class_weights_K=class_weights(dataset, recipe),
            world=world,
        )

    def _run_eagerly(self, compile_mode: str | None) -> None:
        """Record everywhere that this run is not compiled after all."""
        state = self.state
        self.runtime = dataclasses.replace(self.runtime, compile_mode=None)
        self.log.write(MACHINE_FILE, self.machine | {"compile": None})
        state.fingerprint = fingerprint(self.recipe, self.dataset, self.runtime, self.world.size)
        if state.progress.resumed:
            state.progress.changes.append(f"compile {compile_mode}, now off")

    def _start_loaders(self) -> float:
        """Prepare the first batches before any clock runs; returns the seconds taken."""
        start = time.perf_counter()
        self.train_loader.start()
        self.test_loader.start()
        return time.perf_counter() - start

    def _find_max_lr(self) -> float:
        self.log.print("max_lr auto: searching for the peak rate first, on separate networks")
        search = find_max_lr(self.dataset, self.recipe, self.runtime, log=self.log.print)
        self.log.write("lr_find.json", search.to_dict())
        self.log.print(f"max_lr {search}")
        return search.suggestion

    def _roll_back(self, checkpoints: CheckpointManager, error: DivergedError) -> None:
        """Restore the last checkpoint with half the rate, or raise the error if the options say stop."""
        state = self.state
        if self.options.on_nan == "stop" or state.progress.rollbacks == MAX_ROLLBACKS:
            raise error
        checkpoints.roll_back()
        self._start_loaders()
        self.log.rewind(state.progress.epochs)
        rate = f"{state.step.max_lr:.3g}"
        self.log.print(f"{error} Rolled back to step {state.step.step} with half the rate, {rate}")

    def _warn_of_wait(self, seconds: float) -> None:
        stacks = f"; to see every thread's stack: kill -USR1 {os.getpid()}" if os.name == "posix" else ""
        self.log.print(
            f"no batch from {self.train_loader.name} for {seconds:.0f} s, after step {self.state.step.step}; "
            f"still waiting{stacks}"
        )
