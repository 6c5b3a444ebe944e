"""The loss, against torch's own and against counting images."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from fasttrain.data.dataset import Dataset, Split
from fasttrain.loss import class_weights, cross_entropy
from fasttrain.recipe import Recipe


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_the_loss_is_torchs_cross_entropy_to_the_last_bit(label_smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = 9 * torch.randn(24, 10, generator=generator), torch.arange(24) % 10
    results = []
    for loss_fn in (cross_entropy, nn.functional.cross_entropy):
        leaf = logits.clone().requires_grad_()
        loss = loss_fn(leaf, labels, label_smoothing=label_smoothing)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def unbalanced(dataset: Dataset) -> Dataset:
    """Classes 0, 1 and 2 with 20, 15 and 5 images, and seven classes without any."""
    labels = np.repeat([0, 1, 2], [20, 15, 5])
    return dataclasses.replace(dataset, train=Split(dataset.train.images[: len(labels)], labels))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_balanced_classes_count_the_same_however_many_images_they_have(
    dataset: Dataset, label_smoothing: float
) -> None:
    """The loss over all images is the mean over the classes of torch's loss over each."""
    data = unbalanced(dataset)
    weights_K = class_weights(data, Recipe(class_weights="balanced"))
    assert weights_K is not None and weights_K[3:].tolist() == [0] * 7
    labels_N = torch.from_numpy(data.train.labels)
    assert weights_K[labels_N].mean().item() == pytest.approx(1)
    logits_NK = torch.randn(len(labels_N), 10, generator=torch.Generator().manual_seed(0))
    per_class = [
        nn.functional.cross_entropy(
            logits_NK[labels_N == label], labels_N[labels_N == label], label_smoothing=label_smoothing
        )
        for label in range(3)
    ]
    loss = cross_entropy(logits_NK, labels_N, label_smoothing, weights_K)
    assert loss.item() == pytest.approx((sum(per_class) / 3).item(), rel=1e-6)


def test_classes_weigh_the_same_unless_the_recipe_says_otherwise(dataset: Dataset) -> None:
    assert class_weights(dataset, Recipe()) is None
