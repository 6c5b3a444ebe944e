"""torch's global random generators: kept, restored, and left alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fasttrain.errors import UserError


@contextmanager
def fork_rng(device: torch.device) -> Iterator[None]:
    """Leave torch's global random generators, the CPU's and the device's, as they were before the block."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """torch's global generators: dropout draws from them."""
    states = {"cpu": torch.get_rng_state()}
    return states | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else states


def restore_rng(states: dict[str, Tensor], device: torch.device) -> None:
    try:
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
    except RuntimeError as error:
        raise UserError("rng is no state of torch's generators") from error
