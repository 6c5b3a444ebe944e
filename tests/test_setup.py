"""The Makefile says what it offers and installs, passes on what it is given, and refuses anything else."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

TRAINING = ["RECIPE", "EPOCHS", "SEED", "MAX_LR", "DATA", "DATA_DIR", "DEVICE", "ARGS"]


def run_make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # PATH alone: neither the flags of a make above this test nor a VENV of the shell's may reach this one.
    environment = {"PATH": os.environ["PATH"]}
    return subprocess.run(["make", *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def make(*arguments: str, cwd: Path = ROOT) -> str:
    done = run_make(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_line(*arguments: str) -> str:
    """The command that a target ends with, unquoted."""
    return make("-n", *arguments).strip().splitlines()[-1].replace("'", "")


def test_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    listed = re.findall(r"^  make ([a-z-]+) +\S", make("help"), re.MULTILINE)
    assert sorted(listed) == sorted(phony[1].replace("\\", "").split())
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
    command = last_line("find-lr", *flags)
    assert command == ".venv/bin/python -m fasttrain find-lr " + " ".join(flags.values())


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("train EPOCH=3", "`make train` does not take EPOCH= (did you mean EPOCHS=?)"),
        ("train epochs=3", "`make train` does not take epochs= (did you mean EPOCHS=?)"),
        ("train LR=0.1", "does not take LR= (did you mean MAX_LR=?)"),
        ("check train EPOCH=3", "`make check train` does not take EPOCH="),
        ("summary EPOCHS=3", "`make summary` does not take EPOCHS=; it takes RECIPE= DEVICE= ARGS="),
        ("check SEED=3", "it takes no variables"),
        ("EPOCHS=3", "`make help` does not take EPOCHS="),
    ],
)
def test_an_unknown_variable_is_refused_before_anything_is_installed(
    arguments: str, answer: str, tmp_path: Path
) -> None:
    done = run_make("-n", *arguments.split(), f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 2 and done.stdout == "" and not any(tmp_path.iterdir())
    assert answer in done.stderr and done.stderr.count("\n") == 1


def test_help_names_the_variables_that_a_target_takes() -> None:
    for target, text in re.findall(r"^  make ([a-z-]+) +(.*)$", make("help"), re.MULTILINE):
        taken = (
            run_make("-n", target, "NONE=", "PYTHON=true")
            .stderr.partition("it takes ")[2]
            .partition(".")[0]
            .split()
        )
        named = re.findall(r"\b[A-Z_]+(?==)", text)
        expected = TRAINING if target in ("find-lr", "profile") else named
        assert taken == ([f"{name}=" for name in expected] or ["no", "variables"]), target


def test_makes_own_variables_and_the_compilers_are_known() -> None:
    make("-n", "train", "PYTHON=python3", "CC=clang", "CXX=clang++", "SHELL=/bin/sh", "EPOCHS=1")


STUB = """#!/bin/sh
if [ "$*" = "-m pip --version" ]; then exit 0; fi
for word; do echo "$word"; done >> "{log}"
exit {status}
"""


class Clone:
    """A copy of what make reads, in a folder whose name has a space, with a Python that notes its words."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.venv, self.log = folder, folder / "my venv", folder / "words"
        for name in ("Makefile", "pyproject.toml", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, folder)
        (self.venv / "bin").mkdir(parents=True)
        self.answer(0)

    def answer(self, status: int) -> None:
        python = self.venv / "bin" / "python"
        python.write_text(STUB.format(log=self.log, status=status))
        python.chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        self.log.unlink(missing_ok=True)
        return run_make(*arguments, f"VENV={self.venv}", cwd=self.folder)

    def words(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    folder = tmp_path / "a clone"
    folder.mkdir()
    return Clone(folder)


def test_training_installs_only_what_it_needs_and_says_before_how_large_that_is(clone: Clone) -> None:
    said = clone.make("train").stdout
    assert clone.words()[:7] == ["-m", "pip", "install", "-c", "constraints.txt", "-e", "."]
    assert clone.words()[7:] == ["-m", "fasttrain", "train", "--data", "auto"]
    before, _, after = said.partition("pip install")
    assert before.count(" GiB on disk") == 2 and "whl/cpu make train" in before
    assert f"source {clone.venv}/bin/activate" in after
    again = clone.make("train")
    assert clone.words() == ["-m", "fasttrain", "train", "--data", "auto"] and "GiB" not in again.stdout
    clone.make("check")
    assert ".[dev]" in clone.words() and "mypy" in clone.words()
    clone.make("bench")
    assert ".[bench]" in clone.words() and ".[dev]" not in clone.words()


def test_a_failed_install_is_tried_again(clone: Clone) -> None:
    clone.answer(1)
    assert clone.make("setup").returncode == 2
    clone.answer(0)
    assert clone.make("setup").returncode == 0 and "install" in clone.words()
    assert clone.make("setup").returncode == 0 and clone.words() == []


def test_a_venv_whose_making_was_interrupted_is_made_again(clone: Clone) -> None:
    """It has a Python and no pip."""
    python = clone.venv / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    maker = clone.folder / "maker"
    maker.write_text(f'#!/bin/sh\necho "$2" "$3" >> "{clone.folder}/made"\n')
    maker.chmod(0o755)
    assert clone.make("setup", "PYTHON=./maker").returncode == 2
    assert f"venv {clone.venv}" in (clone.folder / "made").read_text()


@pytest.mark.parametrize("value", ["my images", "it's", 'a "b"', "$HOME/$(HOME)", "a;b&c|d", "*", "\\"])
def test_a_value_reaches_the_program_whole(clone: Clone, value: str) -> None:
    clone.make("setup")
    assert clone.make("data", f"DATA_DIR={value}").returncode == 0
    assert clone.words() == ["-m", "fasttrain", "data", "--data", "auto", "--data-dir", value]


def test_args_are_typed_as_in_a_shell(clone: Clone) -> None:
    clone.make("setup")
    clone.make("predict", """ARGS=best.pt "my images" 'it costs $5' \\"x""")
    assert clone.words() == ["-m", "fasttrain", "predict", "best.pt", "my images", "it costs $5", '"x']


def test_constraints_pin_every_dependency_exactly() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pin = re.compile(r"[a-z0-9-]+==[0-9][^ ;]*(; python_version (<|>=|==) \"3\.\d+\")?")
    assert [line for line in lines if not pin.fullmatch(line)] == []
    pinned = {line.split("==")[0] for line in lines}
    project = (ROOT / "pyproject.toml").read_text()
    required = re.findall(r'^\s+"([a-z0-9-]+)[^"]*",$', project, re.MULTILINE)
    assert required and set(required) | {"tensorboard", "pytest", "pytest-xdist", "ruff", "mypy"} <= pinned
