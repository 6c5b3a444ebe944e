"""A fault campaign: runs are killed and resumed, signals sent, disks and files broken, memory watched.

    python -m tests.soak --minutes 60           # the reliability table reports what an hour found
    python -m tests.soak --only kill --seed 3 --turn 17      # one turn again, as a wrong outcome names it

A seed determines every turn, but not how far a process has come at a given moment. The figures go where those
of benchmarks go (benchmarks/README.md), in a file named after the seed: the table adds up all files.
"""

import importlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import torch

from benchmarks.harness import extra_memory_gib, run, save, show
from benchmarks.stats import describe
from fasttrain.errors import UserError
from tests.soak.campaign import Campaign, run_for
from tests.soak.cases import Case, cases
from tests.soak.corrupt import BadInputCampaign
from tests.soak.disk import DiskCampaign
from tests.soak.host import HostCampaign
from tests.soak.kill import KillCampaign
from tests.soak.memory import memory_campaign
from tests.soak.ranks import RankCampaign
from tests.soak.signals import SignalCampaign

CPU = torch.device("cpu")
MOST_GIB = 2.0
"""Memory that reading damaged files may take."""

CAMPAIGNS: dict[str, Callable[[list[Case], Path], Campaign]] = {
    "kill": KillCampaign,
    "ranks": RankCampaign,
    "signals": SignalCampaign,
    "disks": DiskCampaign,
    "host": HostCampaign,
    "bad-inputs": BadInputCampaign,
}
"""The memory campaign has no turns."""

SHARES = {
    "kill": 0.25,
    "ranks": 0.38,
    "signals": 0.12,
    "disks": 0.05,
    "host": 0.06,
    "bad-inputs": 0.03,
    "memory": 0.11,
}
"""The share of the time that each campaign gets. A minute of memory's is 240 epochs, 24 runs, 8 resumes."""

Name = Literal["kill", "ranks", "signals", "disks", "host", "bad-inputs", "memory"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kill and resume trainings, send signals, break disks and files; count what goes wrong."""

    minutes: float = 10
    """For all campaigns together, about."""
    seed: int = 0
    """Seeds the moments of the signals and the damage."""
    only: Name | None = None
    """One campaign, which gets all of the time."""
    turn: int | None = None
    """With --only, one turn of it."""


def main(options: Options) -> None:
    if options.turn is not None and options.only in (None, "memory"):
        raise UserError(f"--turn {options.turn}: expected with --only, and not with its memory")
    torch.set_num_threads(1)  # a process whose torch has threads must not fork
    for slow in ("nvidia.dali", "torch._dynamo"):
        importlib.import_module(slow)  # once, for all forks
    figures: dict[str, Any] = {"seed": options.seed, "minutes": options.minutes}
    folder = Path(mkdtemp(prefix="soak-"))
    for name in (options.only,) if options.only else SHARES:
        share = 1.0 if options.only else SHARES[name]
        figures[name] = campaign_of(name, folder / name, 60 * share * options.minutes, options)
    show("faults", ["figure", "value"], rows(figures))
    if not options.only:
        print(save(f"soak-seed-{options.seed}", CPU, figures))
    wrong = [line for name in SHARES for line in figures.get(name, {}).get("wrong", [])]
    if wrong:
        raise UserError(f"soak: {len(wrong)} wrong outcomes, the first: {wrong[0]}; {folder} has the rest")
    shutil.rmtree(folder)


def campaign_of(name: str, work: Path, seconds: float, options: Options) -> dict[str, Any]:
    """The results of one campaign."""
    work.mkdir()
    everything = cases(work)
    if name == "memory":
        length = max(0.2, seconds / 60)
        return memory_campaign(
            work / "data",
            work,
            epochs=round(240 * length),
            runs=round(24 * length),
            resumes=round(8 * length),
        )
    campaign = CAMPAIGNS[name](everything, work)
    extra_gib = extra_memory_gib(CPU, lambda: run_for(campaign, seconds, options.seed, only=options.turn))
    results = campaign.results
    if name == "kill":
        lost = results.pop("lost")
        results["lost_seconds"] = describe(lost) if lost else None
    if name == "bad-inputs":
        results["extra_gib"] = extra_gib
        if extra_gib is not None and extra_gib > MOST_GIB:
            results["wrong"].append(f"reading a damaged file took {extra_gib:.1f} GiB")
    return results


def rows(figures: dict[str, Any]) -> list[list[str]]:
    found = []
    for name, value in figures.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        found += [[f"{name} {key}".strip(), str(part)] for key, part in parts]
    return found


if __name__ == "__main__":
    run(main, Options)
