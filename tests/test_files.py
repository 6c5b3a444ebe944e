import os
from pathlib import Path

import pytest

from fasttrain.errors import UserError
from fasttrain.system.files import (
    link_atomically,
    new_folder,
    remove_temporaries,
    write_atomically,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")

    def fail(file) -> None:
        file.write(b"half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_signal_just_after_the_rename_stays_a_signal(tmp_path, monkeypatch) -> None:
    rename = os.replace

    def rename_and_stop(*paths: object) -> None:
        rename(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", rename_and_stop)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "machine.json", {})
    assert os.listdir(tmp_path) == ["machine.json"]


def test_a_full_disk_is_one_line(tmp_path) -> None:
    def full(file) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"last\.pt: cannot be written \(No space left on device\)"):
        write_atomically(tmp_path / "last.pt", full)


def test_json_never_holds_nan(tmp_path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "result.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


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


def test_new_folder_refuses_a_folder_that_has_files(tmp_path: Path) -> None:
    target = tmp_path / "set"
    with pytest.raises(UserError, match="set"), new_folder(target) as folder:
        (folder / "mine").write_text("mine")
        assert not target.exists()
        target.mkdir()
        (target / "theirs").write_text("theirs")
    assert [path.name for path in target.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [target]
