"""The committed result files, benchmarks/results/<machine>/, as the tables and pictures read them."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.harness import software
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.system.machine import hardware_name

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

RENAMED = {"record": "speedrun"}
"""Presets that were measured under another name than they have now; the files keep the old one."""


HOW = ("compile", "cuda_graph", "loader", "loader_threads")
"""Fields of a recipe that say how a machine trains it; none of them changes what is trained."""


def preset_name(label: str) -> str:
    """The label with the preset in it called as it is now: record-batch-512 is speedrun-batch-512."""
    return re.sub(r"\b\w+\b", lambda word: RENAMED.get(word.group(), word.group()), label)


def link(path: Path) -> str:
    """The path as a table links to it, from the repository's root."""
    return Path(os.path.relpath(path, ROOT)).as_posix()


def files_of(results: Path, benchmark: str) -> list[Path]:
    """Every machine's files of one benchmark, <benchmark>.json or <benchmark>-<what>.json in its folder."""
    found = [*results.glob(f"*/{benchmark}.json"), *results.glob(f"*/{benchmark}-*.json")]
    return sorted(found, key=lambda path: (path.name, path.parent.name))


def results_of(results: Path, benchmark: str) -> Iterable[dict[str, Any]]:
    """The contents of every machine's files of one benchmark."""
    for path in files_of(results, benchmark):
        yield json.loads(path.read_text())


@dataclass(frozen=True)
class CommittedRun:
    """A training run's folder under <machine>/runs/, without its checkpoints."""

    folder: Path

    @cached_property
    def result(self) -> dict[str, Any]:
        return json.loads((self.folder / "result.json").read_text())

    @cached_property
    def machine(self) -> dict[str, Any]:
        return json.loads((self.folder / "machine.json").read_text())

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """Fields that were added after the run have their defaults."""
        return Recipe.from_dict(json.loads((self.folder / "recipe.json").read_text())).to_dict()

    @property
    def preset(self) -> str:
        return preset_name(self.recipe["name"])

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def hardware(self) -> str:
        return f"{hardware_name(self.machine)}, {self.result['precision']}"

    @property
    def software(self) -> str:
        return software(self.machine)

    @property
    def note(self) -> str:
        """What a reader of its figures should know: what else ran beside it, for one. Some have none."""
        path = self.folder / "note.txt"
        return path.read_text().strip() if path.exists() else ""

    @property
    def differences(self) -> dict[str, Any]:
        """Fields in which it trained something else than its preset does now, whatever the seed."""
        preset = {preset_name(recipe.name): recipe for recipe in PRESETS.values()}[self.preset]
        # A rate that was given satisfies a preset that leaves it to the LR finder.
        ignored = {"name", "seed", "test_views", *HOW} | ({"max_lr"} if preset.max_lr == "auto" else set())
        now = preset.to_dict()
        return {
            field: value
            for field, value in self.recipe.items()
            if field not in ignored and value != now[field]
        }


def runs(results: Path, *, current: bool) -> list[CommittedRun]:
    """The runs of the presets as they are now, or those that newer ones superseded; the longest first."""
    found = [CommittedRun(path.parent) for path in results.glob("*/runs/*/result.json")]
    chosen = [run for run in found if current == (not run.differences)]
    return sorted(chosen, key=lambda run: (-run.result["epochs"], run.folder.name))
