"""The Makefile says what it offers, and passes on what it is given."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def make(*arguments: str) -> str:
    # PATH alone: neither the flags of a make above this test nor a VENV of the shell's may reach this one.
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_line(*arguments: str) -> str:
    """The command that a target ends with, unquoted."""
    return make("-n", *arguments).strip().splitlines()[-1].replace('"', "")


def test_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = re.findall(r"^  make ([a-z-]+) +\S", make("help"), re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].split())
    assert make() == make("help")


def test_train_passes_its_variables_on() -> None:
    command = last_line("train", "EPOCHS=3", "DATA=synthetic", "ARGS=--batch-size 256")
    assert command == ".venv/bin/python -m fasttrain train --epochs 3 --data synthetic --batch-size 256"


def test_train_passes_nothing_else() -> None:
    assert last_line("train") == ".venv/bin/python -m fasttrain train --data auto"


def test_every_variable_becomes_its_flag() -> None:
    flags = {
        "RECIPE=laptop": "--recipe laptop",
        "EPOCHS=1": "--epochs 1",
        "SEED=7": "--seed 7",
        "MAX_LR=0.02": "--max-lr 0.02",
        "DATA=cifar10": "--data cifar10",
        "DATA_DIR=images": "--data-dir images",
        "DEVICE=cpu": "--device cpu",
    }
    command = last_line("lr-find", *flags)
    assert command == ".venv/bin/python -m fasttrain find-lr " + " ".join(flags.values())


def test_a_value_with_a_space_stays_one_word() -> None:
    assert '--data-dir "my images"' in make("-n", "data", "DATA_DIR=my images")


def test_constraints_pin_every_dependency_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pin = re.compile(r"[a-z0-9-]+==[0-9][^ ;]*(; python_version (<|>=) \"3\.\d+\")?")
    assert [line for line in lines if not pin.fullmatch(line)] == []
    pinned = {line.split("==")[0] for line in lines}
    project = (ROOT / "pyproject.toml").read_text()
    required = re.findall(r'^\s+"([a-z0-9-]+)[^"]*",$', project, re.MULTILINE)
    assert required and set(required) | {"tensorboard", "pytest", "pytest-xdist", "ruff", "mypy"} <= pinned
