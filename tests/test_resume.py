"""Runs of a tiny network that are stopped, spoilt and resumed."""

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fasttrain import runtime as runtime_module
from fasttrain import trainer
from fasttrain.checkpoint import manager
from fasttrain.checkpoint import resume as resume_module
from fasttrain.checkpoint.file import load_checkpoint, save_checkpoint
from fasttrain.checkpoint.resume import ResumePoint
from fasttrain.checkpoint.state import Progress
from fasttrain.checkpoint.writer import CheckpointWriter
from fasttrain.cli import main
from fasttrain.data import build_loader as build_loader_module
from fasttrain.data.build_loader import build_loader
from fasttrain.data.dataset import Dataset
from fasttrain.data.loader import Loader
from fasttrain.data.sources import cifar
from fasttrain.errors import DivergedError, Interrupted, UserError
from fasttrain.evaluation import evaluate
from fasttrain.model import build_model
from fasttrain.options import EvaluateOptions
from fasttrain.recipe import Recipe, flag
from fasttrain.report.run import load_run
from fasttrain.runtime import Runtime
from fasttrain.step import TrainStep
from fasttrain.system import precision
from fasttrain.system.files import hold_folder
from fasttrain.system.run_folder import find_unfinished
from fasttrain.tools.evaluate_checkpoint import evaluate_checkpoint
from tests.soak.trainings import outcome, same

RECIPE = Recipe(
    name="tiny", epochs=3, batch_size=16, width=2, dropout=0.1, compute_dtype="fp32", loader="tensor"
)
STEPS_PER_EPOCH = 4

RUNTIME = Runtime(device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch) -> None:
    monkeypatch.setattr(trainer, "measure_matmul_tflops", lambda *_, **__: 1.0)


def train(data: Path, out: Path, recipe: Recipe = RECIPE, **options: Any) -> Path:
    """Train without a page; returns the run's folder."""
    trainer.train(recipe, data_dir=data, out=out, device="cpu", report=False, **options)
    return only(out)


def only(out: Path) -> Path:
    [folder] = out.iterdir()
    return folder


def after_step(monkeypatch, number: int, action) -> None:
    """Call `action` on the training step, once, when it has taken this many steps."""
    take = TrainStep.__call__
    left = [action]

    def stepped(self: TrainStep, *batch: torch.Tensor) -> None:
        take(self, *batch)
        if self.step == number and left:
            left.pop()(self)

    monkeypatch.setattr(TrainStep, "__call__", stepped)


def send(signum: int):
    return lambda _: os.kill(os.getpid(), signum)


def stop_at(data: Path, out: Path, number: int, monkeypatch, **options: Any) -> Path:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        after_step(patch, number, send(signal.SIGTERM))
        train(data, out, **options)
    return only(out)


@pytest.fixture(scope="module")
def whole(dataset_dir: Path, tmp_path_factory) -> Path:
    """A run that nobody disturbed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "measure_matmul_tflops", lambda *_, **__: 1.0)
        return train(dataset_dir, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("number", [1, 3, STEPS_PER_EPOCH, 6, 3 * STEPS_PER_EPOCH])
def test_a_stopped_run_ends_with_the_same_bits(number, whole, dataset_dir, tmp_path, monkeypatch) -> None:
    """Stopped in the first epoch, at an epoch's last step, in a later epoch, and at the very last step."""
    folder = stop_at(dataset_dir, tmp_path, number, monkeypatch)
    assert load_checkpoint(folder / "last.pt")["scheduler"]["step"] == number
    assert not (folder / "result.json").exists()
    assert train(dataset_dir, tmp_path, resume="auto") == folder
    assert same(outcome(folder), outcome(whole))
    assert json.loads((folder / "result.json").read_text())["resumed"] == 1


