"""Checkpoint files: written atomically, verified when read, and loaded without running code from them."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.errors import UserError
from fasttrain.system.files import write_atomically
from fasttrain.system.run_folder import run_folder

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"

REQUIRED = (
    "model",
    "epoch",
    "optimizer",
    "scheduler",
    "scaler",
    "loss",
    "batch_size",
    "recipe",
    "classes",
    "dataset",
    "progress",
    "metrics",
)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; an older one of the same name stays until the new one is complete.

    Raises UserError if the folder cannot be written to or the disk is full.
    """
    buffer = io.BytesIO()  # torch.save hides a full disk behind other errors; a plain write does not
    torch.save(state, buffer)
    write_atomically(path, lambda file: file.write(buffer.getbuffer()))


def checkpoint_in(path: Path) -> Path:
    """Return the checkpoint that a path means: itself, or the last one of a run's folder.

    Raises UserError for a folder without one.
    """
    path = run_folder(path)
    if not path.is_dir():
        return path
    if not (path / LAST).is_file():
        raise UserError(f"{path}: holds no {LAST}; expected a run's folder, or a checkpoint in it")
    return path / LAST


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU: only tensors and plain values (weights_only).

    Raises UserError if there is no such file, if any byte of its content has changed since it was written, or
    if fasttrain did not write it.
    """
    expected = "expected a checkpoint that fasttrain wrote, such as runs/.../last.pt"
    try:
        content = io.BytesIO(path.read_bytes())
        _verify_checksums(content)
        state = torch.load(content, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {expected}") from error
    except Exception as error:  # a corrupt file fails anywhere in zipfile, pickle or torch
        reason = type(error).__name__
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason}); {expected}") from error
    missing = [key for key in REQUIRED if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; {expected}")
    model = state["model"]
    if (
        isinstance(model, dict) and "inverse_std" in model
    ):  # a CustomResNet, perhaps from before it scaled its logits
        model.setdefault("logit_scale", torch.ones(()))
    return state


def _verify_checksums(content: io.BytesIO) -> None:
    """Check the CRC-32 of each part of a checkpoint: torch.save stores them, torch.load ignores them."""
    with zipfile.ZipFile(content) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise zipfile.BadZipFile("compressed, which torch.save never does")
        if archive.testzip() is not None:
            raise zipfile.BadZipFile("a checksum differs")
    content.seek(0)


def require_like(value: Any, example: Any, place: str) -> None:
    """Raise UserError unless a value from a file has the example's keys, types and shapes, all finite.

    place: the value's name in the message.
    """
    if isinstance(example, dict):
        fits = isinstance(value, dict) and value.keys() == example.keys()
        expected = f"the keys {', '.join(map(str, example))}"
    elif isinstance(example, Tensor):
        fits = isinstance(value, Tensor) and value.layout == example.layout
        fits = fits and (value.shape, value.dtype) == (example.shape, example.dtype)
        fits = fits and bool(value.isfinite().all())
        expected = f"finite {example.dtype} of shape {tuple(example.shape)}"
    elif isinstance(example, float):
        fits = type(value) in (int, float) and 0 <= value < float("inf")
        expected = "a number of 0 or more"
    elif isinstance(example, int):
        fits = type(value) is int and value >= 0
        expected = "a whole number of 0 or more"
    else:
        fits = example is None or type(value) is type(example)
        expected = type(example).__name__
    if not fits:
        raise UserError(f"{place} is not {expected}")
    if isinstance(example, dict):
        for key, entry in example.items():
            require_like(value[key], entry, f"{place}.{key}")
