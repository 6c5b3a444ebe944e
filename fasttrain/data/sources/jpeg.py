"""Plain JPEGs of just the size that is wanted, decoded many at a time by DALI, to Pillow's very pixels.

DALI decodes small images several times as fast as Pillow, but does not say which file it fails on, and need
not refuse what Pillow refuses. So it is given only what `is_plain` has walked through from start to end, and
where it fails Pillow judges. Both use libjpeg-turbo: of a plain file they make the same pixels.
"""

import re
import struct
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

BATCH_SIZE = 64
"""The most that DALI decodes in one run."""


BYTES_MAX = 1 << 20
"""Of a plain JPEG: ten times what 256x256 pixels need."""


JFIF, EOI = b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", b"\xff\xd9"


SEGMENT = struct.Struct(">HH")


COMMENT, TABLES, HUFFMAN, FRAME, SCAN = 0xFFFE, 0xFFDB, 0xFFC4, 0xFFC0, 0xFFDA


MARKER = re.compile(rb"\xff[^\x00]")


FILES = "files"


_thread = threading.local()


def is_plain(content: bytes, side: int) -> bool:
    """Whether a file is a whole baseline JFIF of (side, side) pixels, grey or in colour, and nothing else.

    Its segments are comments, tables, one frame and one scan without restart markers, and it ends where its
    last byte is: no EXIF, no colour profile, no thumbnail, nothing cut off. The compressed data may still be
    damaged.
    """
    end = len(content) - len(EOI)
    if not content.startswith(JFIF) or not content.endswith(EOI) or len(content) > BYTES_MAX:
        return False
    frames = [struct.pack(">BHHB", 8, side, side, channels) for channels in (1, 3)]
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
    """(N, side, side, 3) uint8 of up to BATCH_SIZE plain JPEGs of one size, red, green, blue.

    Each thread has a pipeline of its own; one that failed is not used again.
    Raises ImportError where DALI is not installed, RuntimeError if any of the files cannot be decoded.
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
