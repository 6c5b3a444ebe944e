"""What DALI may decode, and that it makes of it what Pillow makes, refusals included."""

import io
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fasttrain.data.sources import folder, jpeg, own_images
from fasttrain.data.sources.image import decode
from fasttrain.errors import UserError

needs_dali = pytest.mark.skipif(sys.platform != "linux", reason="DALI has wheels for Linux only")


def picture(seed: int, side: int = 32, mode: str = "RGB") -> Image.Image:
    """Noise, soft colours, or one colour, by the seed."""
    small = (side, 5, 1)[seed % 3]
    pixels = np.random.default_rng(seed).integers(0, 256, (small, small, 3), np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).convert(mode)


def encode(image: Image.Image, **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **settings)
    return file.getvalue()


def by_pillow(content: bytes, side: int = 32) -> np.ndarray:
    return decode(io.BytesIO(content), side)


SUBSAMPLINGS = ("4:4:4", "4:2:2", "4:2:0")


@needs_dali
@pytest.mark.parametrize("side", [16, 32, 40, 96])
def test_plain_files_become_the_very_same_pixels(side: int) -> None:
    files = [
        encode(picture(seed, side, mode), quality=quality, subsampling=subsampling, comment=b"\xff\xd9")
        for seed in range(3)
        for mode in ("RGB", "L")
        for quality in (1, 30, 75, 95, 100)
        for subsampling in SUBSAMPLINGS
    ]
    assert all(jpeg.is_plain(content, side) for content in files)
    for start in range(0, len(files), jpeg.BATCH_SIZE):
        some = files[start : start + jpeg.BATCH_SIZE]
        expected = np.stack([by_pillow(content, side) for content in some])
        assert np.array_equal(jpeg.decode_plain(some), expected)


def test_all_that_is_not_plain_is_left_to_pillow() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encode(picture(0))
    assert jpeg.is_plain(plain, 32)
    assert not jpeg.is_plain(plain, 40)
    png = io.BytesIO()
    picture(0).save(png, "PNG")
    for content in (
        png.getvalue(),
        b"",
        encode(picture(0), exif=exif),
        encode(picture(0), icc_profile=b"profile"),
        encode(picture(0), progressive=True),
        encode(picture(0), restart_marker_blocks=1),
        encode(picture(0).resize((32, 40))),
        encode(picture(0).resize((40, 32))),
        encode(picture(0, mode="CMYK")),
        plain + b"\0",
        plain + b"\xff\xd9",
        plain + plain,
        plain[:-1] + b"\xd0",
        plain[:-1] + b"\xfe",
        plain[:20] + b"\xff\xfe\0\0" + plain[20:],
        plain[:20] + b"\xff\xfe\xff\xff" + plain[20:],
        plain.replace(b"JFIF", b"JFXX"),
        plain[:2] + plain[20:],  # without JFIF its colours may be others
        plain[:-2] + b"\xff\xfe" + b"\0" * (1 << 20) + plain[-2:],
    ):
        assert not jpeg.is_plain(content, 32)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_file_that_ends_too_early_is_never_plain(mode: str) -> None:
    whole = encode(picture(0, mode=mode))
    scan = whole.index(b"\xff\xda") + 2
    for length in range(len(whole)):
        assert not jpeg.is_plain(whole[:length], 32)
        if length < scan:  # after it, the end marker makes a file that Pillow takes too
            assert not jpeg.is_plain(whole[:length] + b"\xff\xd9", 32)


@needs_dali
@pytest.mark.filterwarnings("ignore")
def test_of_damaged_files_dali_takes_none_that_pillow_refuses() -> None:
    """Where DALI fails Pillow decides; where it does not, Pillow must make the same of the file."""
    chance = random.Random(0)
    plain = agreed = 0
    for trial in range(1500):
        settings = {"quality": chance.choice((30, 75, 95)), "subsampling": chance.choice(SUBSAMPLINGS)}
        content = bytearray(encode(picture(trial, mode=chance.choice(("RGB", "L"))), **settings))
        scan = content.index(b"\xff\xda") + 14
        place = chance.randrange(2, chance.choice((scan, len(content) - 2)))
        piece = chance.choice((b"", b"\0", b"\xff", b"\x7f\x01", chance.randbytes(4), chance.randbytes(1)))
        content[place : place + chance.choice((0, 1, 1, 1, 20))] = piece
        if trial % 5 == 0:
            content = content[: max(place, 4)] + b"\xff\xd9"
        if not jpeg.is_plain(bytes(content), 32):
            continue
        plain += 1
        try:
            [image] = jpeg.decode_plain([bytes(content)])
        except RuntimeError:
            continue
        agreed += 1
        assert np.array_equal(image, by_pillow(bytes(content))), f"trial {trial}"
    assert plain > 500 and agreed > 400


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes of plain JPEGs, more than one batch of them, and one that is none."""
    root = tmp_path / "pets"
    for seed in range(100):
        path = root / ("cat", "dog")[seed % 2] / f"{seed:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(picture(seed), quality=75))
    picture(100, 64).save(root / "cat" / "large.jpg")
    return root


@pytest.fixture
def dali_decoded(monkeypatch) -> list[int]:
    """How many images of each batch DALI decoded."""
    counts: list[int] = []

    def counted(contents: list[bytes]) -> np.ndarray:
        images = jpeg.decode_plain(contents)
        counts.append(len(images))
        return images

    monkeypatch.setattr(own_images, "decode_plain", counted)
    return counts


def pixels(root: Path, cache: str, **settings) -> np.ndarray:
    data = folder.read(root, root.parent / cache, resolution=32, **settings)
    return np.concatenate([data.train.images, data.test.images])


def without_dali(monkeypatch) -> None:
    monkeypatch.setattr(jpeg, "_thread", type("Local", (), {})())
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)


@needs_dali
def test_a_folder_has_the_same_pixels_with_and_without_dali(root: Path, dali_decoded, monkeypatch) -> None:
    with_dali = pixels(root, "with")
    assert sum(dali_decoded) == 100
    without_dali(monkeypatch)
    assert np.array_equal(pixels(root, "without"), with_dali)
    assert sum(dali_decoded) == 100


@needs_dali
def test_bad_files_among_plain_ones_are_named_as_pillow_names_them(
    root: Path, dali_decoded, monkeypatch
) -> None:
    whole = (root / "cat" / "000.jpg").read_bytes()
    (root / "cat" / "cut.jpg").write_bytes(whole[:-40])
    huffman = whole.index(b"\xff\xc4") + 5  # how many codes there are of each length: more than can be
    broken = whole[:huffman] + b"\xff" * 8 + whole[huffman + 8 :]
    assert jpeg.is_plain(broken, 32)  # so DALI meets it, and the others of its batch with it
    (root / "dog" / "broken.jpg").write_bytes(broken)

    def refusal(cache: str) -> str:
        with pytest.raises(UserError) as caught:
            pixels(root, cache)
        return str(caught.value)

    said: list[str] = []
    message = refusal("with")
    assert "2 of 103 files" in message and "cat/cut.jpg (image file is truncated" in message
    assert "dog/broken.jpg (broken data stream" in message
    kept = pixels(root, "with", skip_bad=True, log=said.append)
    assert 0 < sum(dali_decoded) < 2 * 100  # one batch of each read fell to Pillow
    without_dali(monkeypatch)
    assert refusal("without") == message
    assert np.array_equal(pixels(root, "without", skip_bad=True, log=said.append), kept)
    assert len(said) == 2 and said[0] == said[1]
