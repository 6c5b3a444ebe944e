"""The loss that a network is trained on.

Shape suffixes: N images, K classes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class Objective(nn.Module):
    """The network and its loss as one module, for a compiler to fuse, and DistributedDataParallel to wrap.

    sums: (3,) float32, over all batches: loss, correct predictions, and batches with a finite loss.
    """

    sums: Tensor

    def __init__(
        self,
        model: nn.Module,
        label_smoothing: float,
        class_weights_K: Tensor | None,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.model, self.label_smoothing = model, label_smoothing
        self.class_weights_K = None if class_weights_K is None else class_weights_K.to(device)
        self.register_buffer("sums", torch.zeros(3, device=device))

    def forward(self, images_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """Return the mean loss, and add the batch to `sums`."""
        logits_NK = self.model(images_NCHW)
        loss = cross_entropy(logits_NK.float(), labels_N, self.label_smoothing, self.class_weights_K)
        with torch.no_grad():
            correct = (logits_NK.argmax(1) == labels_N).sum()
            loss_sum = loss * len(labels_N)
            # Once NaN or infinite, the sum stays so: the count of finite losses stops at the first bad one.
            is_finite = (self.sums[0] + loss_sum).abs() < math.inf
            self.sums += torch.stack([loss_sum, correct, is_finite])
        return loss
