import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fasttrain.data import dataset
from fasttrain.data.sources import cifar
from fasttrain.errors import UserError
from tests.helpers import SMALL_RELEASE, pretend, records, write_release


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in cifar.CIFAR10.files}


def test_read_keeps_order_planes_and_labels(tmp_path: Path) -> None:
    folder = write_release(tmp_path)
    data = cifar.read(tmp_path)
    raw = b"".join((folder / name).read_bytes() for name in cifar.CIFAR10.train_files)
    assert data.train.images.shape == (len(raw) // 3073, 32, 32, 3) and data.train.images.dtype == np.uint8
    for index in (0, SMALL_RELEASE, len(data.train.labels) - 1):
        record = raw[index * 3073 : (index + 1) * 3073]
        assert data.train.labels[index] == record[0]
        # channel 1 (green), row 2, column 3
        assert data.train.images[index, 2, 3, 1] == record[1 + 1024 + 2 * 32 + 3]
        assert data.train.images[index].transpose(2, 0, 1).tobytes() == record[1:]
    assert len(data.test.labels) == SMALL_RELEASE + 5
    assert data.classes == cifar.CIFAR10.classes


def test_root_may_be_the_inner_folder(tmp_path: Path) -> None:
    folder = write_release(tmp_path)
    assert cifar.exists(folder) and cifar.exists(tmp_path) and not cifar.exists(tmp_path / "elsewhere")
    assert np.array_equal(cifar.read(folder).train.images, cifar.read(tmp_path).train.images)


@pytest.mark.parametrize("name", cifar.CIFAR10.files)
def test_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_release(tmp_path) / name).unlink()
    assert not cifar.exists(tmp_path)
    with pytest.raises(UserError, match=name):
        cifar.read(tmp_path)


@pytest.mark.parametrize("size", [0, 3072, 3074])
def test_truncated_file_is_named_with_its_size(tmp_path: Path, size: int) -> None:
    path = write_release(tmp_path) / "data_batch_3.bin"
    path.write_bytes(bytes(size))
    with pytest.raises(UserError, match=rf"data_batch_3\.bin: {size} bytes.* 3073"):
        cifar.read(tmp_path)


def test_label_out_of_range_names_the_record(tmp_path: Path) -> None:
    path = write_release(tmp_path) / cifar.CIFAR10.test_file
    content = bytearray(path.read_bytes())
    content[2 * 3073] = 10
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"test_batch\.bin: image 2 has label 10, expected 0 to 9"):
        cifar.read(tmp_path)
    (path.parent / cifar.CIFAR10.classes_file).write_text("\n".join("abcdefghijk") + "\n\n")
    assert cifar.read(tmp_path).classes == tuple("abcdefghijk")


def pretend_release(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the small files in `folder` the release, for this test."""
    mean, std = dataset.channel_statistics(cifar.read(folder).train.images)
    (folder / cifar.STATISTICS_FILE).unlink()
    mean, std = (tuple(round(value, 4) for value in values) for values in (mean, std))
    pretend(monkeypatch, sha256=digests(folder), mean=mean, std=std)


def test_only_the_release_is_called_cifar_10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_release(tmp_path)
    assert cifar.read(tmp_path).name == "CIFAR-10 (unverified)"
    pretend_release(folder, monkeypatch)
    assert cifar.read(tmp_path).name == "CIFAR-10"
    assert all(state.verified for state in cifar.checksum_state(tmp_path))

    path = folder / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert cifar.read(tmp_path).name == "CIFAR-10 (unverified)"
    states = cifar.checksum_state(tmp_path)
    assert [state.name for state in states if not state.verified] == ["data_batch_2.bin"]
    assert [(state.records, state.bytes) for state in states][1] == (
        SMALL_RELEASE + 1,
        (SMALL_RELEASE + 1) * 3073,
    )


def test_a_release_with_other_statistics_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_release(write_release(tmp_path), monkeypatch)
    pretend(monkeypatch, std=(0.2470, 0.2435, 0.2616))
    with pytest.raises(UserError, match="mean and std"):
        cifar.read(tmp_path)


def test_a_stand_in_names_itself_but_not_cifar_10(tmp_path: Path) -> None:
    path = write_release(tmp_path) / cifar.NAME_FILE
    path.write_text('{"name": "CIFAR-10 (JPEG q75)"}')
    assert cifar.read(tmp_path).name == "CIFAR-10 (JPEG q75)"
    for claim in ('{"name": "CIFAR-10"}', '{"name": " cifar10"}', '{"name": 3}', '["x"]', "not JSON", "{}"):
        path.write_text(claim)
        with pytest.raises(UserError, match=cifar.NAME_FILE):
            cifar.read(tmp_path)


def test_statistics_are_of_the_training_images(tmp_path: Path) -> None:
    write_release(tmp_path)
    data = cifar.read(tmp_path)
    assert (data.mean, data.std) == dataset.channel_statistics(data.train.images)


def test_statistics_are_cached_until_content_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_release(tmp_path)
    first = cifar.read(tmp_path)
    with monkeypatch.context() as patch:
        patch.delattr(cifar, "channel_statistics")  # a second count would fail
        assert cifar.read(tmp_path).mean == first.mean

    # Same size, same time, other content.
    path = folder / "data_batch_1.bin"
    before = path.stat()
    path.write_bytes(records(SMALL_RELEASE, seed=99))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = cifar.read(tmp_path)
    assert second.mean != first.mean
    assert (second.mean, second.std) == dataset.channel_statistics(second.train.images)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("mean", ["[0.5, 0.5]", "[0.5, 0.5, NaN]", '"abc"', "null", "{"])
def test_a_damaged_cache_is_counted_again(tmp_path: Path, mean: str) -> None:
    folder = write_release(tmp_path)
    first = cifar.read(tmp_path)
    path = folder / cifar.STATISTICS_FILE
    cache = json.loads(path.read_text())
    path.write_text(f'{{"sha256": {json.dumps(cache["sha256"])}, "std": [0.2, 0.2, 0.2], "mean": {mean}}}')
    again = cifar.read(tmp_path)
    assert (again.mean, again.std) == (first.mean, first.std)
    assert json.loads(path.read_text()) == cache


def test_a_read_only_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_release(tmp_path)

    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)  # chmod would not stop root
    assert cifar.read(tmp_path).name == "CIFAR-10 (unverified)"


def test_locate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTTRAIN_DATA", raising=False)
    assert cifar.locate(None) == Path("data")
    monkeypatch.setenv("FASTTRAIN_DATA", "elsewhere")
    assert cifar.locate(None) == Path("elsewhere")
    assert cifar.locate(Path("here")) == Path("here")
