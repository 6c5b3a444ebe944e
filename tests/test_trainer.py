"""The command line from end to end, on a data set of 64 images."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from fasttrain import compile, runtime
from fasttrain.checkpoint.file import load_checkpoint
from fasttrain.cli import main
from fasttrain.compile import CompileEstimate
from fasttrain.data.sources import cifar
from fasttrain.errors import UserError
from fasttrain.full_recipe import is_laptop
from fasttrain.model import CompactNet, CustomResNet, mean_flop_per_image, training_flop_per_image
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.report import network_table
from fasttrain.system.machine import cpu_cores
from fasttrain.trainer import train

RESULT_KEYS = {
    "recipe",
    "dataset",
    "device",
    "precision",
    "epochs",
    "test_accuracy",
    "best_test_accuracy",
    "epoch_seconds",
    "train_seconds",
    "compile_seconds",
    "setup_seconds",
    "wall_seconds",
    "images_per_sec",
    "data_wait_share",
    "mfu",
    "matmul_tflops_measured",
}


def train_two_epochs(data_dir: Path, out: Path) -> int:
    """Two epochs of four steps by the command line; returns its exit status."""
    flags = ["--device", "cpu", "--epochs", "2", "--batch-size", "16"]
    return main(["train", "--data-dir", str(data_dir), "--out", str(out), *flags])


@pytest.fixture(scope="module")
def run(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs of four steps, made by the command line."""
    out = tmp_path_factory.mktemp("runs")
    assert train_two_epochs(dataset_dir, out) == 0
    [folder] = out.iterdir()
    return folder


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_folder(run: Path) -> None:
    assert {path.name for path in run.iterdir()} == {
        "recipe.json",
        "machine.json",
        "data.json",
        "metrics.jsonl",
        "result.json",
        "last.pt",
        "previous.pt",
        "best.pt",
        "report.html",
    }
    assert run.name.endswith("-laptop")  # what --recipe auto takes without a GPU
    recipe = Recipe.from_dict(json.loads((run / "recipe.json").read_text()))
    assert (recipe.epochs, recipe.batch_size, recipe.name) == (2, 16, "laptop")


def test_result_holds_the_run_and_agrees_with_the_metrics(run: Path) -> None:
    result, metrics = json.loads((run / "result.json").read_text()), rows(run)
    assert result.keys() >= RESULT_KEYS
    assert result["dataset"] == "synthetic"
    assert [row["epoch"] for row in metrics] == [1, 2]
    assert result["test_accuracy"] == metrics[-1]["test_accuracy"]
    assert result["best_test_accuracy"] == max(row["test_accuracy"] for row in metrics)
    assert result["epoch_seconds"] == [row["seconds"] for row in metrics]
    assert result["train_seconds"] == pytest.approx(sum(result["epoch_seconds"]))
    assert result["images_per_sec"] == pytest.approx(2 * 64 / result["train_seconds"])
    assert result["wall_seconds"] > result["train_seconds"]
    assert 0 <= result["data_wait_share"] < 1 and 0 < result["mfu"] < 1.5


def test_checkpoints_load_safely_into_a_plain_model(run: Path) -> None:
    result, metrics = json.loads((run / "result.json").read_text()), rows(run)
    for name, epoch in (("last.pt", 2), ("best.pt", result["best_epoch"])):
        state = load_checkpoint(run / name)
        assert state["epoch"] == epoch and state["batch_size"] == 16
        assert state["loss"] == metrics[epoch - 1]["train_loss"]
        CompactNet().load_state_dict(state["model"])  # uncompiled names
        assert state["scheduler"]["step"] == 4 * epoch


def test_evaluate_gives_the_accuracy_that_the_run_ended_with(run: Path, dataset_dir: Path, capsys) -> None:
    assert main(["evaluate", str(run / "last.pt"), "--data-dir", str(dataset_dir), "--device", "cpu"]) == 0
    accuracy = json.loads((run / "result.json").read_text())["test_accuracy"]
    assert f"test accuracy {accuracy:.2%}" in capsys.readouterr().out


