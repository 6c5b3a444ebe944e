"""What a machine does to a training: it stops it for a while, runs out of memory, or sets its clock."""

import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.soak.cases import Case
from tests.soak.fork import finish_or_kill
from tests.soak.trainings import HANG_SECONDS, Reference, Trainings

MIB = 2**20
CGROUPS = Path("/sys/fs/cgroup/memory")
"""Where Linux's first version of control groups limits memory; writable for root."""

START_SECONDS = 6.0
"""So long a process of its own takes until it trains, here."""

JUMPS = (-(365 * 86_400), -3600, -1, 3600, 30 * 365 * 86_400)
"""By how many seconds a clock is set: a year and more, an hour as for summer time, a second."""


ENDS = {
    "address_space": (0, 2, -signal.SIGABRT, 127),
    "out_of_memory": (0, 2, -signal.SIGKILL),
}
"""How a training may end: where memory is short, C++, glibc (with 127) and the kernel end it themselves."""


class HostCampaign:
    """Each turn trains one run while the machine misbehaves, and resumes it if that ended it.

    results: how often each fault was tried, how many trainings ended of one, and how many runs had the bits
    of an undisturbed one in the end. A fault that this machine does not let us have is left out.
    """

    name = "host"

    def __init__(self, cases: list[Case], work: Path) -> None:
        self.work = work
        self._trainings = Trainings([case for case in cases if case.ranks == 1], work)
        self._faults: dict[str, Callable[[Reference, Path, random.Random], int | None]] = {
            "stopped": self._stopped,
            "address_space": self._short_of_address_space,
        }
        if os.access(CGROUPS, os.W_OK):
            self._faults["out_of_memory"] = self._killed_for_memory
        if preload := compiled_clock(work):
            self._faults["clock"] = partial(self._clock_jumps, preload)
        self.results: dict[str, Any] = dict.fromkeys(self._faults, 0)
        self.results |= {"runs": 0, "ended": 0, "bit_equal": 0, "wrong": []}

    def turn(self, number: int, rng: random.Random) -> None:
        results, trainings = self.results, self._trainings
        reference = trainings.reference(number)
        out, trainings.log = self.work / f"run-{number}", self.work / f"log-{number}"
        name = rng.choice(list(self._faults))
        status = self._faults[name](reference, out, rng)
        results["runs"] += 1
        results[name] += 1
        results["ended"] += status != 0
        for wrong in self._outcome(reference, out, status, ENDS.get(name, (0,))):
            results["wrong"].append(f"{name}: {wrong}")

    def _outcome(
        self, reference: Reference, out: Path, status: int | None, ends: tuple[int, ...]
    ) -> Iterator[str]:
        """Resume the run if it has not finished; yields what is wrong with how it ended, both times."""
        said = self._trainings.log.read_text() if self._trainings.log.exists() else ""
        lines = [line for line in said.splitlines() if line.startswith("fasttrain train:")]
        if status not in ends or len(lines) != (status == 2) or "Traceback" in said:
            yield f"status {status}: {said[-800:]!r}"
        if wrong := self._trainings.wrong_end(reference, out, status):
            yield wrong
        else:
            self.results["bit_equal"] += 1

    def _start(self, reference: Reference, out: Path, prepare: Callable[[], object] = lambda: None) -> int:
        [process] = self._trainings.start(reference.case, "--recipe", reference.recipe, out, prepare=prepare)
        return process

    def _stopped(self, reference: Reference, out: Path, rng: random.Random) -> int | None:
        """SIGSTOP and SIGCONT, as a debugger and a full batch system do; several times."""
        process = self._start(reference, out)
        for _ in range(rng.randint(1, 3)):
            time.sleep(rng.uniform(0, reference.seconds / 2))
            os.kill(process, signal.SIGSTOP)
            time.sleep(rng.uniform(0.5, 3))
            os.kill(process, signal.SIGCONT)
        return finish_or_kill(process, HANG_SECONDS)

    def _short_of_address_space(self, reference: Reference, out: Path, rng: random.Random) -> int | None:
        """As after `ulimit -v`: every request for more fails."""
        most = address_space() + rng.randrange(120) * MIB

        def limit() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

        return finish_or_kill(self._start(reference, out, limit), HANG_SECONDS)

    def _killed_for_memory(self, reference: Reference, out: Path, rng: random.Random) -> int | None:
        """In a control group that is too small, as a container may be: the kernel kills it."""
        group = CGROUPS / f"fasttrain-{os.getpid()}"
        group.mkdir(exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(str(rng.randint(8, 120) * MIB))

        def enter() -> None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

        status = finish_or_kill(self._start(reference, out, enter), HANG_SECONDS)
        group.rmdir()
        return status

    def _clock_jumps(self, preload: Path, reference: Reference, out: Path, rng: random.Random) -> int | None:
        """A process of its own, since what is preloaded must be there before everything else."""
        flags = ["--recipe", str(reference.recipe), *reference.case.data, "--out", str(out)]
        jump, after = rng.choice(JUMPS), rng.uniform(0, START_SECONDS + 2 * reference.seconds)
        changed = {"LD_PRELOAD": str(preload), "JUMP_SECONDS": str(jump), "JUMP_AFTER": f"{after:.2f}"}
        with self._trainings.log.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fasttrain", "train", *flags, "--device", "cpu", "--save-every", "1"],
                stdout=log,
                stderr=log,
                env=os.environ | changed | {"OMP_NUM_THREADS": "1"},
            )
        try:
            return process.wait(HANG_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return None


def address_space() -> int:
    """The bytes of this process's address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def compiled_clock(work: Path) -> Path | None:
    """The library that sets a process's clock; None where no compiler makes it."""
    source, target = Path(__file__).with_name("jumping_clock.c"), work / "jumping_clock.so"
    try:
        done = subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target), str(source), "-ldl"])
    except OSError:
        return None
    return target if done.returncode == 0 else None