def test_auto_takes_the_run_that_began_last_even_if_the_clock_was_set_back(tmp_path) -> None:
    """At the end of summer time, 02:10 comes after 02:50; and names of the same second say nothing."""
    names = ["20261025-025000-default", "20261025-021000-default", "20261025-021000-default-10"]
    names += ["20261025-021000-default-2", "20261025-021000-assignment"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").touch()
        assert find_unfinished("auto", tmp_path) == tmp_path / name
        time.sleep(0.02)  # some file systems count in hundredths of a second
    (tmp_path / names[-1] / "result.json").touch()
    assert find_unfinished("auto", tmp_path) == tmp_path / names[-2]


def test_a_batch_that_was_fitted_to_few_images_is_kept_by_the_run(dataset_dir, tmp_path, monkeypatch) -> None:
    large = dataclasses.replace(RECIPE, batch_size=Recipe.batch_size)  # of 512, with 64 images
    folder = stop_at(dataset_dir, tmp_path, 3, monkeypatch, recipe=large)
    assert json.loads((folder / "recipe.json").read_text())["batch_size"] == 32
    assert load_checkpoint(folder / "last.pt")["recipe"]["batch_size"] == 32
    resume_it = ["train", "--resume", str(folder), "--data-dir", str(dataset_dir), "--device", "cpu"]
    assert main(resume_it) == 0
    assert load_run(folder).result["recipe"]["batch_size"] == 32
    assert len(load_run(folder).epochs) == 3


def test_the_loader_of_dali_resumes_too(dataset_dir, tmp_path, monkeypatch) -> None:
    recipe = dataclasses.replace(RECIPE, loader="dali", compute_dtype="auto")
    undisturbed = train(dataset_dir, tmp_path / "whole", recipe)
    folder = stop_at(dataset_dir, tmp_path / "stopped", 6, monkeypatch, recipe=recipe)
    train(dataset_dir, tmp_path / "stopped", recipe, resume=folder)
    assert same(outcome(folder), outcome(undisturbed))


def test_a_run_whose_dali_fails_on_its_next_machine_goes_on_without_it(
    dataset_dir, tmp_path, monkeypatch, capsys
) -> None:
    recipe = dataclasses.replace(RECIPE, loader="auto")
    undisturbed = train(dataset_dir, tmp_path / "whole", recipe)
    folder = stop_at(dataset_dir, tmp_path / "stopped", 6, monkeypatch, recipe=recipe)
    monkeypatch.setattr(build_loader_module, "dali_unusable", lambda _: "DALI fails on cpu (old driver)")
    train(dataset_dir, tmp_path / "stopped", recipe, resume=folder)
    assert same(outcome(folder), outcome(undisturbed))
    result = json.loads((folder / "result.json").read_text())
    assert result["loader"] == "tensor-cpu"
    [line] = result["fallbacks"]
    assert "DALI fails on cpu (old driver)" in line and line in capsys.readouterr().out


def test_what_failed_in_an_earlier_process_is_not_forgotten(dataset_dir, tmp_path, monkeypatch) -> None:
    recipe = dataclasses.replace(RECIPE, loader="auto")
    with monkeypatch.context() as patch:
        patch.setattr(build_loader_module, "dali_unusable", lambda _: "DALI fails on cpu (old driver)")
        folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch, recipe=recipe)
    train(dataset_dir, tmp_path, recipe, resume=folder)
    result = json.loads((folder / "result.json").read_text())
    assert result["loader"].startswith("dali") and "old driver" in result["fallbacks"][0]


def test_a_run_is_not_resumed_in_a_precision_that_fails_here(dataset_dir, tmp_path, monkeypatch) -> None:
    folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch)
    monkeypatch.setattr(resume_module, "fails_in", lambda name, _: f"{name} gives wrong values")
    with pytest.raises(UserError, match="it computes in fp32, but fp32 gives wrong values"):
        train(dataset_dir, tmp_path, resume=folder)


def fail(_: TrainStep) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be")


