"""Where a resumed run goes on from, and what it keeps of the run that began."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasttrain.checkpoint.file import load_checkpoint
from fasttrain.checkpoint.fingerprint import differences, recipe_flags
from fasttrain.checkpoint.network import saved_precision, unproven
from fasttrain.checkpoint.state import RunState
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe, flag, load_recipe
from fasttrain.system.files import quarantine
from fasttrain.system.precision import pick_precision
from fasttrain.system.run_folder import RECIPE_FILE


def resume_from(paths: Sequence[Path], run: RunState, say: Callable[[str], object]) -> None:
    """Go on from the first of these checkpoints that is sound; those before it are named and set aside.

    The first rank reads them, and gives the others what it found. Raises UserError if none is sound.
    """
    path, state = run.world.broadcast(lambda: _first_sound(paths, run, say))
    changes = run.restore(state)
    for change in changes:
        say(f"goes on, but not bit for bit: {change}")
    run.progress.changes += changes
    run.progress.resumed += 1
    say(f"resumed from {path} at step {run.step.step} of {run.step.total_steps}")


def _first_sound(
    paths: Sequence[Path], run: RunState, say: Callable[[str], object]
) -> tuple[Path, dict[str, Any]]:
    unusable: list[tuple[Path, UserError]] = []
    for path in paths:
        try:
            state = run.read(path)
        except UserError as error:
            unusable.append((path, error))
            continue
        for bad, reason in unusable:
            say(f"skipped {reason} (kept as {quarantine(bad)})")
        if "proof" not in state:
            say(unproven(path))
        return path, state
    raise UserError("; ".join(str(reason) for _, reason in unusable))


@dataclass(frozen=True)
class KeptSettings:
    """What the first process of a run chose for its machine and later ones keep; None for a new run.

    precision: bf16, fp16, fp32 or tf32. compile_mode: torch.compile's mode, or off.
    """

    precision: str | None = None
    compile_mode: str | None = None

    @classmethod
    def from_checkpoints(cls, paths: Sequence[Path]) -> "KeptSettings":
        """Read from the first of these checkpoints that is readable and has its folder's recipe."""
        for path in paths:
            with contextlib.suppress(UserError):
                state, begun = load_checkpoint(path), load_recipe(str(path.parent / RECIPE_FILE))
                fingerprint = state.get("fingerprint")
                if isinstance(fingerprint, dict) and not differences(recipe_flags(begun), fingerprint):
                    mode = fingerprint.get("compile")
                    return cls(saved_precision(state), mode if isinstance(mode, str) else None)
        return cls()

    def precision_note(self, requested: str, device: torch.device) -> str | None:
        """A line to print if a new run would take another precision on this device; None if not."""
        if self.precision is None:
            return None
        try:
            now = pick_precision(requested, device)
        except UserError:
            return f"resumed in {self.precision}, as the run began; {device} only emulates it, which is slow"
        if now == self.precision:
            return None
        return (
            f"resumed in {self.precision}, as the run began; a new one would take {now} here, which is faster"
        )


def resumed_recipe(recipe: Recipe, folder: Path, precision: str | None) -> Recipe:
    """The recipe that the run in this folder began with.

    Raises UserError, naming the flags, if `recipe` differs from it. --compute-dtype may name the precision
    that the run computes in.
    """
    begun = load_recipe(str(folder / RECIPE_FILE))
    if precision is not None and recipe.compute_dtype == precision:
        recipe = dataclasses.replace(recipe, compute_dtype=begun.compute_dtype)
    then = begun.to_dict()
    if precision is not None:
        then["compute_dtype"] = precision  # what the error names, instead of auto
    differing = [
        f"{flag(key)} {value} (begun with {then[key]})"
        for key, value in recipe.to_dict().items()
        if value != getattr(begun, key)
    ]
    if differing:
        raise UserError(
            f"--resume {folder}: a resumed run keeps its recipe; leave out {', '.join(differing)}"
        )
    return begun
