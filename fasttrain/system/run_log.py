"""What a run writes: files in its folder, and a progress bar on a terminal or plain lines when piped."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fasttrain.errors import UserError, WriteError
from fasttrain.system.console import Console, reader_may_leave
from fasttrain.system.files import write_atomically, write_json

T = TypeVar("T")

EPOCH_COLUMNS = (
    ("epoch", "", "epoch", "{:>5}"),
    ("train_loss", "train", "loss", "{:>7.4f}"),
    ("train_accuracy", "train", "acc", "{:>7.2%}"),
    ("test_loss", "test", "loss", "{:>7.4f}"),
    ("test_accuracy", "test", "acc", "{:>7.2%}"),
    ("lr", "learning", "rate", "{:>8.2e}"),
    ("seconds", "", "seconds", "{:>8.2f}"),
    ("images_per_sec", "images", "per sec", "{:>8,.0f}"),
    ("data_wait_share", "data", "wait", "{:>6.2%}"),
)
"""The table of epochs: key, two lines of header, and form. A row has 79 characters, for a narrow terminal."""

LIVE_COLUMNS = (
    ("train_loss", "loss {:.3f}"),
    ("train_accuracy", "acc {:.1%}"),
    ("images_per_sec", "{:,.0f} images/s"),
    ("data_wait_share", "wait {:.1%}"),
)

REFRESH_SECONDS = 0.5
"""How often the progress bar asks for its figures: rarely enough not to slow down the training."""


class RunLog:
    """The folder of one run, and its console.

    data.json, machine.json and recipe.json are written first, metrics.jsonl grows by one line per epoch, and
    result.json is written last: a folder without it is an unfinished run. lr_find.json exists if the LR
    finder was to choose the peak rate, TensorBoard's event files if they were asked for.
    """

    def __init__(self, folder: Path) -> None:
        self.console = Console(soft_wrap=True)
        self.folder = folder
        self._header_shown = False
        self._board: Any = None

    def print(self, line: str) -> None:
        """Print a line as it is, without rich's markup. Where nobody reads any more, the training goes on."""
        with reader_may_leave():
            self.console.print(line, markup=False)

    def open_tensorboard(self, images_NCHW: Tensor) -> None:
        """From now on, also write every epoch's metrics for TensorBoard into the run's folder.

        images_NCHW: uint8, shown as one grid. Raises ImportError if TensorBoard is not installed.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(self.folder))
        self._board.add_images("augmented training images", images_NCHW)
        self._board.flush()

    def write(self, name: str, values: dict[str, Any]) -> None:
        """Write one of the folder's JSON files atomically. Raises UserError if that fails."""
        write_json(self.folder / name, values)

    def steps(
        self, batches: Iterable[T], total: int, title: str, figures: Callable[[], dict[str, float]]
    ) -> Iterator[T]:
        """Iterate over the batches; on a terminal, show a progress bar with the figures of LIVE_COLUMNS.

        figures: called every REFRESH_SECONDS, must not wait for the device, and may leave out keys.
        """
        if not self.console.is_terminal:
            yield from batches
            return
        columns = (
            *(TextColumn(title), BarColumn(bar_width=None), TextColumn("{task.fields[live]}")),
            *(TextColumn("ETA"), TimeRemainingColumn(compact=True)),
        )
        # Drawn only from this loop: a background thread would take time from the training.
        with Progress(*columns, console=self.console, transient=True, auto_refresh=False, expand=True) as bar:
            task = bar.add_task(title, total=total, live="")
            drawn = time.perf_counter()
            for done, batch in enumerate(batches):
                if time.perf_counter() - drawn >= REFRESH_SECONDS:
                    shown = figures()
                    live = "  ".join(form.format(shown[key]) for key, form in LIVE_COLUMNS if key in shown)
                    bar.update(task, completed=done, live=live, refresh=True)
                    drawn = time.perf_counter()
                yield batch

    def rewind(self, epochs: list[dict[str, float]]) -> None:
        """Make metrics.jsonl hold exactly these epochs: lines of lost work, complete or not, are removed."""
        lines = "".join(map(_line, epochs))
        write_atomically(self.folder / "metrics.jsonl", lambda file: file.write(lines.encode()))

    def epoch(self, metrics: dict[str, float]) -> None:
        """Append an epoch's metrics to metrics.jsonl, and print them as a row of the table.

        A loss of NaN or infinity is written as null: JSON has neither. Raises WriteError on a full disk.
        """
        path = self.folder / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(_line(metrics))
        except OSError as error:
            raise WriteError(f"{path}: cannot be written ({error.strerror}); free some space") from error
        if self._board is not None:
            for key in metrics.keys() - {"epoch"}:
                self._board.add_scalar(key, metrics[key], metrics["epoch"])
            self._board.flush()
        *headers, cells = zip(
            *((*header, form.format(metrics[key])) for key, *header, form in EPOCH_COLUMNS if key in metrics),
            strict=True,
        )
        if not self._header_shown:
            for header in headers:
                self.print(" ".join(name.rjust(len(cell)) for name, cell in zip(header, cells, strict=True)))
            self._header_shown = True
        self.print(" ".join(cells))


class SilentLog(RunLog):
    """The log of every rank but the first: it knows the folder, prints nothing, and writes nothing."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.console = Console(quiet=True, force_terminal=False)

    def write(self, name: str, values: dict[str, Any]) -> None:
        pass

    def rewind(self, epochs: list[dict[str, float]]) -> None:
        pass

    def epoch(self, metrics: dict[str, float]) -> None:
        pass


def require_tensorboard() -> None:
    """Raise UserError, with the remedy, if TensorBoard is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(f"--tensorboard: {error}; pip install 'fasttrain-dali[tensorboard]'") from error


def _line(metrics: dict[str, float]) -> str:
    row = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    return json.dumps(row) + "\n"
