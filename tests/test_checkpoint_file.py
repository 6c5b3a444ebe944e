import os
import pickle
import stat

import pytest
import torch

from fasttrain.checkpoint.file import REQUIRED, load_checkpoint, require_like, save_checkpoint
from fasttrain.errors import UserError

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


def test_one_flipped_bit_in_the_weights_is_refused(tmp_path) -> None:
    """torch.load itself looks at no checksum."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, STATE | {"model": {"w": torch.full((100,), 1.5)}})
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((100,), 1.5).numpy().tobytes()) + 7] ^= 1
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["model"]["w"][1] != 1.5
    with pytest.raises(UserError, match=r"last\.pt: cannot be read as a checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"w": torch.ones(2)},
        {"w": torch.ones(3), "n": 1, "x": 0.5},
        {"w": torch.ones(2, dtype=torch.float64), "n": 1, "x": 0.5},
        {"w": torch.tensor([1, float("nan")]), "n": 1, "x": 0.5},
        {"w": torch.ones(2), "n": True, "x": 0.5},
        {"w": torch.ones(2), "n": -1, "x": 0.5},
        {"w": torch.ones(2), "n": 1, "x": float("inf")},
        {"w": torch.ones(2), "n": 1, "x": "0.5"},
        {"w": torch.ones(2), "n": 1, "x": 0.5, "y": 1},
    ],
)
def test_a_value_of_another_structure_is_refused_by_name(value) -> None:
    example = {"w": torch.zeros(2), "n": 3, "x": 0.0}
    require_like({"w": torch.ones(2), "n": 1, "x": 0.5}, example, "part")
    with pytest.raises(UserError, match="part"):
        require_like(value, example, "part")