def test_an_error_in_the_middle_leaves_the_last_checkpoint_and_one_line_that_resumes(
    whole, dataset_dir, tmp_path, monkeypatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(UserError) as error:
        after_step(patch, 6, fail)
        train(dataset_dir, tmp_path, save_every="2")
    folder, line = only(tmp_path), str(error.value)
    assert line.startswith(
        "CUDA error: an illegal memory access was encountered CUDA kernel errors might be ("
    )
    assert "\n" not in line and f"fasttrain train --resume {folder}" in line
    assert "in fail" in (folder / "error.txt").read_text()
    assert load_checkpoint(folder / "last.pt")["scheduler"]["step"] == 4
    train(dataset_dir, tmp_path, resume=folder)
    assert same(outcome(folder), outcome(whole))


def test_an_error_before_the_first_step_is_one_line_too(dataset_dir, tmp_path, monkeypatch) -> None:
    """It names a command only where there is something to resume."""
    folder = stop_at(dataset_dir, tmp_path / "begun", 6, monkeypatch)

    def fail(_: Loader) -> None:
        raise RuntimeError("Critical error when building pipeline")

    monkeypatch.setattr(Loader, "start", fail)
    with pytest.raises(UserError, match=rf"^Critical error .*; continue from .* --resume {folder}"):
        train(dataset_dir, tmp_path / "begun", resume=folder)
    with pytest.raises(UserError, match=r"^Critical error when building pipeline \(.*has its traceback\)$"):
        train(dataset_dir, tmp_path / "new")
    assert "in fail" in (only(tmp_path / "new") / "error.txt").read_text()


def test_a_measured_precision_is_kept_from_before_the_first_checkpoint(
    dataset_dir, tmp_path, monkeypatch
) -> None:
    """Killed before it has one, and resumed when the measurement comes out differently."""
    recipe = dataclasses.replace(RECIPE, compute_dtype="auto")

    def choose(precision: str) -> None:
        monkeypatch.setattr(trainer, "agree_on_precision", lambda *_: precision)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    choose("bf16")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Trainer, "fit", stop)
        train(dataset_dir, tmp_path, recipe)
    folder = only(tmp_path)
    assert not (folder / "last.pt").exists()
    choose("fp32")
    train(dataset_dir, tmp_path, recipe, resume=folder)
    assert json.loads((folder / "result.json").read_text())["precision"] == "bf16"


@pytest.mark.parametrize(
    "noted", [{}, {"precision": []}, {"precision": "fp64"}, {"precision": "bf16", "device": "cuda:0"}]
)
def test_a_precision_of_another_device_or_none_is_chosen_anew(noted: dict[str, Any], tmp_path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE.to_dict()))
    (tmp_path / "machine.json").write_text(json.dumps({"device": "cpu"} | noted))
    assert ResumePoint.find(tmp_path, tmp_path, torch.device("cpu")).precision is None


def test_a_run_with_muon_and_shrunk_images_ends_with_the_same_bits(
    dataset_dir, tmp_path, monkeypatch
) -> None:
    recipe = dataclasses.replace(RECIPE, optimizer="muon", early_scale=0.5, early_share=0.6)
    undisturbed = train(dataset_dir, tmp_path / "whole", recipe)
    folder = stop_at(dataset_dir, tmp_path / "stopped", 6, monkeypatch, recipe=recipe)
    train(dataset_dir, tmp_path / "stopped", recipe, resume=folder)
    assert same(outcome(folder), outcome(undisturbed))


@pytest.mark.parametrize("last_step", [2, 6])
def test_a_run_that_fixes_its_first_layer_ends_with_the_same_bits(
    last_step: int, dataset_dir, tmp_path, monkeypatch
) -> None:
    """Stopped before and after that: eight steps, of which the first four train the first layer."""
    recipe = dataclasses.replace(RECIPE, network="compact", first_layer_share=0.5)
    undisturbed = train(dataset_dir, tmp_path / "whole", recipe)
    folder = stop_at(dataset_dir, tmp_path / "stopped", last_step, monkeypatch, recipe=recipe)
    train(dataset_dir, tmp_path / "stopped", recipe, resume=folder)
    assert same(outcome(folder), outcome(undisturbed))


def test_an_averaged_run_ends_with_the_same_bits_and_ships_the_average(
    dataset_dir, tmp_path, monkeypatch
) -> None:
    recipe = dataclasses.replace(
        RECIPE, ema_epochs=0.5, bn_bias_lr_scale=4.0, flip_order="alternating", test_views="shifts"
    )
    undisturbed = train(dataset_dir, tmp_path / "whole", recipe)
    folder = stop_at(dataset_dir, tmp_path / "stopped", 6, monkeypatch, recipe=recipe)
    train(dataset_dir, tmp_path / "stopped", recipe, resume="auto")
    assert same(outcome(folder), outcome(undisturbed))
    states = [load_checkpoint(path / "last.pt") for path in (folder, undisturbed)]
    assert same(states[0]["trained_model"], states[1]["trained_model"])
    assert not same(states[0]["model"], states[0]["trained_model"])
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    result = json.loads((folder / "result.json").read_text())
    assert 0 <= row["test_accuracy_views"] == result["test_accuracy_views"] <= 1
    model = build_model(recipe, num_classes=10)
    model.load_state_dict(states[0]["model"])
    dataset = cifar.read(dataset_dir)
    loader = build_loader(dataset, recipe, train=False, loader="tensor", device=torch.device("cpu"))
    measured = evaluate(model, loader, RUNTIME, views="shifts")
    assert measured.loss == pytest.approx(row["test_loss"], rel=1e-6)
    assert (measured.accuracy, measured.accuracy_views) == (row["test_accuracy"], row["test_accuracy_views"])


