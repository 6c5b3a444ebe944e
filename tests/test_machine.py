"""The machine is described as it is: what is not there is refused or named, never guessed."""

import json
import platform
from pathlib import Path

import pytest
import torch

from fasttrain.errors import UserError
from fasttrain.system import machine, revision

CPU = torch.device("cpu")


@pytest.mark.parametrize("requested", ["cuda:99", "tpu", "xpu", "meta", ""])
def test_a_device_that_is_not_there_is_refused(requested: str) -> None:
    with pytest.raises(UserError, match="expected one of auto, cpu"):
        machine.pick_device(requested)


def test_auto_takes_the_cpu_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.pick_device("auto") == CPU
    with pytest.raises(UserError, match="--device cuda"):
        machine.pick_device("cuda")


def test_a_gpu_is_taken_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "why_unsupported", lambda index: None)
    monkeypatch.setattr(machine, "why_no_gpu", lambda: None)
    assert machine.pick_device("auto") == machine.pick_device("cuda") == torch.device("cuda", 0)
    assert machine.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:0, cuda:1"):
        machine.pick_device("cuda:2")


def test_a_gpu_that_torch_has_no_code_for_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(machine, "why_unsupported", {0: "built for 7.5 and newer", 1: None}.get)
    assert machine.pick_device("auto") == torch.device("cuda", 1)
    monkeypatch.setattr(machine, "why_unsupported", lambda index: "built for 7.5 and newer")
    monkeypatch.setattr(machine, "why_no_gpu", lambda: "built for 7.5 and newer")
    assert machine.pick_device("auto") == CPU
    with pytest.raises(UserError, match=r"--device cuda: built for 7.5 and newer; expected one of auto, cpu"):
        machine.pick_device("cuda")


def test_describe_is_json_and_names_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps(machine.describe(CPU))
    assert json.loads(text)["torch"] == torch.__version__
    assert platform.node() not in text
    assert str(machine.Path.home()) not in text


@pytest.mark.parametrize(
    ("told", "commit", "dirty"), [("0123abc", "0123abc", False), ("0123abc-dirty", "0123abc", True)]
)
def test_a_copy_without_git_is_told_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str, commit: str, dirty: bool
) -> None:
    (tmp_path / "fasttrain").mkdir()
    monkeypatch.setattr(revision, "__file__", str(tmp_path / "fasttrain" / "system" / "revision.py"))
    monkeypatch.delenv("FASTTRAIN_COMMIT", raising=False)
    assert machine.describe(CPU)["git_commit"] is None
    monkeypatch.setenv("FASTTRAIN_COMMIT", told)
    assert (machine.describe(CPU)["git_commit"], machine.describe(CPU)["git_dirty"]) == (commit, dirty)
    monkeypatch.setenv("FASTTRAIN_COMMIT", "another")  # a wheel knows better
    (tmp_path / "fasttrain" / "commit.txt").write_text(f"{told}\n")
    assert (machine.describe(CPU)["git_commit"], machine.describe(CPU)["git_dirty"]) == (commit, dirty)


@pytest.mark.gpu
def test_describe_on_a_gpu() -> None:
    described = machine.describe(torch.device("cuda", 0))
    json.dumps(described)
    assert described["gpu_name"] and described["gpu_driver"]