def test_averaged_predictions_are_a_second_figure_everywhere(dataset_dir: Path, tmp_path, capsys) -> None:
    out = tmp_path / "runs"
    fast = ["--recipe", "fast", "--epochs", "1", "--batch-size", "16", "--width", "8", "--loader", "tensor"]
    data = ["--data-dir", str(dataset_dir), "--device", "cpu"]
    assert main(["train", *fast, *data, "--out", str(out)]) == 0
    [folder] = out.iterdir()
    said = capsys.readouterr().out
    result, [row] = json.loads((folder / "result.json").read_text()), rows(folder)
    first, second = result["test_accuracy"], result["test_accuracy_views"]
    assert (row["test_accuracy"], row["test_accuracy_views"]) == (first, second)
    assert f"; {second:.2%} with averaged predictions" in said
    assert f"mirror image gives {second:.2%}" in " ".join((folder / "report.html").read_text().split())
    assert main(["evaluate", str(folder / "last.pt"), *data, "--views", "mirror"]) == 0
    said = capsys.readouterr().out
    assert said.index(f"test accuracy {first:.2%}") < said.index(
        f"averaged predictions (mirror): {second:.2%}"
    )
    assert main(["evaluate", str(folder / "last.pt"), *data]) == 0
    assert "averaged predictions" not in capsys.readouterr().out
    (folder / "result.json").write_text(json.dumps(result | {"test_accuracy_views": "high"}))
    assert main(["report", str(folder)]) == 2
    assert "test_accuracy_views is 'high'" in capsys.readouterr().err


def test_the_share_of_the_matmul_rate_counts_shrunk_images_as_what_they_are() -> None:
    model = CustomResNet(width=8)
    recipe = Recipe(early_scale=0.5, early_share=0.5)
    expected = (training_flop_per_image(model, 16) + training_flop_per_image(model)) / 2
    assert mean_flop_per_image(model, recipe, 4) == expected < 0.7 * training_flop_per_image(model)


def test_evaluate_refuses_another_data_set(run: Path, dataset_dir: Path, tmp_path, capsys) -> None:
    state = load_checkpoint(run / "last.pt")
    torch.save(state | {"classes": list(cifar.CIFAR10.classes), "dataset": "CIFAR-10"}, tmp_path / "other.pt")
    assert main(["evaluate", str(tmp_path / "other.pt"), "--data-dir", str(dataset_dir)]) == 2
    assert "was trained on CIFAR-10, not on synthetic" in capsys.readouterr().err


