"""What several tests need: steps, loaders and checkpoints without a training, and CIFAR-10 in small."""

import dataclasses
import hashlib
import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fasttrain.checkpoint.file import REQUIRED
from fasttrain.checkpoint.proof import proof_logits
from fasttrain.data.build_loader import build_loader
from fasttrain.data.dataset import Dataset
from fasttrain.data.loader import Loader
from fasttrain.data.sources import cifar, download
from fasttrain.distributed import World
from fasttrain.model import ImageClassifier, build_model
from fasttrain.recipe import Recipe
from fasttrain.runtime import Runtime
from fasttrain.step import TrainStep

CPU = torch.device("cpu")

OTHER_VALUES: dict[str, Any] = {
    "name": "other",
    "epochs": 2,
    "batch_size": 16,
    "seed": 7,
    "optimizer": "muon",
    "max_lr": 0.003,
    "weight_decay": 0.01,
    "label_smoothing": 0.3,
    "class_weights": "balanced",
    "dropout": 0.4,
    "network": "compact",
    "width": 3,
    "activation": "gelu",
    "init": "dirac",
    "first_layer_share": 0.5,
    "init_from": "runs/other",
    "bn_momentum": 0.3,
    "bn_bias_lr_scale": 4.0,
    "muon_lr_scale": 5.0,
    "logit_scale": 0.25,
    "ema_epochs": 0.5,
    "pct_start": 0.3,
    "div_factor": 10.0,
    "final_div_factor": 2.0,
    "cycle_momentum": True,
    "resolution": 48,
    "early_scale": 0.5,
    "early_share": 0.5,
    "crop_padding": 2,
    "flip": False,
    "flip_order": "alternating",
    "cutout": 4,
    "test_views": "shifts",
    "compute_dtype": "fp32",
    "compile": "off",
    "cuda_graph": False,
    "sync_batchnorm": True,
    "loader": "tensor",
    "loader_threads": 1,
}
"""One for every field of a recipe, away from its default; a new field needs one too."""


def experienced_network(recipe: Recipe, num_classes: int = 10, **statistics: Any) -> ImageClassifier:
    """A network whose BatchNorm has seen data, so that evaluation mode makes a difference; in that mode."""
    torch.manual_seed(1)
    model = build_model(recipe, num_classes, **statistics)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None and layer.running_var is not None
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
    return model.eval()


def checkpoint_of(
    model: ImageClassifier, recipe: Recipe, classes: tuple[str, ...] | list[str], **more: Any
) -> dict[str, Any]:
    """What a checkpoint of this network holds, with nothing of a training but its shape."""
    return {
        **dict.fromkeys(REQUIRED, 1),
        "model": model.state_dict(),
        "proof": proof_logits(model),
        "classes": list(classes),
        "recipe": recipe.to_dict(),
        "dataset": "synthetic",
        "epoch": 0,
        "progress": {"epochs": []},
        "metrics": {"images": 0},
        **more,
    }


def step_of(
    recipe: Recipe,
    *,
    model: ImageClassifier | None = None,
    max_lr: float = 0.01,
    total_steps: int = 20,
    world: World | None = None,
    **runtime: Any,
) -> TrainStep:
    """A training step of this recipe, on the network that the recipe describes unless one is given."""
    return TrainStep(
        build_model(recipe, 10) if model is None else model,
        recipe,
        Runtime(**{"device": CPU, **runtime}),
        max_lr=max_lr,
        total_steps=total_steps,
        world=world,
    )


def loader_of(
    dataset: Dataset,
    recipe: Recipe,
    *,
    train: bool = True,
    loader: str = "tensor",
    device: torch.device = CPU,
    **options: Any,
) -> Loader:
    """Batches of this recipe: the training images', or the test images'."""
    return build_loader(dataset, recipe, train=train, loader=loader, device=device, **options)  # type: ignore[arg-type]


SMALL_RELEASE = 4
"""Records of the first file of `write_release`; every later file has one more."""


def records(count: int, seed: int) -> bytes:
    """Random pixels and labels in the format of CIFAR-10."""
    content = np.random.default_rng(seed).integers(0, 256, (count, cifar.CIFAR10.record_bytes), np.uint8)
    content[:, 0] %= 10
    return content.tobytes()


def write_release(root: Path) -> Path:
    """The files of CIFAR-10 with a few records each; returns their folder."""
    folder = root / cifar.CIFAR10.folder
    folder.mkdir(parents=True)
    for seed, name in enumerate(cifar.CIFAR10.files):
        (folder / name).write_bytes(records(SMALL_RELEASE + seed, seed))
    return folder


def small_release(**changes: Any) -> cifar.Release:
    """CIFAR-10 as if it held no more than four random images a file, and could be had nowhere."""
    return dataclasses.replace(
        cifar.CIFAR10,
        sha256={name: hashlib.sha256(content).hexdigest() for name, content in small_files().items()},
        train_images=5 * SMALL_RELEASE,
        test_images=SMALL_RELEASE,
        sources=(),
        mean=None,
        std=None,
        **changes,
    )


def small_files() -> dict[str, bytes]:
    """The files of `small_release`."""
    return {name: records(SMALL_RELEASE, seed) for seed, name in enumerate(cifar.CIFAR10.files)}


def tar_gz(members: Mapping[str, bytes]) -> bytes:
    """A compressed tar file of these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def parquet(contents: list[bytes], labels: tuple[str, ...] = ("label",)) -> bytes:
    """A Parquet file of PNGs, as on Hugging Face, with these files of the release one after another."""
    import pyarrow
    import pyarrow.parquet

    rows = np.frombuffer(b"".join(contents), np.uint8).reshape(-1, len(labels) + 3072)
    pictures = []
    for row in rows:
        png = io.BytesIO()
        Image.fromarray(row[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)).save(png, "PNG")
        pictures.append({"bytes": png.getvalue(), "path": None})
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = {"img": pyarrow.array(pictures, kind)}
    for column, label in enumerate(labels):
        table[label] = pyarrow.array(rows[:, column].astype(np.int64))
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(table), file, row_group_size=3)
    return file.getvalue()


class _Pickler2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which are bytes too."""

    write: Callable[[bytes], object]
    memoize: Callable[[object], None]

    dispatch: ClassVar[dict[Any, Any]] = dict(pickle._Pickler.dispatch)

    def save_str(self, value: bytes) -> None:
        size = len(value)
        self.write(b"U" + bytes([size]) if size < 256 else b"T" + size.to_bytes(4, "little"))
        self.write(value)
        self.memoize(value)

    dispatch[bytes] = save_str


def pickle2(value: object) -> bytes:
    """A pickle as Python 2 and the NumPy of its time wrote it."""
    buffer = io.BytesIO()
    _Pickler2(buffer, protocol=2).dump(value)
    return buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def pickle_of(content: bytes, name: str = "batch", labels: tuple[str, ...] = ("labels",)) -> bytes:
    """A file of the binary release as one of the Python release."""
    rows = np.frombuffer(content, np.uint8).reshape(-1, len(labels) + 3072)
    batch: dict[bytes, object] = {b"batch_label": name.encode()}
    for column, label in enumerate(labels):
        batch[label.encode()] = rows[:, column].tolist()
    batch[b"data"] = rows[:, len(labels) :].copy()
    batch[b"filenames"] = [f"{name}_s_{index:06}.png".encode() for index in range(len(rows))]
    return pickle2(batch)


def pretend(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change what is known of the release of CIFAR-10 for this test."""
    changed = dataclasses.replace(cifar.CIFAR10, **changes)
    for module in (cifar, download):
        monkeypatch.setattr(module, "CIFAR10", changed)
