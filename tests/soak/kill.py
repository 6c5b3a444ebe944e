"""Trainings are killed at random moments and resumed; each must end with the bits of an undisturbed run."""

import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain import cli as command_line
from fasttrain.checkpoint.file import LAST, load_checkpoint
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe
from fasttrain.system.files import write_json
from tests.soak.fork import finish, last_line, start

RECIPES = (
    Recipe(name="soak", epochs=2, batch_size=8, dropout=0.1, loader="auto"),
    Recipe(name="soak", epochs=2, batch_size=8, dropout=0.1, loader="tensor", compute_dtype="fp32"),
)


@dataclass(frozen=True)
class Reference:
    """A recipe's file, the outcome of its undisturbed run, and the seconds that the run took."""

    recipe: Path
    outcome: list[Any]
    seconds: float


@dataclass
class Counts:
    """What has happened so far. lost: seconds between the last checkpoint and each SIGKILL."""

    faults: int = 0
    kills: int = 0
    runs: int = 0
    recovered: int = 0
    bit_equal: int = 0
    lost: list[float] = field(default_factory=list)


class KillCampaign:
    """Sends `faults` signals to trainings and resumes each run until it has finished."""

    def __init__(self, data_dir: Path, work: Path, faults: int, rng: random.Random) -> None:
        self.data_dir, self.work, self.faults, self.rng = data_dir, work, faults, rng
        self.log = work / "log"
        self.counts = Counts()

    def __call__(self) -> Counts:
        references = [self._reference(index, recipe) for index, recipe in enumerate(RECIPES)]
        counts = self.counts
        while counts.faults < self.faults:
            reference = references[counts.runs % len(references)]
            out = self.work / f"run-{counts.runs}"
            found = self._disturb(reference, out)
            shutil.rmtree(out, ignore_errors=True)
            counts.runs += 1
            counts.recovered += found is not None
            counts.bit_equal += found is not None and same(found, reference.outcome)
            print(f"{counts.faults}/{self.faults} faults, {counts.runs} runs", file=sys.stderr)
        return counts

    def _reference(self, index: int, recipe: Recipe) -> Reference:
        path, out = self.work / f"recipe-{index}.json", self.work / "reference"
        write_json(path, recipe.to_dict())
        begun = time.perf_counter()
        status = finish(self._start("--recipe", path, out))
        seconds = time.perf_counter() - begun
        if status != 0:
            raise UserError(f"the undisturbed run ended with status {status}: {last_line(self.log)}")
        [folder] = out.iterdir()
        found = outcome(folder)
        shutil.rmtree(out)
        return Reference(path, found, seconds)

    def _start(self, flag: str, path: Path, out: Path) -> int:
        """`fasttrain train`, as typed, saving after every step; returns its process id."""
        flags = ["--data-dir", str(self.data_dir), "--out", str(out), "--device", "cpu", "--save-every", "1"]
        return start(lambda: command_line.main(["train", flag, str(path), *flags]), self.log)

    def _disturb(self, reference: Reference, out: Path) -> list[Any] | None:
        """Train one run to its end through signals; returns its outcome, or None if it failed."""
        folder: Path | None = None
        lived = lost = 0.0
        while True:
            begun = time.perf_counter()
            process = (
                self._start("--resume", folder, out)
                if folder
                else self._start("--recipe", reference.recipe, out)
            )
            status = self._interrupt(process, begun, 0.8 * reference.seconds)
            folder = next((path.parent for path in out.glob("*/recipe.json")), None)
            if folder is not None and (folder / "result.json").exists():
                return outcome(folder)
            if status not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                print(f"status {status}: {last_line(self.log)}", file=sys.stderr)
                return None
            lived += time.perf_counter() - begun
            kept = 0.0
            if folder is not None and (folder / LAST).exists():
                kept = load_checkpoint(folder / LAST)["progress"]["wall_seconds"]
            if status == -signal.SIGKILL:
                self.counts.lost.append(max(lived - kept - lost, 0.0))
            lost = lived - kept

    def _interrupt(self, process: int, begun: float, latest: float) -> int:
        """While faults are left, send a signal after up to `latest` seconds; returns the process's status."""
        counts = self.counts
        left = counts.faults < self.faults
        status = finish(process, begun + self.rng.uniform(0.1, latest) if left else None)
        if status is None:
            number = signal.SIGTERM if counts.faults % 5 == 4 else signal.SIGKILL
            os.kill(process, number)
            status = finish(process)
            counts.faults += 1
            counts.kills += number == signal.SIGKILL
        assert status is not None
        return status


def outcome(folder: Path) -> list[Any]:
    """Everything of a finished run that must not depend on how often it was killed."""
    state = load_checkpoint(folder / LAST)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")
    figures = [[row[key] for key in timeless] for row in rows]
    best = load_checkpoint(folder / "best.pt")
    return [state["model"], state["optimizer"], state["rng"], state["scheduler"], best["model"], figures]


def same(value: Any, other: Any) -> bool:
    """Equal to the last bit, tensors included."""
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other)
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(same(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(same, value, other))
    return bool(value == other)
