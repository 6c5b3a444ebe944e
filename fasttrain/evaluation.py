"""Evaluation on every test image exactly once: accuracy, figures per class, and the most confident mistakes.

Shape suffixes: N images, K classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fasttrain.data.loader import Loader
from fasttrain.recipe import Views
from fasttrain.runtime import Runtime
from fasttrain.system.precision import autocast


@dataclass(frozen=True)
class ClassFigures:
    """The figures of one class; shares run from 0 to 1 and are None if there is nothing to divide by.

    images: images of this class. recall: share of them predicted as this class. precision: share of the
    images predicted as this class that belong to it. taken_for: the most frequent wrong prediction, if any.
    """

    images: int
    recall: float | None
    precision: float | None
    taken_for: int | None


@dataclass(frozen=True)
class Evaluation:
    """The network's predictions for every test image, in stored order; all tensors are on the CPU.

    loss: mean cross entropy without label smoothing. labels_N, predictions_N: int64.
    confidences_N: float32, the network's probability of its prediction.
    in_top5_N: bool, whether the true class is among the five with the highest logits.
    views_predictions_N: int64, from the mean logits of several views of each image; None if not asked for.
    """

    loss: float
    labels_N: Tensor
    predictions_N: Tensor
    confidences_N: Tensor
    in_top5_N: Tensor
    views_predictions_N: Tensor | None = None

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly, from 0 to 1."""
        return (self.predictions_N == self.labels_N).double().mean().item()

    @property
    def top5_accuracy(self) -> float:
        """Share of the images whose true class is among the five with the highest logits, from 0 to 1."""
        return self.in_top5_N.double().mean().item()

    @property
    def accuracy_views(self) -> float | None:
        """Accuracy of views_predictions_N: reported beside accuracy, never instead of it."""
        if self.views_predictions_N is None:
            return None
        return (self.views_predictions_N == self.labels_N).double().mean().item()

    @property
    def metrics(self) -> dict[str, float]:
        """Loss and accuracies by the names that a run's files give them."""
        averaged = {} if self.accuracy_views is None else {"test_accuracy_views": self.accuracy_views}
        return {"test_loss": self.loss, "test_accuracy": self.accuracy, **averaged}

    def confusion_KK(self, num_classes: int) -> Tensor:
        """Return the confusion matrix as int64 counts: row = true class, column = predicted class."""
        cells = self.labels_N * num_classes + self.predictions_N
        return cells.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)

    def per_class(self, num_classes: int) -> list[ClassFigures]:
        """Return every class's figures, in the order of the labels."""
        figures = []
        confusion_KK = self.confusion_KK(num_classes)
        for label, row_K in enumerate(confusion_KK):
            correct, images, predicted = (
                int(row_K[label]),
                int(row_K.sum()),
                int(confusion_KK[:, label].sum()),
            )
            others_K = row_K.clone()
            others_K[label] = 0
            figures.append(
                ClassFigures(
                    images=images,
                    recall=correct / images if images else None,
                    precision=correct / predicted if predicted else None,
                    taken_for=int(others_K.argmax()) if others_K.any() else None,
                )
            )
        return figures

    def macro_f1(self, num_classes: int) -> float:
        """Return the mean over the classes of F1, the harmonic mean of precision and recall.

        A class that no image has and none is predicted as is left out, one without a correct prediction
        counts as 0.
        """
        confusion_KK = self.confusion_KK(num_classes).double()
        found_K = confusion_KK.sum(0) + confusion_KK.sum(1)
        f1_K = 2 * confusion_KK.diagonal() / found_K
        return f1_K[found_K > 0].mean().item()

    def top_confusions(self, num_classes: int, count: int) -> list[tuple[int, int, int]]:
        """Return the most frequent pairs of true and predicted class, the most frequent first.

        Returns at most `count` triples of true class, predicted class and number of images.
        """
        wrong = self.predictions_N != self.labels_N
        cells, images = (self.labels_N * num_classes + self.predictions_N)[wrong].unique(return_counts=True)
        order = images.argsort(descending=True, stable=True)[:count]
        pairs = zip(cells[order].tolist(), images[order].tolist(), strict=True)
        return [(cell // num_classes, cell % num_classes, number) for cell, number in pairs]

    def misclassified(self) -> Tensor:
        """Return the indices of the misclassified images, int64, the most confident mistake first."""
        wrong = (self.predictions_N != self.labels_N).nonzero().flatten()
        return wrong[self.confidences_N[wrong].argsort(descending=True, stable=True)]


def concat(parts: Sequence[Evaluation]) -> Evaluation:
    """Join the evaluations of several ranks, given in the order of the ranks."""
    if len(parts) == 1:
        return parts[0]
    labels_N = torch.cat([part.labels_N for part in parts])
    averaged = [part.views_predictions_N for part in parts if part.views_predictions_N is not None]
    return Evaluation(
        loss=sum(part.loss * len(part.labels_N) for part in parts) / len(labels_N),
        labels_N=labels_N,
        predictions_N=torch.cat([part.predictions_N for part in parts]),
        confidences_N=torch.cat([part.confidences_N for part in parts]),
        in_top5_N=torch.cat([part.in_top5_N for part in parts]),
        views_predictions_N=torch.cat(averaged) if averaged else None,
    )


def other_views(images_NCHW: Tensor, views: Views) -> Iterator[tuple[float, Tensor]]:
    """Yield the views of images besides themselves, each with its weight relative to theirs.

    A pixel that moves in over the border is the reflection of the one behind it.
    Source: the "TTA" of cifar10-airbench, level 1 (mirror) and 2 (shifts).
    """
    yield 1.0, images_NCHW.flip(3)
    if views == "shifts":
        forward = torch.arange(images_NCHW.shape[3], device=images_NCHW.device)
        last = forward[-1]
        for moved in (forward.sub(1).abs(), last - (last - forward - 1).abs()):
            shifted_NCHW = images_NCHW[:, :, moved][..., moved]
            yield 0.5, shifted_NCHW
            yield 0.5, shifted_NCHW.flip(3)


def evaluate(
    model: nn.Module,
    loader: Loader,
    runtime: Runtime,
    *,
    views: Views = "none",
) -> Evaluation:
    """Run the network on one epoch of an evaluation loader; restores the model's mode.

    views: those to average for the second accuracy, as in a recipe's test_views; nothing else depends on it.
    Waits for the device once, at the end.
    """
    device, dtype = runtime.device, runtime.dtype
    was_training = model.training
    model.eval()
    losses, labels, predictions, confidences, in_top5, views_predictions = [], [], [], [], [], []
    with torch.inference_mode():
        for images_NCHW, labels_N in loader:
            with autocast(device, dtype):
                logits_NK = model(images_NCHW)
            log_probabilities_NK = logits_NK.float().log_softmax(1)
            best = log_probabilities_NK.max(1)
            losses.append(nn.functional.nll_loss(log_probabilities_NK, labels_N, reduction="sum"))
            labels.append(labels_N)
            predictions.append(best.indices)
            confidences.append(best.values.exp())
            top5_N5 = logits_NK.topk(min(5, logits_NK.shape[1])).indices
            in_top5.append((top5_N5 == labels_N[:, None]).any(1))
            if views != "none":
                with autocast(device, dtype):
                    for weight, view_NCHW in other_views(images_NCHW, views):
                        logits_NK = logits_NK + weight * model(view_NCHW).float()
                views_predictions.append(logits_NK.argmax(1))
    model.train(was_training)
    labels_N = torch.cat(labels).cpu()
    return Evaluation(
        loss=torch.stack(losses).sum().item() / len(labels_N),
        labels_N=labels_N,
        predictions_N=torch.cat(predictions).cpu(),
        confidences_N=torch.cat(confidences).cpu(),
        in_top5_N=torch.cat(in_top5).cpu(),
        views_predictions_N=torch.cat(views_predictions).cpu() if views_predictions else None,
    )
