"""Plain JPEGs of exactly the training resolution, decoded many at a time by DALI, with Pillow's pixels.

DALI decodes small images several times as fast as Pillow, but does not say which file it fails on, and may
accept files that Pillow refuses. So DALI gets only files that `is_plain` has walked through from start to
end, and if DALI fails, Pillow decides. Both use libjpeg-turbo: for a plain file they produce the same pixels.
"""

import re
import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

BATCH_SIZE = 64
"""The most files that DALI decodes at a time."""

BYTES_MAX = 1 << 20
"""The largest plain JPEG: ten times what 256x256 pixels need."""

JFIF, EOI = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"\xff\xd9"
SEGMENT = struct.Struct(">HH")
COMMENT, TABLES, HUFFMAN, FRAME, SCAN = 0xFFFE, 0xFFDB, 0xFFC4, 0xFFC0, 0xFFDA
MARKER = re.compile(rb"\xff[^\x00]")
FILES = "files"
_thread = threading.local()


def is_plain(content: bytes, resolution: int) -> bool:
    """Return whether a file is a complete baseline JFIF of (resolution, resolution) pixels, grey or colour.

    It holds comments, tables, one frame and one scan without restart markers, and ends with its last byte: no
    EXIF, no colour profile, no thumbnail, nothing cut off. The compressed data may still be corrupt.
    """
    end = len(content) - len(EOI)
    if not content.startswith(JFIF) or not content.endswith(EOI) or len(content) > BYTES_MAX:
        return False
    frames = [struct.pack(">BHHB", 8, resolution, resolution, channels) for channels in (1, 3)]
    place, framed = len(JFIF) + 9, False
    while place + SEGMENT.size <= end:
        marker, length = SEGMENT.unpack_from(content, place)
        start, place = place + SEGMENT.size, place + 2 + length
        if marker == SCAN:
            found = MARKER.search(content, place)
            return framed and found is not None and found.start() == end
        if marker == FRAME:
            framed = length in (11, 17) and content[start : start + 6] in frames
            if not framed:
                return False
        elif marker not in (COMMENT, TABLES, HUFFMAN):
            return False
    return False


def decode_plain(contents: Sequence[bytes]) -> np.ndarray:
    """Decode up to BATCH_SIZE plain JPEGs of one resolution to (N, H, W, 3) uint8, red, green, blue.

    Each thread has its own pipeline; a pipeline that failed is not used again.
    Raises ImportError if DALI is not installed, RuntimeError if any of the files cannot be decoded.
    """
    if not hasattr(_thread, "pipeline"):
        _thread.pipeline = _pipeline()
    _thread.pipeline.feed_input(FILES, [np.frombuffer(content, np.uint8) for content in contents])
    try:
        (images,) = _thread.pipeline.run()
    except RuntimeError:
        del _thread.pipeline
        raise
    return np.asarray(images.as_tensor())


def _pipeline() -> Any:
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(BATCH_SIZE, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        files = fn.external_source(name=FILES, dtype=types.UINT8, ndim=1, no_copy=True)
        pipeline.set_outputs(fn.decoders.image(files, device="cpu", output_type=types.RGB))
    return pipeline
