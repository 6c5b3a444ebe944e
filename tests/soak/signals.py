"""Signals at random moments of every command: each ends it with one true line, and what that names works."""

import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasttrain.checkpoint.file import LAST
from fasttrain.errors import UserError
from fasttrain.system.files import write_json
from tests.soak.cases import Case

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

ENDED_SECONDS = 20.0
"""A command that takes longer to end after a signal hangs: it may finish a step, an evaluation, a file."""

BOOT_SECONDS = 0.3
"""Python itself takes about 0.05 s to start, on busy cores more, and nothing can be said before."""

ENDING_SECONDS = 4.0
"""A command that had done its work when the signal came, and was ending, may take so long on busy cores."""

NAMED = re.compile(r"(?:resume with|continue from the last checkpoint): (.*)$")


@dataclass(frozen=True)
class Command:
    """A command and the seconds that it takes undisturbed; out: where a training writes its runs."""

    name: str
    words: tuple[str, ...]
    seconds: float = 0.0
    out: Path | None = None


class SignalCampaign:
    """Each turn sends one signal to one command. results: how many, and how many ended before it came."""

    name = "signals"

    def __init__(self, cases: list[Case], work: Path) -> None:
        for signum in SIGNALS:
            if signal.getsignal(signum) is signal.SIG_IGN:  # as under nohup; commands would ignore it too
                signal.signal(signum, signal.SIG_DFL)
        self._commands = the_commands(cases, work)
        self.results: dict[str, Any] = {
            "sent": 0,
            "ended_before": 0,
            "commands": len(self._commands),
            "wrong": [],
        }

    def turn(self, number: int, rng: random.Random) -> None:
        place = number % len(self._commands)
        if not self._commands[place].seconds:
            self._commands[place] = measured(self._commands[place])
        command, signum = self._commands[place], rng.choice(SIGNALS)
        moment = rng.uniform(min(BOOT_SECONDS, command.seconds), command.seconds)
        for fault in disturbed(command, signum, moment, self.results):
            self.results["wrong"].append(f"{command.name}, {signum.name} after {moment:.2f} s: {fault}")


def the_commands(cases: list[Case], work: Path) -> list[Command]:
    """Every command that takes time, on a small finished run and small images."""
    recipe, finished = work / "signals.json", work / "finished"
    write_json(recipe, cases[0].recipe.to_dict())
    data = [*cases[0].data, "--device", "cpu"]
    train = ["train", "--recipe", str(recipe), *data, "--save-every", "1"]
    for _ in range(2):
        if start([*train, "--out", str(finished)]).wait():
            raise UserError("signals: the undisturbed training failed")
    run, other = sorted(finished.iterdir())
    out, files, picture = work / "signalled", work / "files", next((work / "folder").rglob("*.png"))
    files.mkdir()
    search = ["find-lr", "--recipe", str(recipe), *data, "--num-iter", "40", "--repeats", "2"]
    searches = [*train, "--max-lr", "auto", "--width", "2", "--batch-size", "4"]
    return [
        Command("train", (*train, "--out", str(out)), out=out),
        Command("train with the LR finder", (*searches, "--out", str(out)), out=out),
        Command("evaluate", ("evaluate", str(run), "--device", "cpu")),
        Command("report", ("report", str(run), "--device", "cpu")),
        Command("find-lr", (*search, "--plot", str(files / "curves.png"))),
        Command("predict", ("predict", str(run), str(picture), "--device", "cpu")),
        Command("export", ("export", str(run), "--out", str(files / "model.safetensors"))),
        Command("compare", ("compare", str(run), str(other), "--out", str(files / "compare.html"))),
        Command("data", ("data", *cases[0].data)),
        Command("doctor", ("doctor", "--device", "cpu")),
        Command("summary", ("summary", "--device", "cpu")),
    ]


def start(words: list[str] | tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fasttrain", *words]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=quiet)


def measured(command: Command) -> Command:
    """The command with the seconds that it takes."""
    begun = time.perf_counter()
    process = start(command.words)
    _, errors = process.communicate()
    if process.returncode:
        raise UserError(f"signals: undisturbed, {command.name} ended with {process.returncode}: {errors}")
    seconds = time.perf_counter() - begun
    return Command(command.name, command.words, seconds, command.out)


def disturbed(
    command: Command, signum: signal.Signals, moment: float, results: dict[str, Any]
) -> Iterator[str]:
    """Send one signal after so many seconds; yields what is wrong with how the command ended."""
    if command.out:
        shutil.rmtree(command.out, ignore_errors=True)
    process = start(command.words)
    try:
        process.communicate(timeout=moment)
        results["ended_before"] += 1
        return
    except subprocess.TimeoutExpired:
        process.send_signal(signum)
    sent = time.perf_counter()
    results["sent"] += 1
    try:
        _, errors = process.communicate(timeout=ENDED_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        yield f"still there after {ENDED_SECONDS:.0f} s: {errors!r}"
        return
    if process.returncode == 0:
        if time.perf_counter() - sent > ENDING_SECONDS:
            yield f"went on for {time.perf_counter() - sent:.1f} s"
        return
    if process.returncode != 128 + signum:
        yield f"status {process.returncode}, expected {128 + signum}: {errors!r}"
    lines = [line for line in errors.splitlines() if line.startswith("fasttrain")]
    if len(lines) != 1 or "Traceback" in errors or signum.name not in errors:
        yield f"not one line that names the signal: {errors!r}"
        return
    named = NAMED.search(lines[0])
    if named:
        resumed = subprocess.run(shlex.split(named[1]), capture_output=True, text=True, timeout=300)
        if resumed.returncode:
            yield f"{named[1]}: status {resumed.returncode}: {resumed.stderr!r}"
    elif command.out and (left := unfinished(command.out)):
        yield f"{left} can be resumed, and the line does not say so: {lines[0]!r}"


def unfinished(out: Path) -> list[Path]:
    """The runs that have a checkpoint and no result."""
    return [path.parent for path in out.glob(f"*/{LAST}") if not (path.parent / "result.json").exists()]
