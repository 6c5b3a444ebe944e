import os
import pickle
import stat
import threading

import pytest
import torch

from fasttrain.checkpoint import writer as writer_module
from fasttrain.checkpoint.file import REQUIRED, load_checkpoint, require_like, save_checkpoint
from fasttrain.checkpoint.manager import SaveInterval
from fasttrain.checkpoint.writer import CheckpointWriter, snapshot
from fasttrain.errors import UserError
from fasttrain.system.files import link_atomically, remove_temporaries, write_atomically, write_json

STATE = dict.fromkeys(REQUIRED, 1) | {"model": {"w": torch.ones(2)}, "loader": {"pipeline": b"\x00\xff"}}

CPU = torch.device("cpu")


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


def numbered(number: int) -> dict:
    return STATE | {"epoch": number, "model": {"w": torch.full((2,), float(number))}}


def test_the_writer_keeps_the_last_two_and_the_best(tmp_path) -> None:
    with CheckpointWriter(tmp_path, CPU) as writer:
        for number, best in ((1, True), (2, True), (3, False)):
            writer.write(numbered(number), best=best)
    epochs = {path.name: load_checkpoint(path)["epoch"] for path in tmp_path.iterdir()}
    assert epochs == {"last.pt": 3, "previous.pt": 2, "best.pt": 2}
    assert (tmp_path / "previous.pt").samefile(tmp_path / "best.pt")  # serialised and stored once


def test_what_the_writer_holds_becomes_the_best_with_the_next_write(tmp_path) -> None:
    best, state = tmp_path / "best.pt", numbered(1)
    with CheckpointWriter(tmp_path, CPU) as writer:
        writer.hold_best(state)
        state["model"]["w"].zero_()
        writer.write(numbered(2))
        writer.wait()
        assert load_checkpoint(best)["epoch"] == 1 and load_checkpoint(best)["model"]["w"][0] == 1
        writer.hold_best(numbered(3))
        writer.write(numbered(4), best=True)
        writer.wait()
        assert load_checkpoint(best)["epoch"] == 4
        writer.hold_best(numbered(5))
        writer.forget_best()
        writer.write(numbered(6))
    assert load_checkpoint(best)["epoch"] == 4


def test_the_writer_copies_before_it_returns(tmp_path, monkeypatch) -> None:
    changed = threading.Event()

    def write(path, state) -> None:
        assert changed.wait(10)
        save_checkpoint(path, state)

    monkeypatch.setattr(writer_module, "save_checkpoint", write)
    state = numbered(1)
    with CheckpointWriter(tmp_path, CPU) as writer:
        writer.write(state)
        state["model"]["w"].zero_()
        changed.set()
    assert load_checkpoint(tmp_path / "last.pt")["model"]["w"].tolist() == [1, 1]
    nested = {"a": [{"b": torch.ones(1)}]}
    copy = snapshot(nested, CPU)
    nested["a"][0]["b"].zero_()
    nested["a"].append({})
    assert copy == {"a": [{"b": torch.ones(1)}]}


def test_the_writer_writes_elsewhere_and_never_two_at_once(tmp_path, monkeypatch) -> None:
    threads: list[threading.Thread] = []
    busy = threading.Lock()

    def write(path, state) -> None:
        assert busy.acquire(blocking=False)
        threads.append(threading.current_thread())
        busy.release()

    monkeypatch.setattr(writer_module, "save_checkpoint", write)
    with CheckpointWriter(tmp_path, CPU) as writer:
        for number in range(20):
            writer.write(numbered(number))
    assert len(threads) == 20 and len(set(threads)) == 1
    assert threads[0] is not threading.main_thread()


@pytest.mark.parametrize("when", ["next", "end", "wait"])
def test_what_went_wrong_on_the_thread_is_raised(when, tmp_path, monkeypatch) -> None:
    def full(path, state) -> None:
        raise UserError("disk full")

    monkeypatch.setattr(writer_module, "save_checkpoint", full)
    with pytest.raises(UserError, match="disk full"), CheckpointWriter(tmp_path, CPU) as writer:
        writer.write(numbered(1))
        if when == "next":
            writer.write(numbered(2))
        if when == "wait":
            writer.wait()
        assert when == "end"


@pytest.mark.parametrize(
    ("text", "interval"), [("500", SaveInterval(steps=500)), ("30s", SaveInterval(seconds=30))]
)
def test_save_every_is_steps_or_seconds(text: str, interval: SaveInterval) -> None:
    assert SaveInterval.parse(text) == interval
    assert [SaveInterval.parse("3").over(steps, 1e9) for steps in (2, 3)] == [False, True]
    assert [SaveInterval.parse("3s").over(10**9, seconds) for seconds in (2.9, 3.0)] == [False, True]


@pytest.mark.parametrize("text", ["", "0", "0s", "-5", "5m", "1.5", "often", "s"])
def test_save_every_refuses_anything_else(text: str) -> None:
    with pytest.raises(UserError, match="--save-every"):
        SaveInterval.parse(text)


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


def test_a_link_falls_back_on_a_copy(tmp_path, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(1, "Operation not permitted")

    (tmp_path / "source").write_bytes(b"content")
    monkeypatch.setattr(os, "link", refuse)
    link_atomically(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"content"


def test_only_half_written_files_are_removed(tmp_path) -> None:
    for name in (
        "last.pt",
        ".last.pt-x1y2",
        ".best.pt-link",
        ".result.json-abc",
        "last.pt.unusable",
        ".nfs123",
    ):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"last.pt", "last.pt.unusable", ".nfs123"}
