"""One image file as the network takes it: training on a folder and predicting see the same pixels."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")


PIXELS_MAX = 1 << 26
"""Of one image, 67 million: a small file may claim enough pixels to fill the memory."""


def decode(source: Path | BinaryIO, side: int) -> np.ndarray:
    """(side, side, 3) uint8, red, green, blue.

    The image is turned as its EXIF tag says, made RGB (transparency is dropped; of an animation the first
    picture counts), cropped to its central square and scaled by Pillow's antialiased bicubic filter; one of
    just these pixels stays exactly as it is.
    Pillow may warn of odd metadata: callers silence that, since threads share the filters of warnings.
    Raises ValueError, which says what is wrong, for anything but a whole JPEG, PNG, BMP or WebP.
    """
    try:
        if isinstance(source, Path) and not source.is_file():  # a pipe would wait for ever
            raise ValueError("no plain file")
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > PIXELS_MAX:
                raise ValueError(f"{image.width}x{image.height} pixels, over the limit of {PIXELS_MAX:,}")
            size = (side, side)
            image.draft(None, (2 * side, 2 * side))  # a JPEG four times too large is decoded smaller
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8, not scale them
                rgb = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            else:
                rgb = image if image.mode == "RGB" else image.convert("RGB")
            if rgb.size != size:
                rgb = ImageOps.fit(rgb, size, Image.Resampling.BICUBIC)
            return np.asarray(rgb)
    except (ValueError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ValueError("no JPEG, PNG, BMP or WebP") from error
    except Exception as error:  # a damaged file fails anywhere in Pillow's decoders
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(reason) from error
