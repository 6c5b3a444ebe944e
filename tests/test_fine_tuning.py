"""Training that starts from another training's weights: --init-from."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fasttrain.checkpoint.network import find_start, initial_model, load_trained_model
from fasttrain.cli import main
from fasttrain.data.dataset import Dataset, Split
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe
from fasttrain.report.run import Run
from fasttrain.trainer import train

RECIPE = Recipe(epochs=8, batch_size=16, width=8, loader="tensor", cutout=0, crop_padding=0, weight_decay=0.0)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["resnet", "compact"])
def trained(request, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A network that has learned something: more than one in ten of its own training images."""
    recipe = dataclasses.replace(RECIPE, network=request.param, seed=3)
    learned = dataclasses.replace(dataset, test=dataset.train)
    run = train(recipe, data=learned, out=tmp_path_factory.mktemp("runs"), device="cpu", report=False)
    assert run.result["test_accuracy"] > 0.2
    return run


def tuned(trained: Run, **changes: Any) -> Recipe:
    return dataclasses.replace(trained.recipe, seed=4, epochs=1, init_from=str(trained.folder), **changes)


def test_a_training_that_changes_nothing_has_the_accuracy_of_the_one_it_starts_from(
    trained: Run, dataset: Dataset, tmp_path, capsys
) -> None:
    learned = dataclasses.replace(dataset, test=dataset.train)
    recipe = tuned(trained, max_lr=1e-12, bn_momentum=1e-9)
    run = train(recipe, data=learned, out=tmp_path, device="cpu", report=False)
    assert run.result["test_accuracy"] == trained.result["test_accuracy"]
    assert run.column("test_loss")[-1] == pytest.approx(trained.column("test_loss")[-1], rel=1e-5)
    line = f"weights from {trained.folder / 'last.pt'}, epoch 8 on {dataset.name}\n"
    assert line in capsys.readouterr().out


def test_other_classes_get_a_new_last_layer_and_keep_the_rest(trained: Run, dataset: Dataset) -> None:
    fewer = dataclasses.replace(dataset, classes=("a", "b", "c"), mean=(0.1, 0.2, 0.3))
    said: list[str] = []
    torch.manual_seed(0)
    model = initial_model(fewer, tuned(trained, logit_scale=0.5), said.append).state_dict()
    source = load_trained_model(trained.folder, CPU).model.state_dict()
    assert model["fc.weight"].shape[0] == 3 and model["logit_scale"] == 0.5
    assert model.keys() == source.keys()
    for name in source.keys() - {"fc.weight", "fc.bias", "logit_scale"}:  # with the statistics of the pixels
        assert torch.equal(model[name], source[name]), name
    assert len(said) == 1 and said[0].endswith("; the last layer is new, since the classes differ")
    renamed = dataclasses.replace(dataset, classes=dataset.classes[::-1])
    head = initial_model(renamed, tuned(trained)).state_dict()["fc.weight"]
    assert head.shape == source["fc.weight"].shape and not torch.equal(head, source["fc.weight"])


def test_another_network_is_one_line_that_says_what_to_add(trained: Run, dataset: Dataset) -> None:
    other = {"resnet": "compact", "compact": "resnet"}[trained.recipe.network]
    recipe = tuned(trained, width=4, activation="gelu", logit_scale=2.0)
    recipe = dataclasses.replace(recipe, network=other)
    flags = f"--network {trained.recipe.network} --width 8 --activation relu --logit-scale 1.0"
    with pytest.raises(UserError, match=f"its network is another one; add {flags}$"):
        find_start(recipe, dataset)
    with pytest.raises(UserError, match=r"its network needs a --resolution below 128$"):
        find_start(tuned(trained, resolution=128), dataset)
    assert find_start(tuned(trained, resolution=64), dataset) == tuned(trained, resolution=64)


def test_latest_is_the_run_that_it_was_when_the_training_began(
    trained: Run, dataset: Dataset, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    folder = Path("runs", trained.folder.name)
    folder.symlink_to(trained.folder)
    run = train(
        dataclasses.replace(tuned(trained), init_from="latest"), data=dataset, device="cpu", report=False
    )
    assert run.recipe.init_from == str(folder)


def test_what_is_no_checkpoint_is_one_line_and_leaves_no_run(dataset_dir: Path, tmp_path, capsys) -> None:
    args = ["train", "--init-from", str(tmp_path / "none"), "--data-dir", str(dataset_dir), "--device", "cpu"]
    assert main([*args, "--width", "8", "--batch-size", "16", "--out", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err
    assert "none" in said and said.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_training_with_balanced_classes_minimises_the_weighted_loss(
    dataset: Dataset, label_smoothing: float, tmp_path
) -> None:
    """In one step on all images, the training loss of a run is torch's over each class, on average."""
    labels = np.repeat([0, 1, 2], [20, 15, 5])
    data = dataclasses.replace(dataset, train=Split(dataset.train.images[:40], labels))
    recipe = dataclasses.replace(RECIPE, batch_size=40, epochs=1, flip=False, compute_dtype="fp32")
    recipe = dataclasses.replace(recipe, label_smoothing=label_smoothing, class_weights="balanced")
    run = train(recipe, data=data, out=tmp_path, device="cpu", report=False)
    torch.manual_seed(recipe.seed)
    model = initial_model(data, recipe).train()
    logits_NK = model(torch.from_numpy(data.train.images).permute(0, 3, 1, 2))
    labels_N = torch.from_numpy(labels)
    per_class = [
        torch.nn.functional.cross_entropy(
            logits_NK[labels_N == label], labels_N[labels_N == label], label_smoothing=label_smoothing
        ).item()
        for label in range(3)
    ]
    assert run.column("train_loss") == pytest.approx([sum(per_class) / 3], rel=1e-4)


def test_a_resumed_training_does_not_need_the_other_any_more(
    trained: Run, dataset: Dataset, tmp_path, monkeypatch
) -> None:
    recipe = tuned(trained)
    whole = train(recipe, data=dataset, out=tmp_path / "whole", device="cpu", report=False)
    monkeypatch.setattr("fasttrain.trainer.Trainer.train_epoch", fail)
    with pytest.raises(UserError, match="stopped"):
        train(recipe, data=dataset, out=tmp_path / "cut", device="cpu", report=False)
    monkeypatch.undo()
    monkeypatch.setattr("fasttrain.checkpoint.network.Path", fail)  # what --init-from says is not looked at
    cut = train(recipe, data=dataset, resume="auto", out=tmp_path / "cut", device="cpu", report=False)
    for name, tensor in load_trained_model(whole.folder, CPU).model.state_dict().items():
        assert torch.equal(tensor, load_trained_model(cut.folder, CPU).model.state_dict()[name]), name


def fail(*_: object) -> None:
    raise RuntimeError("stopped")
