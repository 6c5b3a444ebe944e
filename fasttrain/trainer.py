"""The training loop: from a recipe to a run's folder."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import save_checkpoint
from fasttrain.data.batches import Loader
from fasttrain.data.cifar import Dataset
from fasttrain.data.loader import DataChoice, build_loader, open_dataset, pick_loader
from fasttrain.evaluate import Evaluation, evaluate
from fasttrain.lr_find import find_max_lr
from fasttrain.machine import (
    describe,
    measure_matmul_tflops,
    pick_compute_dtype,
    pick_device,
    precision_name,
    set_fp32_precision,
)
from fasttrain.metrics import WaitTimer, model_flops_utilization, peak_memory_gib
from fasttrain.model import CustomResNet, training_flop_per_image
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.report import first_images, write_report
from fasttrain.run import Run, load_run
from fasttrain.runlog import RunLog, require_tensorboard
from fasttrain.step import TrainStep, pick_compile_mode

FIRST_STEPS = 5
"""Steps after which the laptop recipe says how long the full one would take."""


def train(
    recipe: Recipe,
    *,
    data: DataChoice = "auto",
    data_dir: Path | str | None = None,
    out: Path | str = "runs",
    device: str = "auto",
    tensorboard: bool = False,
    started: float | None = None,
    report: bool = True,
) -> Run:
    """Train one recipe and leave a run's folder; returns what is in it.

    tensorboard: leave event files in the folder: every epoch's metrics, and a grid of augmented images.
    started: time.perf_counter() when the process began, for wall_seconds; now, if not given.
    report: write report.html too, some seconds that wall_seconds leaves out.
    Raises UserError on anything that the user can mend, and KeyboardInterrupt when interrupted: the last
    finished epoch's checkpoint stays.
    """
    started = time.perf_counter() if started is None else started
    if tensorboard:
        require_tensorboard()
    run_device = pick_device(device)
    dtype = pick_compute_dtype(recipe.compute_dtype, run_device)
    precision = precision_name(recipe.compute_dtype, dtype)
    set_fp32_precision(allow_tf32=recipe.compute_dtype == "tf32")
    torch.backends.cudnn.benchmark = True  # shapes never change: let cuDNN time its kernels once

    dataset = open_dataset(data, Path(data_dir) if data_dir else None, print)
    kind = pick_loader(recipe.loader, run_device, print)
    mode = pick_compile_mode(recipe.compile, run_device, print)
    train_loader = build_loader(dataset, recipe, train=True, kind=kind, device=run_device)
    test_loader = build_loader(dataset, recipe, train=False, kind=kind, device=run_device)

    log = RunLog(Path(out), recipe.name)
    log.write("recipe.json", recipe.to_dict())
    log.write("machine.json", describe(run_device))
    if tensorboard:
        log.open_tensorboard(first_images(dataset, recipe, run_device)[0])
    log.say(
        f"{recipe.name}: {dataset.name}, {recipe.epochs} epochs of {len(train_loader)} steps of "
        f"{recipe.batch_size}, {run_device.type}, {precision}, {train_loader.name}, "
        f"{f'compiled ({mode})' if mode else 'eager'} -> {log.folder}"
    )
    matmul_tflops = measure_matmul_tflops(run_device, dtype)
    max_lr = recipe.max_lr
    if max_lr == "auto":
        log.say("max_lr auto: trying rising rates on networks of their own first")
        search = find_max_lr(dataset, recipe, kind=kind, device=run_device, dtype=dtype, announce=log.say)
        max_lr = search.suggestion
        log.write("lr_find.json", {"max_lr": max_lr, **dataclasses.asdict(search)})
        log.say(f"max_lr {search}")

    torch.manual_seed(recipe.seed)
    step = TrainStep(
        CustomResNet(len(dataset.classes), recipe.dropout, mean=dataset.mean, std=dataset.std),
        recipe,
        max_lr=max_lr,
        total_steps=recipe.epochs * len(train_loader),
        device=run_device,
        compute_dtype=dtype,
        compile_mode=mode,
    )
    compile_seconds = step.warm_up(*_blank_batch(recipe.batch_size, run_device))

    history: list[dict[str, Any]] = []
    for epoch in range(1, recipe.epochs + 1):
        train_figures = _train_epoch(step, train_loader, epoch, log)
        test, test_figures = _test_epoch(step, test_loader)
        history.append({"epoch": epoch, **train_figures, **test_figures})
        log.epoch(history[-1])
        _save_checkpoints(log.folder, history, step, train_loader, dataset)

    # A peak is a maximum: measured before and after, lest a busy moment flatter the training.
    matmul_tflops = max(matmul_tflops, measure_matmul_tflops(run_device, dtype))
    train_seconds = sum(row["seconds"] for row in history)
    images_per_sec = recipe.epochs * len(train_loader) * recipe.batch_size / train_seconds
    best = max(history, key=lambda row: row["test_accuracy"])
    result = {
        "recipe": recipe.to_dict(),
        "dataset": dataset.name,
        "device": run_device.type,
        "loader": train_loader.name,
        "precision": precision,
        "compile": mode or "off",
        "epochs": recipe.epochs,
        "max_lr": max_lr,
        "test_accuracy": history[-1]["test_accuracy"],
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "epoch_seconds": [row["seconds"] for row in history],
        "train_seconds": train_seconds,
        "test_seconds": sum(row["test_seconds"] for row in history),
        "compile_seconds": compile_seconds,
        "wall_seconds": time.perf_counter() - started,
        "images_per_sec": images_per_sec,
        "data_wait_share": sum(row["data_wait_share"] * row["seconds"] for row in history) / train_seconds,
        "mfu": model_flops_utilization(images_per_sec, training_flop_per_image(step.model), matmul_tflops),
        "matmul_tflops_measured": matmul_tflops,
        "peak_memory_gib": peak_memory_gib(run_device),
        "peak_resident_gib": peak_memory_gib(torch.device("cpu")),
    }
    log.write("result.json", result)
    log.say(
        f"{dataset.name}: test accuracy {result['test_accuracy']:.2%} after {recipe.epochs} epochs "
        f"(best {best['test_accuracy']:.2%} at epoch {best['epoch']}, chosen on the test images); "
        f"{train_seconds:.1f} s of training, {result['wall_seconds']:.1f} s in all -> {log.folder}"
    )
    run = load_run(log.folder)
    if report:
        _report(run, log, dataset, test, run_device)
    return run


def _train_epoch(step: TrainStep, loader: Loader, epoch: int, log: RunLog) -> dict[str, float]:
    timer = WaitTimer(loader)
    first_step, start = step.step, time.perf_counter()

    def figures() -> dict[str, float]:
        """What can be said of the epoch so far without waiting for the device."""
        seconds = time.perf_counter() - start
        peeked = step.peek_metrics()
        return {
            **(dict(zip(("train_loss", "train_accuracy"), peeked, strict=True)) if peeked else {}),
            "images_per_sec": (step.step - first_step) * step.recipe.batch_size / seconds,
            "data_wait_share": timer.wait_seconds / seconds,
        }

    title = f"epoch {epoch}/{step.recipe.epochs}"
    for images_NCHW, labels_N in log.steps(timer, len(loader), title, figures):
        step(images_NCHW, labels_N)
        if step.recipe.name == "laptop" and step.step == min(FIRST_STEPS, step.total_steps):
            _announce_full_recipe(log, loader, (time.perf_counter() - start) / step.step)
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


def _announce_full_recipe(log: RunLog, loader: Loader, seconds_per_step: float) -> None:
    full, images = PRESETS["default"], loader.sampler.count
    minutes = full.epochs * images * seconds_per_step / loader.sampler.batch_size / 60
    log.say(
        f"No GPU: this is the short laptop recipe. The full one, {full.epochs} epochs, would take about "
        f"{minutes:.0f} minutes here: fasttrain train --recipe {full.name}"
    )


def _test_epoch(step: TrainStep, loader: Loader) -> tuple[Evaluation, dict[str, float]]:
    start = time.perf_counter()
    test = evaluate(step.model, loader, step.device, step.compute_dtype)
    return test, {
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "test_seconds": time.perf_counter() - start,
    }


def _save_checkpoints(
    folder: Path, history: list[dict[str, Any]], step: TrainStep, loader: Loader, dataset: Dataset
) -> None:
    """last.pt after every epoch; best.pt where the test accuracy is the highest so far."""
    state = {
        "model": step.model.state_dict(),
        "epoch": history[-1]["epoch"],
        **step.state_dict(),
        "loader": loader.state_dict(),
        "loss": history[-1]["train_loss"],
        "batch_size": step.recipe.batch_size,
        "recipe": step.recipe.to_dict(),
        "dataset": dataset.name,
        "classes": list(dataset.classes),
    }
    save_checkpoint(folder / "last.pt", state)
    if all(history[-1]["test_accuracy"] > row["test_accuracy"] for row in history[:-1]):
        save_checkpoint(folder / "best.pt", state)


def _report(run: Run, log: RunLog, dataset: Dataset, test: Evaluation, device: torch.device) -> None:
    """Write report.html from the last epoch's evaluation. The run is finished: nothing here may fail it."""
    try:
        log.say(f"report -> {write_report(run, dataset, test, device=device)}")
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        log.say(f"no report.html ({reason}); try again: fasttrain report {log.folder}")


def _blank_batch(batch_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of the loaders' shape, dtype and strides, to compile on without taking one from them."""
    images = torch.zeros(batch_size, 3, 32, 32, dtype=torch.uint8, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    return images.to(memory_format=torch.channels_last), labels
