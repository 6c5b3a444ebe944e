"""When to save a run: every few steps or seconds, after epochs, on a signal; and how to roll it back."""

import math
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fasttrain.checkpoint.file import LAST
from fasttrain.checkpoint.state import RunState
from fasttrain.checkpoint.writer import CheckpointWriter
from fasttrain.distributed import World
from fasttrain.errors import TrainingInterrupted, UserError

EPOCH_PAUSE = 10.0
"""Seconds after a checkpoint in which the end of an epoch writes no other, unless the epoch is the last.

Writing a checkpoint takes as long as an epoch on a fast GPU.
"""


@dataclass(frozen=True)
class SaveInterval:
    """The most training between two checkpoints: a number of steps, or of seconds."""

    steps: float = math.inf
    seconds: float = math.inf

    @classmethod
    def parse(cls, text: str) -> "SaveInterval":
        """Parse --save-every: 500 means steps, 60s means seconds. Raises UserError for anything else."""
        match = re.fullmatch(r"([0-9]+)(s?)", text)
        if not match or not int(match[1]):
            raise UserError(f"--save-every {text}: expected steps, such as 500, or seconds, such as 60s")
        return cls(seconds=int(match[1])) if match[2] else cls(steps=int(match[1]))

    def over(self, steps: int, seconds: float) -> bool:
        """Return whether the interval is over after this many steps and seconds."""
        return steps >= self.steps or seconds >= self.seconds


class Pace:
    """When to ask the other ranks a question: about once a second, after the same step on every rank.

    A world of one rank asks after every step.
    """

    def __init__(self, world: World, step: int) -> None:
        self._world, self._step, self._next = world, step, step + 1
        self._time = time.perf_counter()

    def due(self, step: int) -> bool:
        """Return whether to ask after this step."""
        return step >= self._next

    def ask(self, step: int, wish: bool) -> bool:
        """Return whether `wish` is true on any rank. Every rank calls this after the same step."""
        steps_per_sec = (step - self._step) / max(time.perf_counter() - self._time, 1e-9)
        wishes, steps = self._world.all_reduce_max(wish, int(steps_per_sec) if self._world.size > 1 else 1)
        self._step, self._next, self._time = step, step + max(1, steps), time.perf_counter()
        return bool(wishes)


class CheckpointManager:
    """Saves a run when it is due, when an epoch ends, and when a signal asks the training to stop.

    All ranks save and stop after the same step: they agree on steps anyway, and ask each other about seconds
    and signals once a second. Only the first rank writes.
    stop_signal: returns the number of the signal that asks the training to stop, or None.
    resume_command: the command that resumes this run, shown to the user.
    """

    def __init__(
        self,
        run: RunState,
        writer: CheckpointWriter,
        interval: SaveInterval,
        *,
        stop_signal: Callable[[], int | None],
        resume_command: str,
    ) -> None:
        self._run, self._writer, self._interval = run, writer, interval
        self._stop_signal, self._resume_command = stop_signal, resume_command
        self._pace = Pace(run.world, run.step.step)
        self._remember()

    def due(self) -> bool:
        """Return whether to save after this step."""
        step = self._run.step.step
        steps, seconds = step - self._step, time.perf_counter() - self._time
        if self._interval.over(steps, 0.0):
            return True
        return self._pace.due(step) and self._pace.ask(
            step, self._interval.over(steps, seconds) or self._stop_signal() is not None
        )

    def save(self) -> None:
        """Write the run's state in the background; after the best epoch so far, also as best.pt.

        Raises UserError if the checkpoint before this one could not be written.
        """
        state = self._state()
        if self._run.world.is_main:
            self._writer.write(state, best=self._after_best_epoch())
        self._remember()

    def end_of_epoch(self) -> None:
        """Save the run after an epoch; if a checkpoint is recent, only hold the state of the best epoch.

        Waits for the disk, so that writing takes no time from the next epoch.
        """
        run, steps = self._run, self._run.step.step - self._step
        is_due = run.epoch == run.step.recipe.epochs or self._stop_signal() is not None
        is_due = is_due or self._interval.over(steps, 0.0)
        is_due = is_due or time.perf_counter() - self._time >= EPOCH_PAUSE
        if run.world.all_reduce_max(int(is_due)) == [1]:
            self.save()
            self._writer.wait()
        elif self._after_best_epoch():
            state = self._state()
            if run.world.is_main:
                self._writer.hold_best(state)

    def stop_if_asked(self) -> None:
        """If any rank has received a signal, save the run as it is now and raise TrainingInterrupted."""
        [signum] = self._run.world.all_reduce_max(self._stop_signal() or 0)
        if signum:
            step = self._run.step
            if (self._step, self._epoch) != (step.step, self._run.epoch):  # after end_of_epoch
                self.save()
            self._writer.wait()
            raise TrainingInterrupted(
                f"{signal.Signals(signum).name}: saved at step {step.step} of {step.total_steps}; "
                f"resume with: {self._resume_command}",
                signum,
            )

    def roll_back(self) -> None:
        """Restore the last checkpoint, halve the peak learning rate, and save the result."""
        self._writer.wait()
        self._writer.forget_best()
        run = self._run
        run.restore(run.world.broadcast(lambda: run.read(self._writer.folder / LAST)))
        run.progress.rollbacks += 1
        run.step.max_lr /= 2
        self.save()

    def _remember(self) -> None:
        """Start counting steps and seconds again from here."""
        self._step, self._epoch, self._time = self._run.step.step, self._run.epoch, time.perf_counter()

    def _after_best_epoch(self) -> bool:
        run, rows = self._run, self._run.progress.epochs
        epoch_is_over = run.epoch > 0 and run.step.step == run.epoch * len(run.loader)
        return epoch_is_over and run.progress.best_epoch is rows[-1]

    def _state(self) -> dict[str, Any]:
        """Return the run's state on the first rank, with the other ranks' own states; {} on the others."""
        _, *others = self._run.world.gather(self._run.own_state())
        return self._run.state_dict() | {"ranks": others} if self._run.world.is_main else {}
