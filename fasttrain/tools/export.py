"""`fasttrain export`: a checkpoint's network as safetensors, torch.export or ONNX, verified before writing.

Whatever precision the training used, an export has float32 weights and computes in float32.
Shape suffixes: N images, C channels, H rows, W columns, K classes.
"""

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fasttrain import __version__
from fasttrain.checkpoint.network import TrainedModel, load_trained_model, model_with_weights
from fasttrain.data.run_images import find_dataset
from fasttrain.errors import UserError
from fasttrain.model import ImageClassifier
from fasttrain.recipe import Recipe
from fasttrain.system.files import require_writable, write_atomically, write_json

TOLERANCE = 1e-4
"""Largest difference allowed in a logit, as a share of the largest logit (or of 1, if that is larger)."""

RANDOM_IMAGES = 64
"""Random images to verify an export on if the test images are not on the disk."""

BATCH_SIZE = 250
CPU = torch.device("cpu")
Format = Literal["safetensors", "torch-export", "onnx"]
Input = Literal["pixels", "normalized"]
Forward = Callable[[Tensor], Tensor]


def export(
    checkpoint: Path,
    format: Format | None,
    out: Path,
    *,
    input: Input = "pixels",
    data: str = "auto",
    data_dir: Path | None = None,
    skip_bad: bool = False,
) -> Path:
    """Write a checkpoint's network to `out`, and its description to `out` + .json; returns the latter's path.

    format: by default, what `out` ends with.
    input: pixels (uint8 NCHW, 0 to 255), which the network normalises itself, or normalized (float32).
    The bytes to write are loaded and compared with the checkpoint first: on the run's test images if they are
    on the disk, else on random pixels. Prints the largest difference and, on test images, the accuracy of the
    file and that of the training.
    data, data_dir, skip_bad: where the run's images are now, as run_images.find_dataset takes them.
    Raises UserError, and writes nothing, if a logit differs by more than TOLERANCE, if the checkpoint cannot
    be read, if the suffix of `out` is not the format's, or if a package is missing.
    """
    if format is None:
        format = next((name for name, one in FORMATS.items() if one[0] == out.suffix), None)
        if format is None:
            suffixes = ", ".join(one[0] for one in FORMATS.values())
            raise UserError(f"--out {out}: expected a name that ends with one of {suffixes}")
    suffix, encode, load = FORMATS[format]
    if out.suffix != suffix:
        raise UserError(f"--out {out}: expected a name that ends with {suffix} for --format {format}")
    if format == "safetensors" and input != "pixels":
        raise UserError("--input normalized: safetensors hold weights, not a graph; leave it out")
    require_writable(out.parent, f"--out {out}")
    trained = load_trained_model(checkpoint, CPU)
    checkpoint = trained.path
    model, recipe = trained.model, trained.recipe
    with warnings.catch_warnings():  # torch's exporters warn about their own internals
        warnings.simplefilter("ignore")
        content = encode(model if input == "pixels" else _NormalizedInput(model))
        forward = load(content, recipe)
    images = _images(trained, data, data_dir, skip_bad)
    found = _compare(model, forward, images, input)
    print(
        f"compared with {checkpoint} on {len(images.pixels_NCHW):,} images ({images.name}): logits differ by "
        f"at most {found.difference:.2g} (allowed: {found.limit:.2g}), {found.agreement:.2%} of the "
        "predictions are equal"
    )
    if not found.difference <= found.limit:  # refuses NaN too
        raise UserError(
            f"{out}: not written, because it would not compute what {checkpoint} does; try another format"
        )
    of_training = trained.metrics["test_accuracy"] if trained.metrics else None
    if found.accuracy is not None:
        print(_accuracies(found.accuracy, of_training, trained.precision))
    write_atomically(out, lambda file: file.write(content))
    card = out.with_name(f"{out.name}.json")
    write_json(card, _card(trained, format, input, content, images, found))
    return card


def _encode_safetensors(model: nn.Module) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})


def _load_safetensors(content: bytes, recipe: Recipe) -> Forward:
    from safetensors.torch import load

    weights = load(content)
    return model_with_weights(recipe, len(weights["fc.bias"]), weights)


class _NormalizedInput(nn.Module):
    """The network for images that are normalised already."""

    def __init__(self, network: ImageClassifier) -> None:
        super().__init__()
        self.network, self.resolution = network, network.resolution

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return self.network.forward_normalized(images_NCHW)


Exported = ImageClassifier | _NormalizedInput


