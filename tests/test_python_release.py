"""The Python release against pickles that pickle and NumPy wrote, and against hostile ones."""

import dataclasses
import io
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from fasttrain.data.sources import cifar, python_release
from fasttrain.data.sources.download import download
from fasttrain.errors import UserError
from tests.helpers import pickle2, pickle_of, records, small_files, small_release, tar_gz

IMAGES = 3
ONE = dataclasses.replace(cifar.CIFAR10, train_images=5 * IMAGES, test_images=IMAGES)


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (IMAGES, 32, 32, 3), np.uint8)


def as_rows(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), 3072)


def read(batch: object) -> np.ndarray:
    return python_release.read(pickle2(batch), IMAGES, ONE)


def good() -> dict[bytes, object]:
    return {b"labels": [7, 0, 9], b"data": as_rows(pictures())}


def test_a_batch_becomes_the_records_of_the_binary_release() -> None:
    expected = b""
    for label, image in zip([7, 0, 9], pictures(), strict=True):
        expected += bytes([label])
        for channel in range(3):
            expected += bytes(int(image[y, x, channel]) for y in range(32) for x in range(32))
    assert read(good()).tobytes() == expected


def test_what_cpickle_of_python_2_wrote_is_read() -> None:
    """Instruction by instruction, with the numbers that it gave to what it stored."""
    pixels = as_rows(pictures())
    content = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03"
        b"U\x06labelsq\x04]q\x05(K\x07K\x00K\x09e"
        b"U\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\x09"
        b"(K\x01K\x03M\x00\x0c\x86cnumpy\ndtype\nq\x0aU\x02u1K\x00K\x01\x87Rq\x0b"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<I", pixels.size) + pixels.tobytes() + b"tb"
        b"U\x09filenamesq\x0c]q\x0d(U\x05a.pngq\x0eU\x05b.pngq\x0fU\x05c.pngq\x10eu."
    )
    assert pickle.loads(content, encoding="bytes")[b"data"].shape == (IMAGES, 3072)
    assert np.array_equal(python_release.read(content, IMAGES, ONE), read(good()))


def test_an_array_may_be_stored_by_column() -> None:
    assert np.array_equal(read({**good(), b"data": np.asfortranarray(as_rows(pictures()))}), read(good()))


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_both_names_of_numpy_are_known(module: bytes) -> None:
    content = pickle2(good()).replace(b"numpy.core.multiarray", module)
    assert module in content
    assert python_release.read(content, IMAGES, ONE).shape == (IMAGES, 3073)


def test_cifar_100_has_the_coarse_label_first() -> None:
    batch = {b"coarse_labels": [1, 2, 3], b"fine_labels": [40, 50, 99], b"data": as_rows(pictures())}
    found = python_release.read(pickle2(batch), IMAGES, cifar.RELEASES["cifar100"])
    assert found.shape == (IMAGES, 3074)
    assert found[:, :2].tolist() == [[1, 40], [2, 50], [3, 99]]
    assert np.array_equal(found[:, 2:], as_rows(pictures()))


