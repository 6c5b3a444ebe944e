"""A finished run in Python: the package's names, its plot, and what a notebook shows."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

import fasttrain
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe
from fasttrain.report.run import Run

ROOT = Path(__file__).parents[1]
HOSTILE = "<script>alert(1)</script>"


def write_run(folder: Path, **result: Any) -> Path:
    """A finished run of three epochs, as its files; keyword arguments replace figures of result.json."""
    epochs = [
        {"epoch": n, "train_loss": 2 / n, "train_accuracy": 0.2 * n, "lr": 0.01, "seconds": 10.0}
        | {"images_per_sec": 5000.0, "data_wait_share": 0.1}
        | {"test_loss": None if n == 2 else 1 / n, "test_accuracy": 0.25 * n, "test_seconds": 1.0}
        for n in (1, 2, 3)
    ]
    names = {"dataset": "CIFAR-10", "device": "cpu", "loader": "dali", "precision": "bf16", "compile": "off"}
    figures = {"test_accuracy": 0.75, "best_test_accuracy": 0.75, "best_epoch": 3, "max_lr": 0.01}
    figures |= {"train_seconds": 30.0, "test_seconds": 3.0, "compile_seconds": 0.0, "wall_seconds": 40.0}
    figures |= {"images_per_sec": 5000.0, "data_wait_share": 0.1, "mfu": 0.5, "matmul_tflops_measured": 1.0}
    figures |= {"peak_memory_gib": 1.0, "peak_resident_gib": 1.0}
    files = {
        "recipe.json": Recipe(epochs=3).to_dict(),
        "machine.json": {"cpu_cores": 2, "cpu_model": "a CPU"},
        "result.json": names | figures | result,
    }
    folder.mkdir()
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in epochs))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return fasttrain.load_run(str(write_run(tmp_path / "run")))


def test_the_packages_names_are_there_and_no_module_hides_one() -> None:
    assert {"train", "load_run", "load_recipe", "Recipe", "PRESETS", "Run"} <= set(dir(fasttrain))
    for name in fasttrain.__all__:
        assert getattr(fasttrain, name) is not None
        assert not (ROOT / "fasttrain" / f"{name}.py").exists()  # importing it would take the name's place
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = fasttrain.trian


@pytest.mark.parametrize("fallbacks", ["a line", [3], {}])
def test_fallbacks_that_are_no_lines_are_refused(fallbacks: object, tmp_path) -> None:
    with pytest.raises(UserError, match=r"result\.json: fallbacks is .*; expected a list of lines"):
        fasttrain.load_run(write_run(tmp_path / "run", fallbacks=fallbacks))


@pytest.mark.parametrize(
    ("file", "key", "value", "shown"),
    [
        ("result.json", "train_seconds", 10**400, "10000"),
        ("result.json", "images_per_sec", float("inf"), "inf"),
        ("result.json", "best_epoch", True, "True"),
        ("result.json", "mfu", -1, "-1"),
        ("machine.json", "ranks", None, "None"),
        ("machine.json", "cpu_model", 3, "3"),
        ("machine.json", "torch", {"a": []}, "{'a': []}"),
        ("metrics.jsonl", "seconds", float("nan"), "nan"),
    ],
)
def test_values_that_no_training_writes_are_refused_by_name(file, key, value, shown, tmp_path) -> None:
    path = write_run(tmp_path / "run") / file
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {key: value}), *others]))
    with pytest.raises(UserError, match=rf"{file}.*: {key} is {re.escape(shown)}") as refused:
        fasttrain.load_run(path.parent)
    assert len(str(refused.value)) < 400 + len(str(path))


def test_a_plot_shows_loss_accuracy_and_seconds(run: Run) -> None:
    loss, accuracy, seconds = run.plot().axes
    assert [axes.get_ylabel() for axes in (loss, accuracy, seconds)] == [
        "loss per image",
        "accuracy",
        "seconds",
    ]
    train, test = loss.lines
    assert list(train.get_ydata()) == [2, 1, 2 / 3]
    assert np.array_equal(test.get_ydata(), [1, np.nan, 1 / 3], equal_nan=True)
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "test"]
    assert list(accuracy.lines[1].get_ydata()) == [0.25, 0.5, 0.75]
    assert [bar.get_height() for bar in seconds.patches] == [9, 9, 9, 1, 1, 1]


def test_a_plot_displays_itself_without_pyplot(run: Run) -> None:
    code = f"""import sys, fasttrain
run = fasttrain.load_run({str(run.folder)!r})
png = run.plot()._repr_png_()
assert "matplotlib.pyplot" not in sys.modules
sys.stdout.buffer.write(png)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    picture_HWC = imread(io.BytesIO(done.stdout))
    assert picture_HWC.shape[1] > 2 * picture_HWC.shape[0]  # three side by side
    assert picture_HWC[0, 0].tolist() == [1, 1, 1, 1]  # white: legible on a dark notebook too


def test_a_notebook_shows_figures_and_curves_and_reaches_nowhere(run: Run) -> None:
    shown = run._repr_html_()
    for text in (
        "CIFAR-10",
        "75.00%",
        "30.0 s",
        "5,000 images/s",
        "10.00%",
        "50%",
        "2 cores of a CPU",
        "bf16",
    ):
        assert text in shown, text
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', shown)
    assert len(uris) == 3 == shown.count("<img")
    assert all(imread(io.BytesIO(base64.b64decode(uri))).std() > 0 for uri in uris)
    # Its styles are its elements' own: a style sheet would be the whole notebook's.
    assert not re.search(r"https?:|<script|<style|<link|class=", re.sub(r"base64,[^\"]+", "", shown))


def test_a_notebook_shows_names_escaped_and_no_unknown_figures(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", dataset=HOSTILE, mfu=None)
    shown = fasttrain.load_run(folder)._repr_html_()
    assert "<script" not in shown and "&lt;script&gt;" in shown
    assert "matmul" not in shown and "unknown" not in shown
