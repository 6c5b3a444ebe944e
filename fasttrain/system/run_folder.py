"""A run's folder: its files, how it is named, and which one --resume means."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttrain.errors import UserError


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected it as fasttrain train wrote it"
        ) from error


def parse_object(text: str, place: object) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(f"{place}: torn or foreign; expected a JSON object as fasttrain train wrote it")
    return values


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a run's file. Raises UserError if it is not there, torn or foreign."""
    return parse_object(read_text(path), path)


def is_lost(path: Path, log: Callable[[str], object]) -> bool:
    """Whether a JSON file of the run is missing or corrupt, which is logged in a line."""
    try:
        read_object(path)
    except UserError as error:
        log(f"{error}; writing a new one that describes this machine")
        return True
    return False


RECIPE_FILE, RESULT_FILE = "recipe.json", "result.json"
"""The first and the last file that a run writes: it is unfinished while it has but the first."""


MACHINE_FILE = "machine.json"
"""What the run was begun on, and whether it is compiled."""


def new_run_folder(out: Path, recipe_name: str) -> Path:
    """Create the folder `out`/<time>-<recipe>, with -2 and so on where runs start in the same second."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{recipe_name}"
    for attempt in range(1, 1000):
        folder = out / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            if not folder.is_dir():
                raise UserError(f"--out {out}: expected a folder; name another one") from None
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another") from error
    raise UserError(f"--out {out}: holds 999 runs of this second; name another folder")


def find_unfinished(resume: str | Path, out: Path) -> Path:
    """The run's folder that --resume means: the newest unfinished one under `out` for auto.

    resume: auto, a run's folder, or a checkpoint in it.
    Raises UserError if there is none, or if its run has finished.
    """
    if str(resume) == "auto":
        begun = {path.parent for path in out.glob(f"*/{RECIPE_FILE}")}
        unfinished = [folder for folder in begun if not (folder / RESULT_FILE).exists()]
        if not unfinished:
            raise UserError(
                f"--resume auto: no unfinished run under {out}; name its folder, or start a new run"
            )
        return max(unfinished)  # their names begin with the time
    folder = Path(resume).parent if Path(resume).is_file() else Path(resume)
    if not (folder / RECIPE_FILE).is_file():
        raise UserError(
            f"--resume {resume}: no run's folder; expected auto, or one that fasttrain train made"
        )
    if (folder / RESULT_FILE).exists():
        raise UserError(f"--resume {resume}: this run has finished; there is nothing to go on with")
    return folder
