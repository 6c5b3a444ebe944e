"""The contract that every loader meets: batches on the device, each a pure function of its step."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fasttrain.data.sampler import Sampler


class Loader(ABC):
    """Batches of images_NCHW, uint8 pixels in channels_last, and labels_N, int64, both on the device.

    An iteration is one epoch. Training loaders shuffle anew each epoch, augment, and drop the last, smaller
    batch; evaluation loaders deliver every image exactly once, in stored order, as it is.

    Steps count on over all epochs; the step is all that there is to restore.
    """

    name: str

    def __init__(self, sampler: Sampler, device: torch.device) -> None:
        self.sampler, self.device = sampler, device
        self._step = 0

    @abstractmethod
    def _next(self) -> tuple[Tensor, Tensor]:
        """The batch of `self._step`."""

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The rest of the current epoch: all of it, unless a restored state stands in its middle."""
        while True:
            batch = self._next()
            self._step += 1
            yield batch
            if self._step % len(self) == 0:
                return

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands; restores bit-exactly mid-epoch."""
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
