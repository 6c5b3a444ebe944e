"""The loss that a network is trained on.

Shape suffixes: N images, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fasttrain.data.dataset import Dataset
from fasttrain.recipe import Recipe


def cross_entropy(
    logits_NK: Tensor, labels_N: Tensor, label_smoothing: float, class_weights_K: Tensor | None = None
) -> Tensor:
    """Return the mean loss as F.cross_entropy does, without its mask of labels to ignore: 7 launches less.

    logits_NK: float32. labels_N: int64. class_weights_K: each image's loss is multiplied by the weight of its
    class. Their sum is divided by the number of images, and not, as torch does, by that of the weights: so an
    image counts the same in every batch.
    """
    log_p_NK = F.log_softmax(logits_NK, dim=1)
    evenly = label_smoothing / logits_NK.shape[1]
    if class_weights_K is not None:
        loss_N = (1 - label_smoothing) * F.nll_loss(log_p_NK, labels_N, reduction="none")
        return (class_weights_K[labels_N] * (loss_N - evenly * log_p_NK.sum(1))).mean()
    loss = F.nll_loss(log_p_NK, labels_N)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - evenly * log_p_NK.sum(1).mean()
    return loss


def class_weights(dataset: Dataset, recipe: Recipe) -> Tensor | None:
    """Return the weight of each class in the loss, (K,) float32, or None if all weigh the same.

    balanced: inversely proportional to its number of training images, 1 on average over the images. A class
    without images has 0.
    """
    if recipe.class_weights == "none":
        return None
    labels_N = torch.as_tensor(dataset.train.labels).long()
    counts_K = labels_N.bincount(minlength=len(dataset.classes)).float()
    is_there_K = counts_K > 0
    return is_there_K * len(labels_N) / (is_there_K.sum() * counts_K.clamp(min=1))
