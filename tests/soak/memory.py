"""One long run, and its memory after every epoch."""

import json
import os
from pathlib import Path

from fasttrain import trainer
from fasttrain.checkpoint.state import Progress
from fasttrain.data import dali
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe
from fasttrain.system.files import write_json
from tests.soak.fork import finish, last_line, start


def memory_campaign(data_dir: Path, work: Path, epochs: int) -> dict[str, float]:
    """Resident MiB after every epoch of one long run: the most in its first half, and in its second."""
    samples: list[float] = []
    finish_epoch = Progress.finish_epoch

    def sample(progress: Progress, row: dict[str, float]) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        samples.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        finish_epoch(progress, row)

    def action() -> int:
        Progress.finish_epoch = sample  # type: ignore[assignment,method-assign]
        # Chunks of one batch: with a set this small, DALI's queue of full ones takes 260 epochs to fill.
        dali.CHUNK_BYTES = 0
        recipe = Recipe(name="soak", epochs=epochs, batch_size=8, width=2)
        trainer.train(recipe, data_dir=data_dir, out=work / "memory", device="cpu", report=False)
        write_json(work / "memory.json", {"samples": samples})
        return 0

    status = finish(start(action, work / "log"))
    if status != 0:
        raise UserError(f"the long run ended with status {status}: {last_line(work / 'log')}")
    samples = json.loads((work / "memory.json").read_text())["samples"]
    return {"epochs": epochs, "first": max(samples[: epochs // 2]), "second": max(samples[epochs // 2 :])}
