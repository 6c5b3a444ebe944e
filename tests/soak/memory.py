"""One long run, many runs in one process, and many resumes of one: memory and open files stay as they are."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fasttrain import trainer
from fasttrain.callbacks import Callback
from fasttrain.data import dali
from fasttrain.errors import Interrupted, UserError
from fasttrain.recipe import Recipe
from fasttrain.system.files import write_json
from tests.soak.fork import finish, last_line, start

GROWTH = 1.05
"""How much more memory the second half may take."""

TINY: dict[str, Any] = {"name": "soak", "batch_size": 8, "width": 2}


def memory_campaign(data_dir: Path, work: Path, *, epochs: int, runs: int, resumes: int) -> dict[str, Any]:
    """For each of the three: how many, and the most MiB and open files in their first and second half.

    `wrong` has a line for each that grew.
    """
    data: dict[str, Any] = {"data_dir": data_dir, "device": "cpu", "report": False}

    def one_run(sample: Callable[[], None]) -> None:
        recipe = Recipe(epochs=epochs, **TINY)
        trainer.train(recipe, out=work / "memory", callbacks=[AfterEpoch(sample)], **data)

    def many_runs(sample: Callable[[], None]) -> None:
        for seed in range(runs):
            trainer.train(Recipe(epochs=1, seed=seed, **TINY), out=work / "memory", **data)
            shutil.rmtree(work / "memory")
            sample()

    def many_resumes(sample: Callable[[], None]) -> None:
        stop = AfterEpoch(lambda: signal.raise_signal(signal.SIGTERM))
        recipe, resume = Recipe(epochs=resumes + 2, **TINY), None
        for _ in range(resumes + 1):
            try:
                trainer.train(recipe, out=work / "memory", resume=resume, callbacks=[stop], **data)
            except Interrupted:
                [resume] = (work / "memory").iterdir()
            sample()

    results: dict[str, Any] = {"wrong": []}
    for name, count, action in (
        ("epochs", epochs, one_run),
        ("runs", runs, many_runs),
        ("resumes", resumes, many_resumes),
    ):
        found = results[name] = {"count": count} | watched(action, work)
        grew = found["second_mib"] > GROWTH * found["first_mib"]
        if grew or found["second_files"] > found["first_files"]:
            results["wrong"].append(f"over many {name}, memory or open files grew: {found}")
    return results


class AfterEpoch(Callback):
    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def on_epoch_end(self, row: dict[str, float]) -> None:
        self.action()


def watched(action: Callable[[Callable[[], None]], None], work: Path) -> dict[str, float]:
    """Run `action`, which calls what it is given now and then, in a fork of this process."""
    samples: list[tuple[float, int]] = []

    def sample() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        samples.append((mib, len(os.listdir("/proc/self/fd"))))

    def process() -> int:
        # Chunks of one batch: with a set this small, DALI's queue of full ones takes 260 epochs to fill.
        dali.CHUNK_BYTES = 0
        action(sample)
        write_json(work / "memory.json", {"samples": samples})
        return 0

    status = finish(start(process, work / "log"))
    if status != 0:
        raise UserError(f"a long run ended with status {status}: {last_line(work / 'log')}")
    found = json.loads((work / "memory.json").read_text())["samples"]
    shutil.rmtree(work / "memory", ignore_errors=True)
    middle = len(found) // 2
    figures: dict[str, float] = {}
    for half, part in (("first", found[:middle]), ("second", found[middle:])):
        figures[f"{half}_mib"] = max(mib for mib, _ in part)
        figures[f"{half}_files"] = max(files for _, files in part)
    return figures
