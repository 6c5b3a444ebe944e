"""What a checkpoint says about images from anywhere, and what it says about files that are none."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fasttrain.checkpoint.file import load_checkpoint, save_checkpoint
from fasttrain.cli import main
from fasttrain.data.sources import image as image_module
from fasttrain.errors import UserError
from fasttrain.model import CustomResNet
from fasttrain.recipe import Recipe
from fasttrain.tools.predict import find_images, predict, read_image
from tests.helpers import checkpoint_of, experienced_network

CLASSES = [f"class {label}" for label in range(5)]
RECIPE = Recipe(width=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = experienced_network(RECIPE, len(CLASSES), mean=(0.1, 0.5, 0.9))
    path = tmp_path_factory.mktemp("run") / "last.pt"
    save_checkpoint(path, checkpoint_of(model, RECIPE, CLASSES))
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three sound images, one of them nested, and a file that is none of ours."""
    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    for name in ("b.png", "a/c.WEBP", "c.bmp"):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(tmp_path / name, lossless=True)
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_probabilities_are_those_of_the_network_in_evaluation_mode(checkpoint: Path, images: Path) -> None:
    found = predict(checkpoint, [images], top_k=2, device="cpu", batch_size=2)
    assert [one.path.relative_to(images).as_posix() for one in found] == ["a/c.WEBP", "b.png", "c.bmp"]
    state = load_checkpoint(checkpoint)
    model = CustomResNet(len(CLASSES), width=8).eval()
    model.load_state_dict(state["model"])
    for one in found:
        pixels_CHW = torch.from_numpy(np.array(Image.open(one.path))).permute(2, 0, 1)
        with torch.inference_mode():
            expected = model(pixels_CHW[None]).softmax(1)[0].topk(2)
        assert [name for name, _ in one.classes] == [CLASSES[label] for label in expected.indices]
        assert [share for _, share in one.classes] == pytest.approx(expected.values.tolist(), rel=1e-4)


def test_a_folder_is_walked_in_order_and_a_loop_of_links_ends(images: Path) -> None:
    (images / "a" / "loop").symlink_to(images)
    names = [path.relative_to(images).as_posix() for path in find_images([images])]
    assert names == ["a/c.WEBP", "b.png", "c.bmp"]
    assert find_images([images / "c.bmp", images / "a"]) == [images / "c.bmp", images / "a" / "c.WEBP"]


def test_decoding_turns_scales_and_drops_transparency(tmp_path: Path) -> None:
    white_below = np.zeros((64, 64, 3), np.uint8)
    white_below[32:] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(white_below).save(tmp_path / "turned.png", exif=exif)
    turned = read_image(tmp_path / "turned.png", 32)
    assert turned.shape == (32, 32, 3) and turned.dtype == np.uint8
    assert turned[:13].min() > 240 and turned[19:].max() < 15

    Image.fromarray(np.full((8, 8), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png", 32) == 128).all()
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png", 32) == (10, 20, 30)).all()


def test_the_first_frame_and_the_first_page_count(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")]
    for name in ("moving.gif", "pages.tif", "pages.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert (read_image(tmp_path / name, 32) == (255, 0, 0)).all()
    assert find_images([tmp_path]) == sorted(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["<u2", ">u2"])
def test_a_tiff_of_16_bits_is_scaled_to_8(tmp_path: Path, kind: str) -> None:
    Image.fromarray(np.full((8, 8), 0x8000, kind)).save(tmp_path / "deep.tif")
    assert (read_image(tmp_path / "deep.tif", 32) == 128).all()


def test_downscaling_weighs_every_pixel(tmp_path: Path) -> None:
    """Stripes finer than the result's pixels become grey; a filter that skips pixels would leave them."""
    stripes = np.zeros((256, 256, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    assert abs(read_image(tmp_path / "stripes.png", 32)[:, 4:-4].astype(int) - 128).max() < 10


def truncated(path: Path) -> None:
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(whole, "JPEG")
    path.write_bytes(whole.getvalue()[:-200])


BAD = {
    "truncated": truncated,
    "text": lambda path: path.write_text("no image"),
    "empty": lambda path: path.touch(),
    "icon": lambda path: Image.new("L", (16, 16)).save(path, "ICO"),
    "dangling": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_named_or_skipped(kind: str, checkpoint: Path, images: Path, capsys) -> None:
    bad = images / "bad.jpg"
    BAD[kind](bad)
    command = ["predict", str(checkpoint), str(images), "--device", "cpu", "--format", "csv"]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{bad}: cannot be decoded" in err

    assert main([*command, "--skip-bad"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 + 3 * 3
    assert f"{bad}: cannot be decoded" in err and "files skipped: 1" in err
    assert main([*command[:2], str(bad), "--skip-bad"]) == 2
    assert f"{bad}: " in capsys.readouterr().err


def test_a_decompression_bomb_is_refused_with_the_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(image_module, "PIXELS_MAX", 16 * 16 - 1)
    for name in ("bomb.png", "bomb.gif", "bomb.tif"):
        Image.new("L", (16, 16)).save(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: .*16x16 pixels, over the limit of 255"):
            read_image(tmp_path / name, 32)


def test_a_gif_whose_frame_outgrows_its_screen_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    Image.new("P", (16, 16)).save(tmp_path / "bomb.gif")
    content = bytearray((tmp_path / "bomb.gif").read_bytes())
    place = content.index(b",\0\0\0\0") + 5  # the frame's width and height
    content[place : place + 4] = (9000).to_bytes(2, "little") * 2
    (tmp_path / "bomb.gif").write_bytes(content)
    with pytest.raises(UserError, match=r"9000x9000 pixels, over the limit of 67,108,864"):
        read_image(tmp_path / "bomb.gif", 32)


def test_what_cannot_be_asked_is_one_line(checkpoint: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        find_images([tmp_path / "nowhere"])
    (tmp_path / "void").mkdir()
    with pytest.raises(UserError, match="void: holds no image"):
        find_images([tmp_path / "void"])
    with pytest.raises(UserError, match="--top-k 0"):
        predict(checkpoint, [images], top_k=0)


def test_every_format_says_the_same(checkpoint: Path, images: Path, capsys) -> None:
    command = ["predict", str(checkpoint), str(images / "b.png"), "--device", "cpu", "--format"]
    assert main([*command, "json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    one = json.loads(line)
    assert one["file"] == str(images / "b.png") and len(one["predictions"]) == 3
    assert main([*command, "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["class"], float(row["probability"])) for row in rows] == [
        (guess["class"], guess["probability"]) for guess in one["predictions"]
    ]
    assert main([*command, "table"]) == 0
    table = capsys.readouterr().out
    assert all(guess["class"] in table for guess in one["predictions"])


def test_a_reader_that_leaves_early_is_no_error(checkpoint: Path, images: Path) -> None:
    command = [sys.executable, "-m", "fasttrain", "predict", str(checkpoint), str(images), "--format", "csv"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_a_checkpoint_of_before_logits_could_be_scaled_still_counts(checkpoint: Path, images: Path) -> None:
    state = load_checkpoint(checkpoint)
    del state["model"]["logit_scale"]
    save_checkpoint(images / "old.pt", state)
    ours, old = (predict(path, [images / "a"], device="cpu") for path in (checkpoint, images / "old.pt"))
    assert ours == old
