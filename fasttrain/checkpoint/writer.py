"""The background thread that writes checkpoints."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint.file import BEST, LAST, PREVIOUS, save_checkpoint
from fasttrain.system.files import link_atomically
from fasttrain.system.memory import pinning_fails


class CheckpointWriter:
    """Write a run's last.pt, previous.pt and best.pt in the background, one state at a time.

    The training waits only while the state is copied. Errors on the thread are raised by the next call, or at
    the end of the `with` block.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self._device = folder, device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._held_best: dict[str, Any] | None = None

    def write(self, state: dict[str, Any], *, best: bool = False) -> None:
        """Save a copy of the state as last.pt and, if it is the best so far, as best.pt.

        Otherwise a held state becomes best.pt. Waits for the state before this one, and raises UserError if
        that could not be written.
        """
        self.wait()
        held, self._held_best = None if best else self._held_best, None
        self._pending = self._thread.submit(self._write, snapshot(state, self._device), best, held)

    def hold_best(self, state: dict[str, Any]) -> None:
        """Keep a copy of the best state so far in memory; the next write saves it as best.pt."""
        self._held_best = snapshot(state, self._device)

    def forget_best(self) -> None:
        """Drop the held state: the run is rolled back to before it."""
        self._held_best = None

    def wait(self) -> None:
        """Wait until the last state is on the disk. Raises UserError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()
        if error is None:
            self.wait()

    def _write(self, state: dict[str, Any], best: bool, held_best: dict[str, Any] | None) -> None:
        last, previous = self.folder / LAST, self.folder / PREVIOUS
        if held_best is not None:
            save_checkpoint(self.folder / BEST, held_best)
        if last.exists():
            link_atomically(last, previous)
        if best:
            save_checkpoint(self.folder / BEST, state)
            link_atomically(self.folder / BEST, last)
        else:
            save_checkpoint(last, state)


def snapshot(state: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Copy nested dicts, lists and tensors to the host's memory. Waits for the device."""

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            host = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda and not pinning_fails())
            return host.copy_(value, non_blocking=value.is_cuda)
        if isinstance(value, dict):
            return {key: copy(entry) for key, entry in value.items()}
        return [copy(entry) for entry in value] if isinstance(value, list) else value

    copied = copy(state)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return copied
