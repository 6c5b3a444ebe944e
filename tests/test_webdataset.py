"""Shards of a user's own images: what is read, how it is split, and what is refused."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.cli import main
from fasttrain.data.dataset import Dataset
from fasttrain.data.sources import own_images, webdataset
from fasttrain.errors import UserError

Members = list[tuple[str, bytes]]


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)


def png(seed: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(noise(seed)).save(content, "PNG")
    return content.getvalue()


def samples(first: int, count: int, label) -> Members:
    return [
        member
        for seed in range(first, first + count)
        for member in ((f"{seed:04}.png", png(seed)), (f"{seed:04}.cls", str(label(seed)).encode()))
    ]


def write_shard(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pet(seed: int) -> str:
    return ("dog", "cat")[seed % 2]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two shards of ten images each, of two classes, to be split."""
    for shard in range(2):
        write_shard(tmp_path / "pets" / f"{shard:02}.tar", samples(10 * shard, 10, pet))
    return tmp_path / "pets"


def read(root: Path, pattern: str = "{00..01}.tar", **settings) -> Dataset:
    defaults = {"resolution": 32, "log": pytest.fail}
    return webdataset.read(root / pattern, root.parent / "cache", **defaults | settings)


def holds(images: np.ndarray, seed: int) -> bool:
    return bool((images == noise(seed)).all((1, 2, 3)).any())


def test_every_sample_counts_once_with_its_own_label(root: Path) -> None:
    data = read(root)
    assert (data.name, data.classes, data.root) == ("webdataset:pets", ("cat", "dog"), root)
    assert np.bincount(data.train.labels).tolist() == [8, 8]
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    for seed in range(20):
        label = data.classes.index(pet(seed))
        in_train, in_test = (
            holds(split.images[split.labels == label], seed) for split in (data.train, data.test)
        )
        assert in_train != in_test


def test_pixels_are_cached_until_a_shard_changes(root: Path, monkeypatch) -> None:
    first = read(root)
    with monkeypatch.context() as patch:
        patch.setattr(own_images, "_decode", lambda *_: pytest.fail("decoded again"))
        assert np.array_equal(read(root).train.images, first.train.images)
    write_shard(root / "01.tar", samples(50, 10, pet))
    os.utime(root / "01.tar", ns=(0, 0))
    changed = read(root)
    images = np.concatenate([changed.train.images, changed.test.images])
    assert holds(images, 50) and not holds(images, 10)


@pytest.mark.parametrize(
    "pattern",
    ["pets-{train,val}-{0..0}.tar", "{train,test}/0.tar", "{0-TRAIN,1-Valid}.tar", "{a,validation}/0.tar"],
)
def test_shards_named_test_or_val_hold_the_test_images(tmp_path: Path, pattern: str) -> None:
    # A folder above all shards that is called test means nothing.
    for index, path in enumerate(webdataset.expand(str(tmp_path / "test" / pattern), "here")):
        write_shard(Path(path), samples(10 * index, 4, pet))
    data = read(tmp_path / "test", pattern)
    assert len(data.train.labels) == len(data.test.labels) == 4
    assert all(holds(data.train.images, seed) for seed in range(4))
    assert all(holds(data.test.images, seed) for seed in range(10, 14))


def test_labels_may_be_numbers_with_or_without_names(tmp_path: Path) -> None:
    root = tmp_path / "numbers"
    write_shard(root / "0.tar", samples(0, 9, lambda seed: f"{seed % 3:02}\n"))
    assert read(root, "0.tar").classes == ("0", "1", "2")
    (root / "classes.txt").write_text("zebra\nape\ncow\n")
    data = read(root, "0.tar")
    assert data.classes == ("zebra", "ape", "cow")
    assert all(holds(data.train.images[data.train.labels == 0], s) for s in (0, 3, 6)) is False
    assert {int(label) for label in data.train.labels} == {0, 1, 2}
    write_shard(root / "0.tar", samples(0, 9, lambda seed: ("zebra", "ape", "cow")[seed % 3]))
    assert np.array_equal(read(root, "0.tar").train.labels, data.train.labels)


