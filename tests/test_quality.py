"""What the benchmark of image quality trains on, and what it says."""

import json
from pathlib import Path

import numpy as np

from benchmarks import harness, tables
from benchmarks.research import quality
from fasttrain import trainer
from fasttrain.data import dataset
from fasttrain.data.sources import cifar


def test_coarser_images_are_farther_from_the_original_and_their_labels_stay(dataset_dir: Path) -> None:
    original = cifar.read(dataset_dir)
    coarse, coarser = (quality.at_quality(original, q) for q in (90, 10))

    def distance(dataset: dataset.Dataset) -> float:
        return float(np.abs(dataset.test.images.astype(int) - original.test.images).mean())

    assert 0 < 1.2 * distance(coarse) < distance(coarser)
    assert coarse.train.images.shape == original.train.images.shape and coarse.mean != original.mean
    assert np.array_equal(coarser.train.labels, original.train.labels)
    assert coarser.name.endswith("encoded once more at q10")


def test_it_trains_at_every_quality_and_continues_where_it_stopped(
    dataset_dir: Path, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(trainer, "measure_matmul_tflops", lambda *_, **__: 1.0)
    monkeypatch.setattr(harness, "MEASURED", tmp_path / "results")
    recipe = tmp_path / "tiny.json"
    recipe.write_text(json.dumps({"name": "tiny", "batch_size": 16, "loader": "tensor"}))
    options = quality.Options(
        qualities=(25,),
        base=str(recipe),
        seeds=2,
        epochs=1,
        width=4,
        out=tmp_path / "runs",
        data_dir=dataset_dir,
        device="cpu",
    )
    quality.main(options)
    monkeypatch.setattr(trainer, "train", None)  # everything is there: nothing is trained again
    quality.main(options)
    [path] = (tmp_path / "results").glob("*/quality.json")
    values = json.loads(path.read_text())
    assert [row["name"] for row in values["rows"]] == ["as they are", "q25"]
    assert values["rows"][0]["difference"] is None and values["rows"][1]["difference"]["n"] == 2
    assert len(values["runs"]) == 4
    assert "| q25 |" in tables.quality_table(tmp_path / "results")
