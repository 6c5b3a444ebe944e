"""The comparison of recipes: what it trains, on which images, and what it says of the results."""

import dataclasses
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import accuracy, harness, tables
from benchmarks.accuracy import Options
from benchmarks.stats import mean_interval
from fasttrain import trainer
from fasttrain.checkpoint.file import load_checkpoint
from fasttrain.errors import UserError
from fasttrain.recipe import PRESETS, Recipe, load_recipe
from fasttrain.step import TrainStep
from fasttrain.system.machine import hardware_name


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path) -> list[Recipe]:
    """No measuring, results in a folder of the test's own; returns the recipes that were trained."""
    monkeypatch.setattr(trainer, "measure_matmul_tflops", lambda *_, **__: 1.0)
    monkeypatch.setattr(trainer.Trainer, "_find_max_lr", lambda _: 0.002)
    monkeypatch.setattr(harness, "MEASURED", tmp_path / "results")
    begun: list[Recipe] = []
    train = trainer.train

    def counted(recipe: Recipe, **options: Any) -> Any:
        begun.append(recipe)
        return train(recipe, **options)

    monkeypatch.setattr(trainer, "train", counted)
    return begun


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A recipe's file that suits 64 images."""
    path = tmp_path / "tiny.json"
    path.write_text(
        json.dumps({"name": "tiny", "epochs": 2, "batch_size": 16, "width": 4, "loader": "tensor"})
    )
    return path


def options(base: Path, data: Path, tmp_path: Path, **fields: Any) -> Options:
    changes = ("flip_order=alternating", "ema_epochs=0.5")
    settings = {"changes": changes, "seeds": 2, "device": "cpu"} | fields
    return Options(base=str(base), data_dir=data, out=tmp_path / "runs", **settings)


def result(tmp_path: Path, name: str) -> dict[str, Any]:
    [path] = (tmp_path / "results").glob(f"*/{name}*.json")
    return json.loads(path.read_text())


def test_ablations_pair_the_seeds_and_change_one_field(base, dataset_dir, tmp_path, tiny, capsys) -> None:
    accuracy.main(options(base, dataset_dir, tmp_path))
    assert len(tiny) == 6
    for seed in (0, 1):
        plain, *others = [recipe for recipe in tiny if recipe.seed == seed]
        for recipe, field in zip(others, ("flip_order", "ema_epochs"), strict=True):
            ours, theirs = recipe.to_dict(), plain.to_dict()
            assert {key for key in ours if ours[key] != theirs[key]} == {field}
    values = result(tmp_path, "ablations-tiny")
    assert values["dataset"] == "synthetic, a tenth of the training images held out"
    assert (values["train_images"], values["test_images"], values["n"], values["width"]) == (54, 10, 2, 4)
    assert set(values["epochs"].values()) == {2}
    measured = {(run["variant"], run["seed"]): run["test_accuracy"] for run in values["runs"]}
    changed = {row["name"]: row for row in values["rows"]}
    assert list(changed) == ["none, tiny", "flip_order=alternating", "ema_epochs=0.5", "test_views=mirror"]
    for change in ("flip_order=alternating", "ema_epochs=0.5"):
        pairs = [measured[f"tiny-{change}", seed] - measured["tiny", seed] for seed in (0, 1)]
        assert changed[change]["difference"] == mean_interval(pairs)
    assert "flip_order=alternating" in capsys.readouterr().out
    table = tables.ablations_table(tmp_path / "results")
    [ema] = [line for line in table.splitlines() if line.startswith("| ema_epochs=0.5")]
    assert accuracy.points(changed["ema_epochs=0.5"]["difference"], "+") in ema
    assert "2 epochs, width 4" in table and "held out" in table
    assert tables.final_table(tmp_path / "results") == "Not measured yet."


def test_a_difference_is_that_of_the_pairs_that_both_have() -> None:
    def runs(**accuracies: float) -> dict[int, Any]:
        return {
            int(seed[1:]): SimpleNamespace(
                recipe=Recipe(test_views="mirror"),
                result={"test_accuracy": accuracy, "test_accuracy_views": 0.95},
            )
            for seed, accuracy in accuracies.items()
        }

    base, other = runs(s0=0.5, s1=0.7, s2=0.9), runs(s0=0.6, s1=0.9)
    first, changed, flip = accuracy.ablation_rows({"tiny": base, "tiny-cutout=4": other})
    assert first["name"] == "none, tiny" and first["accuracy"]["mean"] == pytest.approx(0.7)
    assert changed["name"] == "cutout=4" and changed["difference"]["n"] == 2
    assert changed["difference"]["mean"] == pytest.approx(0.15)  # of +0.1 and +0.2
    assert flip["name"] == "test_views=mirror" and flip["difference"]["mean"] == pytest.approx(0.25)


