"""A run's folder: its name, its files, and which folder --resume refers to."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fasttrain.errors import UserError

RECIPE_FILE, RESULT_FILE = "recipe.json", "result.json"
"""A run without the first has not begun; one without the second, which is written last, is unfinished."""

MACHINE_FILE = "machine.json"
"""The machine that the run was started on, and the precision and compile mode that were chosen there."""

MACHINE_FIGURES = ("ranks", "cpu_cores")
MACHINE_NAMES = ("gpu_name", "cpu_model", "git_commit", "device", "precision", "compile")
"""Its keys that hold numbers, where it has them, and its keys that hold text or null."""

DATA_FILE = "data.json"
"""Which images the run was trained on, and where they were."""

ERROR_FILE = "error.txt"
"""The traceback of an error that ended the training, if there was one."""


def read_text(path: Path) -> str:
    """Read one of the run's text files. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected the file that fasttrain train wrote"
        ) from error


def parse_object(text: str, place: object) -> dict[str, Any]:
    """Parse a JSON object; `place` names it in the UserError raised for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{place}: corrupt; expected the JSON object that fasttrain train wrote")
    return values


def read_object(path: Path) -> dict[str, Any]:
    """Read one of the run's JSON objects. Raises UserError if the file is missing or corrupt."""
    return parse_object(read_text(path), path)


def read_machine(folder: Path) -> dict[str, Any]:
    """Read a run's machine.json. Raises UserError if it is missing, corrupt or not what a training writes."""
    path = folder / MACHINE_FILE
    machine = read_object(path)
    require_values(path, machine, [key for key in MACHINE_FIGURES if key in machine])
    for key, value in machine.items():
        kinds = str | None if key in MACHINE_NAMES else str | int | float | None
        if not isinstance(value, kinds):
            raise _unexpected(path, key, repr(value))
    return machine


def machine_is_lost(folder: Path, log: Callable[[str], object]) -> bool:
    """Return whether the run's machine.json is missing or damaged, and log it if so."""
    try:
        read_machine(folder)
    except UserError as error:
        log(f"{error}; writing a new one that describes this machine")
        return True
    return False


def require_values(
    place: object,
    values: dict[str, Any],
    figures: Sequence[str],
    *,
    nullable: Sequence[str] = (),
    names: Sequence[str] = (),
) -> None:
    """Raise UserError unless these keys hold finite numbers, 0 or more, such or null (nullable), or text."""
    for key in (*figures, *nullable, *names):
        value = values.get(key)
        is_good = (
            isinstance(value, str)
            if key in names
            else _is_figure(value) or (value is None and key in nullable)
        )
        if key not in values or not is_good:
            raise _unexpected(place, key, repr(value) if key in values else "missing")


def _is_figure(value: Any) -> bool:
    """Whether it is a finite number, 0 or more, that a float can hold; JSON's may be longer."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max


def _unexpected(place: object, key: str, found: str) -> UserError:
    return UserError(f"{place}: {key} is {found:.100}; expected the value that fasttrain train wrote")


def new_run_folder(out: Path, recipe_name: str) -> Path:
    """Create and return the folder `out`/<time>-<recipe>; runs of the same second get -2, -3 and so on.

    Raises UserError if the folder cannot be created.
    """
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe_name}"
    for attempt in range(1, 1000):
        folder = out / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"--out {out}: not a folder; choose another one") from None
        except OSError as error:
            raise UserError(
                f"--out {out}: cannot be written ({error.strerror}); choose another folder"
            ) from error
    raise UserError(f"--out {out}: already holds 999 runs of this second; choose another folder")


def run_folder(path: Path, marked_by: str = RESULT_FILE) -> Path:
    """Return the folder that a path to a run means: latest is the one in runs/ that got this file last.

    marked_by: RESULT_FILE for a finished run, RECIPE_FILE for one that has begun.
    Raises UserError if there is none.
    """
    if path != Path("latest") or path.exists():
        return path
    runs = [file.parent for file in Path("runs").glob(f"*/{marked_by}")]
    if not runs:
        kind = "finished run" if marked_by == RESULT_FILE else "run"
        raise UserError(f"latest: no {kind} in runs/; name a run's folder, or train one")
    return _newest(runs, marked_by)


def _newest(folders: list[Path], marked_by: str) -> Path:
    """Return the folder whose file of this name was written last.

    The names begin with the local time, which is set back once a year, and on journeys.
    """

    def age(folder: Path) -> tuple[int, str]:
        try:
            return (folder / marked_by).stat().st_mtime_ns, folder.name
        except OSError:  # it has been deleted meanwhile
            return 0, folder.name

    return max(folders, key=age)


def find_unfinished(resume: str | Path, out: Path) -> Path:
    """Return the folder that --resume refers to; for auto, that of the newest unfinished run under `out`.

    resume: auto, a run's folder, or a checkpoint in it.
    Raises UserError if there is no such run, or if it has finished.
    """
    if str(resume) == "auto":
        started = [path.parent for path in out.glob(f"*/{RECIPE_FILE}")]
        unfinished = [folder for folder in started if not (folder / RESULT_FILE).exists()]
        if not unfinished:
            raise UserError(
                f"--resume auto: no unfinished run under {out}; name its folder, or start a new run"
            )
        return _newest(unfinished, RECIPE_FILE)
    folder = Path(resume).parent if Path(resume).is_file() else Path(resume)
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"--resume {resume}: not a run's folder; expected auto, or a folder that fasttrain train made"
        )
    if (folder / RESULT_FILE).exists():
        raise UserError(f"--resume {resume}: this run has finished; there is nothing to resume")
    return folder
