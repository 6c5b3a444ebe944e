"""A run remembers its images: later commands find them from any folder, under any name, and only them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fasttrain.cli import main
from fasttrain.data.dataset import Dataset, hold_out_images
from fasttrain.data.load_dataset import absolute
from fasttrain.data.run_images import RunImages, find_dataset
from fasttrain.data.sources import cifar, synthetic, webdataset
from fasttrain.errors import UserError
from fasttrain.options import DataOptions, EvaluateOptions
from fasttrain.recipe import Recipe
from fasttrain.tools.evaluate_checkpoint import evaluate_checkpoint
from fasttrain.trainer import train

SMALL = ["--device", "cpu", "--width", "8", "--epochs", "1", "--batch-size", "8", "--loader", "tensor"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pets/, one bad file among them, and runs/, with a run that was trained on the rest."""
    home = tmp_path_factory.mktemp("home")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("test", 3)):
        for label in ("cat", "dog"):
            folder = home / "pets" / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(folder / f"{index}.png")
    (home / "pets" / "train" / "cat" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["train", "--data", "folder:pets", "--skip-bad", *SMALL]) == 0
    return home


@pytest.fixture
def run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, for a process that works in another folder and has no images in data/."""
    monkeypatch.chdir(tmp_path)
    [run] = (home / "runs").iterdir()
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def test_every_command_finds_them_from_another_folder(run: Path, capsys) -> None:
    written = json.loads((run / "result.json").read_text())
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    assert f"folder:pets: test accuracy {written['test_accuracy']:.2%}" in capsys.readouterr().out
    (run / "report.html").unlink()
    assert main(["report", str(run), "--device", "cpu"]) == 0
    assert "Confusion matrix" in (run / "report.html").read_text()
    assert main(["export", str(run), "--format", "safetensors", "--out", "model.safetensors"]) == 0
    assert "(test images of folder:pets)" in capsys.readouterr().out


def test_a_folder_with_another_name_is_known_by_its_images(run: Path, home: Path, tmp_path, capsys) -> None:
    moved = tmp_path / "animals"
    shutil.copytree(home / "pets", moved)
    record = json.loads((run / "data.json").read_text())
    (run / "data.json").write_text(json.dumps(record | {"data": f"folder:{tmp_path / 'pets'}"}))
    assert main(["evaluate", str(run), "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "pets: no such folder" in said and "--data folder:..." in said and said.count("\n") == 1
    (run / "report.html").unlink()
    report_it = ["report", str(run), "--device", "cpu", "--data", f"folder:{moved}"]
    assert main([*report_it, "--skip-bad"]) == 0
    assert "Confusion matrix" in (run / "report.html").read_text()
    (moved / "test" / "cat" / "0.png").unlink()  # now they are others
    assert main([*report_it, "--skip-bad"]) == 2
    assert "trained on folder:pets, and this is folder:animals" in capsys.readouterr().err


def test_a_run_goes_on_with_a_renamed_folder_and_remembers_it(
    run: Path, home: Path, tmp_path, capsys
) -> None:
    (run / "result.json").unlink()
    shutil.move(shutil.copytree(home / "pets", tmp_path / "pets"), tmp_path / "animals")
    data = ["--data", f"folder:{tmp_path / 'animals'}", "--skip-bad"]
    assert main(["train", "--resume", str(run), "--device", "cpu", *data]) == 0
    assert json.loads((run / "result.json").read_text())["changes"] == []
    record = json.loads((run / "data.json").read_text())
    assert (record["name"], record["data"]) == ("folder:animals", f"folder:{tmp_path / 'animals'}")


def test_a_resumed_run_needs_no_word_about_its_images(run: Path) -> None:
    (run / "result.json").unlink()
    assert main(["train", "--resume", str(run), "--device", "cpu", "--hold-out"]) == 2
    assert main(["train", "--resume", str(run), "--device", "cpu"]) == 0
    assert json.loads((run / "result.json").read_text())["dataset"] == "folder:pets"


def test_other_images_of_the_same_classes_can_be_measured_on(run: Path, home: Path, tmp_path, capsys) -> None:
    new = tmp_path / "new" / "dog"  # not every class, and no training images
    shutil.copytree(home / "pets" / "test" / "dog", new)
    evaluate_it = ["evaluate", str(run), "--device", "cpu", "--data", f"folder:{tmp_path / 'new'}"]
    assert main([*evaluate_it, "--split", "all"]) == 0
    said = capsys.readouterr().out
    assert "folder:new: accuracy" in said and "over all 3 images" in said
    assert "on the test images of folder:pets" in said


def test_a_run_that_held_images_out_goes_on_with_these(home: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    pets = f"folder:{home / 'pets'}"
    shutil.copytree(home / "pets" / "train", tmp_path / "alone" / "train", ignore=lambda *_: ["torn.png"])
    shutil.copytree(home / "pets" / "test", tmp_path / "alone" / "test")
    alone = f"folder:{tmp_path / 'alone'}"
    assert main(["train", "--data", alone, "--hold-out", *SMALL]) == 0
    [run] = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert result["dataset"] == "folder:alone, a tenth of the training images held out"
    assert "--data folder:alone --hold-out" in (run / "report.html").read_text()
    capsys.readouterr()
    assert main(["evaluate", str(run), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"test accuracy {result['test_accuracy']:.2%}" in said and "over 2 images" in said
    assert main(["evaluate", str(run), "--device", "cpu", "--data", pets, "--skip-bad"]) == 0
    assert "over 6 images" in capsys.readouterr().out  # the test images, which the training did not have
    assert main(["evaluate", str(run), "--device", "cpu", "--hold-out"]) == 2
    assert "--hold-out: is for training" in capsys.readouterr().err
    (run / "result.json").unlink()
    (run / "data.json").unlink()  # its checkpoint says so too
    assert main(["train", "--resume", str(run), "--device", "cpu", "--data", alone]) == 0
    shutil.rmtree(tmp_path / "alone" / "test")
    shutil.copytree(home / "pets" / "test", tmp_path / "alone" / "test")
    assert main(["report", str(run), "--device", "cpu"]) == 0
    assert "Confusion matrix" in (run / "report.html").read_text()


def test_a_release_of_which_images_are_held_out_is_found_again(tmp_path: Path) -> None:
    synthetic.generate(tmp_path / synthetic.NAME, train_count=64, test_count=40)
    held = hold_out_images(cifar.read(tmp_path / synthetic.NAME))
    images = RunImages.of(held, DataOptions(data_dir=tmp_path))
    assert images.hold_out and find_dataset(images).content_hash == held.content_hash
    assert len(held.test.labels) == 10 and images.data == "synthetic"


def test_the_splits_add_up(run: Path, capsys) -> None:
    found = {
        split: evaluate_checkpoint(EvaluateOptions(checkpoint=run, device="cpu", split=split))  # type: ignore[arg-type]
        for split in ("test", "train", "all")
    }
    assert "train accuracy" in capsys.readouterr().out
    right = {split: round(one.accuracy * len(one.labels_N)) for split, one in found.items()}
    assert [len(found[split].labels_N) for split in found] == [6, 16, 22]
    assert right["all"] == right["train"] + right["test"]


def test_a_refused_resume_leaves_the_record_alone(run: Path, home: Path, dataset_dir: Path, capsys) -> None:
    (run / "result.json").unlink()
    (run / "data.json").unlink()  # a run of an earlier version: its checkpoint says which images they are
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    resume_it = ["train", "--resume", str(run), "--device", "cpu"]
    assert main([*resume_it, "--data-dir", str(dataset_dir)]) == 2
    assert "say where they are with --data folder:" in capsys.readouterr().err
    assert main([*resume_it, "--data", "synthetic", "--data-dir", str(dataset_dir)]) == 2
    assert "trained on folder:pets, and this is synthetic" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert main([*resume_it, "--data", f"folder:{home / 'pets'}", "--skip-bad"]) == 0


def test_a_resumed_run_needs_no_writable_folder_to_start_in(run: Path, monkeypatch) -> None:
    (run / "result.json").unlink()
    monkeypatch.chdir("/proc")
    assert main(["train", "--resume", str(run), "--device", "cpu"]) == 0


def test_a_damaged_or_missing_record_is_as_none(run: Path, home: Path, tmp_path, capsys) -> None:
    for content in ("{", "[]", '{"name": "x"}', '{"name": "x", "data": 3, "data_dir": "", "skip_bad": 1}'):
        (run / "data.json").write_text(content)
        assert RunImages.of_run(run) is None
    assert main(["evaluate", str(run), "--device", "cpu"]) == 2
    assert "say where they are with --data folder:" in capsys.readouterr().err
    pets = ["--data", f"folder:{home / 'pets'}", "--skip-bad"]
    assert main(["evaluate", str(run), "--device", "cpu", *pets]) == 0


def test_a_release_is_known_by_its_images_wherever_it_lies(tmp_path: Path) -> None:
    synthetic.generate(tmp_path / "a", train_count=64, test_count=40)
    dataset = cifar.read(tmp_path / "a")
    images = RunImages.of(dataset, DataOptions(data_dir=tmp_path / "a"))
    assert find_dataset(images).content_hash == dataset.content_hash
    shutil.move(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="a does not hold the run's images, synthetic: name their folder"):
        find_dataset(images)
    assert find_dataset(images, data_dir=tmp_path / "b").root == tmp_path / "b"
    path = next((tmp_path / "b").rglob("test_batch.bin"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="does not hold the run's images"):
        find_dataset(images, data_dir=tmp_path / "b")


def test_a_data_folder_that_is_gone_gives_way_to_the_usual_one(tmp_path: Path, monkeypatch) -> None:
    synthetic.generate(tmp_path / "old", train_count=64, test_count=40)
    images = RunImages.of(cifar.read(tmp_path / "old"), DataOptions(data_dir=tmp_path / "old"))
    shutil.move(tmp_path / "old", tmp_path / "new")
    monkeypatch.setenv("FASTTRAIN_DATA", str(tmp_path / "new"))
    assert find_dataset(images).root == tmp_path / "new"
    assert images.options("auto", None, False)["data_dir"] is None
    (tmp_path / "old").mkdir()
    assert find_dataset(images).root == tmp_path / "new"


def test_a_typed_data_folder_does_not_change_the_release(tmp_path: Path) -> None:
    images = RunImages(name="CIFAR-100", sha256="0", data="cifar100", data_dir=str(tmp_path))
    assert images.options("auto", tmp_path / "x", False) == {
        "data": "cifar100",
        "data_dir": tmp_path / "x",
        "skip_bad": False,
        "hold_out": False,
    }
    assert images.options("folder:y", None, False)["data"] == "folder:y"
    with pytest.raises(UserError, match="--data cifar10x: expected auto"):
        find_dataset(images, "cifar10x")


def test_damage_to_another_release_is_not_in_the_way(tmp_path: Path) -> None:
    synthetic.generate(tmp_path / synthetic.NAME, train_count=64, test_count=40)
    images = RunImages.of(cifar.read(tmp_path / synthetic.NAME), DataOptions(data_dir=tmp_path))
    shutil.copytree(tmp_path / synthetic.NAME / "cifar-10-batches-bin", tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "test_batch.bin").write_bytes(b"torn")
    assert find_dataset(images).name == "synthetic"


def test_what_auto_fell_back_on_is_what_a_resumed_run_gets(tmp_path: Path, dataset: Dataset) -> None:
    """CIFAR-10 may be there by then."""
    synthetic.generate(tmp_path / synthetic.NAME, train_count=64, test_count=40)
    stand_in = cifar.read(tmp_path / synthetic.NAME)
    assert RunImages.of(stand_in, DataOptions(data_dir=tmp_path)).data == "synthetic"
    original = cifar.read(dataset.root)
    object.__setattr__(original, "name", "CIFAR-10")
    assert RunImages.of(original, DataOptions(data_dir=dataset.root)).data == "cifar10"


def test_a_data_set_from_python_is_found_if_it_is_a_release(dataset: Dataset, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=32, width=8, loader="tensor")
    train(recipe, data_dir=str(dataset.root), out=tmp_path / "text", device="cpu", report=False)
    run = train(recipe, data=dataset, out=tmp_path, device="cpu", report=False)
    images = RunImages.of_run(run.folder)
    assert images is not None and images.data == "auto"
    assert main(["evaluate", str(run.folder), "--device", "cpu"]) == 0


def test_latest_is_the_newest_finished_run(home: Path, run: Path, tmp_path, monkeypatch, capsys) -> None:
    assert main(["evaluate", "latest"]) == 2
    assert "latest: no finished run in runs/" in capsys.readouterr().err
    monkeypatch.chdir(home)
    [only] = (home / "runs").iterdir()
    assert main(["evaluate", "latest", "--device", "cpu"]) == 0
    assert f"runs/{only.name}/last.pt" in capsys.readouterr().out
    (only / "report.html").unlink()
    assert main(["report", "latest", "--device", "cpu"]) == 0
    assert (only / "report.html").exists()


def test_patterns_of_shards_are_kept_for_any_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("webdataset:a/{0,1}.tar,b-*.tar") == (
        f"webdataset:{tmp_path}/a/{{0,1}}.tar,{tmp_path}/b-*.tar"
    )
    (tmp_path / "x,y").mkdir()
    monkeypatch.chdir(tmp_path / "x,y")
    named = absolute("webdataset:p-{0,1}.tar,q.tar").partition(":")[2]
    assert webdataset.split_patterns(named) == [f"{tmp_path}/x,y/p-{{0,1}}.tar", f"{tmp_path}/x,y/q.tar"]
    assert webdataset.split_patterns("a.tar,") == ["a.tar"]
    monkeypatch.chdir(tmp_path)
    assert absolute("folder:a,b") == f"folder:{tmp_path}/a,b"
    assert absolute("folder:~/pets") == f"folder:{Path.home()}/pets"
