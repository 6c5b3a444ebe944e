"""A network that leaves its training is the network that was trained, by whichever door it leaves.

Each check holds what a command says against what the training itself had: the network in its memory, and the
figures that it wrote. Nothing that loads a checkpoint is believed.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fasttrain import trainer
from fasttrain.checkpoint.file import load_checkpoint
from fasttrain.checkpoint.network import load_trained_model
from fasttrain.checkpoint.proof import proof_logits
from fasttrain.data.dataset import Dataset
from fasttrain.data.load_dataset import load_dataset
from fasttrain.data.sources import cifar, synthetic
from fasttrain.data.sources.image import decode
from fasttrain.model import CompactNet, CustomResNet, ImageClassifier
from fasttrain.options import EvaluateOptions
from fasttrain.recipe import PRESETS, Recipe, load_recipe
from fasttrain.step import TrainStep
from fasttrain.tools.evaluate_checkpoint import evaluate_checkpoint
from fasttrain.tools.export import FORMATS, export
from fasttrain.tools.predict import predict
from fasttrain.tools.report import report

CPU = torch.device("cpu")

SMALL = {"width": 8, "epochs": 2, "batch_size": 16, "max_lr": 0.01}
AWAY = {
    "activation": "gelu",
    "logit_scale": 0.25,
    "init": "dirac",
    "ema_epochs": 0.5,
    "dropout": 0.3,
    "resolution": 48,
    "width": 12,
    "early_scale": 0.5,
}
"""A value other than the default of every field that could be lost between a training and its checkpoint: one
recipe has them all."""

RECIPES = {name: dataclasses.replace(recipe, **SMALL) for name, recipe in PRESETS.items()}
RECIPES["away"] = Recipe(name="away", **SMALL | AWAY)


@dataclass
class Trained:
    """A finished run, with the network that the process had in memory when it ended."""

    folder: Path
    network: ImageClassifier
    dataset: Dataset
    images: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "last.pt"

    @property
    def last_row(self) -> dict[str, float]:
        return json.loads((self.folder / "metrics.jsonl").read_text().splitlines()[-1])

    @property
    def pixels_NCHW(self) -> Tensor:
        return torch.from_numpy(self.dataset.test.images.copy()).permute(0, 3, 1, 2)

    def logits(self, pixels_NCHW: Tensor) -> Tensor:
        """By the network in memory, in float32."""
        with torch.inference_mode():
            return self.network(pixels_NCHW)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in's images as PNG files, a folder per class."""
    root = tmp_path_factory.mktemp("round-trip")
    synthetic.generate(root / "release", train_count=64, test_count=40)
    dataset = cifar.read(root / "release")
    for split, part in (("train", dataset.train), ("test", dataset.test)):
        for index, (image_HWC, label) in enumerate(zip(part.images, part.labels, strict=True)):
            path = root / "images" / split / dataset.classes[label] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_HWC).save(path)
    return root / "images"


@pytest.fixture(scope="module", params=RECIPES)
def trained(request, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    recipe, steps = RECIPES[request.param], []

    class Kept(TrainStep):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            steps.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TrainStep", Kept)
        out = tmp_path_factory.mktemp("runs")
        run = trainer.train(recipe, data=f"folder:{images}", data_dir=images.parent, out=out, device="cpu")
    dataset = load_dataset(f"folder:{images}", images.parent, log=print, resolution=recipe.resolution)
    yield Trained(run.folder, steps[-1].eval_model.eval(), dataset, images)


def test_evaluate_gives_the_figures_that_the_training_wrote(trained: Trained, capsys) -> None:
    views = load_recipe(str(trained.folder / "recipe.json")).test_views
    result = evaluate_checkpoint(EvaluateOptions(checkpoint=trained.folder, device="cpu", views=views))
    row = trained.last_row
    assert (result.loss, result.accuracy) == (row["test_loss"], row["test_accuracy"])
    assert result.accuracy_views == row.get("test_accuracy_views")
    assert f"the training itself measured {row['test_accuracy']:.2%}" in capsys.readouterr().out


def test_every_checkpoint_of_the_run_proves_itself(trained: Trained) -> None:
    for name in ("last.pt", "previous.pt", "best.pt"):
        load_trained_model(trained.folder / name, CPU, pytest.fail)
    proof_NK = load_checkpoint(trained.checkpoint)["proof"]
    torch.testing.assert_close(proof_NK, proof_logits(trained.network), rtol=1e-5, atol=1e-6)


def test_predict_gives_what_the_network_in_memory_says(trained: Trained) -> None:
    files = sorted((trained.images / "test").rglob("*.png"))
    found = {
        one.path: dict(one.classes) for one in predict(trained.checkpoint, files, top_k=99, device="cpu")
    }
    shares = torch.tensor([[found[path][name] for name in trained.dataset.classes] for path in files])
    pixels_NHWC = torch.from_numpy(np.stack([decode(path, trained.network.resolution) for path in files]))
    pixels_NCHW = pixels_NHWC.permute(0, 3, 1, 2)
    assert sorted(image.tolist() for image in pixels_NCHW) == sorted(trained.pixels_NCHW.tolist())
    torch.testing.assert_close(shares, trained.logits(pixels_NCHW).softmax(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_says_what_the_network_in_memory_says(
    format: str, trained: Trained, tmp_path: Path, capsys
) -> None:
    if format == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    out = tmp_path / f"model{FORMATS[format].suffix}"
    card = json.loads(export(trained.checkpoint, format, out).read_text())
    forward = loaders[format](out, card)
    expected = trained.logits(trained.pixels_NCHW)
    with torch.inference_mode():
        found = forward(trained.pixels_NCHW)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    labels = torch.from_numpy(trained.dataset.test.labels.copy())
    assert card["test_accuracy"] == (expected.argmax(1) == labels).double().mean().item()
    assert card["training_test_accuracy"] == trained.last_row["test_accuracy"]
    assert f"of the file: {card['test_accuracy']:.2%}" in capsys.readouterr().out


def from_safetensors(path: Path, card: dict):
    """As a user would: the network of the card's recipe, filled by the library."""
    from safetensors.torch import load_model

    recipe = card["recipe"]
    settings = ("width", "resolution", "activation", "init", "dropout")
    network_class = {"resnet": CustomResNet, "compact": CompactNet}[recipe["network"]]
    network = network_class(len(card["classes"]), **{name: recipe[name] for name in settings})
    load_model(network, str(path))
    return network.eval()


def from_torch_export(path: Path, _: dict):
    return torch.export.load(path).module()


def from_onnx(path: Path, _: dict):
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


loaders = {"safetensors": from_safetensors, "torch-export": from_torch_export, "onnx": from_onnx}


def test_a_report_written_anew_is_the_first_one(trained: Trained) -> None:
    page = trained.folder / "report.html"
    first = page.read_text()
    page.unlink()
    report(trained.folder, device="cpu")
    assert page.read_text() == first
