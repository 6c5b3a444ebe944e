"""A checkpoint's network for use elsewhere, as safetensors, torch.export or ONNX: verified before it counts.

Whatever precision the training used, an export holds float32 weights and computes in float32.
Shape suffixes: N images, C channels, H rows, W columns, K classes.
"""

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fasttrain import __version__
from fasttrain.checkpoint import load_checkpoint, model_from_state
from fasttrain.errors import UserError
from fasttrain.files import write_atomically, write_json
from fasttrain.machine import fork_rng
from fasttrain.model import CustomResNet
from fasttrain.report import find_dataset

TOLERANCE = 1e-4
"""Largest difference of a logit that an export may show, as a share of the largest logit (or of 1)."""
RANDOM_IMAGES = 64
"""Images that an export is verified on where the test images are not on the disk."""
BATCH_SIZE = 250

CPU = torch.device("cpu")

Format = Literal["safetensors", "torch-export", "onnx"]
Input = Literal["pixels", "normalized"]
Forward = Callable[[Tensor], Tensor]


def export(
    checkpoint: Path,
    format: Format,
    out: Path,
    *,
    input: Input = "pixels",
    data: str = "auto",
    data_dir: Path | None = None,
) -> Path:
    """Write a checkpoint's network to `out`, and what a user must know of it to `out` + .json; returns that.

    input: pixels, and the network normalises them by itself (uint8 NCHW, 0 to 255), or normalized float32.
    The very bytes that will be written are loaded and held against the checkpoint: on the run's test images
    where they are on the disk, else on random pixels. Prints how far they differ.
    data, data_dir: those images, as data.loader.open_dataset takes them; nothing is downloaded.
    Raises UserError, and writes nothing, if a logit differs by more than TOLERANCE, if the checkpoint cannot
    be read, if the suffix of `out` is not the format's, or if a package is missing.
    """
    suffix, encode, load = FORMATS[format]
    if out.suffix != suffix:
        raise UserError(f"--out {out}: expected a name that ends with {suffix} for --format {format}")
    if format == "safetensors" and input != "pixels":
        raise UserError("--input normalized: safetensors hold weights, no graph; leave it out")
    state = load_checkpoint(checkpoint)
    try:
        model = model_from_state(state, CPU)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    with warnings.catch_warnings():  # torch's exporters warn about their own insides
        warnings.simplefilter("ignore")
        content = encode(model if input == "pixels" else _without_normalize(model))
        forward = load(content, model.resolution)
    images_NCHW, images_name = _images(state["dataset"], data, data_dir, model.resolution)
    difference, limit, agreement = _compare(model, forward, images_NCHW, input)
    print(
        f"held against {checkpoint} on {len(images_NCHW):,} images ({images_name}): logits differ by at most "
        f"{difference:.2g} (allowed: {limit:.2g}), {agreement:.2%} of the predictions are equal"
    )
    if not difference <= limit:  # NaN is refused as well
        raise UserError(
            f"{out}: not written, because it would not compute what {checkpoint} does; try another format"
        )
    facts = {
        "fasttrain": __version__,
        "format": format,
        "sha256": hashlib.sha256(content).hexdigest(),
        "input": _input_contract(input, model.resolution),
        "output": "logits, float32, (N, classes); softmax makes them probabilities",
        "classes": state["classes"],
        "mean": (model.mean / 255).tolist(),
        "std": (1 / (255 * model.inverse_std)).tolist(),
        "dataset": state["dataset"],
        "epoch": state["epoch"],
        "test_accuracy": _test_accuracy(state),
        "recipe": state["recipe"],
        "verified": {
            "images": images_name,
            "count": len(images_NCHW),
            "max_abs_logit_difference": difference,
            "equal_predictions": agreement,
        },
    }
    write_atomically(out, lambda file: file.write(content))
    card = out.with_name(f"{out.name}.json")
    write_json(card, facts)
    return card


# ---------------------------------------------------------------------------------------------- the formats


def _encode_safetensors(model: CustomResNet) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})


def _load_safetensors(content: bytes, resolution: int) -> Forward:
    from safetensors.torch import load

    weights = load(content)
    classes, recipe = range(len(weights["fc.bias"])), {"resolution": resolution}
    return model_from_state({"classes": classes, "model": weights, "recipe": recipe}, CPU)