def damage(root: Path) -> tuple[str, dict[str, str]]:
    """Add bad shards and bad samples; returns the pattern, and what a refusal should say of each."""
    whole = samples(100, 4, pet)
    write_shard(
        root / "02.tar",
        [
            *whole,
            ("no-label.png", png(1)),
            ("text.jpg", b"no image"),
            ("text.cls", b"cat"),
            ("empty.png", b""),
            ("empty.cls", b"cat"),
            ("both.png", png(2)),
            ("both.jpg", png(2)),
            ("both.cls", b"cat"),
            ("twice.png", png(3)),
            ("twice.cls", b"cat"),
            ("twice.png", png(4)),
            ("odd.png", png(5)),
            ("odd.cls", b"\x00\xff"),
            ("long.png", png(5)),
            ("long.cls", b"cat" * 1000),
            ("alone.cls", b"cat"),
            ("notes.json", b"{}"),
            (".hidden.png", b"left alone"),
        ],
    )
    with tarfile.open(root / "02.tar", "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.FIFOTYPE, "pipe.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("folder.png"))
    content = write_shard(root / "03.tar", samples(200, 2, pet)).read_bytes()
    (root / "03.tar").write_bytes(content[: 512 + 300])  # within the first image
    content = write_shard(root / "04.tar", samples(300, 2, pet)).read_bytes()
    end = -(-len(content.rstrip(b"\0")) // 512) * 512
    (root / "04.tar").write_bytes(content[:end] + b"rubbish" * 100)  # which tarfile takes for the end
    (root / "05.tar").write_bytes(b"no tar at all" * 100)
    (root / "06.tar").touch()
    with tarfile.open(root / "07.tar", "w:gz"):
        pass
    (root / "08.tar").mkdir()
    return "{00..08}.tar", {
        "02.tar: no-label.png": "no label; expected no-label.cls next to it",
        "02.tar: text.jpg": "not a JPEG, PNG, BMP, WebP, GIF or TIFF that can be read",
        "02.tar: empty.png": "empty",
        "02.tar: both.png": "2 images with one key",
        "02.tar: twice.png": "its key occurs twice",
        "02.tar: odd.cls": "no label; expected the name or number of a class",
        "02.tar: long.cls": "no label; expected the name or number of a class",
        "02.tar: alone": "no image; expected one of jpg",
        "02.tar: link.png": "not a regular file",
        "02.tar: pipe.png": "not a regular file",
        "02.tar: folder.png": "empty",
        "03.tar: 0200.png": "truncated",
        "03.tar": "unexpected end of data",
        "04.tar": "truncated or corrupt after",
        "05.tar": "not a complete, uncompressed tar file",
        "06.tar": "empty",
        "07.tar": "uncompressed tar file",
        "08.tar": "not a regular file",
    }


def test_every_bad_shard_and_sample_is_named_with_what_is_wrong(root: Path, monkeypatch) -> None:
    pattern, reasons = damage(root)
    monkeypatch.setattr(own_images, "NAMED", 100)
    with pytest.raises(
        UserError, match=f"{len(reasons)} of [0-9]+ files cannot be used: .*--skip-bad"
    ) as refusal:
        read(root, pattern)
    message = str(refusal.value)
    assert "\n" not in message
    for name, reason in reasons.items():
        assert f"{name} (" in message and reason in message.split(f"{name} (")[1].split("), ")[0], name


def test_bad_samples_are_left_out_on_request_and_counted(root: Path) -> None:
    pattern, reasons = damage(root)
    said: list[str] = []
    data = read(root, pattern, skip_bad=True, log=said.append)
    # twice.png: the first of them is good, and counts; so do those of a shard that lost its end.
    assert len(data.train.labels) + len(data.test.labels) == 20 + 4 + 1 + 2
    images = np.concatenate([data.train.images, data.test.images])
    assert all(holds(images, seed) for seed in (*range(20), *range(100, 104), 3, 300, 301))
    [line] = said
    assert f"left out {len(reasons)} of " in line


def test_a_class_that_no_training_sample_has_is_unknown(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    write_shard(root / "train.tar", samples(0, 4, pet))
    write_shard(root / "val.tar", [*samples(10, 2, pet), *samples(20, 1, lambda _: "[cow]")])
    with pytest.raises(UserError, match=r"1 of 7 files .*val.tar: 0020.png \(unknown class \[cow\]\)"):
        read(root, "{train,val}.tar")
    (root / "classes.txt").write_text("cat\ndog\n")
    write_shard(root / "val.tar", [*samples(10, 2, pet), *samples(20, 1, lambda _: "2")])
    with pytest.raises(UserError, match="unknown class 2"):
        read(root, "{train,val}.tar")


def test_samples_to_measure_a_network_on_need_no_training_samples_and_keep_its_labels(tmp_path: Path) -> None:
    root, classes = tmp_path / "pets", ["dog", "cow", "cat"]
    write_shard(root / "test.tar", samples(0, 4, pet))
    data = read(root, "test.tar", classes=classes)
    assert data.classes == ("dog", "cow", "cat") and data.train.labels.shape == (0,)
    assert all(holds(data.test.images[data.test.labels == 0], seed) for seed in (0, 2))
    assert all(holds(data.test.images[data.test.labels == 2], seed) for seed in (1, 3))
    write_shard(root / "test.tar", samples(0, 4, lambda seed: seed % 2))
    assert sorted(read(root, "test.tar", classes=classes).test.labels.tolist()) == [0, 0, 1, 1]
    (root / "classes.txt").write_text("cat\ndog\n")  # the shards' own numbering
    data = read(root, "test.tar", classes=classes)
    assert all(holds(data.test.images[data.test.labels == 2], seed) for seed in (0, 2))
    assert all(holds(data.test.images[data.test.labels == 0], seed) for seed in (1, 3))
    write_shard(root / "test.tar", samples(0, 1, lambda _: "fox"))
    with pytest.raises(UserError, match=r"test.tar: 0000.png \(unknown class fox\)"):
        read(root, "test.tar", classes=classes)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("{00..02}.tar", "02.tar: no such shard; expected those that --data webdataset:"),
        ("{1..0}.tar", r"\{1..0\} is not understood; expected \{000..009\} or \{train,val\}"),
        ("{}.tar", r"\{\} is not understood"),
        ("{00.tar", "braces do not match"),
        ("{00,00}.tar", "names a shard twice"),
        ("{0..999999999}.tar", "names 1,000,000,000 shards"),
        ("{0..99999}{0..99999}.tar", "shards; expected at most 100,000"),
        ("val.tar", "no training samples"),
        ("one.tar", "1 classes in 3 training samples"),
        ("none.tar", "0 classes in 0 training samples; none.tar: 0000.png: no label"),
    ],
)
def test_a_pattern_that_names_no_training_set_is_one_line(root: Path, pattern: str, said: str) -> None:
    write_shard(root / "val.tar", samples(0, 4, pet))
    write_shard(root / "one.tar", samples(0, 3, lambda _: "cat"))
    write_shard(root / "none.tar", [("0000.png", png(0))])
    with pytest.raises(UserError, match=said) as refusal:
        read(root, pattern)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (".", ["b-{1}.tar", "test/c.tar", "train-0.tar", "train-1.tar"]),
        ("train-*.tar", ["train-0.tar", "train-1.tar"]),
        ("{test,.}/?.tar", "no shard is ./\\?.tar"),
        ("test,train-{0,1}.tar", ["test/c.tar", "train-0.tar", "train-1.tar"]),
        ("train-1.tar, train-0.tar", ["train-1.tar", "train-0.tar"]),
        ("x,y", ["x,y/d.tar"]),  # a folder of that name
        ("tr*-[0].tar", "no shard is"),  # a bracket is a letter like any other
        ("train-*.tar,./train-0.tar", "names a shard twice"),
        ("empty", "the folder empty holds no .tar; expected a folder or a pattern such as"),
    ],
)
def test_shards_are_named_by_folder_star_or_several_patterns(
    tmp_path: Path, pattern: str, found: list[str] | str, monkeypatch
) -> None:
    (tmp_path / "empty").mkdir()
    names = ["b-{1}.tar", "test/c.tar", "train-0.tar", "train-1.tar", "._train-2.tar", "notes.txt"]
    for name in [*names, "x,y/d.tar"] if pattern == "x,y" else names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    if isinstance(found, str):
        with pytest.raises(UserError, match=found):
            webdataset.find_shards(pattern, "here")
    else:
        assert webdataset.find_shards(pattern, "here") == found


