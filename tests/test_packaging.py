"""What is built is complete, and works without the checkout: installed from the wheel, in another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import fasttrain

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs git")

BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"
"""What pip and build call, without an environment of its own that would have to be downloaded."""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FASTTRAIN"))
    }
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def tracked(folder: Path) -> set[str]:
    return set(run("git", "ls-files", "fasttrain", cwd=folder).splitlines())


def git(*arguments: str, cwd: Path) -> str:
    author = ("-c", "user.name=Someone", "-c", "user.email=someone@example.org")
    return run("git", *author, *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean checkout of these files, committed or not: a build leaves something in it, not in this one."""
    folder = tmp_path_factory.mktemp("a checkout")
    for name in run("git", "ls-files", "-co", "--exclude-standard", "--deduplicate", cwd=ROOT).splitlines():
        if (ROOT / name).is_file() and not name.startswith("benchmarks/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    git("init", "--quiet", cwd=folder)
    git("add", "--all", cwd=folder)
    git("commit", "--quiet", "--message", "All", cwd=folder)
    return folder


@pytest.fixture(scope="module")
def commit(checkout: Path) -> str:
    return git("rev-parse", "HEAD", cwd=checkout)


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-c", BUILD, "build_wheel", out, cwd=checkout)
    return next(out.iterdir())


def content(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_its_commit(checkout: Path, commit: str, wheel: Path) -> None:
    held = content(wheel)
    package = {name for name in held if ".dist-info/" not in name}
    assert package == tracked(checkout) | {"fasttrain/commit.txt"}
    assert held["fasttrain/commit.txt"].decode() == f"{commit}\n"
    metadata = next(held[name].decode() for name in held if name.endswith("/METADATA"))
    assert "\nName: fasttrain-dali\n" in metadata and f"\nVersion: {fasttrain.__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata and "# fasttrain\n" in metadata
    assert any(name.endswith("/licenses/LICENSE") for name in held)
    assert git("status", "--porcelain", cwd=checkout) == "", "a build leaves nothing that git sees"


def test_an_sdist_makes_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    run(sys.executable, "-c", BUILD, "build_sdist", tmp_path, cwd=checkout)
    [sdist] = tmp_path.iterdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    [unpacked] = [path for path in tmp_path.iterdir() if path.is_dir()]
    run(sys.executable, "-c", BUILD, "build_wheel", tmp_path, cwd=unpacked)
    ours, theirs = (content(path) for path in (wheel, next(tmp_path.glob("*.whl"))))
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if "RECORD" not in name and ours[name] != theirs[name]} == set()


def test_a_changed_checkout_says_so_and_a_copy_is_told_its_commit(
    checkout: Path, commit: str, tmp_path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    ask = (
        sys.executable,
        "-c",
        "import setuptools; setuptools.setup = dict; import setup; print(setup.commit())",
    )
    (copy / "README.md").write_text("changed")
    assert run(*ask, cwd=copy) == f"{commit}-dirty"
    shutil.rmtree(copy / ".git")
    assert run(*ask, cwd=copy) == ""
    assert run("env", "FASTTRAIN_COMMIT=abc", *ask, cwd=copy) == "abc"


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin/ of an environment with the wheel, and the packages of this one instead of a download."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    paths = {key: sysconfig.get_path(key) for key in ("purelib", "platlib")}
    [packages] = folder.glob("lib/python3*/site-packages")
    (packages / "ours.pth").write_text("\n".join(paths.values()))  # without what their .pth add: the checkout
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "--quiet")
    run(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
    return folder / "bin"


def test_the_wheel_trains_in_another_folder(
    installed: Path, commit: str, dataset_dir: Path, tmp_path
) -> None:
    where = run(installed / "python", "-c", "import fasttrain; print(fasttrain.__file__)", cwd=tmp_path)
    assert Path(where).is_relative_to(installed.parent)
    assert "synthetic" in run(installed / "fasttrain", "data", "--data-dir", dataset_dir, cwd=tmp_path)
    flags = ("--epochs", "1", "--batch-size", "32", "--width", "4", "--device", "cpu")
    run(installed / "fasttrain", "train", "--data-dir", dataset_dir, *flags, cwd=tmp_path)
    [folder] = (tmp_path / "runs").iterdir()
    assert (folder / "report.html").exists()
    machine = json.loads((folder / "machine.json").read_text())
    assert (machine["git_commit"], machine["git_dirty"]) == (commit, False)


SCRIPT = """
import fasttrain
from fasttrain import Recipe, load_dataset, train
run = train(Recipe(epochs=1), data=load_dataset("synthetic"))
epochs: int = run.recipe.epochs
wrong: str = run.recipe.epochs
"""


def test_a_type_checker_knows_every_public_name(installed: Path, tmp_path: Path) -> None:
    """Only of other packages it learns nothing here: reading torch would take a minute."""
    script, settings = tmp_path / "script.py", tmp_path / "mypy.ini"
    names = [name for name in fasttrain.__all__ if name != "__version__"]
    script.write_text(SCRIPT + "".join(f"reveal_type(fasttrain.{name})\n" for name in names))
    others = ",".join(f"mypy-{name}.*" for name in ("torch", "numpy", "matplotlib", "PIL", "rich", "jinja2"))
    settings.write_text(f"[mypy]\nstrict = True\n[{others}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--config-file", settings, "--cache-dir", tmp_path / "cache"]
    command += ["--python-executable", installed / "python", script]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert len(errors) == 1 and "script.py:6" in errors[0] and "assignment" in errors[0], done.stdout
    revealed = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(revealed) == len(names) and not [line for line in revealed if 'is "Any"' in line]