def _trace(model: CustomResNet) -> Any:
    """The network's graph for any number of images, without the exporting machine's paths in it."""
    model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as in model.py
    dtype = torch.float32 if isinstance(model, _NormalizedInput) else torch.uint8
    example_NCHW = torch.zeros(2, 3, model.resolution, model.resolution, dtype=dtype)
    program = torch.export.export(model, (example_NCHW,), dynamic_shapes=({0: torch.export.Dim("N", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def _encode_torch_export(model: CustomResNet) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_trace(model), buffer)
    return buffer.getvalue()


def _load_torch_export(content: bytes, _: int) -> Forward:
    return torch.export.load(io.BytesIO(content)).module()


def _encode_onnx(model: CustomResNet) -> bytes:
    try:
        import onnxruntime  # noqa: F401  # the verification's: said before the minute of work
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"--format onnx: {error}; pip install 'fasttrain[onnx]'") from error
    program = torch.onnx.export(
        _trace(model), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
    )
    assert program is not None  # None comes from the older exporter alone
    return program.model_proto.SerializeToString()


def _load_onnx(content: bytes, _: int) -> Forward:
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return lambda images_NCHW: torch.from_numpy(session.run(None, {"images": images_NCHW.numpy()})[0])


class FormatKind(NamedTuple):
    """How a format is written to bytes, and read back, with the images' resolution, as something to call."""

    suffix: str
    encode: Callable[[CustomResNet], bytes]
    load: Callable[[bytes, int], Forward]


FORMATS: dict[Format, FormatKind] = {
    "safetensors": FormatKind(".safetensors", _encode_safetensors, _load_safetensors),
    "torch-export": FormatKind(".pt2", _encode_torch_export, _load_torch_export),
    "onnx": FormatKind(".onnx", _encode_onnx, _load_onnx),
}


class _NormalizedInput(CustomResNet):
    """The network for images that are normalised already."""

    def normalize(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW


def _without_normalize(model: CustomResNet) -> CustomResNet:
    with fork_rng(CPU):  # a new network draws its weights from the global generator
        bare = _NormalizedInput(model.fc.out_features, resolution=model.resolution)
    bare.load_state_dict(model.state_dict())
    return bare.eval()


# ------------------------------------------------------------------------------------------ the verification


def _images(dataset_name: str, data: str, data_dir: Path | None, resolution: int) -> tuple[Tensor, str]:
    """What to verify on, uint8, and its name: the run's test images, or the same random pixels every time."""
    try:
        dataset = find_dataset(dataset_name, data, data_dir, resolution=resolution)
    except UserError as error:
        if data != "auto":
            raise
        print(f"verified on random pixels: {error}")
        generator = torch.Generator().manual_seed(0)
        shape = (RANDOM_IMAGES, 3, resolution, resolution)
        return torch.randint(256, shape, dtype=torch.uint8, generator=generator), "random pixels"
    # A copy, since torch warns of images that are mapped from a file and cannot be written.
    return torch.from_numpy(dataset.test.images.copy()), f"test images of {dataset.name}"


def _compare(
    model: CustomResNet, forward: Forward, images_NCHW: Tensor, input: Input
) -> tuple[float, float, float]:
    """The largest difference of a logit, the largest allowed, and the share of equal predictions.

    The first image goes alone, so that an export that takes one size of batch only does not pass.
    """
    expected, found = [], []
    with torch.inference_mode():
        for batch_NCHW in (images_NCHW[:1], *images_NCHW[1:].split(BATCH_SIZE)):
            expected.append(model(batch_NCHW))
            found.append(forward(batch_NCHW if input == "pixels" else model.normalize(batch_NCHW)))
    expected_NK, found_NK = torch.cat(expected), torch.cat(found)
    return (
        (found_NK - expected_NK).abs().max().item(),
        TOLERANCE * max(1.0, expected_NK.abs().max().item()),
        (found_NK.argmax(1) == expected_NK.argmax(1)).double().mean().item(),
    )


# -------------------------------------------------------------------------------------- what is said about it


def _input_contract(input: Input, resolution: int) -> dict[str, Any]:
    pixels = "red, green, blue from 0 to 255"
    return {
        "dtype": "uint8" if input == "pixels" else "float32",
        "shape": ["N", 3, resolution, resolution],
        "values": pixels if input == "pixels" else f"({pixels}, divided by 255, minus mean) / std",
        "normalized_by": "the network" if input == "pixels" else "the caller",
    }


def _test_accuracy(state: dict[str, Any]) -> float | None:
    """Of these very weights, as measured by the run; None where they have trained on since."""
    rows = state["progress"]["epochs"]
    return rows[-1]["test_accuracy"] if rows and not state["metrics"]["images"] else None
