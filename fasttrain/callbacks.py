"""What a caller of `fasttrain.train` is told while it trains."""

import copy
from collections.abc import Sequence
from typing import Any


class Callback:
    """Told about the epochs and the end of a training; a subclass overrides what it wants to hear.

    Under torchrun only the first process calls them, and after an epoch the others wait for it, 18 s at most.
    """

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        """Called after each epoch. metrics: its row of metrics.jsonl.

        An exception ends the training, which can be resumed from its last checkpoint. An epoch that is
        trained again, after that or after a NaN, is told again.
        """

    def on_train_end(self, result: dict[str, Any]) -> None:
        """Called last, when the run and its report are written. result: the content of result.json."""


class CallbackList(Callback):
    """Several callbacks as one; each gets a copy of its own, so that none can change what is saved."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback.on_epoch_end(dict(metrics))

    def on_train_end(self, result: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_train_end(copy.deepcopy(result))