def test_torchvision_reads_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision for another torch
        pytest.skip(f"needs torchvision ({error})")
    place_folder(tmp_path)
    meta = pickle2({b"label_names": [name.encode() for name in cifar.CIFAR10.classes]})
    (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    download(tmp_path, [], small_release())
    found = cifar.read(tmp_path, small_release())
    for train, split in ((True, found.train), (False, found.test)):
        theirs = CIFAR10(str(tmp_path), train=train)
        assert np.array_equal(theirs.data, split.images) and theirs.targets == split.labels.tolist()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({b"labels": [1, 2]}, "labels: expected a list of 3"),
        ({b"labels": b"123"}, "labels: expected a list"),
        ({b"labels": [1, 2, 256]}, "labels: expected numbers from 0 to 255"),
        ({b"labels": [1, 2, True]}, "labels: expected numbers"),
        ({b"labels": [1, 2, 1 << 40]}, "labels: expected numbers"),
        ({b"data": as_rows(pictures())[:2]}, r"data: expected an array of bytes of shape \(3, 3072\)"),
        ({b"data": as_rows(pictures()).astype(np.int16)}, "data: expected an array of bytes"),
        ({b"data": as_rows(pictures()).astype("M8[s]")}, "expected an array of bytes"),
        ({b"data": b"pixels"}, "data: expected an array"),
        ({b"data": as_rows(pictures()).astype(float)}, "data: expected an array of bytes"),
        ({b"more": 1.5}, "instruction BINFLOAT"),
        ({b"more": {1, 2}}, r"asks for '__builtin__ set'"),
    ],
)
def test_another_batch_is_refused(change: dict[bytes, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read({**good(), **change})


class Evil:
    def __init__(self, call: object, *arguments: object) -> None:
        self.reduced = (call, arguments)

    def __reduce__(self) -> object:
        return self.reduced


ARRAY = "cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01bt"
DTYPE = "cnumpy\ndtype\n(U\x02u1K\x00K\x01tR"


@pytest.mark.parametrize(
    "content",
    [
        pickle2(Evil(os.system, "touch HERE")),
        pickle2({b"labels": Evil(eval, "open('HERE', 'w')"), b"data": Evil(os.mkdir, "HERE")}),
        pickle.dumps(Evil(os.mkdir, "HERE"), protocol=0),
        pickle.dumps(Evil(os.mkdir, "HERE"), protocol=4),
        b"cnumpy.core.multiarray\n_reconstruct\n.",
        b"cfasttrain.data.sources.python_release\nread\n)R.",
        b"cnumpy.core\nmultiarray._reconstruct\n)R.",
        b"\x80\x02\x82\x01.",  # a class from copyreg's table
        b"\x80\x02Pname\n.",  # a persistent object
        b"\x80\x02" + b"K\x01r\xff\xff\xff\xff.",  # a table of 4 billion places
        b"\x80\x02T\xff\xff\xff\x7fabc.",  # a string of 2 GiB
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # a bytearray of 1 TiB
        b"\x80\x02]q\x00" + b"h\x00a" * 3 + b".",  # a list that holds itself
        b"\x80\x02}q\x00(U\x06labelsh\x00U\x04datah\x00u.",
        b"\x80\x02" + f"{ARRAY}R}}U\x01aK\x01sb.".encode("latin1"),
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n}U\x01aK\x01sb.",
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"]" + b"]" * 100_000 + b"a" * 100_000 + b".",
        b"",
        b".",
        b"\x80\x02}" + b".",
        pickle2(good())[:-100],
        b"<html>",
        b"S" + b"x" * 10_000 + b"\n.",
        b"I" + b"9" * 10_000 + b"\n.",
        bytes(10_000),
    ],
)
def test_a_hostile_pickle_is_refused_and_does_nothing(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        python_release.read(content, IMAGES, ONE)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
    assert list(tmp_path.iterdir()) == []
    assert read(good()).shape == (IMAGES, 3073)  # nothing stays behind from the bad one


@pytest.mark.parametrize(
    "state",
    [
        f"(K\x01K\x03M\x00\x0c\x86{DTYPE}\x89U\x04abcdt",
        f"(K\x01(K\x03M\x00\x0ct{DTYPE}\x89Nt",
        "(K\x01K\x03M\x00\x0c\x86N\x89U\x04abcdt",
        "K\x01",
        "(t",
    ],
)
def test_an_array_with_another_state_reaches_no_numpy(state: str) -> None:
    program = f"\x80\x02}}(U\x06labels](K\x01K\x02K\x03eU\x04data{ARRAY}R{state}bu."
    with pytest.raises(ValueError, match="data: expected"):
        python_release.read(program.encode("latin1"), IMAGES, ONE)


def place_folder(root: Path) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, content in small_files().items():
        (folder / name.removesuffix(".bin")).write_bytes(pickle_of(content))
    return folder


def placed(root: Path, form: str) -> None:
    """Put a form of the small release into the data folder, as by hand."""
    files = small_files()
    pickles = {
        f"cifar-10-batches-py/{name.removesuffix('.bin')}": pickle_of(content)
        for name, content in files.items()
    }
    root.mkdir(exist_ok=True)
    if form == "folder":
        place_folder(root)
    elif form == "python":
        (root / "cifar-10-python.tar.gz").write_bytes(tar_gz(pickles))
    else:
        binaries = {f"cifar-10-batches-bin/{name}": content for name, content in files.items()}
        (root / "cifar-10-binary.tar.gz").write_bytes(tar_gz(binaries))


@pytest.mark.parametrize("form", ["folder", "python", "binary"])
def test_what_was_placed_by_hand_is_converted_once(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    placed(tmp_path, form)
    before = sorted(tmp_path.iterdir())
    for _ in range(2):
        download(tmp_path, ["http://127.0.0.1:1/never-asked"], small_release())
    assert capsys.readouterr().err == f"CIFAR-10: taken from {before[0]}\n"
    folder = tmp_path / "cifar-10-batches-bin"
    assert sorted(tmp_path.iterdir()) == sorted([*before, folder])
    assert {name: (folder / name).read_bytes() for name in small_files()} == small_files()
    assert (folder / "batches.meta.txt").read_text().split() == [*cifar.CIFAR10.classes]
    assert cifar.read(tmp_path, small_release()).name == "CIFAR-10"


def test_the_folder_of_pickles_may_be_the_data_folder_itself(tmp_path: Path) -> None:
    folder = place_folder(tmp_path)
    download(folder, [], small_release())
    assert cifar.read(folder, small_release()).name == "CIFAR-10"


def test_other_pixels_placed_by_hand_are_unverified(tmp_path: Path) -> None:
    folder = place_folder(tmp_path)
    (folder / "test_batch").write_bytes(pickle_of(records(4, seed=99)))
    download(tmp_path, [], small_release())
    assert cifar.read(tmp_path, small_release()).name == "CIFAR-10 (unverified)"


def test_damage_in_what_was_placed_by_hand_is_told(tmp_path: Path) -> None:
    folder = place_folder(tmp_path)
    (folder / "data_batch_3").write_bytes(pickle2(Evil(os.mkdir, "HERE")))
    with pytest.raises(UserError, match=r"data_batch_3: .*a pickle that asks for .*; put a good copy"):
        download(tmp_path, [], small_release())
    (folder / "data_batch_3").write_bytes(bytes(2 << 20))
    with pytest.raises(UserError, match=r"data_batch_3 has 2097152 bytes, expected at most"):
        download(tmp_path, [], small_release())
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match=r"batches-py: lacks data_batch_3\.bin;"):
        download(tmp_path, [], small_release())
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("keep", [0, 5, 3000, -1000])
def test_a_truncated_archive_placed_by_hand_is_told(tmp_path: Path, keep: int) -> None:
    placed(tmp_path, "python")
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{path}: (not a complete tar\.gz|lacks).*; put a good copy there"):
        download(tmp_path, [], small_release())
    assert list(tmp_path.iterdir()) == [path]


def bomb(size: int) -> bytes:
    """A tar file whose first member claims, and has, so many zeros as its extended header."""
    import gzip
    import tarfile

    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, size
    return gzip.compress(header.tobuf() + bytes(size))


def test_a_small_archive_cannot_fill_the_memory(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(bomb(64 << 20))
    tracemalloc.start()
    with pytest.raises(UserError, match="larger than the release"):
        download(tmp_path, [], small_release())
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_pickle_cannot_fill_the_memory() -> None:
    import tracemalloc

    tracemalloc.start()
    for content in (b"\x80\x02K\x01r\xff\xff\xff\x0f.", b"\x80\x05\x96" + struct.pack("<Q", 1 << 30) + b"."):
        with pytest.raises(ValueError):
            python_release.read(content, IMAGES, ONE)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_writer_of_these_tests_writes_what_pickle_reads() -> None:
    assert pickle.load(io.BytesIO(pickle2({b"x": [b"y" * 300]})), encoding="bytes") == {b"x": [b"y" * 300]}
