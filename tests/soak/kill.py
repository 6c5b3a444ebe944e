"""Trainings are killed at random moments and resumed; each must end with the bits of an undisturbed run."""

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from fasttrain.checkpoint.file import LAST, load_checkpoint
from tests.soak.cases import Case
from tests.soak.fork import finish, finish_or_kill, last_line
from tests.soak.trainings import HANG_SECONDS, Reference, Trainings, begun_run, outcome, same

ENDED_SECONDS = 30.0
"""After a signal, a process that takes longer to end counts as hanging."""

STOPPED = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""How a rank may end that was told to: at once before the training, with its own status in it."""


class KillCampaign:
    """Each turn trains one run through up to FAULTS signals, and resumes it until it has finished.

    results: faults, and of them kills, which are SIGKILLs; of these, `resuming` met a run that had been
    stopped before, and `of_ranks` one of several ranks. lost: seconds between the last checkpoint and each
    SIGKILL of a run on one rank.
    """

    name = "kill"
    FAULTS = 8

    def __init__(self, cases: list[Case], work: Path) -> None:
        self.work, self.trainings = work, Trainings(cases, work)
        counts = ("faults", "kills", "resuming", "of_ranks", "runs", "bit_equal")
        self.results: dict[str, Any] = dict.fromkeys(counts, 0) | {"lost": [], "wrong": []}

    def turn(self, number: int, rng: random.Random) -> None:
        results, reference = self.results, self.trainings.reference(number)
        out = self.work / f"run-{number}"
        moments = [rng.random() for _ in range(rng.randint(1, self.FAULTS))]
        found = self._disturb(reference, out, moments, rng)
        is_equal = found is not None and same(found, reference.outcome)
        results["runs"] += 1
        results["bit_equal"] += is_equal
        if is_equal:
            shutil.rmtree(out)
        else:
            what = "was not recovered" if found is None else "ended with other bits"
            said = last_line(self.trainings.log)
            results["wrong"].append(f"the run of {reference.recipe} in {out} {what}: {said}")

    def _disturb(
        self, reference: Reference, out: Path, moments: list[float], rng: random.Random
    ) -> list[Any] | None:
        """Train one run to its end, with a signal at each moment, 0 to 1; returns its outcome or None."""
        folder: Path | None = None
        lived = behind = kept = 0.0  # seconds of all processes; of them not kept by the last one, and kept
        while True:
            begun = time.perf_counter()
            flag, path = ("--resume", folder) if folder else ("--recipe", reference.recipe)
            ranks = self.trainings.start(reference.case, flag, path, out)
            left = 0.9 * max(reference.seconds - kept, 0.0)  # of what an undisturbed one takes
            moment = begun + 0.1 + moments.pop() * left if moments else None
            signum, is_good = self._interrupt(ranks, moment, rng, is_resumed=folder is not None)
            folder = begun_run(out)
            is_finished = folder is not None and (folder / "result.json").exists()
            if is_finished or signum is None or not is_good:
                return outcome(folder) if folder is not None and is_finished and is_good else None
            lived += time.perf_counter() - begun
            if folder is not None and (folder / LAST).exists():
                kept = load_checkpoint(folder / LAST)["progress"]["wall_seconds"]
            if signum == signal.SIGKILL and len(ranks) == 1:
                self.results["lost"].append(max(lived - kept - behind, 0.0))
            behind = lived - kept

    def _interrupt(
        self, ranks: list[int], moment: float | None, rng: random.Random, *, is_resumed: bool
    ) -> tuple[int | None, bool]:
        """Send a signal to one of the ranks at this moment, four SIGKILLs to every SIGTERM, and wait for all.

        Returns the signal, None if they ended before, and whether every rank ended as it should.
        """
        results, chosen = self.results, rng.randrange(len(ranks))
        signum: int | None = None
        if moment is None:
            status = finish_or_kill(ranks[chosen], HANG_SECONDS)
        elif (status := finish(ranks[chosen], moment)) is None:
            signum = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
            os.kill(ranks[chosen], signum)
            results["faults"] += 1
            if signum == signal.SIGKILL:
                results["kills"] += 1
                results["resuming"] += is_resumed
                results["of_ranks"] += len(ranks) > 1
            status = finish_or_kill(ranks[chosen], ENDED_SECONDS)
        is_good = status == 0 or (signum is not None and status in (-signum, 128 + signum))
        for other in ranks[:chosen] + ranks[chosen + 1 :]:
            is_good &= self._ended_as_by_torchrun(other, has_failed=status != 0)
        return signum, is_good

    def _ended_as_by_torchrun(self, rank: int, *, has_failed: bool) -> bool:
        """Wait for a rank, with SIGTERM once another has failed; returns whether it ended as it should."""
        status = finish(rank, time.perf_counter() + 1) if has_failed else None
        if has_failed and status is None:
            os.kill(rank, signal.SIGTERM)
        if status is None:
            status = finish_or_kill(rank, ENDED_SECONDS if has_failed else HANG_SECONDS)
        return status in ((0, 2, *STOPPED) if has_failed else (0,))  # 2: it has lost the other
