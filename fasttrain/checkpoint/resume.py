"""Where to resume a run from, and the settings that it keeps from its first process."""

import contextlib
import dataclasses
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasttrain.checkpoint.file import LAST, PREVIOUS, load_checkpoint
from fasttrain.checkpoint.fingerprint import differences, recipe_flags
from fasttrain.checkpoint.network import images_of, saved_precision, unproven
from fasttrain.checkpoint.state import RunState
from fasttrain.data.dataset import Dataset
from fasttrain.data.run_images import RunImages
from fasttrain.distributed import World
from fasttrain.errors import Interrupted, LostRankError, TrainingInterrupted, UserError, WriteError, one_line
from fasttrain.options import TrainOptions, typed_flags
from fasttrain.recipe import Recipe, flag, load_recipe
from fasttrain.system.fallbacks import Fallbacks
from fasttrain.system.files import quarantine, write_atomically
from fasttrain.system.memory import is_full_memory
from fasttrain.system.precision import DTYPES, fails_in, pick_precision
from fasttrain.system.program import typed_for_all_ranks
from fasttrain.system.run_folder import ERROR_FILE, RECIPE_FILE, RESULT_FILE, read_machine


@dataclass(frozen=True)
class ResumePoint:
    """Where to resume a run from, and the settings that its first process chose and later ones keep.

    A new run has no folder yet, no checkpoints, and no settings to keep.
    resume: the value of --resume. checkpoints: the preferred one first.
    images: those that the run was trained on; None if its folder does not say.
    precision: bf16, fp16, fp32 or tf32. compile_mode: torch.compile's mode, or off.
    """

    folder: Path | None = None
    resume: str | Path | None = None
    checkpoints: tuple[Path, ...] = ()
    images: RunImages | None = None
    precision: str | None = None
    compile_mode: str | None = None

    @classmethod
    def find(cls, folder: Path | None, resume: str | Path | None, device: torch.device) -> "ResumePoint":
        """Find the checkpoints of an unfinished run, and take the settings from the first readable one.

        folder: None for a new run. device: where it is going to train.
        """
        if folder is None or resume is None:
            return cls()
        checkpoints, images = find_checkpoints(folder, resume), RunImages.of_run(folder)
        for path in checkpoints:
            with contextlib.suppress(UserError):
                state, recipe = load_checkpoint(path), load_recipe(str(path.parent / RECIPE_FILE))
                images = images or images_of(path, state)
                fingerprint = state.get("fingerprint")
                if isinstance(fingerprint, dict) and not differences(recipe_flags(recipe), fingerprint):
                    compile_mode = fingerprint.get("compile")
                    compile_mode = compile_mode if isinstance(compile_mode, str) else None
                    return cls(folder, resume, checkpoints, images, saved_precision(state), compile_mode)
        return cls(folder, resume, checkpoints, images, _noted_precision(folder, device))

    def options(self, typed: TrainOptions) -> TrainOptions:
        """Return the options with the run's own images, unless these name a place for them."""
        if self.images is None or isinstance(typed.data, Dataset):
            return typed
        if typed.hold_out and not self.images.hold_out:
            raise UserError("--hold-out: the run was begun without it; leave this flag out")
        return dataclasses.replace(typed, **self.images.options(typed.data, typed.data_dir, typed.skip_bad))

    def require_images(self, dataset: Dataset) -> None:
        """Raise UserError if a data set does not hold the images that the run was trained on."""
        if self.images is not None:
            self.images.require(dataset, f"--resume {self.folder}")

    def require_unchanged(self, world: World) -> None:
        """Raise UserError if the run's checkpoints are no longer those that were found."""
        folder, resume = self.folder, self.resume
        if folder is None or resume is None:
            return
        if self.checkpoints != world.broadcast(lambda: find_checkpoints(folder, resume)):
            raise UserError(f"{folder}: another process has trained it in the meantime; resume it again")

    def recipe(self, recipe: Recipe) -> Recipe:
        """Return the recipe that the run was started with; for a new run, the given one.

        Raises UserError, naming the flags, if the given recipe differs. --compute-dtype may also name the
        precision that the run computes in.
        """
        if self.folder is None:
            return recipe
        original = load_recipe(str(self.folder / RECIPE_FILE))
        if self.precision is not None and recipe.compute_dtype == self.precision:
            recipe = dataclasses.replace(recipe, compute_dtype=original.compute_dtype)
        then = original.to_dict()
        if self.precision is not None:
            then["compute_dtype"] = self.precision  # for the error, instead of auto
        differing = [
            f"{flag(key)} {value} (started with {then[key]})"
            for key, value in recipe.to_dict().items()
            if value != getattr(original, key)
        ]
        if differing:
            raise UserError(
                f"--resume {self.folder}: a resumed run keeps its recipe; leave out {', '.join(differing)}"
            )
        return original

    def working_precision(self, device: torch.device) -> str | None:
        """Return the run's precision, None for a new run. Raises UserError if it fails on this device."""
        failure = fails_in(self.precision, device) if self.precision else None
        if failure is not None:
            raise UserError(f"--resume {self.folder}: it computes in {self.precision}, but {failure}")
        return self.precision

    def precision_note(self, requested: str, device: torch.device) -> str | None:
        """Return a line to log if a new run would use another precision on this device, else None.

        requested: the recipe's compute_dtype.
        """
        if self.precision is None:
            return None
        try:
            now = pick_precision(requested, device, Fallbacks(lambda _: None))
        except UserError:
            return f"resumed in {self.precision}, as started; {device} only emulates it, which is slow"
        if now == self.precision:
            return None
        return f"resumed in {self.precision}, as started; a new run would use {now} here, which is faster"