def test_a_folder_of_shards_is_read_and_cached_under_its_own_name(root: Path, monkeypatch) -> None:
    by_pattern = read(root)
    by_folder = read(root, ".")
    assert by_folder.name == by_pattern.name == "webdataset:pets"
    assert np.array_equal(by_folder.train.images, by_pattern.train.images)
    monkeypatch.setattr(own_images, "_decode", lambda *_: pytest.fail("decoded again"))
    assert np.array_equal(read(root, ".").test.images, by_pattern.test.images)
    assert np.array_equal(read(root).test.images, by_pattern.test.images)


def test_shards_that_the_webdataset_package_wrote_are_read(tmp_path: Path) -> None:
    """It writes fractional times, which take extended headers, and labels before images."""
    package = pytest.importorskip("webdataset")
    for name, first in (("pets-train-%06d.tar", 0), ("pets-val-%06d.tar", 10)):
        with package.ShardWriter(str(tmp_path / name), maxcount=3, verbose=0) as shards:
            for seed in range(first, first + 6):
                key = f"photos/{seed}-{'long' * 40}"  # too long for a plain header
                shards.write({"__key__": key, "png": noise(seed), "cls": seed % 2, "json": {"seed": seed}})
    data = read(tmp_path, "pets-*.tar")
    assert (len(data.train.labels), len(data.test.labels)) == (6, 6) and data.classes == ("0", "1")
    for split, first in ((data.train, 0), (data.test, 10)):
        for seed in range(first, first + 6):
            assert holds(split.images[split.labels == seed % 2], seed)