def test_a_run_begun_before_a_field_was_added_goes_on(whole, dataset_dir, tmp_path, monkeypatch) -> None:
    folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch)
    later = ("init", "flip_order", "ema_epochs")
    recipe = json.loads((folder / "recipe.json").read_text())
    state = load_checkpoint(folder / "last.pt")
    for name in later:
        del recipe[name], state["recipe"][name], state["fingerprint"][flag(name)]
    for name in ("setup_seconds", "fallbacks"):
        del state["progress"][name]
    (folder / "recipe.json").write_text(json.dumps(recipe))
    save_checkpoint(folder / "last.pt", state)
    (folder / "previous.pt").unlink()
    train(dataset_dir, tmp_path, resume="auto")
    assert same(outcome(folder), outcome(whole))


def choose(monkeypatch, precision: str) -> None:
    """Let this machine choose a precision for new runs."""
    for module in (runtime_module, resume_module):
        monkeypatch.setattr(
            module, "pick_precision", lambda requested, *_: precision if requested == "auto" else requested
        )


AUTO = dataclasses.replace(RECIPE, compute_dtype="auto")


@pytest.mark.parametrize("named", [False, True])
def test_a_resumed_run_keeps_its_precision_wherever_it_goes_on(
    named: bool, dataset_dir, tmp_path, monkeypatch, capsys
) -> None:
    choose(monkeypatch, "bf16")
    undisturbed = train(dataset_dir, tmp_path / "whole", AUTO)
    folder = stop_at(dataset_dir, tmp_path / "stopped", 6, monkeypatch, recipe=AUTO)
    choose(monkeypatch, "fp32")
    resume_it = ["train", "--resume", str(folder), "--data-dir", str(dataset_dir), "--device", "cpu"]
    assert main([*resume_it, "--compute-dtype", "fp32"]) == 2
    assert "leave out --compute-dtype fp32 (started with bf16)" in capsys.readouterr().err
    assert main([*resume_it, "--compute-dtype", "bf16"] if named else resume_it) == 0
    assert "resumed in bf16, as started; a new run would use fp32 here" in capsys.readouterr().out
    assert same(outcome(folder), outcome(undisturbed))
    assert json.loads((folder / "result.json").read_text())["precision"] == "bf16"
    assert json.loads((folder / "recipe.json").read_text())["compute_dtype"] == "auto"


@pytest.mark.parametrize("requested", ["auto", "bf16"])
def test_a_machine_without_the_runs_precision_emulates_it(
    requested: str, dataset_dir, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(precision, "has_native_bf16", lambda _: True)
    monkeypatch.setattr(precision, "bf16_speedup_on_cpu", lambda: 2.0)
    recipe = dataclasses.replace(RECIPE, compute_dtype=requested)
    undisturbed = train(dataset_dir, tmp_path / "whole", recipe)
    folder = stop_at(dataset_dir, tmp_path / "stopped", 6, monkeypatch, recipe=recipe)
    monkeypatch.setattr(precision, "has_native_bf16", lambda _: False)
    resume_it = ["train", "--resume", str(folder), "--data-dir", str(dataset_dir), "--device", "cpu"]
    assert main(resume_it) == 0
    reason = "cpu only emulates it" if requested == "bf16" else "a new run would use fp32 here"
    assert f"resumed in bf16, as started; {reason}" in capsys.readouterr().out
    assert same(outcome(folder), outcome(undisturbed))
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    result = evaluate_checkpoint(EvaluateOptions(checkpoint=folder, device="cpu"))
    said = capsys.readouterr().out
    assert "images, in fp32" in said and f"measured {row['test_accuracy']:.2%} on synthetic, in bf16" in said
    assert result.loss == pytest.approx(row["test_loss"], rel=0.02)
    monkeypatch.setattr(precision, "has_native_bf16", lambda _: True)
    monkeypatch.setattr(precision, "bf16_speedup_on_cpu", lambda: 0.5)  # here a new run would take fp32
    result = evaluate_checkpoint(EvaluateOptions(checkpoint=folder, device="cpu"))
    assert "images, in bf16" in capsys.readouterr().out
    assert (result.loss, result.accuracy) == (row["test_loss"], row["test_accuracy"])


@pytest.mark.parametrize("content", [None, "", "{", "[1]", '{"ranks": null}'])
def test_a_lost_or_torn_machine_file_stops_no_resume(
    content: str | None, whole, dataset_dir, tmp_path, monkeypatch, capsys
) -> None:
    folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch)
    (folder / "machine.json").unlink()
    if content is not None:
        (folder / "machine.json").write_text(content)
    train(dataset_dir, tmp_path, resume="auto")
    assert "machine.json" in capsys.readouterr().out
    assert same(outcome(folder), outcome(whole))
    assert load_run(folder).machine["torch"] == torch.__version__


