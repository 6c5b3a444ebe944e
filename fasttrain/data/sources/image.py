"""Decoding of one image file: training on own images and `fasttrain predict` see the same pixels."""

from contextlib import suppress
from pathlib import Path, PurePath
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
"""The names' endings, in lower case, that promise one of these formats; the content decides."""

UNREAD_SUFFIXES = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".psd", ".ico", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".exr", ".hdr", ".dng", ".cr2", ".nef", ".arw"),
)
"""The names' endings that promise an image in another format."""

PIXELS_MAX = 1 << 26
"""The most pixels in one image, 67 million: a small file can claim enough of them to fill the memory."""


def decode(source: Path | BinaryIO, resolution: int, *, name: str = "") -> np.ndarray:
    """Decode an image to (resolution, resolution, 3) uint8, red, green, blue.

    The image is rotated as its EXIF tag says, converted to RGB (transparency is dropped; the first frame of
    an animation and the first page of a TIFF are used), cropped to its central square and scaled by Pillow's
    antialiased bicubic filter. An image that has this resolution already is not resampled.
    name: the file's, from which an error tells the format.
    Pillow may warn about odd metadata; silencing that is up to the caller, since threads share warning
    filters.
    Raises ValueError, saying what is wrong, for anything but a complete image in one of FORMATS, and for
    signed or 32-bit pixels, which have no known range.
    """
    try:
        if isinstance(source, Path) and not source.is_file():  # a pipe would block forever
            raise ValueError("not a regular file")
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > PIXELS_MAX:
                raise ValueError(f"{image.width}x{image.height} pixels, over the limit of {PIXELS_MAX:,}")
            if image.mode in ("I", "F"):
                raise ValueError("signed or 32-bit pixels, of no known range; convert it to 8 or 16 bits")
            size = (resolution, resolution)
            # A JPEG four times too large is decoded at a smaller scale.
            image.draft(None, (2 * resolution, 2 * resolution))
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling
                rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            else:
                rgb = image if image.mode == "RGB" else image.convert("RGB")
            if rgb.size != size:
                rgb = ImageOps.fit(rgb, size, Image.Resampling.BICUBIC)
            return np.asarray(rgb)
    except (ValueError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ValueError(_unread(name)) from error
    except Exception as error:  # a corrupt file fails anywhere in Pillow's decoders
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(reason) from error


def is_image(path: Path) -> bool:
    """Return whether a file begins as an image in one of FORMATS; it may still be damaged."""
    with suppress(Exception), Image.open(path, formats=FORMATS):  # anything may fail on foreign bytes
        return True
    return False


def _unread(name: str) -> str:
    suffix = PurePath(name).suffix.lower()
    if suffix in UNREAD_SUFFIXES:
        return f"{suffix[1:].upper()} is not read; convert it to JPEG or PNG"
    return "not a JPEG, PNG, BMP, WebP, GIF or TIFF that can be read"
