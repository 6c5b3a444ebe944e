"""The state of torch's global random generators: read, restored, and preserved."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fasttrain.errors import UserError


@contextmanager
def fork_rng(device: torch.device) -> Iterator[None]:
    """Restore torch's global random generators, the CPU's and the device's, after the block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's global generators, which dropout draws from, by device type."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_rng(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore what rng_state returned. Raises UserError for anything else."""
    try:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
    except RuntimeError as error:
        raise UserError("rng is not a state of torch's generators") from error
