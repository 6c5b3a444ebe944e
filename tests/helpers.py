"""What several tests need: steps, loaders and checkpoints without a training, and CIFAR-10 in small."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain.checkpoint.file import REQUIRED
from fasttrain.checkpoint.proof import proof_logits
from fasttrain.data.build_loader import build_loader
from fasttrain.data.dataset import Dataset
from fasttrain.data.loader import Loader
from fasttrain.data.sources import cifar, download
from fasttrain.distributed import World
from fasttrain.model import CustomResNet, build_model
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
    "dropout": 0.4,
    "width": 3,
    "activation": "gelu",
    "init": "dirac",
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
    "early_resolution": 16,
    "early_share": 0.5,
    "crop_padding": 2,
    "flip": False,
    "flip_order": "alternating",
    "cutout": 4,
    "test_flip": True,
    "compute_dtype": "fp32",
    "compile": "off",
    "cuda_graph": False,
    "sync_batchnorm": True,
    "loader": "tensor",
    "loader_threads": 1,
}
"""One for every field of a recipe, away from its default; a new field needs one too."""


def experienced_network(recipe: Recipe, num_classes: int = 10, **statistics: Any) -> CustomResNet:
    """A network whose BatchNorm has seen data, so that evaluation mode makes a difference; in that mode."""
    torch.manual_seed(1)
    model = build_model(recipe, num_classes, **statistics)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
    return model.eval()


def checkpoint_of(
    model: CustomResNet, recipe: Recipe, classes: tuple[str, ...] | list[str], **more: Any
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
    model: CustomResNet | None = None,
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


def pretend(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change what is known of the release of CIFAR-10 for this test."""
    changed = dataclasses.replace(cifar.CIFAR10, **changes)
    for module in (cifar, download):
        monkeypatch.setattr(module, "CIFAR10", changed)
