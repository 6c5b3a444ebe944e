"""Disks that fail: each training ends in one line with the command that resumes it, and loses nothing."""

import errno
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from fasttrain.checkpoint.file import LAST
from tests.soak.cases import Case
from tests.soak.fork import finish_or_kill
from tests.soak.trainings import HANG_SECONDS, Trainings, begun_run

CALLS: tuple[tuple[Any, str], ...] = (
    *((os, "replace"), (os, "fsync"), (os, "chmod"), (tempfile, "mkstemp")),
    (Path, "open"),  # as metrics.jsonl is appended to
)
"""What a file needs to be written: each may fail. A failing os.link is replaced by a copy."""

REASONS = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT)
LATEST_CALL = 60
SLOW_SECONDS = 0.05


class DiskCampaign:
    """Each turn trains one run on a disk that fails at some call, for good or once, or that is slow.

    results: runs; how many of them the disk ended; and how many lost nothing in the end.
    """

    name = "disks"

    def __init__(self, cases: list[Case], work: Path) -> None:
        self.work = work
        self._trainings = Trainings([case for case in cases if case.ranks == 1], work)
        self.results: dict[str, Any] = {"runs": 0, "failed": 0, "bit_equal": 0, "wrong": []}

    def turn(self, number: int, rng: random.Random) -> None:
        results, trainings = self.results, self._trainings
        reference = trainings.reference(number)
        out, trainings.log = self.work / f"run-{number}", self.work / f"log-{number}"
        failure = Failure(rng)
        [process] = trainings.start(
            reference.case, "--recipe", reference.recipe, out, prepare=failure.install
        )
        status = finish_or_kill(process, HANG_SECONDS)
        results["runs"] += 1
        if status != 0:
            results["failed"] += 1
            for fault in wrong_in(trainings.log.read_text(), status, begun_run(out)):
                results["wrong"].append(f"{failure}: {fault}")
        if wrong := trainings.wrong_end(reference, out, status):
            results["wrong"].append(f"{failure}: {wrong}")
        else:
            results["bit_equal"] += 1


class Failure:
    """A call that fails from its n-th time on, or only then; or a disk on which everything takes long."""

    def __init__(self, rng: random.Random) -> None:
        self.module, self.name = rng.choice(CALLS)
        self.first = rng.randrange(3 if self.name == "open" else LATEST_CALL)
        self.reason, self.lasts = rng.choice(REASONS), rng.random() < 0.5
        self.is_slow = rng.random() < 0.1
        self._calls = 0

    def __str__(self) -> str:
        if self.is_slow:
            return f"{self.name} is slow"
        when = "from then on" if self.lasts else "once"
        return f"{self.name} fails at call {self.first}, {when}: {os.strerror(self.reason)}"

    def install(self) -> None:
        original = getattr(self.module, self.name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.name == "open" and args[1:2] != ("a",):
                return original(*args, **kwargs)  # reading
            number, self._calls = self._calls, self._calls + 1
            if self.is_slow:
                time.sleep(SLOW_SECONDS)
            elif number == self.first or (self.lasts and number > self.first):
                raise OSError(self.reason, os.strerror(self.reason))
            return original(*args, **kwargs)

        setattr(self.module, self.name, call)


def wrong_in(log: str, status: int | None, folder: Path | None) -> list[str]:
    """What is wrong with how a training ended whose disk had failed."""
    found = []
    lines = [line for line in log.splitlines() if line.startswith("fasttrain train:")]
    if status != 2 or len(lines) != 1 or "Traceback" in log:
        found.append(f"status {status}, {len(lines)} lines: {log[-500:]!r}")
    elif folder is not None and (folder / LAST).exists() and f"--resume {folder}" not in lines[0]:
        found.append(f"the line does not say how to resume: {lines[0]!r}")
    return found
