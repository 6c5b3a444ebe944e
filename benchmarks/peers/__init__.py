"""What people would pick instead of our loaders, each from its real package, doing the same work.

Every module here has one function:

    batches(images_NHWC, labels_N, *, batch_size, workers, mean, std, device) -> Iterable of (images, labels)

images_NHWC: (N, 32, 32, 3) uint8. An iteration is one epoch: shuffled, the last, smaller batch dropped.
Images are (batch_size, 3, 32, 32) in floating point: cropped from within a border of 4 reflected pixels,
mirrored with probability one half, an 8x8 square cut out, normalised. Labels are int64. Both are on the device.
workers: processes or threads beside the main one, where the package has them. `check.py` holds them to it.
"""

import importlib
from types import ModuleType

PEERS = {
    "albumentations": "albumentations + DataLoader",
    "torchvision": "torchvision v2 + DataLoader",
    "kornia": "kornia on batches",
    "resident": "batches masked on the device",
    "ffcv": "ffcv",
}
"""Modules here, and what each is called in tables. The first is the training assignment's way."""

INSTALL = {
    "ffcv": "needs OpenCV's and libturbojpeg's development files and a compiler, then pip install ffcv",
}
"""How to get a peer that `pip install -e '.[bench]'` does not bring."""


def load(peer: str) -> ModuleType:
    """The module of this peer. Raises ImportError, with the remedy, where its package is not installed."""
    try:
        return importlib.import_module(f"{__name__}.{peer}")
    except ImportError as error:
        remedy = INSTALL.get(peer, "pip install -e '.[bench]'")
        raise ImportError(f"not installed ({error}): {remedy}") from error