def test_it_continues_where_it_stopped(base, dataset_dir, tmp_path, tiny, monkeypatch, capsys) -> None:
    """A first visit ends in the middle of the third run; the second trains what is left of it and no more."""
    take = TrainStep.__call__
    steps: list[int] = []

    def stepped(self: TrainStep, *batch: Any) -> None:
        take(self, *batch)
        steps.append(self.step)
        if len(steps) == 2 * 6 + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(TrainStep, "__call__", stepped)
    with pytest.raises(SystemExit) as stopped:
        accuracy.main(options(base, dataset_dir, tmp_path))
    assert stopped.value.code == 143 and "the same command resumes" in capsys.readouterr().err
    assert len(result(tmp_path, "ablations-tiny")["runs"]) == 2
    accuracy.main(options(base, dataset_dir, tmp_path))
    assert len(steps) == 6 * 6 and len(tiny) == 3 + 4
    values = result(tmp_path, "ablations-tiny")
    assert [run["resumed"] for run in values["runs"] if run["variant"] == "tiny-ema_epochs=0.5"] == [1, 0]
    assert not list((tmp_path / "runs").rglob("*.pt"))
    accuracy.main(options(base, dataset_dir, tmp_path))
    assert len(steps) == 6 * 6 and len(tiny) == 3 + 4


def test_a_finished_run_put_there_is_read_and_not_trained(base, dataset_dir, tmp_path, tiny) -> None:
    """As `fasttrain train --recipe tiny.json` left it: under its own name, without test_views."""
    recipe = load_recipe(str(base))
    place = tmp_path / "runs" / "final" / "tiny" / "seed-1"
    seeded = dataclasses.replace(recipe, seed=1)
    trainer.train(seeded, data_dir=dataset_dir, out=place, device="cpu", report=False)
    [folder] = place.iterdir()
    machine = json.loads((folder / "machine.json").read_text())
    elsewhere = machine | {"cpu_model": "Other", "git_commit": "0123456789"}
    (folder / "machine.json").write_text(json.dumps(elsewhere))
    accuracy.main(options(base, dataset_dir, tmp_path, mode="final", presets=(str(base),)))
    assert [recipe.seed for recipe in tiny] == [1, 0]
    assert load_checkpoint(folder / "last.pt")  # nobody else's checkpoints are removed
    values = result(tmp_path, "final-tiny")
    assert values["dataset"] == "synthetic" and values["test_images"] == 40
    [row] = values["rows"]
    assert (row["accuracy"]["n"], row["accuracy_views"]["n"]) == (2, 1)
    table = tables.final_table(tmp_path / "results")  # both machines, each with its commit
    precision = json.loads((folder / "result.json").read_text())["precision"]
    assert all(f"{hardware_name(where)}, {precision}" in table for where in (machine, elsewhere))
    assert "commit 012345678" in table and f"commit {machine['git_commit'][:9]}" in table


@pytest.mark.parametrize(
    ("spoil", "said"), [({"cutout": 4}, "--cutout 4 instead of 8"), ({"seed": 3}, "--seed 3 instead of 0")]
)
def test_a_run_of_another_recipe_is_refused_by_name(spoil, said, base, dataset_dir, tmp_path) -> None:
    accuracy.main(options(base, dataset_dir, tmp_path, changes=("cutout=4",), seeds=1))
    [path] = (tmp_path / "runs" / "ablations" / "tiny" / "seed-0").glob("*/recipe.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | spoil))
    with pytest.raises(UserError, match=said):
        accuracy.main(options(base, dataset_dir, tmp_path, changes=("cutout=4",), seeds=1))


def test_a_run_on_other_images_is_refused(base, dataset_dir, tmp_path) -> None:
    accuracy.main(options(base, dataset_dir, tmp_path, changes=("cutout=4",), seeds=1))
    [path] = (tmp_path / "runs" / "ablations" / "tiny" / "seed-0").glob("*/result.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dataset": "synthetic"}))
    with pytest.raises(UserError, match="its images are synthetic, not synthetic, a tenth of"):
        accuracy.main(options(base, dataset_dir, tmp_path, changes=("cutout=4",), seeds=1))


def test_every_preset_has_its_fields_ablated_and_no_value_is_tried_against_itself() -> None:
    for name in ("default", "fast"):
        found = accuracy.variants(Options(base=name))
        assert next(iter(found)) == name and len(set(map(repr, found.values()))) == len(found)
        fields = {key.removeprefix(f"{name}-").split("=")[0] for key in list(found)[1:]}
        assert fields == set(accuracy.CHANGES)
        assert all(recipe.test_views == "mirror" for recipe in found.values())
    final = accuracy.variants(Options(mode="final", epochs=3))
    assert list(final) == ["assignment", "default", "fast", "speedrun", "laptop"]
    assert final["assignment"] == dataclasses.replace(PRESETS["assignment"], test_views="mirror", epochs=3)
    assert final["speedrun"] == dataclasses.replace(PRESETS["speedrun"], epochs=3)  # it has views of its own


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("cutout",), "expected field=value"),
        (("cutout=99",), "--cutout 99"),
        (("cut=1",), "unknown recipe key"),
    ],
)
def test_a_change_that_is_none_is_one_line(changes, said) -> None:
    with pytest.raises(UserError, match=said):
        accuracy.variants(Options(changes=changes))
