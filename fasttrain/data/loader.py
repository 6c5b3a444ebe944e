"""The contract of every loader: batches on the device, each a pure function of its step."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.sampler import Sampler


class Loader(ABC):
    """Batches of images_NCHW, uint8 pixels in channels_last, and labels_N, int64, both on the device.

    Iterating once is one epoch. Training loaders shuffle every epoch again, augment, and drop the last,
    smaller batch; evaluation loaders deliver every image exactly once, in stored order, unchanged.

    Steps are counted across epochs, and the step is the loader's whole state.
    """

    name: str

    def __init__(self, sampler: Sampler, device: torch.device) -> None:
        self.sampler, self.device = sampler, device
        self._step = 0
        self._prepared: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def _next(self) -> tuple[Tensor, Tensor]:
        """Return the batch of `self._step`."""

    def start(self) -> None:
        """Prepare the first batch now and wait for it; otherwise that happens when it is taken.

        Everything that the loader builds or allocates is built here, so it also shows here whether it works.
        """
        self._prepared = self._prepared or self._next()
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the rest of the current epoch: all of it, unless a restored step lies within the epoch."""
        while True:
            batch, self._prepared = self._prepared or self._next(), None
            self._step += 1
            yield batch
            if self._step % len(self) == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's position; restoring it within an epoch is exact to the bit."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the position that state_dict returned."""
        self._step, self._prepared = state["step"], None
