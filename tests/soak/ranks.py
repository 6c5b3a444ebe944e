"""Ranks under torchrun that are killed, frozen or told to stop: the job says which, and what resumes it."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.checkpoint.file import LAST
from fasttrain.distributed import ANSWER_SECONDS
from fasttrain.errors import UserError
from fasttrain.system import roll_call
from tests.soak.cases import Case
from tests.soak.signals import NAMED, SIGNALS, run_named
from tests.soak.trainings import (
    HANG_SECONDS,
    Reference,
    Trainings,
    begun_run,
    outcome,
    same,
    wait_for_file,
)

FROZEN_SECONDS = ANSWER_SECONDS + roll_call.SECONDS + 3.0
"""So long a rank is stopped: the others must have named it by then, and have ended."""

ENDED_SECONDS = 60.0
"""torchrun gives ranks 30 s to end before it kills them; a job that takes longer than this hangs."""

FAULTS = {"kill": 0.5, "freeze": 0.2, "stop the job": 0.1, "stop a rank": 0.2}
"""Their shares; a frozen rank takes three times as long as the others."""


@dataclass(frozen=True)
class Job:
    """A job of torchrun: its process, and the folder with its ranks' standard errors."""

    process: subprocess.Popen[bytes]
    logs: Path

    def ranks(self) -> dict[int, int]:
        """The process id of each rank that has been started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found: dict[int, int] = {}
        with suppress(OSError):  # they are ending
            for child in children.read_text().split():
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                ranks = [value for value in environment if value.startswith(b"RANK=")]
                found |= {int(value[5:]): int(child) for value in ranks}
        return found

    def errors(self) -> dict[int, str]:
        """What each rank has said on its standard error."""
        paths = self.logs.glob("*/attempt_*/*/stderr.log")
        return {int(path.parent.name): path.read_text() for path in paths}

    def summary(self) -> str:
        """What torchrun itself has said."""
        return (self.logs / "torchrun").read_text()


class RankCampaign:
    """Each turn disturbs one job of two or three ranks, and runs what it says resumes it.

    results: jobs; how many of them each fault met while they ran; and how many ended with the bits of an
    undisturbed run.
    """

    name = "ranks"

    def __init__(self, cases: list[Case], work: Path) -> None:
        self.work = work
        self._trainings = Trainings([case for case in cases if case.ranks > 1], work)
        self._seconds: dict[Path, float] = {}
        counts = ("jobs", "ended_before", *FAULTS, "resumed", "bit_equal")
        self.results: dict[str, Any] = dict.fromkeys(counts, 0) | {"wrong": []}

    def turn(self, number: int, rng: random.Random) -> None:
        reference = self._trainings.reference(number)
        if reference.recipe not in self._seconds:
            logs = self.work / f"undisturbed-{reference.recipe.stem}"
            self._seconds[reference.recipe] = self._undisturbed_seconds(reference, logs)
        job, begun = self._start(reference, self.work / f"job-{number}"), time.perf_counter()
        [fault] = rng.choices([*FAULTS], [*FAULTS.values()])
        moment = rng.uniform(0.3, self._seconds[reference.recipe])
        if rng.random() < 0.6:  # most of the time is the start, and most of a real run is not
            wait_for_file(job.process, self.work / "out", f"*/{LAST}")
            moment = time.perf_counter() - begun + rng.uniform(0, 1)
        for wrong in self._disturbed(job, reference, fault, begun + moment, rng):
            self.results["wrong"].append(f"{wrong}; {moment:.2f} s after the start, logs in {job.logs}")

    def _undisturbed_seconds(self, reference: Reference, logs: Path) -> float:
        job, begun = self._start(reference, logs), time.perf_counter()
        if job.process.wait(HANG_SECONDS):
            raise UserError(f"ranks: an undisturbed job failed: {job.errors()} {job.summary()}")
        return time.perf_counter() - begun

    def _start(self, reference: Reference, logs: Path) -> Job:
        shutil.rmtree(self.work / "out", ignore_errors=True)
        logs.mkdir()
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--redirects", "3", "--log-dir", str(logs)]
        ranks = ["--nproc-per-node", str(reference.case.ranks), "-m", "fasttrain", "train"]
        flags = ["--recipe", str(reference.recipe), "--out", str(self.work / "out"), "--save-every", "1"]
        words = [sys.executable, *torchrun, *ranks, *flags, *reference.case.data, "--device", "cpu"]
        with (logs / "torchrun").open("w") as said:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            return Job(subprocess.Popen(words, stdout=said, stderr=said, env=environment), logs)

    def _disturbed(
        self, job: Job, reference: Reference, fault: str, moment: float, rng: random.Random
    ) -> Iterator[str]:
        """Yields what is wrong with how the job ended, and with the run after it."""
        results, process = self.results, job.process
        results["jobs"] += 1
        try:
            process.wait(max(moment - time.perf_counter(), 0.001))
        except subprocess.TimeoutExpired:
            ranks = job.ranks()
            if not ranks:
                fault = "stop the job"
            results[fault] += 1
            rank = disturb(job, ranks, fault, rng)
        else:
            results["ended_before"] += 1
            if process.returncode:
                yield f"undisturbed, it failed: {job.errors()}"
            return
        try:
            status = process.wait(ENDED_SECONDS)
        except subprocess.TimeoutExpired:
            for pid in job.ranks().values():
                os.kill(pid, signal.SIGKILL)
            process.kill()
            process.wait()
            yield f"still there after {ENDED_SECONDS:.0f} s: {job.errors()}"
            return
        for wrong in wrong_lines(job, fault, rank) if status else ():
            yield f"{fault}, rank {rank}: {wrong}"
        for wrong in self._resumed(job, reference):
            yield f"{fault}, rank {rank}, resumed: {wrong}"

    def _resumed(self, job: Job, reference: Reference) -> Iterator[str]:
        """Run what the job said resumes it; yields what is wrong with the run."""
        folder = begun_run(self.work / "out")
        if folder is None:
            return  # it had not begun
        if not (folder / "result.json").exists():
            named = [match[1] for text in job.errors().values() if (match := NAMED.search(text))]
            ranks, resume = str(reference.case.ranks), ["--resume", str(folder), "--device", "cpu"]
            typed = ["torchrun", "--nproc-per-node", ranks, "-m", "fasttrain", "train", *resume]
            if len({*named}) > 1:
                yield f"the ranks name different commands: {named}"
            self.results["resumed"] += 1
            if failure := run_named(named[0] if named else shlex.join(typed)):
                yield failure
                return
        if same(outcome(folder), reference.outcome):
            self.results["bit_equal"] += 1
        else:
            yield f"{folder} has other bits"


def disturb(job: Job, ranks: dict[int, int], fault: str, rng: random.Random) -> int | None:
    """Do one of FAULTS; returns the rank that it was done to, None if that was torchrun."""
    if fault == "stop the job":
        job.process.send_signal(rng.choice(SIGNALS))
        return None
    rank, pid = rng.choice(sorted(ranks.items()))
    with suppress(ProcessLookupError):  # it may have ended
        if fault == "freeze":
            os.kill(pid, signal.SIGSTOP)
            with suppress(subprocess.TimeoutExpired):
                job.process.wait(FROZEN_SECONDS)
            os.kill(pid, signal.SIGCONT)
        else:
            os.kill(pid, signal.SIGKILL if fault == "kill" else rng.choice(SIGNALS))
    return rank


def wrong_lines(job: Job, fault: str, rank: int | None) -> Iterator[str]:
    """What is wrong with what the ranks and torchrun said of a job that failed."""
    errors, began = job.errors(), list((job.logs.parent / "out").glob(f"*/{LAST}"))
    for other, text in errors.items():
        lines = [line for line in text.splitlines() if line.startswith("fasttrain")]
        if len(lines) > 1 or "Traceback" in text:
            yield f"rank {other}: {text!r}"
    lost = [text for other, text in errors.items() if "lost " in text and other != rank]
    names = [re.search(r"lost (another rank|ranks? [^(]+) \(", text) for text in lost]
    if fault == "freeze" and not lost:
        yield f"nobody says that rank {rank} is lost: {errors}"
    are_wrong = any(name and name[1] != f"rank {rank}" for name in names)
    if are_wrong and (fault == "freeze" or (fault == "kill" and began)):
        yield f"rank {rank} was lost, and the others say {[name and name[1] for name in names]}"
    if fault == "kill" and not re.search(rf"rank +: {rank} .*\n.*exitcode +: -9", job.summary()):
        yield f"torchrun does not name rank {rank}: {job.summary()[-1500:]}"