def _noted_precision(folder: Path, device: torch.device) -> str | None:
    """Return the precision that machine.json notes; None if it notes none, or another kind of device.

    A run that has no checkpoint has it from there: auto measures, and might choose another the next time.
    """
    try:
        machine = read_machine(folder)
    except UserError:
        return None
    precision = machine.get("precision")
    is_same_kind = str(machine.get("device")).partition(":")[0] == device.type
    return precision if is_same_kind and precision in DTYPES else None


@contextlib.contextmanager
def say_how_to_resume(folder: Path, opts: TrainOptions) -> Iterator[None]:
    """Within the block, an error of torch, DALI or the GPU becomes a UserError that says how to resume.

    The traceback goes into the run's folder. Out-of-memory errors pass. A signal that did not wait for the
    state to be saved becomes an Interrupted that says so too; the disk's errors and a lost rank's get the
    same advice. Before the first checkpoint no line names a command; once the run has its result, everything
    passes as it is.
    """
    try:
        yield
    except TrainingInterrupted:
        raise
    except BaseException as error:
        if (folder / RESULT_FILE).exists():
            raise
        advice = ""
        if find_checkpoints(folder, folder):
            advice = f"; continue from the last checkpoint: {resume_command(folder, opts)}"
        shown = _with_advice(error, advice, folder)
        if shown is error:
            raise
        raise shown from error


def _with_advice(error: BaseException, advice: str, folder: Path) -> BaseException:
    """Return the error as the user should see it; the traceback of one from torch goes into the folder."""
    if isinstance(error, KeyboardInterrupt):
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        return Interrupted(f"{signal.Signals(signum).name}{advice or ': stopped'}", signum)
    if isinstance(error, LostRankError | WriteError):
        return UserError(f"{error}{advice}")
    if not isinstance(error, RuntimeError) or is_full_memory(error):
        return error
    text, where = "".join(traceback.format_exception(error)).encode(errors="replace"), "has its traceback"
    try:
        write_atomically(folder / ERROR_FILE, lambda file: file.write(text))
    except UserError as unwritable:
        where = f"could not be written ({unwritable})"
    return UserError(f"{one_line(error)} ({folder / ERROR_FILE} {where}){advice}")


def find_checkpoints(folder: Path, resume: str | Path) -> tuple[Path, ...]:
    """Return the checkpoints to resume from, the preferred one first; none if the run has to start over."""
    named = Path(resume)
    if named.is_file():
        return (named,)
    return tuple(folder / name for name in (LAST, PREVIOUS) if (folder / name).exists())


def restore_latest(checkpoints: Sequence[Path], run: RunState, log: Callable[[str], object]) -> None:
    """Restore the first sound one of these checkpoints; those before it are reported and renamed.

    The first rank reads them and sends the result to the others. Raises UserError if none is sound.
    """
    path, state = run.world.broadcast(lambda: _first_sound(checkpoints, run, log))
    changes = run.restore(state)
    for change in changes:
        log(f"resumed, but not bit for bit: {change}")
    run.progress.changes += changes
    run.progress.resumed += 1
    log(f"resumed from {path} at step {run.step.step} of {run.step.total_steps}")


def _first_sound(
    paths: Sequence[Path], run: RunState, log: Callable[[str], object]
) -> tuple[Path, dict[str, Any]]:
    unusable: list[tuple[Path, UserError]] = []
    for path in paths:
        try:
            state = run.read(path)
        except UserError as error:
            unusable.append((path, error))
            continue
        for bad, reason in unusable:
            log(f"skipped {reason} (kept as {quarantine(bad)})")
        if "proof" not in state:
            log(unproven(path))
        return path, state
    raise UserError("; ".join(str(reason) for _, reason in unusable))


def resume_command(folder: Path, options: TrainOptions) -> str:
    """Return the command that resumes this run, without the options that have their default.

    The run remembers its images, so their options are left out too.
    """
    kept = typed_flags(options, "device", "save_every", "on_nan", "fallback", "tensorboard")
    return typed_for_all_ranks("train", "--resume", str(folder), *kept)
