"""Trainings in forks of this process, which have all imports behind them."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from fasttrain import cli as command_line
from fasttrain import trainer


def start(action: Callable[[], int], log: Path) -> int:
    """Run `action` in a fork of this process; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        with log.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        # Both take seconds, and a run's weights depend on neither.
        trainer.measure_matmul_tflops = lambda *_, **__: 1.0
        trainer.try_report = lambda *_: "no report"
        command_line.STARTED = time.perf_counter()
        status = action()
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def finish(process: int, deadline: float | None = None) -> int | None:
    """Wait for a process; returns its status, negative for a signal, or None if the deadline passes."""
    while True:
        done, status = os.waitpid(process, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.perf_counter() >= deadline:
            return None
        time.sleep(0.005)


def finish_or_kill(process: int, seconds: float) -> int | None:
    """Wait for a process; returns its status, or None if it took longer and had to be killed."""
    status = finish(process, time.perf_counter() + seconds)
    if status is None:
        os.kill(process, signal.SIGKILL)
        finish(process)
    return status


def last_line(path: Path) -> str:
    return path.read_text().strip().splitlines()[-1]
