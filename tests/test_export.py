"""What leaves fasttrain computes what its checkpoint does, or does not leave."""

import hashlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fasttrain.checkpoint.file import load_checkpoint, save_checkpoint
from fasttrain.checkpoint.network import load_trained_model
from fasttrain.data.dataset import Dataset
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe
from fasttrain.tools import export as export_module
from fasttrain.tools.export import FORMATS, FormatKind, export
from tests.helpers import checkpoint_of, experienced_network

CPU = torch.device("cpu")
RECIPE = Recipe(logit_scale=0.5, width=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Path:
    model = experienced_network(RECIPE, len(dataset.classes), mean=dataset.mean, std=dataset.std)
    state = checkpoint_of(
        *(model, RECIPE, dataset.classes),
        dataset=dataset.name,
        epoch=2,
        progress={"epochs": [{"test_accuracy": 0.25}, {"test_accuracy": 0.5}]},
        fingerprint={"precision": "bf16"},
    )
    path = tmp_path_factory.mktemp("run") / "last.pt"
    save_checkpoint(path, state)
    return path


@pytest.mark.parametrize(
    ("format", "input"),
    [
        ("safetensors", "pixels"),
        ("torch-export", "pixels"),
        ("torch-export", "normalized"),
        ("onnx", "pixels"),
        ("onnx", "normalized"),
    ],
)
def test_an_export_loads_and_computes_what_the_checkpoint_does(
    format, input, checkpoint: Path, dataset: Dataset, dataset_dir: Path, tmp_path: Path, capsys
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    out = tmp_path / f"model{FORMATS[format].suffix}"
    card = export(checkpoint, format, out, input=input, data_dir=dataset_dir)
    said = capsys.readouterr().out
    assert "40 images (test images of synthetic)" in said and "100.00% of the predictions" in said

    content = out.read_bytes()
    model = load_trained_model(checkpoint, CPU).model
    pixels_NCHW = torch.from_numpy(dataset.test.images[:7]).permute(0, 3, 1, 2)
    facts = json.loads(card.read_text())
    images_NCHW = pixels_NCHW
    if input == "normalized":  # as the description beside the file tells it
        mean, std = (torch.tensor(facts[key]).reshape(3, 1, 1) for key in ("mean", "std"))
        images_NCHW = (pixels_NCHW / 255 - mean) / std
    with torch.inference_mode():
        torch.testing.assert_close(
            FORMATS[format].load(content, RECIPE)(images_NCHW), model(pixels_NCHW), rtol=1e-3, atol=1e-4
        )
    assert facts["input"]["dtype"] == ("uint8" if input == "pixels" else "float32")
    assert facts["sha256"] == hashlib.sha256(content).hexdigest()
    assert facts["classes"] == list(dataset.classes)
    with torch.inference_mode():
        pixels_NCHW = torch.from_numpy(dataset.test.images).permute(0, 3, 1, 2)
        predictions_N = model(pixels_NCHW).argmax(1).numpy()
    accuracy = (predictions_N == dataset.test.labels).mean()
    assert (facts["test_accuracy"], facts["arithmetic"]) == (accuracy, "float32")
    assert (facts["training_test_accuracy"], facts["training_precision"]) == (0.5, "bf16")
    assert f"of the file: {accuracy:.2%}, in float32; the training measured 50.00% in bf16" in said
    assert facts["mean"] == pytest.approx(dataset.mean) and facts["std"] == pytest.approx(dataset.std)
    assert Recipe.from_dict(facts["recipe"]) == RECIPE
    assert str(Path(export_module.__file__).parent).encode() not in content  # nothing of this machine
    assert sorted(path.name for path in tmp_path.iterdir()) == [out.name, card.name]


def off_by(difference: float) -> FormatKind:
    """safetensors, except that what is loaded computes something else."""
    suffix, encode, load = FORMATS["safetensors"]
    return FormatKind(suffix, encode, lambda *args: lambda images: load(*args)(images) + difference)


@pytest.mark.parametrize("difference", [0.01, float("nan")])
def test_an_export_that_differs_is_refused(
    difference: float, checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(FORMATS, "safetensors", off_by(difference))
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"older")
    with pytest.raises(UserError, match=r"model\.safetensors: not written"):
        export(checkpoint, "safetensors", out, data_dir=tmp_path)
    assert out.read_bytes() == b"older" and list(tmp_path.iterdir()) == [out]


def test_without_the_images_random_pixels_do(checkpoint: Path, tmp_path: Path, capsys) -> None:
    card = export(checkpoint, "safetensors", tmp_path / "model.safetensors", data_dir=tmp_path / "none")
    assert re.search(r"on 64 images \(random pixels\)", capsys.readouterr().out)
    facts = json.loads(card.read_text())
    assert facts["verified"]["images"] == "random pixels"
    assert (facts["test_accuracy"], facts["training_test_accuracy"]) == (None, 0.5)
    assert not (tmp_path / "none").exists()


def test_images_that_are_named_but_not_the_runs_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for label in ("cats", "dogs"):
        for index in range(5):
            path = tmp_path / "pets" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (40 * index, 30 * index, 20 * index)).save(path)
    target = tmp_path / "model.safetensors"
    with pytest.raises(UserError, match="trained on synthetic, and this is folder:pets"):
        export(checkpoint, "safetensors", target, data=f"folder:{tmp_path / 'pets'}", data_dir=tmp_path)
    assert not target.exists()


def test_images_of_other_classes_give_no_accuracy(
    checkpoint: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    """As a folder of the same name may hold: its labels mean something else."""
    state = load_checkpoint(checkpoint)
    save_checkpoint(tmp_path / "last.pt", state | {"classes": state["classes"][::-1]})
    card = export(tmp_path / "last.pt", "safetensors", tmp_path / "m.safetensors", data_dir=dataset_dir)
    facts = json.loads(card.read_text())
    assert (facts["test_accuracy"], facts["verified"]["images"]) == (None, "random pixels")


def test_an_accuracy_of_other_weights_is_not_told(checkpoint: Path, tmp_path: Path) -> None:
    state = load_checkpoint(checkpoint) | {"metrics": {"images": 512}}  # a step into the next epoch
    save_checkpoint(tmp_path / "previous.pt", state)
    card = export(tmp_path / "previous.pt", "safetensors", tmp_path / "m.safetensors", data_dir=tmp_path)
    assert json.loads(card.read_text())["training_test_accuracy"] is None


def test_the_format_is_what_the_name_ends_with(checkpoint: Path, tmp_path: Path) -> None:
    card = export(checkpoint, None, tmp_path / "m.safetensors", data_dir=tmp_path)
    assert json.loads(card.read_text())["format"] == "safetensors"
    with pytest.raises(
        UserError, match=r"expected a name that ends with one of \.safetensors, \.pt2, \.onnx"
    ):
        export(checkpoint, None, tmp_path / "m.pth", data_dir=tmp_path)


def test_what_cannot_be_exported_is_one_line(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"expected a name that ends with \.pt2"):
        export(checkpoint, "torch-export", tmp_path / "model.onnx")
    with pytest.raises(UserError, match="safetensors hold weights"):
        export(checkpoint, "safetensors", tmp_path / "m.safetensors", input="normalized")
    with pytest.raises(UserError, match="nowhere is not a folder"):
        export(checkpoint, "safetensors", tmp_path / "nowhere" / "m.safetensors", data_dir=tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'fasttrain-dali\[onnx\]'"):
        export(checkpoint, "onnx", tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
