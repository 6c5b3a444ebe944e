"""CIFAR's Python release: pickles of Python 2, read without running anything that they ask for.

One pickle is a dictionary with the pixels, an array of a row per image, and a list of labels (CIFAR-100 has
two). A pickle is a program, so an untrusted one must not reach pickle's whole machine: only the instructions
that build these values are let through, the few names they call are stand-ins that keep what they are given,
and NumPy sees nothing but plain bytes whose number has been checked.
"""

import io
import math
import pickle
import pickletools
from typing import Any

import numpy as np

from fasttrain.data.sources.releases import IMAGE_SHAPE, Release
from fasttrain.errors import one_line

PIXELS = math.prod(IMAGE_SHAPE)
# fmt: off
INSTRUCTIONS = {
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD",
    "NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "LONG1",
    "SHORT_BINSTRING", "BINSTRING", "BINUNICODE",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
}
# fmt: on
"""Those of protocol 2, without the ones that make objects of other kinds."""

STORED_MAX = 1 << 20
"""The most values that a pickle may store for later; pickle keeps a table as long as the largest number."""


class _DType:
    """Stands in for numpy.dtype."""

    def __init__(self, *arguments: Any) -> None:
        self.code = arguments[0] if arguments else None

    def __setstate__(self, state: Any) -> None:
        pass  # byte order and alignment, which bytes do not have


class _Array:
    """Stands in for numpy's function that makes an empty array, which its state fills."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


STAND_INS = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy._core.multiarray._reconstruct": _Array,
    "numpy.dtype": _DType,
    "numpy.ndarray": "numpy.ndarray",  # only ever passed on
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return STAND_INS[f"{module}.{name}"]


def read(content: bytes, images: int, release: Release) -> np.ndarray:
    """Return a pickle's images as the records of the binary release, (images, record_bytes) uint8.

    Raises ValueError, saying what is wrong, for anything but a batch of the release with so many images.
    """
    try:
        _check_instructions(content)
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a corrupt pickle fails anywhere
        raise ValueError(f"not a batch of the Python release: {one_line(error)}") from error
    if not isinstance(batch, dict):
        raise ValueError("not a batch of the Python release: no dictionary")
    columns = [_labels(batch, f"{label}s", images) for label in release.labels]
    return np.concatenate([np.stack(columns, axis=1), _pixels(batch, images)], axis=1)


def _check_instructions(content: bytes) -> None:
    """Let only a program through that builds plain values, in memory in proportion to its length."""
    argument: Any
    for instruction, argument, _ in pickletools.genops(content):
        if instruction.name not in INSTRUCTIONS:
            raise ValueError(
                f"a pickle with the instruction {instruction.name}, which the release does not use"
            )
        if instruction.name == "GLOBAL" and argument.replace(" ", ".") not in STAND_INS:
            raise ValueError(f"a pickle that asks for {argument[:80]!r}, which the release does not use")
        if instruction.name == "LONG_BINPUT" and argument > STORED_MAX:
            raise ValueError(
                f"a pickle that stores a value in place {argument}, expected {STORED_MAX} at most"
            )


def _labels(batch: dict[Any, Any], key: str, images: int) -> np.ndarray:
    labels = batch.get(key.encode())
    if not isinstance(labels, list) or len(labels) != images:
        raise ValueError(f"{key}: expected a list of {images} numbers")
    if not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise ValueError(f"{key}: expected numbers from 0 to 255")
    return np.array(labels, np.uint8)


def _pixels(batch: dict[Any, Any], images: int) -> np.ndarray:
    array = batch.get(b"data")
    if not isinstance(array, _Array) or not isinstance(array.state, tuple) or len(array.state) != 5:
        raise ValueError("data: expected an array")
    _, shape, dtype, by_column, content = array.state
    if shape != (images, PIXELS) or not isinstance(dtype, _DType) or dtype.code not in (b"u1", "u1"):
        raise ValueError(f"data: expected an array of bytes of shape {(images, PIXELS)}")
    if not isinstance(content, bytes) or len(content) != images * PIXELS:
        raise ValueError(f"data: expected {images * PIXELS} bytes")
    return np.frombuffer(content, np.uint8).reshape((images, PIXELS), order="F" if by_column else "C")