def test_a_checkpoint_of_before_the_proof_resumes_and_is_said_to_be_unproven(
    whole, dataset_dir, tmp_path, monkeypatch, capsys
) -> None:
    folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch)
    state = load_checkpoint(folder / "last.pt")
    del state["proof"]
    save_checkpoint(folder / "last.pt", state)
    train(dataset_dir, tmp_path, resume="auto")
    assert f"{folder / 'last.pt'}: unproven" in capsys.readouterr().out
    assert same(outcome(folder), outcome(whole))
    assert "proof" in load_checkpoint(folder / "last.pt")


def test_a_checkpoint_that_fails_its_proof_is_not_resumed(
    whole, dataset_dir, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(manager, "EPOCH_PAUSE", 0.0)
    folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch)
    state = load_checkpoint(folder / "last.pt")
    state["model"]["fc.weight"].mul_(1.01)
    save_checkpoint(folder / "last.pt", state)
    train(dataset_dir, tmp_path, resume="auto")
    out = capsys.readouterr().out
    assert "skipped" in out and "logits of the proof images differ by" in out
    assert f"resumed from {folder / 'previous.pt'} at step 4 of 12" in out
    assert same(outcome(folder), outcome(whole))


def test_another_runs_checkpoint_decides_nothing(dataset_dir, tmp_path, monkeypatch, capsys) -> None:
    """A last.pt of another recipe and precision is set aside; previous.pt, which is this run's, resumes."""
    monkeypatch.setattr(manager, "EPOCH_PAUSE", 0.0)
    choose(monkeypatch, "fp32")
    undisturbed = train(dataset_dir, tmp_path / "whole", AUTO)
    folder = stop_at(dataset_dir, tmp_path / "stopped", 6, monkeypatch, recipe=AUTO)
    other = dataclasses.replace(AUTO, compute_dtype="bf16", seed=5, epochs=1)
    (folder / "last.pt").write_bytes((train(dataset_dir, tmp_path / "other", other) / "last.pt").read_bytes())
    train(dataset_dir, tmp_path / "stopped", AUTO, resume=folder)
    assert "skipped" in capsys.readouterr().out
    assert same(outcome(folder), outcome(undisturbed))


def test_a_run_that_another_process_trained_in_the_meantime_is_not_begun_anew(
    dataset_dir, tmp_path, monkeypatch
) -> None:
    folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch)
    found, looks = resume_module.find_checkpoints, []

    def look(*args):
        looks.append(args)
        return () if len(looks) == 1 else found(*args)  # none yet, when it looks first

    monkeypatch.setattr(resume_module, "find_checkpoints", look)
    before = (folder / "last.pt").read_bytes()
    with pytest.raises(UserError, match="another process has trained it in the meantime"):
        train(dataset_dir, tmp_path, resume="auto")
    assert (folder / "last.pt").read_bytes() == before


def test_a_run_may_go_back_to_its_best_checkpoint(whole, dataset_dir, tmp_path, monkeypatch) -> None:
    folder = stop_at(dataset_dir, tmp_path, 10, monkeypatch)
    assert load_checkpoint(folder / "best.pt")["epoch"] in (1, 2)
    train(dataset_dir, tmp_path, resume=folder / "best.pt")
    assert same(outcome(folder), outcome(whole))


