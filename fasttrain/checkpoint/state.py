"""The complete state of a run: saved as a checkpoint, and checked before a run resumes from it."""

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fasttrain.checkpoint.file import load_checkpoint, require_like
from fasttrain.checkpoint.fingerprint import differences
from fasttrain.checkpoint.network import restore_model
from fasttrain.checkpoint.proof import proof_logits
from fasttrain.data.dataset import Dataset
from fasttrain.data.loader import Loader
from fasttrain.errors import DivergedError, UserError
from fasttrain.model import mean_flop_per_image
from fasttrain.optim import state_example
from fasttrain.recipe import Recipe
from fasttrain.step import TrainStep
from fasttrain.system.machine import hardware_name
from fasttrain.system.rng import restore_rng, rng_state
from fasttrain.system.throughput import model_flops_utilization

ENVIRONMENT = ("fasttrain", "torch", "dali", "numpy", "torch_threads")
"""Keys of machine.json: software and settings that may change between resumes, and with them the rounding."""

EPOCH_FIGURES = (
    *("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr"),
    *("seconds", "test_seconds", "images_per_sec", "data_wait_share"),
)


@dataclass
class Progress:
    """The progress of a run.

    epochs: a row of figures per finished epoch. seconds, wait_seconds: those of the current epoch.
    compile_seconds: to compile and capture the step. setup_seconds: to start the loaders.
    wall_seconds: up to the checkpoint, without lost work and the time between two processes.
    matmul_tflops: the highest rate measured so far. resumed, rollbacks: how many times.
    changes: what was different, in words, when the run was resumed. fallbacks: what failed and was replaced.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    wait_seconds: float = 0.0
    compile_seconds: float = 0.0
    setup_seconds: float = 0.0
    wall_seconds: float = 0.0
    matmul_tflops: float = 0.0
    resumed: int = 0
    rollbacks: int = 0
    changes: list[str] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    @property
    def best_epoch(self) -> dict[str, float]:
        """The row with the highest test accuracy; the first of several."""
        return max(self.epochs, key=lambda row: row["test_accuracy"])

    def finish_epoch(self, row: dict[str, float]) -> None:
        """Add a finished epoch's row, and start the next epoch's clocks at 0."""
        self.epochs.append(row)
        self.seconds = self.wait_seconds = 0.0


class RunState:
    """A run's training step, loader and progress as one state.

    fingerprint: from checkpoint.fingerprint; a checkpoint with another one is refused.
    machine: from machine.describe; a change of software or hardware is logged and recorded.
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

    def add_up(
        self, started: float, *, compile_seconds: float, setup_seconds: float, matmul_tflops: float
    ) -> None:
        """Add this process's figures to those of earlier ones; started: time.perf_counter() at its start."""
        self._started = started - self.progress.wall_seconds
        self.progress.compile_seconds += compile_seconds
        self.progress.setup_seconds += setup_seconds
        self.progress.matmul_tflops = max(self.progress.matmul_tflops, matmul_tflops)

    def keep_fallbacks(self, lines: list[str]) -> list[str]:
        """Keep what failed on any rank, once each; returns what ranks other than the first add to it.

        lines: this rank's, so far.
        """
        kept, others = self.progress.fallbacks, []
        for rank, found in enumerate(self.world.gather(lines)):
            new = [line for line in found if line not in kept]
            kept += new
            others += [f"rank {rank}: {line}" for line in new if rank]
        return others

    @property
    def wall_seconds(self) -> float:
        """Seconds of all the run's processes, without lost work and the time between them."""
        return time.perf_counter() - self._started

    @property
    def epoch(self) -> int:
        """Number of finished epochs, evaluation included."""
        return len(self.progress.epochs)

    def figures(self, matmul_tflops: float) -> dict[str, Any]:
        """Return a finished run's part of result.json, over all its processes.

        matmul_tflops: the measured rate of one rank's device.
        """
        progress, recipe = self.progress, self.step.recipe
        rows, best = progress.epochs, progress.best_epoch
        train_seconds = sum(row["seconds"] for row in rows)
        images_per_sec = recipe.epochs * len(self.loader) * recipe.batch_size / train_seconds
        averaged = {key: value for key, value in rows[-1].items() if key == "test_accuracy_views"}
        return {
            "test_accuracy": rows[-1]["test_accuracy"],
            **averaged,
            "best_test_accuracy": best["test_accuracy"],
            "best_epoch": best["epoch"],
            "epoch_seconds": [row["seconds"] for row in rows],
            "train_seconds": train_seconds,
            "test_seconds": sum(row["test_seconds"] for row in rows),
            "compile_seconds": progress.compile_seconds,
            "setup_seconds": progress.setup_seconds,
            "wall_seconds": self.wall_seconds,
            "resumed": progress.resumed,
            "changes": progress.changes,
            "fallbacks": progress.fallbacks,
            "rollbacks": progress.rollbacks,
            "images_per_sec": images_per_sec,
            "data_wait_share": sum(row["data_wait_share"] * row["seconds"] for row in rows) / train_seconds,
            "mfu": model_flops_utilization(
                images_per_sec,
                mean_flop_per_image(self.step.model, recipe, self.step.total_steps),
                matmul_tflops * self.world.size,
            ),
            "matmul_tflops_measured": matmul_tflops,
        }

    def require_finite(self) -> None:
        """Raise DivergedError if the loss or the weights are NaN or infinite. Waits for the device."""
        step = self.step.diverged()
        if step is not None:
            raise DivergedError(
                f"epoch {self.epoch + 1}, step {step}: the loss or a weight became NaN or infinite; "
                "the last checkpoint is from before. Resume with --on-nan rollback, or use a lower --max-lr."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the content of a checkpoint; its tensors are the live ones, not copies."""
        recipe, dataset = self.step.recipe, self.dataset
        return {
            "model": self.step.eval_model.state_dict(),
            "proof": proof_logits(self.step.eval_model),
            "epoch": self.epoch,
            **self.step.state_dict(),
            "loader": self.loader.state_dict(),
            "rng": rng_state(self.step.device),
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
        """Return the part of the state that each rank has for itself; the first rank's is in state_dict."""
        return {"rng": rng_state(self.step.device), "sums": self.step.state_dict()["metrics"]["sums"].cpu()}

    def load(self, path: Path) -> list[str]:
        """Read and restore a checkpoint, on one rank; returns what `restore` does.

        Raises UserError, and changes nothing, if it is not a sound checkpoint of this run.
        """
        return self.restore(self.read(path))

    def read(self, path: Path) -> dict[str, Any]:
        """Read a checkpoint for `restore`. Raises UserError if it is not a sound one of this run."""
        state = load_checkpoint(path)
        if isinstance(state.get("progress"), dict):  # fields that it lacks are newer than it
            state["progress"] = dataclasses.asdict(Progress()) | state["progress"]
        try:
            self._require_same_run(state.get("fingerprint"))
            self._require_sound(state)
            restore_model(state, self.step.recipe, len(self.dataset.classes), self.step.device)
            restore_rng(state["rng"], self.step.device)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        return state

    def restore(self, state: dict[str, Any]) -> list[str]:
        """Continue from what `read` returned; returns, in words, what has changed in the environment."""
        if self.world.rank:
            own = state["ranks"][self.world.rank - 1]
            state = state | {"rng": own["rng"], "metrics": state["metrics"] | {"sums": own["sums"]}}
        restore_rng(state["rng"], self.step.device)
        self.step.eval_model.load_state_dict(state["model"])
        self.step.load_state_dict(state)
        self.loader.load_state_dict(state["loader"])
        self.progress = Progress(**state["progress"])
        then = state["environment"]
        return [f"{key} {then[key]}, now {now}" for key, now in self.environment.items() if then[key] != now]

    def _require_same_run(self, then: Any) -> None:
        if not isinstance(then, dict) or any(isinstance(value, Tensor) for value in then.values()):
            raise UserError("it does not say which run it belongs to")
        differing = differences(self.fingerprint, then)
        if differing:
            raise UserError(
                f"cannot resume from it: {', '.join(differing)}; change that back, or start a new run"
            )

    def _require_sound(self, state: dict[str, Any]) -> None:
        """Raise UserError unless each field to restore has the right structure and agrees with the others."""
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
                raise UserError("progress.epochs has a row with missing or non-numeric figures")
        share = recipe.batch_size // self.world.size
        all_sums = [metrics["sums"].tolist(), *(rank["sums"].tolist() for rank in ranks)]
        agree = {
            "progress.epochs": [row["epoch"] for row in rows] == list(range(1, state["epoch"] + 1)),
            "progress.changes": all(isinstance(change, str) for change in progress["changes"]),
            "progress.fallbacks": all(isinstance(line, str) for line in progress["fallbacks"]),
            "scheduler.step": first <= step <= min(first + len(self.loader), total_steps),
            "scheduler.total_steps": total_steps == self.step.total_steps,
            "scheduler.max_lr": max_lr == _max_lr(recipe, progress["rollbacks"], max_lr),
            "loader.step": state["loader"]["step"] == step,
            "metrics.since": metrics["since"] == first,
            "metrics.images": metrics["images"] == (step - first) * share,
            "metrics.sums": all(
                finite_steps == step - first and 0 <= correct <= metrics["images"]
                for _, correct, finite_steps in all_sums
            ),
            "optimizer.state": all(s.get("step", 0) <= step for s in state["optimizer"]["state"].values()),
        }
        for place, fits in agree.items():
            if not fits:
                raise UserError(f"{place} does not agree with the rest of the checkpoint")


def _max_lr(recipe: Recipe, rollbacks: int, found: float) -> float:
    """Return the peak rate that a checkpoint should hold; if the LR finder chose it, any rate above 0."""
    if recipe.max_lr == "auto":
        return found if found > 0 else 1.0
    return recipe.max_lr / 2**rollbacks
