"""The Python API: what callbacks are told; a run's network, measured, used and exported; the types."""

import dataclasses
import json
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fasttrain
from fasttrain.options import TrainKeywords, TrainOptions


class Recorder(fasttrain.Callback):
    """Keeps what it is told, and then spoils it."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.out, self.pages = "", list[Path]()

    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        self.told.append(json.dumps(metrics))
        metrics.clear()

    def on_train_end(self, result: dict[str, Any]) -> None:
        self.told.append(json.dumps(result))
        self.pages = [*Path(self.out).glob("*/report.html")]
        result["recipe"].clear()


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture(scope="module")
def run(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory, recorder: Recorder) -> fasttrain.Run:
    recipe = fasttrain.Recipe(epochs=2, batch_size=16, width=8, loader="tensor")
    out = recorder.out = str(tmp_path_factory.mktemp("runs"))
    return fasttrain.train(
        recipe, data_dir=str(dataset_dir), out=out, device="cpu", callbacks=[Recorder(), recorder]
    )


def test_callbacks_are_told_what_the_files_say(run: fasttrain.Run, recorder: Recorder) -> None:
    *epochs, end = recorder.told
    assert [json.loads(row) for row in epochs] == [
        json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert json.loads(end) == json.loads((run.folder / "result.json").read_text())
    assert len(epochs) == 2 and run.result["recipe"]["width"] == 8
    assert recorder.pages == [run.folder / "report.html"]  # there when the end is told


def test_a_callback_that_fails_ends_the_training_which_can_be_resumed(dataset_dir: Path, tmp_path) -> None:
    class Failing(fasttrain.Callback):
        def on_epoch_end(self, metrics: dict[str, float]) -> None:
            raise ValueError(f"at epoch {metrics['epoch']}")

    recipe = fasttrain.Recipe(epochs=2, batch_size=16, width=8, loader="tensor")
    where: dict[str, Any] = {"data_dir": dataset_dir, "out": tmp_path, "device": "cpu"}
    with pytest.raises(ValueError, match="at epoch 1"):
        fasttrain.train(recipe, **where, callbacks=[Failing()])
    finished = fasttrain.train(recipe, resume="auto", **where)
    assert finished.result["resumed"] == 1 and len(finished.epochs) == 2


def test_a_loaded_model_takes_pixels_and_has_the_accuracy_that_the_training_wrote(
    run: fasttrain.Run, dataset: fasttrain.Dataset
) -> None:
    for place in (run.folder, str(run.folder / "last.pt")):
        model = fasttrain.load_model(place, "cpu")
        assert not model.training and model.classes == dataset.classes and model.resolution == 32
        with torch.inference_mode():
            logits_NK = model(torch.from_numpy(dataset.test.images).permute(0, 3, 1, 2))
        hits = (logits_NK.argmax(1).numpy() == dataset.test.labels).sum()
        assert abs(hits / len(dataset.test.labels) - run.result["test_accuracy"]) <= 1 / 40  # bf16 or float32


def test_evaluate_gives_the_trainings_own_figure(
    run: fasttrain.Run, dataset: fasttrain.Dataset, dataset_dir: Path, capsys
) -> None:
    assert fasttrain.evaluate(run.folder, device="cpu").accuracy == run.result["test_accuracy"]
    assert capsys.readouterr().out == ""  # a function returns, and prints nothing
    elsewhere = fasttrain.evaluate(str(run.folder), data=dataset, split="train", device="cpu")
    assert elsewhere.labels_N.tolist() == dataset.train.labels.tolist()
    with pytest.raises(fasttrain.UserError, match="checkpoint"):
        fasttrain.evaluate(dataset_dir)


def test_predict_and_export_agree_with_the_loaded_model(
    run: fasttrain.Run, dataset: fasttrain.Dataset, tmp_path
) -> None:
    image_HWC = dataset.test.images[0]
    Image.fromarray(image_HWC).save(tmp_path / "one.png")
    [prediction] = fasttrain.predict(str(run.folder), str(tmp_path / "one.png"), top_k=10, device="cpu")
    model = fasttrain.load_model(run.folder, "cpu")
    with torch.inference_mode():
        [row_K] = model(torch.tensor(image_HWC).permute(2, 0, 1)[None]).softmax(1)
    expected = {name: row_K[index].item() for index, name in enumerate(model.classes)}
    assert dict(prediction.classes) == pytest.approx(expected, abs=1e-4)
    card = fasttrain.export(run.folder, str(tmp_path / "net.safetensors"))
    assert json.loads(card.read_text())["classes"] == list(model.classes)
    weights = np.frombuffer((tmp_path / "net.safetensors").read_bytes(), np.uint8)
    assert len(weights) > 4 * sum(parameter.numel() for parameter in model.parameters())


def test_the_keywords_of_train_are_its_options() -> None:
    typed, options = (
        typing.get_type_hints(one, localns={"Dataset": object}) for one in (TrainKeywords, TrainOptions)
    )
    assert {*typed} == {field.name for field in dataclasses.fields(TrainOptions)}
    in_a_shell = {"data", "data_dir", "out", "resume"}  # there all of them are text
    assert {name: typed[name] for name in typed if name not in in_a_shell} == {
        name: options[name] for name in typed if name not in in_a_shell
    }


USERS_SCRIPT = """
from pathlib import Path

import torch

import fasttrain


class Printer(fasttrain.Callback):
    def on_epoch_end(self, metrics: dict[str, float]) -> None:
        print(metrics["epoch"], metrics["test_accuracy"])


def main(folder: Path) -> float:
    recipe: fasttrain.Recipe = fasttrain.load_recipe("fast")
    run: fasttrain.Run = fasttrain.train(
        recipe, data="synthetic", data_dir=folder, out="runs", device="cpu", callbacks=[Printer()]
    )
    dataset: fasttrain.Dataset = fasttrain.load_dataset("synthetic", folder)
    loader = fasttrain.build_loader(dataset, recipe, train=True, device=torch.device("cpu"))
    for images, labels in loader:
        print(images.shape, labels.shape, loader.device)
    model = fasttrain.load_model(run.folder)
    logits: torch.Tensor = model(torch.zeros(1, 3, model.resolution, model.resolution))
    found = fasttrain.evaluate(run.folder, split="test", views="mirror")
    for prediction in fasttrain.predict(run.folder, ["cat.jpg", Path("dogs")]):
        print(prediction.path, prediction.classes[0][0].upper(), model.classes)
    card: Path = fasttrain.export(run.folder, "network.onnx")
    print(card, logits.argmax(1), found.accuracy_views, fasttrain.load_run(run.folder).recipe.epochs)
    return found.accuracy


print(main(Path("data")) + 1.0)
"""


def check_types(script: str, folder: Path) -> str:
    """What mypy --strict says about a user's script, outside of this project and its settings."""
    (folder / "script.py").write_text(script)
    (folder / "mypy.ini").write_text("[mypy]\nstrict = true\n[mypy-fasttrain.*]\nfollow_imports = silent\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", str(folder), "script.py"],
        cwd=folder,
        env=os.environ | {"MYPYPATH": str(Path(fasttrain.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.stdout + done.stderr


def test_a_users_script_passes_mypy_strict_and_a_mistake_does_not(tmp_path) -> None:
    pytest.importorskip("mypy")
    assert "Success: no issues found" in check_types(USERS_SCRIPT, tmp_path)
    said = check_types(USERS_SCRIPT.replace('device="cpu",', "divice=3,").replace("+ 1.0", '+ "1"'), tmp_path)
    assert (
        'Unexpected keyword argument "divice" for "train"' in said and "unsupported operand" in said.lower()
    )
