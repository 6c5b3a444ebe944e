"""What several tests need: a checkpoint without a training, and another value for every field of a recipe."""

from typing import Any

import torch
from torch import nn

from fasttrain.checkpoint.file import REQUIRED
from fasttrain.checkpoint.proof import proof_logits
from fasttrain.model import CustomResNet, build_model
from fasttrain.recipe import Recipe

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
