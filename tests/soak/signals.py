"""Signals at random moments of every command: each ends it with one true line, and what that names works."""

import dataclasses
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
from tests.soak.trainings import HANG_SECONDS, wait_for_file

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

ENDED_SECONDS = 20.0
"""A command that takes longer to end after a signal hangs: it may finish a step, an evaluation, a file."""

BOOT_SECONDS = 0.3
"""Python itself takes about 0.05 s to start, on busy cores more, and nothing can be said before."""

ENDING_SECONDS = 4.0
"""A command that had done its work when the signal came, and was ending, may take so long on busy cores."""

NAMED = re.compile(r"(?:resume with|continue from the last checkpoint): (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command and the seconds that it takes undisturbed.

    out: where a training writes its runs. before: what lies there when it starts.
    """

    name: str
    words: tuple[str, ...]
    seconds: float = 0.0
    out: Path | None = None
    before: Path | None = None

    def begin(self) -> subprocess.Popen[str]:
        if self.out:
            shutil.rmtree(self.out, ignore_errors=True)
        if self.out and self.before:
            shutil.copytree(self.before, self.out)
        return start(self.words)


class SignalCampaign:
    """Each turn sends a signal to one command, or two in a row.

    results: how many commands were sent some; of them, how many were sent two, and how many had done their
    work, and ended as if nothing had come; and how many had ended before.
    """

    name = "signals"

    def __init__(self, cases: list[Case], work: Path) -> None:
        for signum in SIGNALS:
            if signal.getsignal(signum) is signal.SIG_IGN:  # as under nohup; commands would ignore it too
                signal.signal(signum, signal.SIG_DFL)
        self._commands = every_command(cases, work)
        self.results: dict[str, Any] = {
            "sent": 0,
            "twice": 0,
            "done": 0,
            "ended_before": 0,
            "commands": len(self._commands),
            "wrong": [],
        }

    def turn(self, number: int, rng: random.Random) -> None:
        place = number % len(self._commands)
        if not self._commands[place].seconds:
            self._commands[place] = measured(self._commands[place])
        command = self._commands[place]
        signums = rng.choices(SIGNALS, k=rng.choice((1, 1, 2)))
        moment, pause = rng.uniform(min(BOOT_SECONDS, command.seconds), command.seconds), rng.uniform(0, 0.5)
        names = " and ".join(signum.name for signum in signums)
        for fault in disturbed(command, signums, moment, pause, self.results):
            self.results["wrong"].append(f"{command.name}, {names} after {moment:.2f} s: {fault}")


def every_command(cases: list[Case], work: Path) -> list[Command]:
    """Every command that takes time, on a small finished run and small images."""
    recipe, finished = work / "signals.json", work / "finished"
    write_json(recipe, cases[0].recipe.to_dict())
    data = [*cases[0].data, "--device", "cpu"]
    train = ["train", "--recipe", str(recipe), *data, "--save-every", "1"]
    for _ in range(2):
        if start([*train, "--out", str(finished)]).wait(HANG_SECONDS):
            raise UserError("signals: the undisturbed training failed")
    run, other = sorted(finished.iterdir())
    stopped = stopped_run([*train, "--out", str(work / "stopped")], work / "stopped")
    out, files, picture = work / "signalled", work / "files", next((work / "folder").rglob("*.png"))
    files.mkdir()
    search = ["find-lr", "--recipe", str(recipe), *data, "--num-iter", "40", "--repeats", "2"]
    searches = [*train, "--max-lr", "auto", "--width", "2", "--batch-size", "4"]
    return [
        Command("train", (*train, "--out", str(out)), out=out),
        Command(
            "train --resume",
            ("train", "--resume", str(out / stopped.name), "--device", "cpu"),
            out=out,
            before=stopped.parent,
        ),
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


def stopped_run(words: list[str], out: Path) -> Path:
    """The folder of a training that was stopped in the middle."""
    process = start(words)
    wait_for_file(process, out, "*/previous.pt")
    process.terminate()
    if process.wait(ENDED_SECONDS) != 128 + signal.SIGTERM:
        raise UserError(f"signals: a training could not be stopped: {process.returncode}")
    [folder] = out.iterdir()
    return folder


def start(words: list[str] | tuple[str, ...]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fasttrain", *words]
    quiet = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=quiet)


def measured(command: Command) -> Command:
    """The command with the seconds that it takes."""
    begun = time.perf_counter()
    process = command.begin()
    _, errors = process.communicate(timeout=HANG_SECONDS)
    if process.returncode:
        raise UserError(f"signals: undisturbed, {command.name} ended with {process.returncode}: {errors}")
    seconds = time.perf_counter() - begun
    return dataclasses.replace(command, seconds=seconds)


def disturbed(
    command: Command, signums: list[signal.Signals], moment: float, pause: float, results: dict[str, Any]
) -> Iterator[str]:
    """Send signals after so many seconds, with a pause between; yields what is wrong with how it ended."""
    process = command.begin()
    try:
        process.communicate(timeout=moment)
        results["ended_before"] += 1
        return
    except subprocess.TimeoutExpired:
        process.send_signal(signums[0])
    sent = time.perf_counter()
    results["sent"] += 1
    results["twice"] += len(signums) > 1
    try:
        for signum in signums[1:]:
            time.sleep(pause)
            process.send_signal(signum)
        _, errors = process.communicate(timeout=ENDED_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        _, errors = process.communicate()
        yield f"still there after {ENDED_SECONDS:.0f} s: {errors!r}"
        return
    if process.returncode == 0:
        results["done"] += 1
        if time.perf_counter() - sent > ENDING_SECONDS:
            yield f"went on for {time.perf_counter() - sent:.1f} s"
        return
    told = [signum for signum in signums if 128 + signum == process.returncode]
    if not told:
        yield f"status {process.returncode}, expected {128 + signums[0]}: {errors!r}"
    lines = [line for line in errors.splitlines() if line.startswith("fasttrain")]
    is_short = 1 <= len(lines) <= len(signums)  # the second may come once the first has had its line
    if not is_short or "Traceback" in errors or not any(signum.name in errors for signum in told):
        yield f"not one line that names the signal: {errors!r}"
        return
    named = NAMED.search(lines[0])
    if named:
        if failure := run_named(named[1]):
            yield failure
    elif command.out and not command.before and (left := unfinished(command.out)):
        yield f"{left} can be resumed, and the line does not say so: {lines[0]!r}"


def run_named(command: str) -> str | None:
    """Run a command that a line named; returns how it failed, or None."""
    beside = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # torchrun's
    environment = os.environ | {"PATH": beside, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            shlex.split(command), capture_output=True, text=True, timeout=HANG_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"{command}: not done after {HANG_SECONDS:.0f} s"
    return f"{command}: status {done.returncode}: {done.stderr!r}" if done.returncode else None


def unfinished(out: Path) -> list[Path]:
    """The runs that have a checkpoint and no result."""
    return [path.parent for path in out.glob(f"*/{LAST}") if not (path.parent / "result.json").exists()]
