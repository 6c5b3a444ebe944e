"""The network in a checkpoint: rebuilt from its recipe, and checked against its proof."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fasttrain.checkpoint.file import checkpoint_in, load_checkpoint
from fasttrain.checkpoint.proof import require_proven
from fasttrain.data.dataset import Dataset
from fasttrain.data.run_images import RunImages
from fasttrain.errors import UserError
from fasttrain.model import POOLED_STEM_FROM, ImageClassifier, build_model, build_model_for
from fasttrain.recipe import Recipe, flag
from fasttrain.system.precision import DTYPES
from fasttrain.system.rng import fork_rng
from fasttrain.system.run_folder import run_folder


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """The network in a checkpoint, and what the checkpoint says about it.

    path: the checkpoint's. model: in evaluation mode. classes: names, in the order of the logits.
    images: those that it was trained on.
    precision: that of the training: bf16, fp16, fp32 or tf32; None if the checkpoint does not say.
    metrics: the row of metrics.jsonl that the training measured on these weights; None if they have been
    trained since.
    """

    path: Path
    model: ImageClassifier
    recipe: Recipe
    classes: list[str]
    images: RunImages
    epoch: int
    precision: str | None
    metrics: dict[str, float] | None

    def has_classes_of(self, dataset: Dataset) -> bool:
        """Return whether the data set has the classes that the network was trained on, in the same order."""
        return list(dataset.classes) == self.classes

    def require_classes_of(self, dataset: Dataset) -> None:
        """Raise UserError unless the data set has the classes that the network was trained on."""
        if not self.has_classes_of(dataset):
            raise UserError(
                f"{self.path}: it was trained on {self.images.name}, not on {dataset.name}, which has other "
                "classes; name its --data"
            )


def find_start(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Check that a new training can start from the weights that its recipe names; see init_from.

    Returns the recipe with the name of the very run, where init_from is `latest`, which will be another one
    later. Raises UserError if the checkpoint cannot be read, or holds another network than the recipe's.
    """
    if not recipe.init_from:
        return recipe
    place = run_folder(Path(recipe.init_from))
    source = load_trained_model(place, torch.device("cpu"))
    fields = ("network", "width", "activation", *(("logit_scale",) if source.has_classes_of(dataset) else ()))
    there = source.recipe
    other = [one for one in fields if getattr(there, one) != getattr(recipe, one)]
    if other:
        add = " ".join(f"{flag(one)} {getattr(there, one)}" for one in other)
        raise UserError(f"--init-from {recipe.init_from}: its network is another one; add {add}")
    pools = there.resolution >= POOLED_STEM_FROM
    if pools != (recipe.resolution >= POOLED_STEM_FROM):
        side = "from" if pools else "below"
        raise UserError(
            f"--init-from {recipe.init_from}: its network needs a --resolution {side} {POOLED_STEM_FROM}"
        )
    return dataclasses.replace(recipe, init_from=str(place))


def initial_model(
    dataset: Dataset,
    recipe: Recipe,
    log: Callable[[str], object] = lambda _: None,
    *,
    is_resumed: bool = False,
) -> ImageClassifier:
    """Build the network that a training of the recipe starts from, on the CPU; find_start has checked it.

    Weights from a checkpoint include its statistics of pixels: the filters were trained on images normalised
    so. log: called with a line that says what was taken. is_resumed: its weights are going to be loaded.
    """
    model = build_model_for(dataset, recipe)
    if is_resumed or not recipe.init_from:
        return model
    source = load_trained_model(Path(recipe.init_from), torch.device("cpu"))
    has_new_head = not source.has_classes_of(dataset)
    kept = ("logit_scale", *(("fc.weight", "fc.bias") if has_new_head else ()))
    weights, new = source.model.state_dict(), model.state_dict()
    model.load_state_dict(weights | {name: new[name] for name in kept})
    head = "; the last layer is new, since the classes differ" if has_new_head else ""
    log(f"weights from {source.path}, epoch {source.epoch} on {source.images.name}{head}")
    return model


def _print_to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def load_trained_model(
    path: Path, device: torch.device, log: Callable[[str], object] = _print_to_stderr
) -> TrainedModel:
    """Rebuild the network in a checkpoint, and check that it is the one that was saved.

    path: the checkpoint, or the folder of its run. log: called with one line if the checkpoint has no proof.
    Raises UserError if the file is not a checkpoint, or if the network's logits differ from the saved ones.
    """
    path = checkpoint_in(path)
    state = load_checkpoint(path)
    try:
        recipe, classes = Recipe.from_dict(state["recipe"]), list(state["classes"])
        trained = TrainedModel(
            path=path,
            model=restore_model(state, recipe, len(classes), device),
            recipe=recipe,
            classes=classes,
            images=images_of(path, state),
            epoch=int(state["epoch"]),
            precision=saved_precision(state),
            metrics=_metrics_of_these_weights(state),
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = type(error).__name__
        raise UserError(
            f"{path}: not a checkpoint that fasttrain wrote ({reason}); train the network again"
        ) from error
    trained.model.classes = tuple(classes)
    if "proof" not in state:
        log(unproven(path))
    return trained


def unproven(path: Path) -> str:
    """Return the line to log about a checkpoint without a proof."""
    return (
        f"{path}: unproven: written before checkpoints held a proof; rebuilding the network from its recipe"
    )


def saved_precision(state: dict[str, Any]) -> str | None:
    """Return the precision that the checkpoint's run computes in; None if the checkpoint does not say."""
    fingerprint = state.get("fingerprint")
    precision = fingerprint.get("precision") if isinstance(fingerprint, dict) else None
    return precision if isinstance(precision, str) and precision in DTYPES else None


def images_of(path: Path, state: dict[str, Any]) -> RunImages:
    """Return the images that a network was trained on; the folder of its run may say where they are."""
    fingerprint = state.get("fingerprint")
    sha256 = fingerprint.get("the images' SHA-256") if isinstance(fingerprint, dict) else None
    recorded = RunImages.of_run(path.parent)
    if recorded is not None and recorded.sha256 == sha256:
        return recorded
    return RunImages(name=str(state["dataset"]), sha256=sha256 if isinstance(sha256, str) else None)


def _metrics_of_these_weights(state: dict[str, Any]) -> dict[str, float] | None:
    rows = state["progress"]["epochs"]
    if not rows or state["metrics"]["images"]:  # images trained on since the last evaluation
        return None
    return {**rows[-1], "test_accuracy": float(rows[-1]["test_accuracy"])}


def restore_model(
    state: dict[str, Any], recipe: Recipe, num_classes: int, device: torch.device
) -> ImageClassifier:
    """Rebuild the network in a loaded checkpoint, in evaluation mode; check its proof if there is one.

    Raises UserError if the weights do not fit, or if the network's logits differ from the saved ones.
    """
    model = model_with_weights(recipe, num_classes, state["model"]).to(device)
    if "proof" in state:
        require_proven(model, state["proof"])
    return model


def model_with_weights(recipe: Recipe, num_classes: int, weights: dict[str, Tensor]) -> ImageClassifier:
    """Build the recipe's network with these weights, on the CPU and in evaluation mode.

    The weights include the mean and standard deviation of the training images. Raises UserError if they do
    not fit the network.
    """
    with fork_rng(torch.device("cpu")):  # a new network draws its weights from the global generator
        model = build_model(recipe, num_classes)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        first, *details = str(error).splitlines()
        reason = details[0].strip() if details else first  # torch names the weights from the second line on
        raise UserError(f"its weights do not fit the network ({reason}); train the network again") from error
    return model.eval()
