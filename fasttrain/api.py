"""What to do with a trained network in Python; the commands of the same names do it from a shell.

A checkpoint is a path: the folder of a run, which means its last.pt, one of its checkpoints, or latest, the
newest finished run in runs/. All of it raises UserError for a mistake that the user can fix.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fasttrain.checkpoint.network import load_trained_model
from fasttrain.evaluation import Evaluation
from fasttrain.model import ImageClassifier
from fasttrain.options import EvaluateOptions
from fasttrain.recipe import Views
from fasttrain.system.machine import pick_device
from fasttrain.tools.evaluate_checkpoint import SplitName, measure
from fasttrain.tools.export import export as export_checkpoint
from fasttrain.tools.predict import Prediction
from fasttrain.tools.predict import predict as predict_files

if TYPE_CHECKING:
    from fasttrain.data.dataset import Dataset


def load_model(checkpoint: Path | str, device: str = "auto") -> ImageClassifier:
    """Return the network in a checkpoint, in evaluation mode.

    It takes pixels (N, 3, resolution, resolution) from 0 to 255, uint8 or floating point, and returns logits
    (N, classes) in the order of its `classes`; `resolution` and `classes` are attributes.
    """
    return load_trained_model(Path(checkpoint), pick_device(device)).model


def evaluate(
    checkpoint: Path | str,
    *,
    data: "str | Dataset" = "auto",
    data_dir: Path | str | None = None,
    skip_bad: bool = False,
    split: SplitName = "test",
    device: str = "auto",
    views: Views = "none",
) -> Evaluation:
    """Measure a checkpoint on every image of a split, in the precision of its training.

    data: auto, the images of its run; or a Dataset, or a name that `fasttrain train --data` takes.
    data_dir, skip_bad: as there. views: as a recipe's test_views.
    """
    options = EvaluateOptions(
        checkpoint=Path(checkpoint),
        data=data,  # type: ignore[arg-type]  # a Dataset cannot be typed in a shell
        data_dir=None if data_dir is None else Path(data_dir),
        skip_bad=skip_bad,
        split=split,
        device=device,
        views=views,
    )
    return measure(options).evaluation


def predict(
    checkpoint: Path | str,
    images: Path | str | Sequence[Path | str],
    *,
    top_k: int = 3,
    device: str = "auto",
    batch_size: int = 256,
) -> list[Prediction]:
    """Classify image files, or all those in a folder; returns each file's likeliest classes."""
    paths = [images] if isinstance(images, Path | str) else images
    return predict_files(
        Path(checkpoint), [Path(path) for path in paths], top_k=top_k, device=device, batch_size=batch_size
    )


def export(
    checkpoint: Path | str,
    out: Path | str,
    *,
    input: Literal["pixels", "normalized"] = "pixels",
    data_dir: Path | str | None = None,
) -> Path:
    """Write a checkpoint's network for use elsewhere, in the format that the name of `out` ends with.

    .safetensors, .pt2 (torch.export) or .onnx. Returns the path of the JSON file that describes it.
    input: pixels, which the network normalises, or normalized. data_dir: where its images are, if moved.
    """
    place = None if data_dir is None else Path(data_dir)
    return export_checkpoint(Path(checkpoint), None, Path(out), input=input, data_dir=place)
