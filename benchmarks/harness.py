"""Shared by all benchmarks: options, samples taken in turn, processes, memory, printed tables, JSON files."""

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fasttrain.errors import UserError
from fasttrain.system.files import write_json
from fasttrain.system.machine import describe

T = TypeVar("T")

Workload = Callable[[], float]
"""Measures itself and returns its figure."""

MEASURED = Path(os.environ.get("FASTTRAIN_RESULTS") or "bench-results")
"""Where benchmarks write their figures: a folder that git ignores, unless the environment names another."""


def run(main: Callable[[T], object], options: type[T]) -> None:
    """Call a benchmark with the options from the command line; a user's mistake ends it with one line."""
    try:
        main(tyro.cli(options))
    except UserError as error:
        sys.exit(str(error))


def require_counts(**counts: int | None) -> None:
    """Raise UserError, naming the flag, for a number below 1."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: expected at least 1")


# -------------------------------------------------------------------------------------------------- measuring


def interleave(workloads: dict[str, Workload], rounds: int) -> dict[str, list[float]]:
    """Call every workload once per round, in turn, so that a slow minute of the machine hits all alike.

    Returns all samples by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in workloads}
    for turn in range(rounds):
        for name, workload in workloads.items():
            print(f"round {turn + 1}/{rounds}: {name}", file=sys.stderr)
            samples[name].append(workload())
    return samples


class OwnProcess(Generic[T]):
    """A workload in a process of its own, for settings of a whole process; it sleeps between samples.

    set_up: called in that process with `args`, returns the workload. Both have to be picklable.
    The process ends with the `with` block.
    """

    def __init__(self, set_up: Callable[..., Callable[[], T]], *args: Any) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_set_up, initargs=(set_up, args)
        )

    def __enter__(self) -> "OwnProcess[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def __call__(self) -> T:
        return self._pool.submit(_sample).result()

    def extra_memory_gib(self, device: torch.device) -> float | None:
        return self._pool.submit(_extra_memory_gib, device).result()


_workload: Callable[[], Any]
"""What an OwnProcess runs, in that process."""


def _set_up(set_up: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> None:
    global _workload
    _workload = set_up(*args)


def _sample() -> Any:
    return _workload()


def _extra_memory_gib(device: torch.device) -> float | None:
    return extra_memory_gib(device, _workload)


@contextmanager
def confined_to(cores: Iterable[int]) -> Iterator[None]:
    """A process that is started within the block, and all that it starts, may use only these cores."""
    available = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, available)


def on_cores(cores: int, question: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    """Call `question` in a process that may use only this many cores."""
    if not hasattr(os, "sched_setaffinity"):
        return question(*args)
    with (
        confined_to(sorted(os.sched_getaffinity(0))[:cores]),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool,
    ):
        return pool.submit(question, *args).result()


def side_by_side(questions: Mapping[str, Callable[[], T]], *, swap: bool) -> dict[str, T]:
    """Answer two questions at the same time, each in a new process with half of the cores.

    Whatever else the machine does then slows both. swap: the first question gets the second half. Questions
    have to be picklable. Raises UserError where there are no two cores, or no way to share them out.
    """
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        raise UserError("it takes Linux and two cores, to train two networks at the same time")
    cores = sorted(os.sched_getaffinity(0))
    middle = len(cores) // 2
    halves = [cores[:middle], cores[middle : 2 * middle]]
    with ExitStack() as pools:
        futures = {}
        for half, (name, question) in zip(halves[:: -1 if swap else 1], questions.items(), strict=True):
            pool = pools.enter_context(ProcessPoolExecutor(1, mp_context=get_context("spawn")))
            with confined_to(half):
                futures[name] = pool.submit(question)  # which starts the process
        return {name: future.result() for name, future in futures.items()}


def extra_memory_gib(device: torch.device, work: Callable[[], object]) -> float | None:
    """The most memory that `work` needs beyond what is held before it, in GiB; None where nobody counts it.

    On a GPU what torch allocates there, otherwise the process's resident memory as Linux counts it.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**30
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed earlier would be reused, and not counted
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except (OSError, AttributeError):
        return None
    before = _resident_kib("VmRSS")
    work()
    return (_resident_kib("VmHWM") - before) / 2**20


def _resident_kib(field: str) -> int:
    """A line of Linux's /proc/self/status: VmRSS is resident now, VmHWM at most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1])


# -------------------------------------------------------------------------------------------------- reporting


def save(name: str, device: torch.device, values: dict[str, Any]) -> Path:
    """Write a benchmark's figures with the machine they come from; returns the file."""
    machine = describe(device)
    label = str(machine.get("gpu_name") or machine["cpu_model"] or "unknown")
    cores = f"{machine['cpu_cores']}-core " if device.type == "cpu" else ""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cores}{label}".lower()).strip("-")
    path = MEASURED / slug / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"benchmark": name, "time": time.strftime("%Y-%m-%d"), "machine": machine, **values})
    return path


def software(machine: dict[str, Any]) -> str:
    """The versions in what machine.describe gave, for a caption."""
    commit = f"{str(machine['git_commit'])[:9]}{' with local changes' if machine['git_dirty'] else ''}"
    return f"torch {machine['torch']}, DALI {machine['dali']}, commit {commit}"


def markdown(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table: text to the left, figures to the right."""
    lines = [columns, ["---" if index == 0 else "---:" for index in range(len(columns))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table, as wide as the terminal; 80 columns where the output is none."""
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        # Figures stay whole: their headers break at every space, and the text beside them gives way.
        of_figures = index > 0 and all(_is_figure(row[index]) for row in rows)
        header = column.replace(" ", "\n") if of_figures else column
        table.add_column(
            Text(header), overflow="fold", no_wrap=of_figures, justify="right" if of_figures else "left"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    _console().print(table)


def say(text: str) -> None:
    """Print a paragraph, wrapped like the tables."""
    _console().print(Text(text))


def _console() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else 80)


def _is_figure(cell: str) -> bool:
    """A number with its sign and unit, or a gap."""
    return len(cell) <= 9 and " " not in cell
