"""A generated stand-in for CIFAR-10 in the same file format, for tests and for machines without a network.

Ten classes of textures and shapes, each at a random place, size and phase, in two random colours under a
random ramp of light and noise. A coin toss decides which of the two colours is brighter, so the mean image of
every class is the same grey: a linear classifier on pixels learns little, while a small convolutional network
soon learns nearly everything. A horizontal flip never changes the class: diagonals in both directions are one
class.

Results on this data set show that the code works, and nothing about CIFAR-10.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fasttrain.data.dataset import HELD_OUT
from fasttrain.data.sources import cifar
from fasttrain.errors import UserError
from fasttrain.system.files import new_folder

NAME = "synthetic"
GENERATOR = 1  # raise it when a change below changes the images: an old set must not be taken for a new one
SIDE = 32
CHUNK = 500  # images generated at once: bounds the memory
NOISE = 24  # standard deviation in 8-bit steps: enough that the first epochs still make mistakes
SQRT_2 = np.float32(2**0.5)

# A pattern maps pixel coordinates around a random centre, x (N, 1, 32) and y (N, 32, 1), to a value that is
# positive inside and negative outside; `images` clips it to -0.5..0.5, which leaves soft edges. `scale`, (N,
# 1, 1), is half of an object's radius or of a texture's period in pixels; `phase`, (N, 1, 1), is from 0 to 2
# pi.
Pattern = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def names_stand_in(name: str) -> bool:
    """Return whether this is the stand-in's name, of all its images or with some of them held out."""
    return name.removesuffix(HELD_OUT) == NAME


def _wave(distance: np.ndarray, scale: np.ndarray, phase: np.ndarray) -> np.ndarray:
    return np.sin(distance * (np.pi / scale) + phase)


def _diagonal(x: np.ndarray, y: np.ndarray, scale: np.ndarray, phase: np.ndarray) -> np.ndarray:
    direction = np.where(phase < np.pi, np.float32(1), np.float32(-1))
    return _wave((x + direction * y) / SQRT_2, scale, phase)


def _box(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the distance from the centre along the farther axis: below r inside a square of side 2r."""
    return np.maximum(abs(x), abs(y))


def _plus(x: np.ndarray, y: np.ndarray, scale: np.ndarray, phase: np.ndarray) -> np.ndarray:
    return np.minimum(2 * scale - _box(x, y), scale / 2 - np.minimum(abs(x), abs(y)))


def _saltire(x: np.ndarray, y: np.ndarray, scale: np.ndarray, phase: np.ndarray) -> np.ndarray:
    return np.minimum(2 * scale - _box(x, y), scale / 2 - abs(abs(x) - abs(y)) / SQRT_2)


PATTERNS: dict[str, Pattern] = {
    "horizontal": lambda x, y, scale, phase: _wave(y, scale, phase),
    "vertical": lambda x, y, scale, phase: _wave(x, scale, phase),
    "diagonal": _diagonal,
    "checkers": lambda x, y, scale, phase: 2 * _wave(x, scale, phase) * _wave(y, scale, phase),
    "dots": lambda x, y, scale, phase: _wave(x, scale, phase) + _wave(y, scale, phase) - 0.8,
    "rings": lambda x, y, scale, phase: _wave(np.hypot(x, y), scale, phase),
    "disc": lambda x, y, scale, phase: 2 * scale - np.hypot(x, y),
    "square": lambda x, y, scale, phase: 2 * scale - _box(x, y),
    "plus": _plus,
    "saltire": _saltire,
}


def generate(root: Path, train_count: int = 10_000, test_count: int = 2_000, seed: int = 0) -> None:
    """Write the data set into root/cifar-10-batches-bin, which appears complete or not at all.

    The same arguments give the same bytes on one machine; NumPy's sine may differ in its last bit on another.
    Does nothing if a data set with the same arguments exists already.
    Raises ValueError for fewer than 5 training images or 1 test image, as no file may be empty; UserError if
    the folder holds anything else or cannot be written to.
    """
    if train_count < len(cifar.CIFAR10.train_files) or test_count < 1:
        raise ValueError(f"expected train_count >= 5 and test_count >= 1, got {train_count} and {test_count}")
    target = root / cifar.CIFAR10.folder
    identity = {
        "name": NAME,
        "generator": GENERATOR,
        "train_count": train_count,
        "test_count": test_count,
        "seed": seed,
    }
    if target.exists():
        if cifar.read_json(target / cifar.NAME_FILE) == identity and cifar.exists(root):
            return
        raise UserError(f"{target}: holds another data set; choose another --data-dir or move this one away")

    counts = [len(part) for part in np.array_split(np.arange(train_count), len(cifar.CIFAR10.train_files))]
    with new_folder(target) as folder:
        for index, (name, count) in enumerate(zip(cifar.CIFAR10.files, [*counts, test_count], strict=True)):
            rng = np.random.default_rng([seed, index])
            labels = rng.permutation(np.arange(count) % len(PATTERNS)).astype(np.uint8)
            with (folder / name).open("wb") as file:
                for start in range(0, count, CHUNK):
                    chunk = labels[start : start + CHUNK]
                    pixels = images(chunk, rng).reshape(len(chunk), -1)
                    file.write(np.concatenate([chunk[:, None], pixels], axis=1).tobytes())
        (folder / cifar.CIFAR10.classes_file).write_text("\n".join(PATTERNS) + "\n", "utf-8")
        (folder / cifar.NAME_FILE).write_text(json.dumps(identity) + "\n", "utf-8")


def images(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw one image of each label's pattern. labels: (N,) uint8. Returns (N, 3, 32, 32) uint8."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> np.ndarray:
        return rng.uniform(low, high, (count, *shape)).astype(np.float32)

    x = np.arange(SIDE, dtype=np.float32)[None, None, :] - uniform(11, 20, 1, 1)
    y = np.arange(SIDE, dtype=np.float32)[None, :, None] - uniform(11, 20, 1, 1)
    scale = uniform(2.5, 4.5, 1, 1)
    phase = uniform(0, 2 * np.pi, 1, 1)
    inside = np.empty((count, SIDE, SIDE), np.float32)
    for label, pattern in enumerate(PATTERNS.values()):
        mine = labels == label
        inside[mine] = pattern(x[mine], y[mine], scale[mine], phase[mine])
    np.clip(inside, -0.5, 0.5, out=inside)

    # The sign of a direction in colour space is random: light on dark is as likely as dark on light.
    direction = rng.standard_normal((count, 3, 1, 1), np.float32)
    contrast = direction / np.linalg.norm(direction, axis=1, keepdims=True) * uniform(50, 150, 1, 1, 1)
    ramp = uniform(-2, 2, 3, 1, 1) * x[:, None] + uniform(-2, 2, 3, 1, 1) * y[:, None]
    noise = rng.standard_normal((count, 3, SIDE, SIDE), np.float32) * NOISE
    images = uniform(88, 168, 3, 1, 1) + ramp + contrast * inside[:, None] + noise
    return np.clip(images, 0, 255).astype(np.uint8)
