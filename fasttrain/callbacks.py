"""What a caller of `fasttrain.train` is told while it trains."""

import copy
from collections.abc import Sequence
from typing import Any


class Callback:
    """Told about the epochs and the end of a training; a subclass overrides what it wants to hear.

    Under torchrun only the first process calls them. An exception in one ends the training, which can be
    resumed from its last checkpoint.
    """

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        """Called after each epoch that was trained. metrics: its row of metrics.jsonl."""

    def on_train_end(self, result: dict[str, Any]) -> None:
        """Called once the run is finished. result: the content of result.json."""


class CallbackList(Callback):
    """Several callbacks as one; each gets a copy of its own, so that none can change what is saved."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = callbacks

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        for callback in self.callbacks:
            callback.on_epoch_end(dict(metrics))

    def on_train_end(self, result: dict[str, Any]) -> None:
        for callback in self.callbacks:
            callback.on_train_end(copy.deepcopy(result))
