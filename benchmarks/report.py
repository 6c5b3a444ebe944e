"""What every benchmark shares: interleaved samples, a printed table, a JSON file with all of it."""

import ctypes
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
import tyro
from rich.console import Console
from rich.table import Table

from fasttrain.errors import UserError
from fasttrain.system.files import write_json
from fasttrain.system.machine import describe

T = TypeVar("T")

RESULTS = Path(os.environ.get("FASTTRAIN_RESULTS") or Path(__file__).parent / "results")


def run(main: Callable[[T], object], options: type[T]) -> None:
    """Call a benchmark with the options from the command line; a user's mistake ends it with one line."""
    try:
        main(tyro.cli(options))
    except UserError as error:
        sys.exit(str(error))


def software(machine: dict[str, Any]) -> str:
    """The versions in what machine.describe gave, for a caption."""
    commit = f"{str(machine['git_commit'])[:9]}{' with local changes' if machine['git_dirty'] else ''}"
    return f"torch {machine['torch']}, DALI {machine['dali']}, commit {commit}"


def interleave(workloads: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call every workload once per round, in turn, so that a slow minute of the machine hits all alike.

    A workload measures itself and returns its figure. Returns all samples by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in workloads}
    for turn in range(rounds):
        for name, workload in workloads.items():
            print(f"round {turn + 1}/{rounds}: {name}", file=sys.stderr)
            samples[name].append(workload())
    return samples


class OwnProcess:
    """A workload in a process of its own, for what holds for a whole process; it rests between samples.

    set_up: called there with `args`, returns the workload. Both have to be picklable.
    """

    def __init__(self, set_up: Callable[..., Callable[[], float]], *args: Any) -> None:
        self._pool = ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=_set_up, initargs=(set_up, args)
        )

    def __call__(self) -> float:
        return self._pool.submit(_sample).result()

    def extra_memory_gib(self, device: torch.device) -> float | None:
        return self._pool.submit(_extra_memory_gib, device).result()


_workload: Callable[[], float]
"""What an OwnProcess runs, in that process."""


def _set_up(set_up: Callable[..., Callable[[], float]], args: tuple[Any, ...]) -> None:
    global _workload
    _workload = set_up(*args)


def _sample() -> float:
    return _workload()


def _extra_memory_gib(device: torch.device) -> float | None:
    return extra_memory_gib(device, _workload)


def spread(samples: list[float]) -> float:
    """Half the distance between the smallest and the largest sample, relative to the median."""
    return (max(samples) - min(samples)) / 2 / statistics.median(samples)


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
        ctypes.CDLL(None).malloc_trim(0)  # lest memory freed earlier serves unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return None
    before = _resident_kib("VmRSS")
    work()
    return (_resident_kib("VmHWM") - before) / 2**20


def _resident_kib(field: str) -> int:
    """A line of Linux's /proc/self/status: VmRSS is resident now, VmHWM at most."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1])


def save(name: str, device: torch.device, values: dict[str, Any]) -> Path:
    """Write a benchmark's figures with the machine they come from; returns the file."""
    machine = describe(device)
    label = str(machine.get("gpu_name") or machine["cpu_model"] or "unknown")
    cores = f"{machine['cpu_cores']}-core " if device.type == "cpu" else ""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cores}{label}".lower()).strip("-")
    path = RESULTS / slug / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"benchmark": name, "time": time.strftime("%Y-%m-%d"), "machine": machine, **values})
    return path


def markdown(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table: text to the left, figures to the right."""
    lines = [columns, ["---" if index == 0 else "---:" for index in range(len(columns))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, soft_wrap=True).print(table)