def test_lines_of_lost_work_leave_the_metrics(whole, dataset_dir, tmp_path, monkeypatch) -> None:
    folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 2, "train_loss": 9}\n{"epoch": 3, "tra')
    train(dataset_dir, tmp_path, resume=folder)
    assert same(outcome(folder), outcome(whole))


def test_seconds_of_both_processes_count_and_those_between_do_not(dataset_dir, tmp_path, monkeypatch) -> None:
    def slow_step_then_stop(_: TrainStep) -> None:
        time.sleep(1.5)  # longer than all of the second process
        os.kill(os.getpid(), signal.SIGTERM)

    begun = time.perf_counter()
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        after_step(patch, 2, slow_step_then_stop)
        train(dataset_dir, tmp_path)
    folder = only(tmp_path)
    kept = load_checkpoint(folder / "last.pt")["progress"]
    assert 1.5 < kept["seconds"] < kept["wall_seconds"] < time.perf_counter() - begun
    time.sleep(1)
    begun = time.perf_counter()
    train(dataset_dir, tmp_path, resume=folder)
    second_process = time.perf_counter() - begun
    result = json.loads((folder / "result.json").read_text())
    assert kept["seconds"] < result["epoch_seconds"][0] < kept["seconds"] + second_process
    assert kept["wall_seconds"] < result["wall_seconds"] < kept["wall_seconds"] + second_process


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    whole, dataset_dir, tmp_path, monkeypatch
) -> None:
    folder = stop_at(dataset_dir, tmp_path, 1, monkeypatch)
    for path in folder.glob("*.pt"):
        path.unlink()
    (folder / ".last.pt-killed").write_bytes(b"half")
    train(dataset_dir, tmp_path, resume="auto")
    assert same(outcome(folder), outcome(whole))
    assert not list(folder.glob(".*"))  # what a killed process left half-written is gone


def test_auto_takes_the_newest_unfinished_run(whole, dataset_dir, tmp_path, monkeypatch, capsys) -> None:
    folder = stop_at(dataset_dir, tmp_path, 1, monkeypatch)
    older = tmp_path / "older"
    older.mkdir()
    shutil.copy(folder / "recipe.json", older)
    os.utime(older / "recipe.json", (0, 0))
    train_data = ["train", "--out", str(tmp_path), "--data-dir", str(dataset_dir), "--device", "cpu"]
    assert main([*train_data, "--resume", "auto"]) == 0
    assert same(outcome(folder), outcome(whole))
    assert main([*train_data, "--resume", str(folder)]) == 2
    assert "has finished" in capsys.readouterr().err