def test_a_pattern_counts_with_equal_width() -> None:
    assert webdataset.expand("a-{08..10}.{x,y}", "here") == [
        f"a-{number}.{letter}" for number in ("08", "09", "10") for letter in "xy"
    ]


def test_the_commands_take_shards_of_another_resolution_from_data_to_predict(
    root: Path, tmp_path: Path, capsys
) -> None:
    images = ["--data", f"webdataset:{root}/{{00..01}}.tar", "--data-dir", str(tmp_path / "data")]
    assert main(["data", *images, "--resolution", "16"]) == 0
    assert "webdataset:pets in" in capsys.readouterr().out
    train = ["train", *images, "--out", str(tmp_path / "runs"), "--device", "cpu", "--epochs", "1"]
    assert main([*train, "--batch-size", "8", "--width", "8", "--resolution", "16"]) == 0
    [run] = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["dataset"] == "webdataset:pets" and result["recipe"]["resolution"] == 16
    assert "[1, 8, 7, 7]" in (run / "report.html").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(run / "last.pt"), *images, "--device", "cpu"]) == 0
    assert f"test accuracy {result['test_accuracy']:.2%}" in capsys.readouterr().out
    assert main(["report", str(run), *images, "--device", "cpu"]) == 0
    out = tmp_path / "model.pt2"
    assert main(["export", str(run / "last.pt"), "--format", "torch-export", "--out", str(out)]) == 0
    assert json.loads((tmp_path / "model.pt2.json").read_text())["input"]["shape"] == ["N", 3, 16, 16]
    Image.fromarray(noise(7)).resize((90, 70)).save(tmp_path / "photo.jpg")
    assert main(["predict", str(run / "last.pt"), str(tmp_path / "photo.jpg"), "--device", "cpu"]) == 0
    assert "photo.jpg" in capsys.readouterr().out
    assert main(["train", "--data", "synthetic", "--resolution", "16", "--device", "cpu"]) == 2
    assert "--resolution 16: the images of --data synthetic have 32 pixels a side" in capsys.readouterr().err
