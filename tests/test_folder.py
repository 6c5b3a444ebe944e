"""A user's own images: what is read, how it is split, and what is refused."""

import json
import os
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.cli import main
from fasttrain.data.dataset import Dataset, channel_statistics
from fasttrain.data.load_dataset import load_dataset
from fasttrain.data.sources import folder, own_images
from fasttrain.errors import UserError
from fasttrain.recipe import load_recipe
from fasttrain.tools.predict import read_image


def noise(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def write_class(path: Path, count: int, suffix: str = "png", seed: int = 0) -> Path:
    path.mkdir(parents=True)
    for index in range(count):
        noise(seed + index).save(path / f"{index:03}.{suffix}")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of ten images each, to be split."""
    root = tmp_path / "pets"
    write_class(root / "dog", 10)
    write_class(root / "cat", 10, seed=100)
    return root


def read(root: Path, **settings) -> Dataset:
    defaults = {"resolution": 32, "log": pytest.fail}
    return folder.read(root, root.parent / "cache", **defaults | settings)


def refused(root: Path, text: str) -> str:
    with pytest.raises(UserError, match=text) as refusal:
        read(root)
    message = str(refusal.value)
    assert "\n" not in message and str(root) in message
    return message


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def holds(images: np.ndarray, image_HWC: np.ndarray) -> bool:
    return bool((images == image_HWC).all((1, 2, 3)).any())


def test_a_flat_folder_is_split_by_class_and_every_image_counts_once(root: Path) -> None:
    data = read(root)
    assert (data.name, data.classes, data.root) == ("folder:pets", ("cat", "dog"), root)
    assert data.train.images.shape == (16, 32, 32, 3) and data.train.images.dtype == np.uint8
    assert np.bincount(data.train.labels).tolist() == [8, 8]
    assert np.bincount(data.test.labels).tolist() == [2, 2]
    for label, first in ((0, 100), (1, 0)):
        for seed in range(first, first + 10):
            image_HWC = pixels(noise(seed))
            in_train, in_test = (
                holds(split.images[split.labels == label], image_HWC) for split in (data.train, data.test)
            )
            assert in_train != in_test
    assert (data.mean, data.std) == channel_statistics(data.train.images)
    assert 0 < data.train.labels[:8].sum() < 8  # mixed: the first images show more than one class


def test_the_split_depends_on_names_alone(root: Path, tmp_path: Path) -> None:
    data = read(root)
    for label, name in enumerate(("cat", "dog")):
        in_order = sorted(
            (f"{name}/{i:03}.png" for i in range(10)), key=lambda key: sha256(key.encode()).digest()
        )
        mine = data.test.images[data.test.labels == label]
        assert all(holds(mine, pixels(Image.open(root / path))) for path in in_order[:2])
    elsewhere = tmp_path / "moved"
    for name in ("cat", "dog"):
        (elsewhere / name).mkdir(parents=True)
        for path in sorted((root / name).iterdir(), reverse=True):
            (elsewhere / name / path.name).write_bytes(path.read_bytes())
    again = read(elsewhere)
    assert np.array_equal(data.test.images, again.test.images)
    assert np.array_equal(data.train.images, again.train.images)
    (root / "cat" / "new.png").write_bytes((root / "cat" / "000.png").read_bytes())
    kept = read(root).test.images
    assert sum(holds(kept, image_HWC) for image_HWC in data.test.images) >= 3  # at most a border moves


@pytest.mark.parametrize(
    ("train", "tests"),
    [
        ("train", "test"),
        ("train", "val"),
        ("Train", "VALID"),
        ("TRAINING", "Validation"),
        ("training", "Test"),
    ],
)
def test_train_and_test_folders_are_taken_as_they_are(tmp_path: Path, train: str, tests: str) -> None:
    root = tmp_path / "pets"
    write_class(root / train / "cat", 3)
    write_class(root / train / "dog", 2, seed=10)
    write_class(root / tests / "dog", 4, seed=20)
    data = read(root)
    assert data.classes == ("cat", "dog")
    assert sorted(data.train.labels.tolist()) == [0, 0, 0, 1, 1] and data.test.labels.tolist() == [1] * 4
    assert all(holds(data.test.images, pixels(noise(seed))) for seed in range(20, 24))


def test_test_goes_before_val_and_train_may_be_a_class(tmp_path: Path) -> None:
    root = tmp_path / "pets"
    for part, seed in (("train", 0), ("val", 10), ("test", 20)):
        for offset, name in enumerate(("cat", "dog")):
            write_class(root / part / name, 1, seed=seed + offset)
    said: list[str] = []
    assert holds(read(root, log=said.append).test.images, pixels(noise(20)))
    assert said == [f"--data folder:{root}: left out val: the test images are those in test"]
    root = tmp_path / "vehicles"
    write_class(root / "train", 5)
    write_class(root / "ship", 5, seed=10)
    assert read(root).classes == ("ship", "train")


def test_images_to_measure_a_network_on_need_no_training_images_and_keep_its_labels(
    tmp_path: Path, monkeypatch
) -> None:
    root, classes = tmp_path / "holiday", ["dog", "cow", "cat"]  # not in the order of their names
    write_class(root / "test" / "cat", 3)
    write_class(root / "test" / "dog", 2, seed=10)
    for gib in ("1", "1", "0"):  # decoded into the cache, read from it, and decoded without one
        monkeypatch.setenv("FASTTRAIN_CACHE_GIB", gib)
        if gib == "0":
            [cache] = (tmp_path / "cache").iterdir()
            cache.unlink()
        data = read(root, classes=classes)
        assert data.classes == ("dog", "cow", "cat") and data.train.images.shape == (0, 32, 32, 3)
        assert sorted(data.test.labels.tolist()) == [0, 0, 2, 2, 2]
        assert all(holds(data.test.images[data.test.labels == 2], pixels(noise(seed))) for seed in range(3))
        assert (data.mean, data.std) == channel_statistics(data.test.images)
    refused(root, "1 class folders")  # to train on it is another matter
    write_class(root / "test" / "fox", 1)
    with pytest.raises(UserError, match="fox: a class that the network was not trained on; remove or move"):
        read(root, classes=classes)


def test_images_with_a_training_split_keep_the_labels_of_a_network_too(root: Path) -> None:
    split = read(root)
    data = read(root, classes=["dog", "cow", "cat"])
    assert np.array_equal(data.test.images, split.test.images)
    assert np.array_equal(data.test.labels, np.array([2, 0])[split.test.labels])


def test_all_formats_and_modes_become_rgb(root: Path) -> None:
    for suffix in ("bmp", "webp", "jpg", "JPEG"):
        noise(200).save(root / "cat" / f"x.{suffix}", quality=95)
    noise(201).save(root / "cat" / "no-suffix", format="PNG")
    for mode in ("L", "RGBA", "P", "1", "LA"):
        noise(202).convert(mode).save(root / "dog" / f"{mode}.png")
    noise(203).convert("CMYK").save(root / "dog" / "cmyk.jpg")
    for suffix in ("gif", "tif"):
        noise(204).convert("P").save(root / "dog" / f"x.{suffix}")
    data = read(root)
    assert len(data.train.labels) + len(data.test.labels) == 33
    images = np.concatenate([data.train.images, data.test.images])
    assert holds(images, pixels(noise(200)))  # BMP keeps every pixel
    assert holds(images, pixels(noise(202).convert("L")))
    assert (images == pixels(noise(204).convert("P"))).all((1, 2, 3)).sum() == 2


def test_files_that_are_no_images_are_left_out_with_their_number_and_the_cache_is_kept(root: Path) -> None:
    whole = read(root)
    for name in ("a.txt", "b.TXT", "labels.json", "Thumbs.db", ".DS_Store", "._000.png", "LICENSE"):
        (root / "cat" / name).write_bytes(b"no image")
    (root / "cat" / "pipe.txt").symlink_to("nowhere")
    for name in ("__MACOSX", ".ipynb_checkpoints"):
        write_class(root / "dog" / name, 1)
        write_class(root / name, 1)
    (root / "classes.txt").write_text("cat dog")
    noise(1).save(root / "loose.jpg")
    cache = root.parent / "cache"
    [before] = (path.stat() for path in cache.iterdir())
    said: list[str] = []
    data = read(root, log=said.append)
    assert np.array_equal(data.train.images, whole.train.images)
    assert np.array_equal(data.test.labels, whole.test.labels)
    assert said == [
        f"--data folder:{root}: left out 12 other files: 4 .txt, 4 hidden, "
        "1 .jpg outside the class folders, 1 without an ending, 1 .db, ..."
    ]
    [after] = (path.stat() for path in cache.iterdir())
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)  # and not decoded again
    for path in (root / "cat").iterdir():
        if path.suffix != ".png" or path.name[0] == ".":
            path.unlink()
    read(root, log=said.append)
    assert "left out 4 other files: 2 hidden, 1 .txt, 1 .jpg outside the class folders" in said[1]


def test_splits_whose_names_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    for first, second in (("train", "Train"), ("train", "training"), ("Test", "test")):
        root = tmp_path / f"{first}-{second}"
        for part in {"train", first, second}:
            write_class(root / part / "cat", 1)
        if root.joinpath(first).samefile(root / second):
            pytest.skip("the disk does not tell upper from lower case")
        if "est" not in first:
            write_class(root / "val" / "cat", 1)
        refused(root, "has both [tT]\\w+ and [tT]\\w+; keep one of them")


def test_images_are_cropped_to_the_centre_and_shrunk_without_aliasing(tmp_path: Path) -> None:
    wide = np.zeros((320, 960, 3), np.uint8)
    wide[:, 320:640] = np.indices((320, 320)).sum(0)[..., None] % 2 * 255  # a checkerboard: mean grey
    wide[:, 640:] = (255, 0, 0)
    for suffix in ("png", "jpg"):
        root = tmp_path / suffix
        for name in ("a", "b"):
            write_class(root / name, 1)
            Image.fromarray(wide).save(root / name / f"wide.{suffix}")
        data = read(root)
        images = np.concatenate([data.train.images, data.test.images]).astype(int)
        grey = [image for image in images if image.std() < 20]
        assert len(grey) == 2 and abs(np.mean(grey) - 127.5) < 3
        assert abs(grey[0][:, 2:-2] - 127.5).max() < 6  # no red, no black: the centre alone


def test_a_large_jpeg_keeps_its_detail_though_it_is_decoded_smaller(root: Path) -> None:
    large = noise(250, 64, 64).resize((192, 192), Image.Resampling.NEAREST)
    large.save(root / "cat" / "large.jpg", quality=95)
    data = read(root)
    images = np.concatenate([data.train.images, data.test.images]).astype(int)
    expected = pixels(large.resize((32, 32), Image.Resampling.BICUBIC))
    assert min(abs(image - expected).mean() for image in images) < 4


def test_a_photograph_is_turned_as_its_camera_was(root: Path) -> None:
    image = noise(300)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise
    image.save(root / "cat" / "turned.png", exif=exif)
    data = read(root)
    images = np.concatenate([data.train.images, data.test.images])
    assert holds(images, pixels(image.transpose(Image.Transpose.ROTATE_270)))


def test_training_and_predicting_see_the_same_pixels(root: Path) -> None:
    data = read(root)
    images = np.concatenate([data.train.images, data.test.images])
    for path in sorted((root / "cat").iterdir()):
        assert holds(images, read_image(path, 32))


def damage(root: Path) -> dict[str, str]:
    """Put one of each kind of bad file into cat; returns what a refusal should say of each."""
    cat = root / "cat"
    noise(1, 200, 200).save(cat / "cut.jpg")
    (cat / "cut.jpg").write_bytes((cat / "cut.jpg").read_bytes()[:5000])
    (cat / "cut.png").write_bytes((cat / "000.png").read_bytes()[:1000])
    (cat / "empty.jpg").touch()
    (cat / "text.jpg").write_text("no image")
    Image.new("1", (20_000, 10_000)).save(cat / "bomb.png")
    Image.new("1", (10_000, 8_000)).save(cat / "big.png")
    (cat / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    Image.fromarray(np.zeros((32, 32), np.float32)).save(cat / "depth.tiff")
    (cat / "inner").mkdir()
    (cat / "loop.png").symlink_to(cat / "loop.png")
    (cat / "gone.png").symlink_to(cat / "nothing.png")
    noise(1).save(root.parent / "outside.png")
    (cat / "out.png").symlink_to(root.parent / "outside.png")
    os.mkfifo(cat / "pipe.png")
    return {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "empty.jpg": "empty",
        "text.jpg": "not a JPEG, PNG, BMP, WebP, GIF or TIFF that can be read",
        "bomb.png": "exceeds limit",
        "big.png": "10000x8000 pixels, over the limit of 67,108,864",
        "phone.HEIC": "HEIC is not read; convert it to JPEG or PNG",
        "depth.tiff": "signed or 32-bit pixels, of no known range; convert it to 8 or 16 bits",
        "inner": "a folder inside a class",
        "loop.png": "symbolic link",
        "gone.png": "No such file",
        "out.png": "leads out of the folder",
        "pipe.png": "not a regular file",
    }


def test_every_bad_file_is_named_with_what_is_wrong(root: Path, monkeypatch) -> None:
    reasons = damage(root)
    monkeypatch.setattr(own_images, "NAMED", 100)
    message = refused(root, f"13 of {20 + len(reasons)} files cannot be used: .*--skip-bad")
    found = dict(
        part.split("cat/")[1].rstrip(")").split(" (", 1) for part in message.split("used: ")[1].split("), ")
    )
    assert set(found) == set(reasons)
    for name, reason in reasons.items():
        assert reason in found[name]
    assert not list((root.parent / "cache").iterdir())


def test_a_refusal_names_the_first_few(root: Path) -> None:
    for index in range(9):
        (root / "dog" / f"bad{index}.png").touch()
    message = refused(root, r"9 of 29 files .*dog/bad0.png \(empty\), .*bad2.png \(empty\), \.\.\.;")
    assert "bad3" not in message


def test_bad_files_are_left_out_on_request_and_never_cached(root: Path) -> None:
    whole = read(root)
    [cache] = (root.parent / "cache").iterdir()
    before = cache.read_bytes()
    damage(root)
    said: list[str] = []
    for _ in range(2):
        data = read(root, skip_bad=True, log=said.append)
        assert np.array_equal(data.train.images, whole.train.images)
        assert np.array_equal(data.test.labels, whole.test.labels)
    assert len(said) == 2 and all("left out 13 of 33 files: cat/" in line for line in said)
    with pytest.raises(UserError, match="13 of 33"):
        read(root)
    assert before == cache.read_bytes()


def test_a_link_within_the_folder_is_followed(root: Path) -> None:
    noise(400).save(root / "cat" / "real.png")
    (root / "dog" / "link.png").symlink_to(root / "cat" / "real.png")
    data = read(root)
    assert len(data.train.labels) + len(data.test.labels) == 22


def test_folders_of_another_layout_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such folder; expected folder:PATH")
    root = tmp_path / "one"
    write_class(root / "cat", 3)
    refused(root, "1 class folders .* with 2 to 1000")
    write_class(root / "dog", 1)
    refused(root, "the class dog has 1 usable images; expected at least two")
    (root / "dog" / "000.png").unlink()
    refused(root, "the class dog has 0 usable images")
    root = tmp_path / "train-alone"
    write_class(root / "train" / "cat", 2)
    write_class(root / "train" / "dog", 2)
    refused(root, "has train, but none of test, val, valid, validation next to it")
    (root / "val").mkdir()
    refused(root, "no usable test images")
    write_class(root / "val" / "mouse", 2)
    refused(root, "mouse: a class without training images")
    (root / "val" / "mouse").rename(root / "val" / "cat")
    (root / "train" / "dog" / "000.png").unlink()
    (root / "train" / "dog" / "001.png").unlink()
    refused(root, "the class dog has 0 usable images; expected at least one to train on")
    root = tmp_path / "many"
    for index in range(1001):
        (root / str(index)).mkdir(parents=True)
    refused(root, "1001 class folders")


def test_folders_that_are_links_must_stay_inside(root: Path) -> None:
    write_class(root.parent / "mice", 2)
    (root / "mouse").symlink_to(root.parent / "mice")
    refused(root, "mouse: a link that leads out")
    (root / "mouse").unlink()
    (root / "mouse").symlink_to(root / "mouse")
    refused(root, "mouse: cannot be read")


def test_a_colour_that_never_changes_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "flat"
    for name in ("a", "b"):
        write_class(root / name, 0)
        for index in range(3):
            Image.new("RGB", (32, 32), (index * 50, 7, index)).save(root / name / f"{index}.png")
    with pytest.raises(UserError, match="a colour channel is the same"):
        read(root)


def test_pixels_are_cached_until_a_file_changes(root: Path, monkeypatch) -> None:
    first = read(root)
    [cache] = (root.parent / "cache").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(own_images, "_decode", lambda *_: pytest.fail("decoded again"))
        again = read(root)
        assert np.array_equal(first.train.images, again.train.images)
        assert np.array_equal(first.test.labels, again.test.labels)
        assert (first.mean, first.std) == (again.mean, again.std)
        patch.chdir(root)
        assert np.array_equal(
            folder.read(Path(), cache.parent, resolution=32).train.images, first.train.images
        )
    before = os.stat(root / "cat" / "000.png")
    noise(999).save(root / "cat" / "000.png")
    os.utime(root / "cat" / "000.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    changed = read(root)
    assert holds(np.concatenate([changed.train.images, changed.test.images]), pixels(noise(999)))
    (root / "dog" / "000.png").rename(root / "dog" / "renamed.png")
    monkeypatch.setattr(own_images, "_decode", lambda *_: (_ for _ in ()).throw(UserError("decoded")))
    with pytest.raises(UserError, match="decoded"):
        read(root)
    assert list((root.parent / "cache").iterdir()) == [cache]


@pytest.mark.parametrize(
    ("harm", "place"),
    [
        (lambda content: content[:2000], 0),
        (lambda content: b"", 0),
        (None, 20 * 3072 // 2),  # one bit of one pixel
        (None, 20 * 3072 + 40),  # of the mean
        (None, -1),  # of the checksum
    ],
)
def test_a_damaged_cache_is_made_anew(root: Path, harm, place: int) -> None:
    first = read(root)
    [cache] = (root.parent / "cache").iterdir()
    expected, whole = first.train.images.copy(), cache.read_bytes()
    del first  # it maps the file
    content = bytearray(whole)
    content[place] ^= 1
    cache.write_bytes(content if harm is None else harm(whole))
    assert np.array_equal(read(root).train.images, expected)
    assert cache.read_bytes() == whole


def test_nothing_is_cached_that_is_too_large_or_has_no_place(root: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("FASTTRAIN_CACHE_GIB", "0.00001")
        assert read(root).train.images.flags.writeable  # in memory, not mapped
        assert not (root.parent / "cache").exists()
        patch.setattr(os, "sysconf", lambda _: 200)  # 40,000 bytes of memory
        refused(root, r"decoded images, 0.0 GiB, would fill the memory; FASTTRAIN_CACHE_GIB=1 keeps them")
        patch.setenv("FASTTRAIN_CACHE_GIB", "much")
        with pytest.raises(UserError, match="FASTTRAIN_CACHE_GIB=much: expected how many GiB"):
            read(root)
    (root.parent / "cache").touch()
    assert len(read(root).train.labels) == 16


def test_a_choice_that_is_none_is_refused_in_one_line(tmp_path: Path, capsys) -> None:
    for verb in ("train", "find-lr", "data", "profile"):
        for choice in ("cifar", "folder:", "webdataset"):
            assert main([verb, "--data", choice, "--device", "cpu"][: 3 if verb == "data" else 5]) == 2
            error = capsys.readouterr().err
            assert f"--data {choice}: expected auto, cifar10, cifar100, synthetic, folder:PATH, or" in error
    with pytest.raises(UserError, match="--skip-bad: only"):
        load_dataset("synthetic", tmp_path, log=pytest.fail, skip_bad=True)


def test_the_commands_take_a_folder_from_data_to_report(root: Path, tmp_path: Path, capsys) -> None:
    (root / "dog" / "bad.jpg").touch()
    images = ["--data", f"folder:{root}", "--data-dir", str(tmp_path / "data")]
    assert main(["data", *images]) == 2
    images.append("--skip-bad")
    assert main(["data", *images]) == 0
    said = capsys.readouterr().out
    assert "folder:pets in" in said and "left out 1 of 21" in said and "cat" in said
    out = ["--out", str(tmp_path / "runs"), "--device", "cpu", "--width", "8"]
    assert main(["train", *images, *out, "--epochs", "1", "--batch-size", "17"]) == 2
    assert "folder:pets has 16 training images" in capsys.readouterr().err
    assert main(["train", *images, *out, "--epochs", "1"]) == 0
    assert "--batch-size 8 instead of 512: folder:pets has 16 training images" in capsys.readouterr().out
    [run] = (tmp_path / "runs").iterdir()
    assert json.loads((run / "result.json").read_text())["dataset"] == "folder:pets"
    assert load_recipe(str(run / "recipe.json")).batch_size == 8
    page = (run / "report.html").read_text()
    assert main(["evaluate", str(run / "last.pt"), *images, "--device", "cpu"]) == 0
    assert "folder:pets: test accuracy" in capsys.readouterr().out
    assert main(["report", str(run), *images, "--device", "cpu"]) == 0
    assert (run / "report.html").read_text().count("<img") == page.count("<img") > 10
    assert main(["report", str(run), "--data", "synthetic"]) == 2
    write_class(tmp_path / "other" / "cat", 2)
    write_class(tmp_path / "other" / "cow", 2)
    assert main(["evaluate", str(run / "last.pt"), "--data", f"folder:{tmp_path / 'other'}"]) == 2
    assert "cow: a class that the network was not trained on" in capsys.readouterr().err
