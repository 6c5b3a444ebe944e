"""Faults for real: killed processes, full and read-only disks, damaged files. `make soak` is longer."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fasttrain.checkpoint.file import REQUIRED, load_checkpoint, save_checkpoint
from fasttrain.cli import main
from fasttrain.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mounts a tmpfs with these options; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("no mount command here")
        if done.returncode:
            pytest.skip(f"may not mount a disk here ({done.stderr.strip()})")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_older_checkpoint(mount: Mount) -> None:
    path = mount("size=1m") / "last.pt"
    state = dict.fromkeys(REQUIRED, 1)
    save_checkpoint(path, state)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"last\.pt: cannot be written \(No space left on device\)"):
        save_checkpoint(path, state | {"model": {"w": torch.zeros(2**20)}})
    assert path.read_bytes() == before and os.listdir(path.parent) == ["last.pt"]
    load_checkpoint(path)


def test_a_training_that_fills_the_disk_ends_in_one_line(mount: Mount, dataset_dir: Path, capsys) -> None:
    """Room for the network, but not for the optimizer's state too."""
    disk = mount("size=60m")
    flags = ["--data-dir", str(dataset_dir), "--device", "cpu", "--epochs", "2", "--batch-size", "32"]
    assert main(["train", "--recipe", "default", *flags, "--out", str(disk)]) == 2
    error = capsys.readouterr().err
    [folder] = disk.iterdir()
    assert error.count("\n") == 1 and "No space left on device" in error and f"--resume {folder}" in error
    assert load_checkpoint(folder / "last.pt")["scheduler"]["step"] == 0
    assert not (folder / "result.json").exists()


def test_a_read_only_disk_is_one_line(mount: Mount, dataset_dir: Path, capsys) -> None:
    disk = mount("ro")
    flags = ["--data-dir", str(dataset_dir), "--device", "cpu", "--batch-size", "32"]
    assert main(["train", *flags, "--out", str(disk / "runs")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Read-only file system" in error


@pytest.mark.skipif(sys.platform != "linux", reason="the campaign forks, and reads memory from /proc")
def test_a_small_fault_campaign(tmp_path: Path) -> None:
    flags = ["--minutes", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"FASTTRAIN_RESULTS": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = tmp_path.glob("*/soak-seed-0.json")
    figures = json.loads(path.read_text())
    assert figures["kill"]["kills"] > 0 and figures["kill"]["runs"] == figures["kill"]["bit_equal"] > 0
    for name in ("disks", "host"):
        assert figures[name]["runs"] == figures[name]["bit_equal"] > 0
    assert figures["ranks"]["jobs"] > 0
    assert figures["signals"]["sent"] > 0 and figures["bad-inputs"]["tried"] > 50
    assert figures["bad-inputs"]["refused"] > figures["bad-inputs"]["tried"] // 3
    assert set(figures["memory"]) == {"epochs", "runs", "resumes", "wrong"}
