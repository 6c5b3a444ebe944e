import os
import pickle
import stat

import pytest
import torch

from fasttrain.checkpoint import REQUIRED, load_checkpoint, save_checkpoint
from fasttrain.errors import UserError
from fasttrain.files import write_atomically, write_json

STATE = dict.fromkeys(REQUIRED, 1) | {"model": {"w": torch.ones(2)}, "loader": {"pipeline": b"\x00\xff"}}


class Trap:
    """Unpickling it would run a command."""

    def __reduce__(self):
        return os.system, ("touch sprung",)


def test_a_checkpoint_comes_back(tmp_path) -> None:
    save_checkpoint(tmp_path / "last.pt", STATE)
    state = load_checkpoint(tmp_path / "last.pt")
    assert torch.equal(state["model"]["w"], torch.ones(2)) and state["loader"] == {"pipeline": b"\x00\xff"}
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
    assert stat.S_IMODE((tmp_path / "last.pt").stat().st_mode) & 0o044 == 0o044


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def fail(file) -> None:
        file.write(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line(tmp_path) -> None:
    def full(file) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"last\.pt: cannot be written \(No space left on device\)"):
        write_atomically(tmp_path / "last.pt", full)


def test_json_never_holds_nan(tmp_path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "result.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_refused_by_name_and_runs_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "whole.pt", STATE)
    whole = (tmp_path / "whole.pt").read_bytes()
    torch.save({"model": Trap()}, tmp_path / "trap.pt")
    contents = {
        "empty.pt": b"",
        "torn.pt": whole[: len(whole) // 2],
        "text.pt": b"not a checkpoint",
        "pickle.pt": pickle.dumps(Trap()),
        "trap.pt": (tmp_path / "trap.pt").read_bytes(),
    }
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    contents["foreign.pt"] = (tmp_path / "foreign.pt").read_bytes()
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=name) as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        load_checkpoint(tmp_path / "missing.pt")
    assert not (tmp_path / "sprung").exists()
