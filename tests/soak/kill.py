"""Trainings are killed at random moments and resumed; each must end with the bits of an undisturbed run."""

import functools
import json
import os
import random
import shutil
import signal
import socket
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
from tests.soak.cases import Case
from tests.soak.fork import finish, finish_or_kill, last_line, start

ENDED_SECONDS = 30.0
"""After a signal, a process that takes longer to end counts as hanging."""

HANG_SECONDS = 300.0
"""A run that nobody disturbs and that takes longer hangs."""

LOSSES = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM)
"""How a process ends that was sent a signal."""


@dataclass(frozen=True)
class Reference:
    """A case, its recipe's file, the outcome of its undisturbed run, and the seconds that the run took."""

    case: Case
    recipe: Path
    outcome: list[Any]
    seconds: float


class KillCampaign:
    """Each turn trains one run through up to FAULTS signals, and resumes it until it has finished.

    results: faults, and of them kills, which are SIGKILLs; of these, `resuming` met a run that had been
    stopped before, and `of_ranks` one of several ranks. lost: seconds between the last checkpoint and each
    SIGKILL of a run on one rank.
    """

    name = "kill"
    FAULTS = 8

    def __init__(self, cases: list[Case], work: Path) -> None:
        self.cases, self.work = cases, work
        self.log = work / "log"
        counts = ("faults", "kills", "resuming", "of_ranks", "runs", "recovered", "bit_equal")
        self.results: dict[str, Any] = dict.fromkeys(counts, 0) | {"lost": [], "wrong": []}
        self._references: dict[int, Reference] = {}

    def turn(self, number: int, rng: random.Random) -> None:
        results, index = self.results, number % len(self.cases)
        reference, out = self.reference(index), self.work / f"run-{number}"
        moments = [rng.random() for _ in range(rng.randint(1, self.FAULTS))]
        found = self._disturb(reference, out, moments, rng)
        is_equal = found is not None and same(found, reference.outcome)
        results["runs"] += 1
        results["recovered"] += found is not None
        results["bit_equal"] += is_equal
        if is_equal:
            shutil.rmtree(out)
        else:
            what = "was not recovered" if found is None else "ended with other bits"
            results["wrong"].append(f"the run of case {index} in {out} {what}: {last_line(self.log)}")

    def reference(self, index: int) -> Reference:
        """The undisturbed run of a case."""
        if index not in self._references:
            self._references[index] = self._run_undisturbed(index)
        return self._references[index]

    def _run_undisturbed(self, index: int) -> Reference:
        case = self.cases[index]
        path, out = self.work / f"recipe-{index}.json", self.work / "reference"
        write_json(path, case.recipe.to_dict())
        begun = time.perf_counter()
        statuses = [finish(process) for process in self.start(case, "--recipe", path, out)]
        seconds = time.perf_counter() - begun
        if any(statuses):
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
            return command_line.main(["train", flag, str(path), *flags])

        return [start(functools.partial(action, rank), self.log) for rank in range(case.ranks)]

    def _disturb(
        self, reference: Reference, out: Path, moments: list[float], rng: random.Random
    ) -> list[Any] | None:
        """Train one run to its end, with a signal at each moment, 0 to 1; returns its outcome or None."""
        folder: Path | None = None
        lived = lost = 0.0
        while True:
            begun = time.perf_counter()
            flag, path = ("--resume", folder) if folder else ("--recipe", reference.recipe)
            processes = self.start(reference.case, flag, path, out)
            moment = begun + 0.1 + moments.pop() * 0.8 * reference.seconds if moments else None
            signum, is_good = self._interrupt(processes, moment, rng, is_resumed=folder is not None)
            folder = next((path.parent for path in out.glob("*/recipe.json")), None)
            is_finished = folder is not None and (folder / "result.json").exists()
            if is_finished or signum is None or not is_good:
                return outcome(folder) if folder is not None and is_finished and is_good else None
            lived += time.perf_counter() - begun
            kept = 0.0
            if folder is not None and (folder / LAST).exists():
                kept = load_checkpoint(folder / LAST)["progress"]["wall_seconds"]
            if signum == signal.SIGKILL and len(processes) == 1:
                self.results["lost"].append(max(lived - kept - lost, 0.0))
            lost = lived - kept

    def _interrupt(
        self, processes: list[int], moment: float | None, rng: random.Random, *, is_resumed: bool
    ) -> tuple[int | None, bool]:
        """Send a signal to one of the ranks at this moment, four SIGKILLs to every SIGTERM, and wait for all.

        Returns the signal, None if they ended before, and whether every rank ended as it should.
        """
        results, chosen = self.results, rng.randrange(len(processes))
        signum: int | None = None
        if moment is None:
            status = finish_or_kill(processes[chosen], HANG_SECONDS)
        elif (status := finish(processes[chosen], moment)) is None:
            signum = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
            os.kill(processes[chosen], signum)
            results["faults"] += 1
            if signum == signal.SIGKILL:
                results["kills"] += 1
                results["resuming"] += is_resumed
                results["of_ranks"] += len(processes) > 1
            status = finish_or_kill(processes[chosen], ENDED_SECONDS)
        is_good = status == 0 or (signum is not None and status in LOSSES)
        for other in processes[:chosen] + processes[chosen + 1 :]:
            is_good &= self._ended_as_by_torchrun(other, has_failed=status != 0)
        return signum, is_good

    def _ended_as_by_torchrun(self, process: int, *, has_failed: bool) -> bool:
        """Wait for a rank, with SIGTERM once another has failed; returns whether it ended as it should."""
        status = finish(process, time.perf_counter() + 1) if has_failed else None
        if has_failed and status is None:
            os.kill(process, signal.SIGTERM)
        if status is None:
            status = finish_or_kill(process, ENDED_SECONDS)
        return status in ((0, 2, *LOSSES) if has_failed else (0,))  # 2: it has lost the other


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


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
