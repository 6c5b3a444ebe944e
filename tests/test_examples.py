"""The examples run as they are, in small: on the stand-in, or on a folder of its images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fasttrain
from fasttrain.data.sources import synthetic
from fasttrain.recipe import PRESETS, Recipe

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose data/ holds a small stand-in."""
    synthetic.generate(tmp_path / "data", train_count=256, test_count=40)
    monkeypatch.delenv("FASTTRAIN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_example(name: str, *args: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_has_a_test() -> None:
    names = [path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")]
    assert sorted(names) == ["fine_tune.py", "hosted_gpu.ipynb", "own_loop.py"]


def test_a_loop_of_ones_own_learns_the_stand_in(small_data: Path) -> None:
    said = run_example("own_loop.py", "synthetic", "12")
    accuracies = [float(figure) for figure in re.findall(r"epoch \d+: test accuracy ([\d.]+)%", said)]
    assert len(accuracies) == 12 and max(accuracies[6:]) >= 20  # chance is 10


def test_fine_tuning_takes_the_weights_to_a_folder(small_data: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=64, width=8, loader="tensor")
    trained = fasttrain.train(recipe, data="synthetic", device="cpu", report=False)
    dataset = fasttrain.load_dataset("synthetic")
    for index, (image_HWC, label) in enumerate(zip(dataset.train.images, dataset.train.labels, strict=True)):
        if label < 2:
            path = Path("shapes", dataset.classes[label], f"{index}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_HWC).save(path)
    said = run_example("fine_tune.py", str(trained.folder), "shapes", "2")
    assert f"weights from {trained.folder / 'last.pt'}" in said and "the last layer is new" in said
    assert "macro-F1" in said
    [page] = Path("runs").glob("*-fine-tuned/report.html")
    assert f"all of it to look at: {page}" in said


def test_the_notebook_trains_and_shows_the_mistakes(small_data: Path, monkeypatch, capsys) -> None:
    """Cell by cell, without those that install."""
    notebook = json.loads((EXAMPLES / "hosted_gpu.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
    monkeypatch.setitem(PRESETS, "default", Recipe(epochs=1, batch_size=64, width=8))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("%pip"):
            exec(source, names)
    run = names["run"]
    assert (run.folder / "report.html").exists() and Path("network.safetensors").exists()
    assert run._repr_html_() and names["found"].accuracy == run.result["test_accuracy"]
    shown = [axes.images[0].get_array() for axes in names["figure"].axes if axes.images]
    wrong = names["found"].misclassified()[: len(shown)].tolist()
    assert shown and all(
        (pixels == names["dataset"].test.images[index]).all()
        for pixels, index in zip(shown, wrong, strict=True)
    )
    assert f"{run.result['test_accuracy']:.2%} of 40 test images are right" in capsys.readouterr().out