def _trace(model: Exported) -> Any:
    """Trace the network's graph for any number of images, and remove this machine's paths from it."""
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as in model.py
    dtype = torch.float32 if isinstance(model, _NormalizedInput) else torch.uint8
    example_NCHW = torch.zeros(2, 3, model.resolution, model.resolution, dtype=dtype)
    program = torch.export.export(model, (example_NCHW,), dynamic_shapes=({0: torch.export.Dim("N", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _encode_torch_export(model: Exported) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_trace(model), buffer)
    return buffer.getvalue()


def _load_torch_export(content: bytes, _: Recipe) -> Forward:
    return torch.export.load(io.BytesIO(content)).module()


def _encode_onnx(model: Exported) -> bytes:
    try:
        import onnxruntime  # noqa: F401  # for the verification: fail before a minute of work
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx: {error}; pip install 'fasttrain-dali[onnx]'") from error
    program = torch.onnx.export(
        _trace(model), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
    )
    assert program is not None  # only the older exporter returns None
    return program.model_proto.SerializeToString()


def _load_onnx(content: bytes, _: Recipe) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images_NCHW: torch.from_numpy(session.run(None, {"images": images_NCHW.numpy()})[0])


class FormatKind(NamedTuple):
    """One format: its suffix, how to encode a network as bytes, and how to load them as a function again."""

    suffix: str
    encode: Callable[[Any], bytes]
    load: Callable[[bytes, Recipe], Forward]


FORMATS: dict[Format, FormatKind] = {
    "safetensors": FormatKind(".safetensors", _encode_safetensors, _load_safetensors),
    "torch-export": FormatKind(".pt2", _encode_torch_export, _load_torch_export),
    "onnx": FormatKind(".onnx", _encode_onnx, _load_onnx),
}


class _Images(NamedTuple):
    """The images to verify an export on: pixels (N, 3, H, W) uint8, and labels if they have any."""

    name: str
    pixels_NCHW: Tensor
    labels_N: Tensor | None


class _Comparison(NamedTuple):
    """A comparison of an export with its checkpoint.

    difference: the largest difference in a logit. limit: the largest allowed. agreement: share of equal
    predictions. accuracy: the export's, from 0 to 1; None without labels.
    """

    difference: float
    limit: float
    agreement: float
    accuracy: float | None


def _images(trained: TrainedModel, data: str, data_dir: Path | None, skip_bad: bool) -> _Images:
    """Return the run's test images or, if they are not found, the same random pixels every time."""
    resolution = trained.recipe.resolution
    try:
        dataset = find_dataset(trained.images, data, data_dir, skip_bad=skip_bad, resolution=resolution)
        trained.require_classes_of(dataset)
    except UserError as error:
        if data != "auto":
            raise
        print(f"verified on random pixels: {error}")
        generator = torch.Generator().manual_seed(0)
        shape = (RANDOM_IMAGES, 3, resolution, resolution)
        pixels_NCHW = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return _Images("random pixels", pixels_NCHW, None)
    # A copy, since the arrays may be mapped from a file, and torch warns about read-only arrays.
    pixels_NCHW = torch.from_numpy(np.ascontiguousarray(dataset.test.images.transpose(0, 3, 1, 2)))
    labels_N = torch.from_numpy(dataset.test.labels.copy())
    return _Images(f"test images of {dataset.name}", pixels_NCHW, labels_N)


def _compare(model: ImageClassifier, forward: Forward, images: _Images, input: Input) -> _Comparison:
    """Compare an export with the network that it was made from.

    The first image is a batch by itself, so that an export for a single batch size does not pass.
    """
    expected, found = [], []
    with torch.inference_mode():
        for batch_NCHW in (images.pixels_NCHW[:1], *images.pixels_NCHW[1:].split(BATCH_SIZE)):
            expected.append(model(batch_NCHW))
            found.append(forward(batch_NCHW if input == "pixels" else model.normalize(batch_NCHW)))
    expected_NK, found_NK = torch.cat(expected), torch.cat(found)
    labels_N = images.labels_N
    return _Comparison(
        difference=(found_NK - expected_NK).abs().max().item(),
        limit=TOLERANCE * max(1.0, expected_NK.abs().max().item()),
        agreement=(found_NK.argmax(1) == expected_NK.argmax(1)).double().mean().item(),
        accuracy=None if labels_N is None else (found_NK.argmax(1) == labels_N).double().mean().item(),
    )


def _card(
    trained: TrainedModel, format: Format, input: Input, content: bytes, images: _Images, found: _Comparison
) -> dict[str, Any]:
    """Describe the file: what a user needs to know, and what it was verified on."""
    model, recipe = trained.model, trained.recipe
    return {
        "fasttrain": __version__,
        "format": format,
        "sha256": hashlib.sha256(content).hexdigest(),
        "input": _input_contract(input, recipe.resolution),
        "output": "logits, float32, (N, classes); softmax makes them probabilities",
        "arithmetic": "float32",
        "classes": trained.classes,
        "mean": (model.mean / 255).tolist(),
        "std": (1 / (255 * model.inverse_std)).tolist(),
        "dataset": trained.images.name,
        "epoch": trained.epoch,
        "test_accuracy": found.accuracy,
        "training_test_accuracy": trained.metrics["test_accuracy"] if trained.metrics else None,
        "training_precision": trained.precision,
        "recipe": recipe.to_dict(),
        "verified": {
            "images": images.name,
            "count": len(images.pixels_NCHW),
            "max_abs_logit_difference": found.difference,
            "equal_predictions": found.agreement,
        },
    }


def _input_contract(input: Input, resolution: int) -> dict[str, Any]:
    pixels = "red, green, blue from 0 to 255"
    return {
        "dtype": "uint8" if input == "pixels" else "float32",
        "shape": ["N", 3, resolution, resolution],
        "values": pixels if input == "pixels" else f"({pixels}, divided by 255, minus mean) / std",
        "normalized_by": "the network" if input == "pixels" else "the caller",
    }


def _accuracies(of_file: float, of_training: float | None, precision: str | None) -> str:
    """Return a line with the file's accuracy, and the training's if it measured the same weights."""
    line = f"test accuracy of the file: {of_file:.2%}, in float32"
    if of_training is None:
        return line
    line += f"; the training measured {of_training:.2%}" + (f" in {precision}" if precision else "")
    return line if precision in (None, "fp32") else f"{line}; the different rounding moves a few images"
