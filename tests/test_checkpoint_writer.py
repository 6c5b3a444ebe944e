import threading

import pytest
import torch

from fasttrain.checkpoint import writer as writer_module
from fasttrain.checkpoint.file import REQUIRED, load_checkpoint, save_checkpoint
from fasttrain.checkpoint.writer import CheckpointWriter, snapshot
from fasttrain.errors import UserError

CPU = torch.device("cpu")


def numbered(number: int) -> dict:
    return dict.fromkeys(REQUIRED, 1) | {"epoch": number, "model": {"w": torch.full((2,), float(number))}}


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
