"""Checkpoints: written atomically, loaded without running anything that the file may contain."""

from pathlib import Path
from typing import Any

import torch

from fasttrain.errors import UserError
from fasttrain.files import write_atomically

REQUIRED = ("model", "epoch", "optimizer", "scheduler", "scaler", "loss", "batch_size", "recipe", "classes")


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint; an older one of the same name stays until the new one is whole."""
    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain values only (weights_only).

    Raises UserError if there is no such file, or if it is not a whole checkpoint of this project.
    """
    expected = "expected a checkpoint that fasttrain wrote, such as runs/.../last.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {expected}") from error
    except Exception as error:  # a torn or foreign file fails anywhere in zipfile, pickle or torch
        reason = type(error).__name__
        raise UserError(f"{path}: cannot be read as a checkpoint ({reason}); {expected}") from error
    missing = [key for key in REQUIRED if not isinstance(state, dict) or key not in state]
    if missing:
        raise UserError(f"{path}: holds no {', '.join(missing)}; {expected}")
    return state
