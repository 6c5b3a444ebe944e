"""Accuracy over every test image exactly once; per class, and the most confident mistakes.

Shape suffixes: N images, K classes.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fasttrain.checkpoint import load_checkpoint
from fasttrain.data.cifar import Dataset
from fasttrain.data.loader import Loader, build_loader, pick_loader
from fasttrain.errors import UserError
from fasttrain.machine import pick_compute_dtype, pick_device
from fasttrain.model import CustomResNet
from fasttrain.recipe import Recipe
from fasttrain.step import autocast


@dataclass(frozen=True)
class Evaluation:
    """What the network said about every test image, in stored order; all tensors on the CPU.

    loss: mean cross entropy without label smoothing. labels_N, predictions_N: int64.
    confidences_N: float32, the probability that the network gave to its prediction.
    """

    loss: float
    labels_N: Tensor
    predictions_N: Tensor
    confidences_N: Tensor

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly, 0 to 1."""
        return (self.predictions_N == self.labels_N).double().mean().item()

    def confusion_KK(self, num_classes: int) -> Tensor:
        """Counts: row = true class, column = predicted class."""
        cells = self.labels_N * num_classes + self.predictions_N
        return cells.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)

    def misclassified(self) -> Tensor:
        """Indices of the wrongly classified images, the most confident mistake first."""
        wrong = (self.predictions_N != self.labels_N).nonzero().flatten()
        return wrong[self.confidences_N[wrong].argsort(descending=True, stable=True)]


def evaluate(
    model: nn.Module, loader: Loader, device: torch.device, compute_dtype: torch.dtype
) -> Evaluation:
    """Run the network over one epoch of an evaluation loader; the model's mode is restored.

    Waits for the device once, at the end.
    """
    was_training = model.training
    model.eval()
    losses, labels, predictions, confidences = [], [], [], []
    with torch.inference_mode():
        for images_NCHW, labels_N in loader:
            with autocast(device, compute_dtype):
                logits_NK = model(images_NCHW)
            log_probabilities_NK = logits_NK.float().log_softmax(1)
            best = log_probabilities_NK.max(1)
            losses.append(nn.functional.nll_loss(log_probabilities_NK, labels_N, reduction="sum"))
            labels.append(labels_N)
            predictions.append(best.indices)
            confidences.append(best.values.exp())
    model.train(was_training)
    labels_N = torch.cat(labels).cpu()
    return Evaluation(
        loss=torch.stack(losses).sum().item() / len(labels_N),
        labels_N=labels_N,
        predictions_N=torch.cat(predictions).cpu(),
        confidences_N=torch.cat(confidences).cpu(),
    )


def evaluate_checkpoint(
    path: Path, open_dataset: Callable[[], Dataset], *, device: str = "auto", mistakes: int = 5
) -> Evaluation:
    """Measure a checkpoint on every test image and print accuracy, classes and the most confident mistakes.

    Images are normalised with the mean and standard deviation that the checkpoint was trained with.
    Raises UserError if the checkpoint cannot be read, or if its classes are not the data set's.
    """
    from rich.console import Console
    from rich.table import Table

    state = load_checkpoint(path)
    dataset = open_dataset()
    if list(dataset.classes) != state["classes"]:
        raise UserError(f"{path}: was trained on {state['dataset']}, not on {dataset.name}; name its --data")
    recipe = Recipe.from_dict(state["recipe"])
    run_device = pick_device(device)
    compute_dtype = pick_compute_dtype(recipe.compute_dtype, run_device)
    dataset = dataclasses.replace(dataset, mean=tuple(state["mean"]), std=tuple(state["std"]))
    loader = build_loader(
        dataset,
        recipe,
        train=False,
        kind=pick_loader(recipe.loader, run_device, print),
        device=run_device,
        dtype=compute_dtype,
    )
    model = CustomResNet(len(dataset.classes))
    model.load_state_dict(state["model"])
    result = evaluate(model.to(run_device), loader, run_device, compute_dtype)

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{dataset.name}: test accuracy {result.accuracy:.2%}, loss {result.loss:.4f} over "
        f"{len(result.labels_N):,} images; epoch {state['epoch']} of {path}",
        markup=False,
    )
    confusion = result.confusion_KK(len(dataset.classes))
    table = Table("class", "images", "recall", "precision", "most often taken for")
    for index, name in enumerate(dataset.classes):
        hits, images, claims = confusion[index, index], confusion[index].sum(), confusion[:, index].sum()
        others = confusion[index].clone()
        others[index] = -1
        table.add_row(
            name,
            f"{images:,}",
            f"{hits / images:.2%}" if images else "-",
            f"{hits / claims:.2%}" if claims else "-",
            dataset.classes[int(others.argmax())] if others.max() > 0 else "-",
        )
    console.print(table)
    for index in result.misclassified()[:mistakes].tolist():
        truth, said = dataset.classes[result.labels_N[index]], dataset.classes[result.predictions_N[index]]
        confidence = result.confidences_N[index]
        console.print(f"test image {index}: {truth}, taken for {said} at {confidence:.1%}", markup=False)
    return result
