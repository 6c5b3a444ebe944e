"""When a run is saved: every few steps or seconds, after epochs, on a signal; and how it is rolled back."""

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
from fasttrain.errors import Interrupted, UserError

EPOCH_PAUSE = 10.0
"""Seconds. An epoch that ends sooner after a checkpoint gets none of its own, unless it is the last one.

Writing one takes as long as an epoch does on a fast GPU.
"""


@dataclass(frozen=True)
class SaveInterval:
    """How much training may pass between two checkpoints: a number of steps, or of seconds."""

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


class Pace:
    """When to ask the other ranks something: about once a second, after the same step on all of them.

    A world of one may ask after every step. `asked` takes the steps that every rank has answered.
    """

    def __init__(self, world: World, step: int) -> None:
        self._world, self._step, self._next = world, step, step + 1
        self._time = time.perf_counter()

    def due(self, step: int) -> bool:
        return step >= self._next

    def ask(self, step: int, wish: bool) -> bool:
        """Whether any rank wishes it."""
        steps_per_sec = (step - self._step) / max(time.perf_counter() - self._time, 1e-9)
        wishes, steps = self._world.all_reduce_max(wish, int(steps_per_sec) if self._world.size > 1 else 1)
        self._step, self._next, self._time = step, step + max(1, steps), time.perf_counter()
        return bool(wishes)


class CheckpointManager:
    """Saves a run when it is due, when an epoch ends, and when a signal asks the training to stop.

    All ranks save and stop after the same step: those that count steps agree anyway, and about seconds and
    signals they ask each other once a second. Only the first rank writes.
    stop_signal: returns the number of the signal that asks the training to stop, or None.
    resume_command: the words that the user is told to type.
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
        """Whether to save after this step."""
        step = self._run.step.step
        steps, seconds = step - self._step, time.perf_counter() - self._time
        if self._interval.over(steps, 0.0):
            return True
        return self._pace.due(step) and self._pace.ask(
            step, self._interval.over(steps, seconds) or self._stop_signal() is not None
        )

    def save(self) -> None:
        """Write the run's state in the background; as best.pt too after the best epoch so far."""
        state = self._state()
        if self._run.world.is_main:
            self._writer.write(state, best=self._after_best_epoch())
        self._remember()

    def end_of_epoch(self) -> None:
        """Save the run after an epoch, or hold its state if it is the best one and a checkpoint is recent.

        Waits for the disk, so that serialising takes no time from the next epoch.
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
        """After a signal to any rank, raise Interrupted once the run as it is now is on the disk."""
        [signum] = self._run.world.all_reduce_max(self._stop_signal() or 0)
        if signum:
            step = self._run.step
            if (self._step, self._epoch) != (step.step, self._run.epoch):  # after end_of_epoch
                self.save()
            self._writer.wait()
            raise Interrupted(
                f"{signal.Signals(signum).name}: saved at step {step.step} of {step.total_steps}; "
                f"resume with: {self._resume_command}",
                signum,
            )

    def roll_back(self) -> None:
        """Restore the last checkpoint, halve the peak learning rate, and save that."""
        self._writer.wait()
        self._writer.forget_best()
        run = self._run
        run.restore(run.world.broadcast(lambda: run.read(self._writer.folder / LAST)))
        run.progress.rollbacks += 1
        run.step.max_lr /= 2
        self.save()

    def _remember(self) -> None:
        """Count steps and seconds from here."""
        self._step, self._epoch, self._time = self._run.step.step, self._run.epoch, time.perf_counter()

    def _after_best_epoch(self) -> bool:
        run, rows = self._run, self._run.progress.epochs
        epoch_is_over = run.epoch > 0 and run.step.step == run.epoch * len(run.loader)
        return epoch_is_over and run.progress.best_epoch is rows[-1]

    def _state(self) -> dict[str, Any]:
        """The run's state on the first rank, with what the others have for themselves; {} on the others."""
        _, *others = self._run.world.gather(self._run.own_state())
        return self._run.state_dict() | {"ranks": others} if self._run.world.is_main else {}
