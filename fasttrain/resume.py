"""All that a run is at one moment: saved as a checkpoint, checked against the run that goes on from it."""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint import (
    LAST,
    CheckpointWriter,
    SaveInterval,
    load_checkpoint,
    require_like,
    restore_model,
    saved_precision,
    unproven,
)
from fasttrain.data.batches import Loader
from fasttrain.data.cifar import Dataset
from fasttrain.distributed import Pace
from fasttrain.errors import DivergedError, Interrupted, UserError
from fasttrain.files import set_aside
from fasttrain.machine import hardware_name, pick_precision
from fasttrain.optim import state_example
from fasttrain.proof import proof_logits
from fasttrain.recipe import Recipe, flag, load_recipe
from fasttrain.runlog import RECIPE_FILE
from fasttrain.step import TrainStep

ENVIRONMENT = ("fasttrain", "torch", "dali", "numpy", "torch_threads")
"""What machine.json says of the software; a change in it may round differently, but trains the same."""

EPOCH_FIGURES = (
    *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr"),
    *("seconds", "test_seconds", "images_per_sec", "data_wait_share"),
)


@dataclass
class Progress:
    """What a run has to show so far.

    epochs: a row of figures per finished epoch. seconds, wait_seconds: of the epoch under way.
    wall_seconds: up to the checkpoint, without what was lost or passed between two processes.
    changes: what was different, in words, when the run was resumed.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    wait_seconds: float = 0.0
    compile_seconds: float = 0.0
    wall_seconds: float = 0.0
    matmul_tflops: float = 0.0
    resumed: int = 0
    rollbacks: int = 0
    changes: list[str] = field(default_factory=list)

    @property
    def best_epoch(self) -> dict[str, float]:
        """The row with the highest test accuracy, the first of equals."""
        return max(self.epochs, key=lambda row: row["test_accuracy"])

    def finish_epoch(self, row: dict[str, float]) -> None:
        self.epochs.append(row)
        self.seconds = self.wait_seconds = 0.0


class RunState:
    """A run's training step, loader and progress as one state.

    fingerprint: from `fingerprint` below; a checkpoint with another one is refused.
    machine: as machine.describe gives it; a change of its software or hardware is noted and said.
    """

    def __init__(
        self,
        step: TrainStep,
        loader: Loader,
        dataset: Dataset,
        *,
        fingerprint: dict[str, Any],
        machine: dict[str, Any],
    ) -> None:
        self.step, self.loader, self.dataset, self.world = step, loader, dataset, step.world
        self.fingerprint = fingerprint
        self.environment = {key: str(machine[key]) for key in ENVIRONMENT} | {
            "hardware": hardware_name(machine)
        }
        self.progress = Progress()
        self._started = time.perf_counter()

    def add_up(self, started: float, *, compile_seconds: float, matmul_tflops: float) -> None:
        """Count what this process, begun at `started`, spent and found to what earlier ones did."""
        self._started = started - self.progress.wall_seconds
        self.progress.compile_seconds += compile_seconds
        self.progress.matmul_tflops = max(self.progress.matmul_tflops, matmul_tflops)

    @property
    def wall_seconds(self) -> float:
        """Seconds of all the run's processes, without what was lost or passed in between."""
        return time.perf_counter() - self._started

    @property
    def epoch(self) -> int:
        """Epochs that are finished, evaluation included."""
        return len(self.progress.epochs)

    def require_finite(self) -> None:
        """Raise DivergedError if the loss or the weights are NaN or infinite. Waits for the device."""
        step = self.step.diverged()
        if step is not None:
            raise DivergedError(
                f"epoch {self.epoch + 1}, step {step}: the loss or a weight is no finite number any more; "
                "the last checkpoint is from before. Resume with --on-nan rollback, or take a lower --max-lr."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; the tensors are the live ones."""
        recipe, dataset = self.step.recipe, self.dataset
        return {
            "model": self.step.shipped_model.state_dict(),
            "proof": proof_logits(self.step.shipped_model),
            "epoch": self.epoch,
            **self.step.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": _rng_state(self.step.device),
            "progress": dataclasses.asdict(self.progress) | {"wall_seconds": self.wall_seconds},
            "loss": self.progress.epochs[-1]["train_loss"] if self.epoch else None,
            "batch_size": recipe.batch_size,
            "recipe": recipe.to_dict(),
            "dataset": dataset.name,
            "classes": list(dataset.classes),
            "fingerprint": self.fingerprint,
            "environment": self.environment,
        }

    def own_state(self) -> dict[str, Any]:
        """What of it every rank has for itself; the first one's is in state_dict."""
        return {"rng": _rng_state(self.step.device), "sums": self.step.state_dict()["metrics"]["sums"].cpu()}

    def load(self, path: Path) -> list[str]:
        """Read and restore a checkpoint, on one rank; returns what restore does.

        Raises UserError, and changes nothing, if it is not a sound checkpoint of this very run.
        """
        return self.restore(self.read(path))

    def read(self, path: Path) -> dict[str, Any]:
        """A checkpoint, for `restore`. Raises UserError if it is not a sound one of this very run."""
        state = load_checkpoint(path)
        try:
            self._require_same_run(state.get("fingerprint"))
            self._require_sound(state)
            restore_model(state, self.step.recipe, len(self.dataset.classes), self.step.device)
            _restore_rng(state["rng"], self.step.device)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return state

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Go on from what `read` returned; returns what of the environment is different now, in words."""
        if self.world.rank:
            own = state["ranks"][self.world.rank - 1]
            state = state | {"rng": own["rng"], "metrics": state["metrics"] | {"sums": own["sums"]}}
        _restore_rng(state["rng"], self.step.device)
        self.step.shipped_model.load_state_dict(state["model"])
        self.step.load_state_dict(state)
        self.loader.load_state_dict(state["loader"])
        self.progress = Progress(**state["progress"])
        then = state["environment"]
        return [f"{key} {then[key]}, now {now}" for key, now in self.environment.items() if then[key] != now]

    def _require_same_run(self, then: Any) -> None:
        if not isinstance(then, dict) or any(isinstance(value, Tensor) for value in then.values()):
            raise UserError("it does not say what run it is of")
        differing = _differing(self.fingerprint, then)
        if differing:
            raise UserError(f"cannot go on from it: {', '.join(differing)}; restore that, or start a new run")

    def _require_sound(self, state: dict[str, Any]) -> None:
        """Every field that is restored: its structure, shapes, finite values, and figures that agree."""
        example = self.state_dict()
        require_like(state["scheduler"], example["scheduler"], "scheduler")
        step, total_steps, max_lr = (state["scheduler"][key] for key in ("step", "total_steps", "max_lr"))
        example["optimizer"] = {
            "state": state_example(self.step.optimizer) if step else {},
            "param_groups": [],
        }
        for key in (
            "model",
            *(("trained_model",) if self.step.average else ()),
            "epoch",
            "optimizer",
            "scaler",
            "metrics",
            "loader",
            "rng",
            "progress",
            "environment",
        ):
            require_like(state.get(key), example[key], key)
        own, ranks = self.own_state(), state.get("ranks", [])
        require_like(
            dict(enumerate(ranks)) if isinstance(ranks, list) else ranks,
            {rank: own for rank in range(self.world.size - 1)},
            "ranks",
        )
        progress, metrics, recipe = state["progress"], state["metrics"], self.step.recipe
        rows, first = progress["epochs"], state["epoch"] * len(self.loader)
        for row in rows:
            figures = [row.get(key) for key in {*EPOCH_FIGURES, *row}] if isinstance(row, dict) else [None]
            if any(type(figure) not in (int, float) for figure in figures):
                raise UserError("progress.epochs holds a row that is no row of figures")
        share = recipe.batch_size // self.world.size
        all_sums = [metrics["sums"].tolist(), *(rank["sums"].tolist() for rank in ranks)]
        agree = {
            "progress.epochs": [row["epoch"] for row in rows] == list(range(1, state["epoch"] + 1)),
            "progress.changes": all(isinstance(change, str) for change in progress["changes"]),
            "scheduler.step": first <= step <= min(first + len(self.loader), total_steps),
            "scheduler.total_steps": total_steps == self.step.total_steps,
            "scheduler.max_lr": max_lr == _max_lr(recipe, progress["rollbacks"], max_lr),
            "loader.step": state["loader"]["step"] == step,
            "metrics.since": metrics["since"] == first,
            "metrics.images": metrics["images"] == (step - first) * share,
            "metrics.sums": all(
                finite_steps == step - first and 0 <= hits <= metrics["images"]
                for _, hits, finite_steps in all_sums
            ),
            "optimizer.state": all(s.get("step", 0) <= step for s in state["optimizer"]["state"].values()),
        }
        for place, fits in agree.items():
            if not fits:
                raise UserError(f"{place} does not agree with the rest of it")


def resume_from(paths: Sequence[Path], run: RunState, say: Callable[[str], object]) -> None:
    """Go on from the first of these checkpoints that is sound; those before it are named and set aside.

    The first rank reads them, and gives the others what it found. Raises UserError if none is sound.
    """
    path, state = run.world.from_first(lambda: _first_sound(paths, run, say))
    changes = run.restore(state)
    for change in changes:
        say(f"goes on, but not bit for bit: {change}")
    run.progress.changes += changes
    run.progress.resumed += 1
    say(f"resumed from {path} at step {run.step.step} of {run.step.total_steps}")


def _first_sound(
    paths: Sequence[Path], run: RunState, say: Callable[[str], object]
) -> tuple[Path, dict[str, Any]]:
    unusable: list[tuple[Path, UserError]] = []
    for path in paths:
        try:
            state = run.read(path)
        except UserError as error:
            unusable.append((path, error))
            continue
        for bad, reason in unusable:
            say(f"skipped {reason} (kept as {set_aside(bad)})")
        if "proof" not in state:
            say(unproven(path))
        return path, state
    raise UserError("; ".join(str(reason) for _, reason in unusable))


EPOCH_PAUSE = 10.0
"""Seconds. An epoch that ends sooner after a checkpoint gets none of its own, unless it is the last one.

Writing one takes as long as an epoch does on a fast GPU.
"""


class Saver:
    """Saves a run where it is time to, where an epoch ends, and where a signal asks the training to stop.

    All ranks save and stop after the same step: those that count steps agree anyway, and about seconds and
    signals they ask each other once a second. The first rank alone writes.
    signalled: the number of the signal that came, or None. resume_command: what the user is told to type.
    """

    def __init__(
        self,
        run: RunState,
        writer: CheckpointWriter,
        interval: SaveInterval,
        signalled: Callable[[], int | None],
        resume_command: str,
    ) -> None:
        self._run, self._writer, self._interval = run, writer, interval
        self._signalled, self._resume_command = signalled, resume_command
        self._step, self._epoch, self._time = run.step.step, run.epoch, time.perf_counter()
        self._pace = Pace(run.world, run.step.step)

    def wanted(self) -> bool:
        """Whether to save after this step."""
        step = self._run.step.step
        steps, seconds = step - self._step, time.perf_counter() - self._time
        if self._interval.over(steps, 0.0):
            return True
        return self._pace.due(step) and self._pace.ask(
            step, self._interval.over(steps, seconds) or self._signalled() is not None
        )

    def save(self) -> None:
        """Write the run's state in the background; as best.pt too after the best epoch so far."""
        state = self._state()
        if self._run.world.is_first:
            self._writer.write(state, best=self._after_best_epoch())
        self._step, self._epoch, self._time = self._run.step.step, self._run.epoch, time.perf_counter()

    def end_epoch(self) -> None:
        """Save the run after an epoch, or hold its state if it is the best one and a checkpoint is young.

        Waits for the disk, lest serialising takes its share of the next epoch's seconds.
        """
        run, steps = self._run, self._run.step.step - self._step
        over = run.epoch == run.step.recipe.epochs or self._signalled() is not None
        over = over or self._interval.over(steps, 0.0) or time.perf_counter() - self._time >= EPOCH_PAUSE
        if run.world.maximum(int(over)) == [1]:
            self.save()
            self._writer.wait()
        elif self._after_best_epoch():
            state = self._state()
            if run.world.is_first:
                self._writer.hold_best(state)

    def _after_best_epoch(self) -> bool:
        run, rows = self._run, self._run.progress.epochs
        epoch_is_over = run.epoch > 0 and run.step.step == run.epoch * len(run.loader)
        return epoch_is_over and run.progress.best_epoch is rows[-1]

    def _state(self) -> dict[str, Any]:
        """The run's state on the first rank, with what the others have for themselves; {} on the others."""
        _, *others = self._run.world.gather(self._run.own_state())
        return self._run.state_dict() | {"ranks": others} if self._run.world.is_first else {}

    def roll_back(self) -> None:
        """Go back to the last checkpoint, halve the peak rate, and save that."""
        self._writer.wait()
        self._writer.forget_best()
        run = self._run
        run.restore(run.world.from_first(lambda: run.read(self._writer.folder / LAST)))
        self._run.progress.rollbacks += 1
        self._run.step.max_lr /= 2
        self.save()

    def stop_if_asked(self) -> None:
        """After a signal to any rank, raise Interrupted once the run as it is now is on the disk."""
        [signum] = self._run.world.maximum(self._signalled() or 0)
        if signum:
            step = self._run.step
            if (self._step, self._epoch) != (step.step, self._run.epoch):  # after end_epoch
                self.save()
            self._writer.wait()
            raise Interrupted(
                f"{signal.Signals(signum).name}: saved at step {step.step} of {step.total_steps}; "
                f"go on with: {self._resume_command}",
                signum,
            )


def fingerprint(
    recipe: Recipe,
    dataset: Dataset,
    *,
    loader: str,
    precision: str,
    compile_mode: str | None,
    device: torch.device,
    world_size: int = 1,
) -> dict[str, Any]:
    """What decides a run's weights, under the names by which a difference is reported."""
    return _recipe_flags(recipe) | {
        "dataset": dataset.name,
        "the images' SHA-256": dataset.content_hash,
        "loader": loader,
        "precision": precision,
        "compile": compile_mode or "off",
        "device": device.type,
        "world size": world_size,
    }


def _differing(now: dict[str, Any], then: dict[str, Any]) -> list[str]:
    """What of `now` is not as in a checkpoint's fingerprint, in words."""
    then = _recipe_flags(Recipe()) | then  # a recipe has its defaults where it says nothing
    return [
        f"{key} is {value} and was {then.get(key)}"
        for key, value in now.items()
        if key not in then or isinstance(then[key], Tensor) or then[key] != value
    ]


def _recipe_flags(recipe: Recipe) -> dict[str, Any]:
    return {flag(key): value for key, value in recipe.to_dict().items()}


@dataclass(frozen=True)
class KeptSettings:
    """What the first process of a run chose for its machine and later ones keep; None for a new run.

    precision: bf16, fp16, fp32 or tf32. compile_mode: torch.compile's mode, or off.
    """

    precision: str | None = None
    compile_mode: str | None = None

    @classmethod
    def from_checkpoints(cls, paths: Sequence[Path]) -> "KeptSettings":
        """Read from the first of these checkpoints that is readable and has its folder's recipe."""
        for path in paths:
            with contextlib.suppress(UserError):
                state, begun = load_checkpoint(path), load_recipe(str(path.parent / RECIPE_FILE))
                fingerprint = state.get("fingerprint")
                if isinstance(fingerprint, dict) and not _differing(_recipe_flags(begun), fingerprint):
                    mode = fingerprint.get("compile")
                    return cls(saved_precision(state), mode if isinstance(mode, str) else None)
        return cls()

    def precision_note(self, requested: str, device: torch.device) -> str | None:
        """A line to print if a new run would take another precision on this device; None if not."""
        if self.precision is None:
            return None
        try:
            now = pick_precision(requested, device)
        except UserError:
            return f"resumed in {self.precision}, as the run began; {device} only emulates it, which is slow"
        if now == self.precision:
            return None
        return (
            f"resumed in {self.precision}, as the run began; a new one would take {now} here, which is faster"
        )


def resumed_recipe(recipe: Recipe, folder: Path, precision: str | None) -> Recipe:
    """The recipe that the run in this folder began with.

    Raises UserError, naming the flags, if `recipe` differs from it. --compute-dtype may name the precision
    that the run computes in.
    """
    begun = load_recipe(str(folder / RECIPE_FILE))
    if precision is not None and recipe.compute_dtype == precision:
        recipe = dataclasses.replace(recipe, compute_dtype=begun.compute_dtype)
    then = begun.to_dict()
    if precision is not None:
        then["compute_dtype"] = precision  # what the error names, instead of auto
    differing = [
        f"{flag(key)} {value} (begun with {then[key]})"
        for key, value in recipe.to_dict().items()
        if value != getattr(begun, key)
    ]
    if differing:
        raise UserError(
            f"--resume {folder}: a resumed run keeps its recipe; leave out {', '.join(differing)}"
        )
    return begun


def _max_lr(recipe: Recipe, rollbacks: int, found: float) -> float:
    """The peak rate that a checkpoint should hold; where the LR finder found it, any above 0."""
    if recipe.max_lr == "auto":
        return found if found > 0 else 1.0
    return recipe.max_lr / 2**rollbacks


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    """torch's global generators: dropout draws from them."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def _restore_rng(states: dict[str, Tensor], device: torch.device) -> None:
    try:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
    except RuntimeError as error:
        raise UserError("rng is no state of torch's generators") from error
