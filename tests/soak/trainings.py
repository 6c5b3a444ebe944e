"""Trainings of a campaign: started as typed, resumed, and compared with undisturbed ones to the last bit."""

import functools
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain import cli as command_line
from fasttrain.checkpoint.file import LAST, load_checkpoint
from fasttrain.errors import UserError
from fasttrain.system.files import write_json
from fasttrain.system.signals import raise_on_signals
from tests.soak.cases import Case
from tests.soak.fork import finish_or_kill, last_line, start

HANG_SECONDS = 300.0
"""A run that nobody disturbs and that takes longer hangs."""


@dataclass(frozen=True)
class Reference:
    """A case, its recipe's file, the outcome of its undisturbed run, and the seconds that the run took."""

    case: Case
    recipe: Path
    outcome: list[Any]
    seconds: float


class Trainings:
    """Trainings of some cases in forks of this process, with what they print in `log`."""

    def __init__(self, cases: list[Case], work: Path) -> None:
        self.cases, self.work, self.log = cases, work, work / "log"
        self._references: dict[int, Reference] = {}

    def reference(self, number: int) -> Reference:
        """The undisturbed run of the case whose turn it is."""
        index = number % len(self.cases)
        if index not in self._references:
            self._references[index] = self._run_undisturbed(index)
        return self._references[index]

    def _run_undisturbed(self, index: int) -> Reference:
        case = self.cases[index]
        path, out = self.work / f"recipe-{index}.json", self.work / "reference"
        write_json(path, case.recipe.to_dict())
        for _ in range(1 if case.recipe.compile == "auto" else 2):  # the second finds what the first compiled
            shutil.rmtree(out, ignore_errors=True)
            begun = time.perf_counter()
            ranks = self.start(case, "--recipe", path, out)
            statuses = [finish_or_kill(rank, HANG_SECONDS) for rank in ranks]
            seconds = time.perf_counter() - begun
            if any(status != 0 for status in statuses):
                raise UserError(
                    f"the undisturbed run of case {index} ended with {statuses}: {last_line(self.log)}"
                )
        [folder] = out.iterdir()
        found = outcome(folder)
        shutil.rmtree(out)
        return Reference(case, path, found, seconds)

    def start(
        self, case: Case, flag: str, path: Path, out: Path, prepare: Callable[[], object] = lambda: None
    ) -> list[int]:
        """`fasttrain train`, as typed, saving after every step; returns the process ids of its ranks.

        prepare: called in each of the processes first.
        """
        flags = [*case.data, "--out", str(out), "--device", "cpu", "--save-every", "1"]
        port = str(free_port()) if case.ranks > 1 else ""

        def action(rank: int) -> int:
            prepare()
            if case.ranks > 1:  # what torchrun says
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {"WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(case.ranks)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with raise_on_signals():  # as fasttrain.__main__ does
                return command_line.main(["train", flag, str(path), *flags])

        return [start(functools.partial(action, rank), self.log) for rank in range(case.ranks)]

    def wrong_end(self, reference: Reference, out: Path, status: int | None) -> str | None:
        """Resume a run of one rank, if it has not finished; returns what is wrong with its end, or None.

        status: how its process has ended. The run's folder is removed where nothing is wrong.
        """
        begun = begun_run(out)
        if begun is not None and (begun / "result.json").exists():
            status = 0  # what came later, perhaps while the page was drawn, costs no result
        if status != 0:
            flag, path = ("--resume", begun) if begun else ("--recipe", reference.recipe)
            [process] = self.start(reference.case, flag, path, out)
            status = finish_or_kill(process, HANG_SECONDS)
        folder = begun_run(out)
        if status != 0 or folder is None or not (folder / "result.json").exists():
            return f"resumed, the run in {out} ended with {status}: {last_line(self.log)}"
        if not same(outcome(folder), reference.outcome):
            return f"the run in {out} has other bits"
        shutil.rmtree(out)
        return None


def wait_for_file(process: subprocess.Popen[Any], out: Path, pattern: str) -> None:
    """Wait until such a file lies under `out`, but not for a process that has ended or hangs."""
    deadline = time.perf_counter() + HANG_SECONDS
    while process.poll() is None and not list(out.glob(pattern)) and time.perf_counter() < deadline:
        time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def begun_run(out: Path) -> Path | None:
    """The folder of the run under `out`, once it has begun."""
    return next((path.parent for path in out.glob("*/recipe.json")), None)


def outcome(folder: Path) -> list[Any]:
    """Everything of a finished run that must not depend on how often it was killed."""
    state = load_checkpoint(folder / LAST)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")
    figures = [[row[key] for key in timeless] for row in rows]
    kept = [state[key] for key in ("model", "optimizer", "rng", "scheduler", "ranks")]
    return [*kept, load_checkpoint(folder / "best.pt")["model"], figures]


def same(value: Any, other: Any) -> bool:
    """Equal to the last bit, tensors included, but for the sign of a zero."""
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other)
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(same(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(same, value, other))
    return bool(value == other)
