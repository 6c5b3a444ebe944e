"""What a trace of `fasttrain profile` holds: launches, copies and waits per step, and the GPU's gaps.

    python -m benchmarks.trace runs/profile/trace.json

Kernels and copies are counted for each of the GPU's streams, the calls that start them or wait for them for
each of the host's threads: so DALI's work and waits are told from the training's.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.harness import run, save, show
from fasttrain.errors import UserError
from fasttrain.system.machine import pick_device
from fasttrain.tools.profiler import STEP

ON_THE_GPU = {"kernel": "kernels", "gpu_memcpy": "copies", "gpu_memset": "fills"}
"""Categories of torch's trace, and what they are called here."""

CALLS = ("Launch", "Memcpy", "Memset", "Synchronize", "WaitEvent", "Malloc", "Free")
"""Parts of the names of CUDA's functions that are counted."""

LARGEST_GAPS = 10


@dataclass(frozen=True, kw_only=True)
class Options:
    """Count what happens in a trace."""

    trace: Annotated[Path, tyro.conf.Positional]
    """trace.json, as fasttrain profile writes it."""


def read(path: Path) -> list[dict[str, Any]]:
    """The trace's events that have a duration. Raises UserError if the file is no trace."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as a trace ({error})") from error
    return [event for event in events if event.get("ph") == "X"]


def count(events: Iterable[dict[str, Any]], steps: int) -> list[dict[str, Any]]:
    """A row per kind of event and stream or thread: how many, and how many milliseconds, in a step."""
    found: dict[tuple[str, str], list[float]] = {}
    for event in events:
        category = event.get("cat")
        if category in ON_THE_GPU:
            key = ON_THE_GPU[category], f"stream {event['args']['stream']}"
        elif category in ("cuda_runtime", "cuda_driver") and any(part in event["name"] for part in CALLS):
            key = event["name"], f"thread {event['tid']}"
        else:
            continue
        found.setdefault(key, []).append(event["dur"] / 1000)
    return [
        {"what": what, "where": where, "per_step": len(ms) / steps, "ms_per_step": sum(ms) / steps}
        for (what, where), ms in sorted(found.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def end_of(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]


def gaps(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The longest times in which nothing ran on the GPU: when, how long, and what came before and after."""
    busy = sorted(
        (event for event in events if event.get("cat") in ON_THE_GPU), key=lambda event: event["ts"]
    )
    found: list[dict[str, Any]] = []
    last = busy[0] if busy else {}
    for event in busy[1:]:
        if event["ts"] > end_of(last):
            times = {
                "at_ms": (end_of(last) - busy[0]["ts"]) / 1000,
                "ms": (event["ts"] - end_of(last)) / 1000,
            }
            found.append({**times, "after": last["name"], "before": event["name"]})
        last = max(last, event, key=end_of)
    return sorted(found, key=lambda gap: -gap["ms"])


def main(options: Options) -> None:
    events = read(options.trace)
    steps = sum(event.get("cat") == "user_annotation" and event["name"] == STEP for event in events)
    if not steps:
        raise UserError(f"{options.trace}: has no step of fasttrain profile")
    rows, idle = count(events, steps), gaps(events)
    if not rows:
        print(f"{options.trace}: {steps} steps, and nothing of them ran on a GPU")
        return
    device = pick_device()
    figures = {"steps": steps, "idle_ms_per_step": sum(gap["ms"] for gap in idle) / steps}
    path = save("trace", device, figures | {"rows": rows, "gaps": idle[:LARGEST_GAPS]})
    show(
        f"{steps} steps; the GPU idle for {figures['idle_ms_per_step']:.3f} ms of each",
        ["what", "where", "in a step", "ms in a step"],
        [
            [row["what"], row["where"], f"{row['per_step']:,.2f}", f"{row['ms_per_step']:,.3f}"]
            for row in rows
        ],
    )
    print(path)


if __name__ == "__main__":
    run(main, Options)
