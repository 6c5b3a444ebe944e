"""Decoding of one image file: training on a folder and `fasttrain predict` see the same pixels."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")

PIXELS_MAX = 1 << 26
"""The most pixels in one image, 67 million: a small file can claim enough of them to fill the memory."""


def decode(source: Path | BinaryIO, resolution: int) -> np.ndarray:
    """Decode an image to (resolution, resolution, 3) uint8, red, green, blue.

    The image is rotated as its EXIF tag says, converted to RGB (transparency is dropped; the first frame of
    an animation is used), cropped to its central square and scaled by Pillow's antialiased bicubic filter. An
    image that has this resolution already is not resampled.
    Pillow may warn about odd metadata; silencing that is up to the caller, since threads share warning
    filters.
    Raises ValueError, saying what is wrong, for anything but a complete JPEG, PNG, BMP or WebP.
    """
    try:
        if isinstance(source, Path) and not source.is_file():  # a pipe would block forever
            raise ValueError("not a regular file")
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > PIXELS_MAX:
                raise ValueError(f"{image.width}x{image.height} pixels, over the limit of {PIXELS_MAX:,}")
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
        raise ValueError("not a JPEG, PNG, BMP or WebP") from error
    except Exception as error:  # a corrupt file fails anywhere in Pillow's decoders
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(reason) from error