@pytest.mark.usefixtures("default_sigint")
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_with_its_status_and_says_how_to_go_on(
    signum, status, dataset_dir, tmp_path, monkeypatch, capsys
) -> None:
    handler = signal.getsignal(signum)
    (tmp_path / "tiny.json").write_text(json.dumps(RECIPE.to_dict()))
    flags = ["--recipe", str(tmp_path / "tiny.json"), "--data-dir", str(dataset_dir), "--device", "cpu"]
    with monkeypatch.context() as patch:
        after_step(patch, 5, send(signum))
        assert main(["train", *flags, "--out", str(tmp_path / "runs")]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "saved at step 5 of 12" in error
    assert signal.getsignal(signum) is handler
    command = error.split("fasttrain train")[-1].split()
    assert main(["train", *command]) == 0
    assert (only(tmp_path / "runs") / "result.json").exists()


def test_flags_that_contradict_the_run_are_refused_by_name(
    dataset_dir, tmp_path, monkeypatch, capsys
) -> None:
    folder = stop_at(dataset_dir, tmp_path, 1, monkeypatch)
    resume = ["train", "--resume", str(folder), "--data-dir", str(dataset_dir), "--device", "cpu"]
    assert main([*resume, "--epochs", "9", "--seed", "1"]) == 2
    assert "leave out --epochs 9 (started with 3), --seed 1 (started with 0)" in capsys.readouterr().err
    assert main([*resume, "--recipe", "default"]) == 2
    assert "--recipe default" in capsys.readouterr().err
    assert main([*resume, "--save-every", "often"]) == 2
    assert "--save-every often" in capsys.readouterr().err


def test_other_images_are_refused_and_nothing_changes(dataset_dir, tmp_path, monkeypatch) -> None:
    folder = stop_at(dataset_dir, tmp_path, 1, monkeypatch)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(trainer, "load_from_options", lambda *_, **__: mirrored(original(*_)))
    with pytest.raises(UserError, match=r"was trained on synthetic, and this is another set of that name"):
        train(dataset_dir, tmp_path, resume=folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


original = trainer.load_from_options


def mirrored(dataset: Dataset) -> Dataset:
    train = dataclasses.replace(dataset.train, images=dataset.train.images[:, :, ::-1])
    return dataclasses.replace(dataset, train=train)


def test_another_version_is_said_and_kept(dataset_dir, tmp_path, monkeypatch, capsys) -> None:
    folder = stop_at(dataset_dir, tmp_path, 1, monkeypatch)
    describe = trainer.describe
    monkeypatch.setattr(trainer, "describe", lambda device: describe(device) | {"torch": "9.9"})
    train(dataset_dir, tmp_path, resume=folder)
    assert "not bit for bit: torch" in capsys.readouterr().out
    [change] = json.loads((folder / "result.json").read_text())["changes"]
    assert change.endswith("now 9.9")


def test_a_torn_checkpoint_is_named_and_the_one_before_it_used(
    whole, dataset_dir, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(manager, "EPOCH_PAUSE", 0.0)
    folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch)
    torn = (folder / "last.pt").read_bytes()[:-100]
    (folder / "last.pt").write_bytes(torn)
    train(dataset_dir, tmp_path, resume="auto")
    out = capsys.readouterr().out
    assert "skipped" in out and "last.pt: cannot be read" in out
    assert f"resumed from {folder / 'previous.pt'} at step 4 of 12" in out
    assert (folder / "last.pt.unusable").read_bytes() == torn
    assert same(outcome(folder), outcome(whole))


def test_without_a_sound_checkpoint_nothing_is_begun(dataset_dir, tmp_path, monkeypatch) -> None:
    folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch)
    for name in ("last.pt", "previous.pt"):
        (folder / name).write_bytes(b"torn")
    with pytest.raises(UserError, match=r"last\.pt.*previous\.pt"):
        train(dataset_dir, tmp_path, resume="auto")
    assert (folder / "last.pt").read_bytes() == b"torn"


def test_a_tensor_in_the_place_of_a_flag_is_refused(dataset_dir, tmp_path, monkeypatch) -> None:
    folder = stop_at(dataset_dir, tmp_path, 6, monkeypatch)
    state = load_checkpoint(folder / "last.pt")
    state["fingerprint"]["--max-lr"] = torch.ones(3)
    for name in ("last.pt", "previous.pt"):
        save_checkpoint(folder / name, state)
    with pytest.raises(UserError, match=r"last\.pt: it does not say which run it belongs to"):
        train(dataset_dir, tmp_path, resume="auto")


def test_two_processes_never_train_one_run(dataset_dir, tmp_path, monkeypatch) -> None:
    folder = stop_at(dataset_dir, tmp_path, 1, monkeypatch)
    with hold_folder(folder), pytest.raises(UserError, match="another process"):
        train(dataset_dir, tmp_path, resume="auto")
    train(dataset_dir, tmp_path, resume="auto")


def poison(step: TrainStep) -> None:
    with torch.no_grad():
        next(iter(step.model.parameters())).fill_(float("nan"))


def test_a_nan_stops_the_run_and_keeps_the_good_checkpoint(dataset_dir, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(manager, "EPOCH_PAUSE", 0.0)
    after_step(monkeypatch, 6, poison)  # so that step 7 is the first with a NaN loss
    with pytest.raises(DivergedError, match="epoch 2, step 7"):
        train(dataset_dir, tmp_path)
    folder = only(tmp_path)
    assert not (folder / "result.json").exists()
    state = load_checkpoint(folder / "last.pt")
    assert state["epoch"] == 1 and all(value.isfinite().all() for value in state["model"].values())


def test_poisoned_weights_are_never_saved(dataset_dir, tmp_path, monkeypatch) -> None:
    after_step(monkeypatch, 6, poison)
    with pytest.raises(DivergedError, match="epoch 2, step 6"):
        train(dataset_dir, tmp_path, save_every="1")
    assert load_checkpoint(only(tmp_path) / "last.pt")["scheduler"]["step"] == 5


def test_rollback_goes_on_from_the_good_checkpoint_at_half_the_rate(
    dataset_dir, tmp_path, monkeypatch
) -> None:
    after_step(monkeypatch, 6, poison)
    folder = train(dataset_dir, tmp_path, on_nan="rollback")
    result = json.loads((folder / "result.json").read_text())
    assert (result["rollbacks"], result["max_lr"]) == (1, RECIPE.max_lr / 2)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("best_epoch", [1, 2, 3])
def test_short_epochs_share_a_checkpoint_and_the_best_one_is_kept(
    dataset_dir, tmp_path, monkeypatch, best_epoch: int
) -> None:
    """Two writes, before the first step and after the last one, whichever epoch was the best."""
    writes: list[dict[str, Any]] = []
    write = CheckpointWriter.write
    monkeypatch.setattr(
        CheckpointWriter,
        "write",
        lambda self, state, **best: (writes.append(state), write(self, state, **best)),
    )
    monkeypatch.setattr(Progress, "best_epoch", property(lambda self: self.epochs[:best_epoch][-1]))
    folder = train(dataset_dir, tmp_path)
    assert [state["epoch"] for state in writes] == [0, 3]
    assert load_checkpoint(folder / "best.pt")["epoch"] == best_epoch
    assert load_checkpoint(folder / "last.pt")["epoch"] == 3


def test_a_signal_right_after_a_short_epoch_still_saves_it(dataset_dir, tmp_path, monkeypatch) -> None:
    end_of_epoch = manager.CheckpointManager.end_of_epoch

    def signalled_late(self: manager.CheckpointManager) -> None:
        end_of_epoch(self)  # the checkpoint is recent: none is written
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(manager.CheckpointManager, "end_of_epoch", signalled_late)
    with pytest.raises(Interrupted, match=f"saved at step {STEPS_PER_EPOCH} "):
        train(dataset_dir, tmp_path)
    state = load_checkpoint(only(tmp_path) / "last.pt")
    assert (state["epoch"], state["scheduler"]["step"]) == (1, STEPS_PER_EPOCH)


def test_a_rollback_drops_a_best_epoch_that_no_checkpoint_holds(dataset_dir, tmp_path, monkeypatch) -> None:
    """Epoch 1 is held as the best when epoch 2 fails; the run goes on from before both."""
    after_step(monkeypatch, 6, poison)
    best: list[dict[str, Any]] = []
    write = CheckpointWriter._write

    def noted(
        self: CheckpointWriter, state: dict[str, Any], is_best: bool, held: dict[str, Any] | None
    ) -> None:
        best.extend([held] * (held is not None) + [state] * is_best)
        write(self, state, is_best, held)

    monkeypatch.setattr(CheckpointWriter, "_write", noted)
    train(dataset_dir, tmp_path, on_nan="rollback")
    assert best and all(state["progress"]["rollbacks"] == 1 for state in best)


def test_rollback_gives_up_after_three(dataset_dir, tmp_path) -> None:
    with pytest.raises(DivergedError):
        train(dataset_dir, tmp_path, dataclasses.replace(RECIPE, max_lr=1e38), on_nan="rollback")
    assert load_checkpoint(only(tmp_path) / "last.pt")["progress"]["rollbacks"] == 3


def test_a_found_rate_is_not_searched_again(dataset_dir, tmp_path, monkeypatch) -> None:
    recipe = dataclasses.replace(RECIPE, max_lr="auto")
    monkeypatch.setattr(trainer.Trainer, "_find_max_lr", lambda _: 0.002)
    folder = stop_at(dataset_dir, tmp_path, 2, monkeypatch, recipe=recipe)
    monkeypatch.setattr(trainer.Trainer, "_find_max_lr", lambda _: pytest.fail("searched again"))
    train(dataset_dir, tmp_path, recipe, resume=folder)
    assert json.loads((folder / "result.json").read_text())["max_lr"] == 0.002


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        MemoryError(),
    ],
)
def test_full_memory_is_one_line_with_a_smaller_batch(error, dataset_dir, tmp_path, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(TrainStep, "__call__", fail)
    with pytest.raises(UserError, match=r"--batch-size 16: out of memory; try --batch-size 8$"):
        train(dataset_dir, tmp_path)


def test_other_errors_keep_their_traceback(dataset_dir, tmp_path, monkeypatch) -> None:
    after_step(monkeypatch, 1, lambda _: [][0])
    with pytest.raises(IndexError):
        train(dataset_dir, tmp_path)