def test_two_runs_of_one_seed_are_equal_bit_for_bit(run: Path, dataset_dir: Path, tmp_path) -> None:
    recipe = Recipe.from_dict(json.loads((run / "recipe.json").read_text()))
    train(recipe, data_dir=dataset_dir, out=tmp_path, device="cpu", report=False)
    [again] = tmp_path.iterdir()
    ours, theirs = (load_checkpoint(folder / "last.pt")["model"] for folder in (again, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("pays", [False, True])
def test_auto_compiles_where_it_pays_and_a_resumed_run_keeps_what_was_decided(
    pays: bool, dataset_dir: Path, tmp_path, monkeypatch, capsys
) -> None:
    gain = CompileEstimate(
        steps=4, step_seconds=2.0, floor_seconds=0.5, compile_seconds=1.0 if pays else 60.0
    )
    compile_, calls = torch.compile, []
    monkeypatch.setattr(runtime, "pick_compile_mode", lambda *_: "default")
    monkeypatch.setattr(compile, "estimate_compile", lambda *_: calls.append("asked") or gain)
    monkeypatch.setattr(torch, "compile", lambda model, **_: compile_(model, backend="aot_eager"))
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: None)
    settings = {"data_dir": dataset_dir, "out": tmp_path, "device": "cpu", "report": False}
    recipe = Recipe(epochs=1, batch_size=16, width=8)
    result = train(recipe, **settings).result
    assert result["compile"] == ("default" if pays else "off")
    assert (result["compile_seconds"] > 0) is pays
    out = capsys.readouterr().out
    assert "about 2.3 s to gain in 4 steps" in out and ("compiled (default)" in out) is pays

    [folder] = tmp_path.iterdir()
    (folder / "result.json").unlink()  # as if it had been killed behind its last checkpoint
    gain = dataclasses.replace(gain, compile_seconds=60.0 if pays else 1.0)  # what it would decide now
    assert train(recipe, resume=folder, **settings).result["compile"] == result["compile"]
    assert calls == ["asked"]


@pytest.mark.gpu(seconds=5)
@pytest.mark.parametrize("recipe", ["default", "assignment", "speedrun"])
def test_a_gpu_run_trains_captures_its_step_and_can_be_evaluated(
    recipe: str, dataset_dir: Path, tmp_path, capsys
) -> None:
    small = ["--epochs", "3", "--batch-size", "16", "--max-lr", "0.005", "--device", "cuda"]
    folders = ["--data-dir", str(dataset_dir), "--out", str(tmp_path)]
    assert main(["train", "--recipe", recipe, *small, *folders]) == 0
    out = capsys.readouterr().out
    [folder] = tmp_path.iterdir()
    result = json.loads((folder / "result.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert result["loader"].endswith("-gpu") and result["device"] == "cuda" and result["compile"] == "off"
    assert "s to gain" in out and rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert main(["evaluate", str(folder / "last.pt"), "--data-dir", str(dataset_dir)]) == 0


def test_the_laptop_recipe_says_what_the_full_one_would_take(dataset_dir: Path, tmp_path, capsys) -> None:
    recipe = Recipe(name="laptop", epochs=1, batch_size=32)
    train(recipe, data_dir=dataset_dir, out=tmp_path, device="cpu", report=False)
    out = capsys.readouterr().out
    again = f"fasttrain train --recipe default --data-dir {dataset_dir} --device cpu --out {tmp_path}"
    assert out.count("would take about") == 1 and again in out
    assert "\x1b" not in out and "\r" not in out  # piped: plain lines


def test_tensorboard_shows_the_metrics_of_every_epoch_and_the_images(dataset_dir: Path, tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = ["--epochs", "2", "--batch-size", "32", "--width", "8", "--device", "cpu", "--tensorboard"]
    assert main(["train", "--data-dir", str(dataset_dir), "--out", str(tmp_path), *flags]) == 0
    [folder] = tmp_path.iterdir()
    events = EventAccumulator(str(folder)).Reload()
    metrics = rows(folder)
    assert set(events.Tags()["scalars"]) == metrics[-1].keys() - {"epoch"}
    for key in events.Tags()["scalars"]:
        written = [(event.step, event.value) for event in events.Scalars(key)]
        assert written == [(row["epoch"], pytest.approx(row[key], rel=1e-5)) for row in metrics if key in row]
    [grid] = events.Images("augmented training images")
    assert (grid.width, grid.height) == (8 * 32, 3 * 32)


def test_tensorboard_where_it_is_missing_is_one_line_and_no_folder(
    dataset_dir: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    assert main(["train", "--data-dir", str(dataset_dir), "--out", str(tmp_path), "--tensorboard"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'fasttrain-dali[tensorboard]'" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_max_lr_auto_asks_the_finder_first(dataset_dir: Path, tmp_path, monkeypatch) -> None:
    from fasttrain import trainer as train_module
    from fasttrain.lr_finder import LrSearch

    monkeypatch.setattr(train_module, "find_max_lr", lambda *_, **__: LrSearch([], [0.003, 0.002, 0.001]))
    recipe = Recipe(epochs=1, batch_size=32, width=8, max_lr="auto")
    run = train(recipe, data_dir=dataset_dir, out=tmp_path, device="cpu", report=False)
    assert run.result["max_lr"] == 0.002
    monkeypatch.setattr(train_module, "find_max_lr", lambda *_, **__: LrSearch([], [0.5, 0.002]))
    with pytest.raises(UserError, match=r"--max-lr auto: the tries suggest 0\.002 to 0\.5"):
        train(recipe, data_dir=dataset_dir, out=tmp_path / "none", device="cpu", report=False)
    [folder] = (tmp_path / "none").iterdir()
    assert json.loads((folder / "lr_find.json").read_text())["max_lr"] is None


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["train", "--recipe", "fastest"], "--recipe fastest"),
        (["train", "--epochs", "0"], "--epochs 0"),
        (["train", "--data-dir", "{tmp}/none", "--data", "cifar10"], "none"),
        (["train", "--batch-size", "65", "--data-dir", "{data}"], "--batch-size 65"),
        (["train", "--out", "{tmp}/file", "--data-dir", "{data}", "--batch-size", "16"], "--out"),
        (["train", "--device", "tpu"], "--device tpu"),
        (["evaluate", "{tmp}/none.pt", "--data-dir", "{data}"], "none.pt"),
        (["data", "--data-dir", "{tmp}/torn"], "test_batch.bin"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(
    args, said, dataset_dir, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("FASTTRAIN_MIRRORS", "file:///nowhere/cifar.tar.gz")
    (tmp_path / "file").write_text("")
    torn = tmp_path / "torn" / "cifar-10-batches-bin"
    torn.mkdir(parents=True)
    for path in (dataset_dir / "cifar-10-batches-bin").iterdir():
        (torn / path.name).write_bytes(path.read_bytes())
    (torn / "test_batch.bin").write_bytes(b"\0" * 100)
    args = [arg.format(tmp=tmp_path, data=dataset_dir) for arg in args]
    assert main(args) == 2
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1] and "Traceback" not in error
    tried = error.splitlines()[:-1]  # a download says what it tries
    assert all("CIFAR-10" in line or "cifar-10" in line for line in tried) and (
        "cifar10" in args or not tried
    )


@pytest.mark.parametrize("args", [["train", "--epoks", "3"], ["train", "--epochs", "three"], ["fly"]])
def test_a_wrong_flag_exits_with_status_2(args, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        sys.exit(main(args))
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


def test_help_of_train_shows_the_chosen_recipes_defaults(capsys) -> None:
    for name in ("laptop", "assignment"):
        with pytest.raises(SystemExit):
            main(["train", "--recipe", name, "--help"])
        out = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert f"Passes over the training images. (default: {PRESETS[name].epochs})" in out


def test_summary_names_the_least_time_of_an_epoch_on_this_machine(monkeypatch, capsys) -> None:
    monkeypatch.setattr(network_table, "measure_matmul_tflops", lambda *_: 10.0)
    monkeypatch.setattr(network_table, "pick_precision", lambda *_: "fp32")
    assert main(["summary", "--device", "cpu", "--recipe", "assignment"]) == 0
    out = capsys.readouterr().out
    assert "6,573,130" in out and f"{cpu_cores()} cores" in out
    assert "10 TFLOP/s of fp32 matmul" in out and "take 11.4 s an epoch" in out  # 113.8 / 10
    assert main(["summary", "--device", "cpu", "--resolution", "64"]) == 0  # of the recipe used here
    assert "[1, 3, 64, 64]" in capsys.readouterr().out
    assert main(["summary", "--device", "tpu"]) == 2


def test_data_and_doctor_answer(dataset_dir: Path, capsys) -> None:
    assert main(["data", "--data-dir", str(dataset_dir)]) == 0
    out = capsys.readouterr().out
    assert "synthetic" in out and "test_batch.bin" in out and "rings" in out
    assert main(["doctor", "--device", "cpu"]) == 0


@pytest.mark.parametrize(("device", "expected"), [("cpu", True), ("cuda", False)])
def test_only_a_cpu_is_told_that_it_has_no_gpu(device: str, expected: bool) -> None:
    assert is_laptop(PRESETS["laptop"], torch.device(device)) is expected
