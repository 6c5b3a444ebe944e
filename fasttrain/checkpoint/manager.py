"""When a run is saved: steps, seconds, ends of epochs, signals, rollbacks."""

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
from fasttrain.distributed import Pace
from fasttrain.errors import Interrupted, UserError


@dataclass(frozen=True)
class SaveInterval:
    """How much training may pass between two checkpoints: so many steps, or so many seconds."""

    steps: float = math.inf
    seconds: float = math.inf

    @classmethod
    def parse(cls, text: str) -> "SaveInterval":
        """From --save-every: 500 means steps, 60s seconds. Raises UserError for anything else."""
        match = re.fullmatch(r"([0-9]+)(s?)", text)
        if not match or not int(match[1]):
            raise UserError(f"--save-every {text}: expected steps, as 500, or seconds, as 60s")
        return cls(seconds=int(match[1])) if match[2] else cls(steps=int(match[1]))

    def over(self, steps: int, seconds: float) -> bool:
        return steps >= self.steps or seconds >= self.seconds


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
        if self._run.world.is_main:
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
            if run.world.is_main:
                self._writer.hold_best(state)

    def _after_best_epoch(self) -> bool:
        run, rows = self._run, self._run.progress.epochs
        epoch_is_over = run.epoch > 0 and run.step.step == run.epoch * len(run.loader)
        return epoch_is_over and run.progress.best_epoch is rows[-1]

    def _state(self) -> dict[str, Any]:
        """The run's state on the first rank, with what the others have for themselves; {} on the others."""
        _, *others = self._run.world.gather(self._run.own_state())
        return self._run.state_dict() | {"ranks": others} if self._run.world.is_main else {}

    def roll_back(self) -> None:
        """Go back to the last checkpoint, halve the peak rate, and save that."""
        self._writer.wait()
        self._writer.forget_best()
        run = self._run
        run.restore(run.world.broadcast(lambda: run.read(self._writer.folder / LAST)))
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
