"""The pages about runs: what is on them, what they refuse, and that nothing in them reaches outside."""

import base64
import dataclasses
import errno
import hashlib
import html
import io
import json
import os
import queue
import random
import re
import shlex
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from fasttrain import trainer as train_module
from fasttrain.cli import _parse_recipe, main
from fasttrain.data.dataset import Dataset, Split
from fasttrain.data.run_images import RunImages
from fasttrain.data.sources import cifar
from fasttrain.evaluation import Evaluation
from fasttrain.lr_finder import LrCurve, LrSearch
from fasttrain.model import CustomResNet
from fasttrain.options import TrainCommand
from fasttrain.recipe import PRESETS, Recipe
from fasttrain.report import plots
from fasttrain.report.compare import compare_settings, group_runs
from fasttrain.report.html import _samples, _tests, progress_page, write_report
from fasttrain.report.pages import render
from fasttrain.report.run import load_run, load_unfinished
from fasttrain.report.settings import train_command
from fasttrain.system.files import hold_folder
from fasttrain.tools import watch as watch_module
from fasttrain.tools.report import report
from fasttrain.tools.watch import watch
from fasttrain.trainer import train

HOSTILE = "<script>alert('$x_$')</script>"
SEARCH = LrSearch(
    [LrCurve([0.001 * 1.2**i for i in range(30)], [2 + (i - 20) ** 2 / 100 for i in range(30)], False)],
    [0.003],
)
SECTIONS = (
    *("Loss", "Accuracy", "Seconds per epoch", "Schedule", "LR finder", "Augmented training images"),
    *("Confusion matrix", "Precision and recall", "The most confident mistakes"),
    *("Recipe and machine", "Settings that differ from the preset default", "Machine", "Network", "Files"),
)


@pytest.fixture(scope="module")
def run(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs whose peak rate came from the LR finder, with a name that bites."""
    out = tmp_path_factory.mktemp("runs")
    recipe = Recipe(
        name="tiny", epochs=2, batch_size=16, width=8, max_lr="auto", cycle_momentum=True, loader="tensor"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "find_max_lr", lambda *_, **__: SEARCH)
        train(recipe, data_dir=dataset_dir, out=out, device="cpu")
    [folder] = out.iterdir()
    return folder


def copied(run: Path, folder: Path, **result: Any) -> Path:
    """A copy without checkpoints, page and data.json; keyword arguments replace figures of result.json."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.pt", "report.html", "data.json"))
    figures = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(figures | result))
    return folder


def pixels_HWC(uri: str) -> np.ndarray:
    """The pixels of an embedded PNG, uint8, without its alpha channel."""
    picture_HWC = imread(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
    return (255 * picture_HWC[..., :3]).round().astype(np.uint8)


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its text, and the addresses that it loads."""

    LOADING: ClassVar = {"src", "srcset", "data", "poster", "background", "action"}

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.feed(self.source)
        text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", self.source, flags=re.DOTALL)
        self.text = " ".join(html.unescape(text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in self.LOADING]
        self.links += [value or "" for name, value in attrs if name == "href"]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] in ("h2", "h3") and data.strip():
            self.headings.append(data.strip())


def test_train_leaves_a_page_with_every_section(run: Path) -> None:
    page = Page(run / "report.html")
    assert [name for name in SECTIONS if name not in page.headings] == []
    result = json.loads((run / "result.json").read_text())
    parameters = sum(parameter.numel() for parameter in CustomResNet(width=8).parameters())
    assert f"{result['test_accuracy']:.2%} on synthetic images final test accuracy" in page.text
    assert "the figure to quote" in page.text
    assert "“synthetic” and not the original release" in page.text
    assert page.source.count('class="headline"') == 2 and "on synthetic images" in page.text
    assert f"{parameters:,}" in page.text and "40 images" in page.text
    assert "pct_start 0.208333 " in page.text  # and not 0.20833333333333334
    changed = "epochs 2 batch_size 16 max_lr auto width 8 cycle_momentum yes loader tensor"
    assert f"preset default {changed} The others " in page.text
    started = re.sub(r"(....)(..)(..)-(..)(..).*", r"\1-\2-\3 \4:\5", run.name)
    assert f"run {run.name}, started {started}" in page.text
    assert "compile off" in page.text and " cuda none" in page.text and "unknown" not in page.text
    assert "measured again" not in page.text  # its figures are the training's own
    assert {"last.pt", "best.pt", "metrics.jsonl", "lr_find.json"} <= set(page.links)
    assert all((run / link).is_file() for link in page.links)


def test_lr_find_json_holds_curves_suggestions_and_the_choice(run: Path) -> None:
    found = json.loads((run / "lr_find.json").read_text())
    assert found["max_lr"] == 0.003 == json.loads((run / "result.json").read_text())["max_lr"]
    assert found["suggestions"] == [0.003]
    [curve] = SEARCH.curves
    assert found["curves"] == [{"lrs": curve.lrs, "losses": curve.losses, "diverged": False}]


def test_every_picture_is_inside_and_decodes(run: Path) -> None:
    page = Page(run / "report.html")
    assert len(page.loaded) == 5 * 2 + 24 + 24  # figures for light and dark, samples, mistakes
    for uri in page.loaded:
        assert uri.startswith("data:image/png;base64,")
        assert pixels_HWC(uri).std() > 0  # it shows something
    assert all(pixels_HWC(uri).shape == (32, 32, 3) for uri in page.loaded[10:])


def test_the_page_reaches_nowhere(run: Path) -> None:
    page = Page(run / "report.html")
    assert not re.search(r"https?://|//[a-z]|@import", re.sub(r"data:[^\"']*", "", page.source))
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "default-src 'none'" in page.source


def test_samples_are_the_loaders_own_batch_with_normalisation_undone(dataset) -> None:
    """Without augmentation they are the training images themselves, in some order."""
    recipe = Recipe(batch_size=16, crop_padding=0, flip=False, cutout=0)
    samples = _samples(dataset, recipe, torch.device("cpu"))
    stored = {
        image.tobytes(): dataset.classes[label]
        for image, label in zip(dataset.train.images, dataset.train.labels, strict=True)
    }
    for sample in samples["images"]:
        assert stored[pixels_HWC(sample["uri"]).tobytes()] == sample["label"]


def test_a_mistake_shows_its_own_image_with_truth_and_prediction(dataset) -> None:
    labels_N = torch.from_numpy(dataset.test.labels).long()
    predictions_N = labels_N.clone()
    predictions_N[[3, 7]] = (labels_N[[3, 7]] + 1) % 10
    confidences_N = torch.full((40,), 0.5)
    confidences_N[7] = 0.75
    tests = _tests(dataset, Evaluation(1.0, labels_N, predictions_N, confidences_N, confidences_N > 0))
    assert [mistake["confidence"] for mistake in tests["mistakes"]] == [0.75, 0.5]
    for index, mistake in zip((7, 3), tests["mistakes"], strict=True):
        assert np.array_equal(pixels_HWC(mistake["uri"]), dataset.test.images[index])
        assert mistake["truth"] == dataset.classes[labels_N[index]]
        assert mistake["prediction"] == dataset.classes[predictions_N[index]]


def many_classes(dataset: Dataset, count: int) -> tuple[Dataset, Evaluation]:
    """Two test images of each class: of class 3 both are taken for 4, of class 5 one for 6."""
    labels = np.repeat(np.arange(count), 2)
    images = np.resize(dataset.test.images, (2 * count, *dataset.test.images.shape[1:]))
    labels_N = torch.from_numpy(labels)
    predictions_N, ones_N = labels_N.clone(), torch.ones(2 * count)
    predictions_N[[6, 7, 10]] = torch.tensor([4, 4, 6])
    in_top5_N = ones_N > 0
    in_top5_N[6] = False
    larger = dataclasses.replace(
        dataset, classes=tuple(f"class {label}" for label in range(count)), test=Split(images, labels)
    )
    return larger, Evaluation(1.0, labels_N, predictions_N, ones_N, in_top5_N)


def test_a_page_of_a_thousand_classes_lists_the_worst(run: Path, dataset: Dataset, tmp_path) -> None:
    folder = copied(run, tmp_path / "run")
    larger, evaluation = many_classes(dataset, 1000)
    path = write_report(load_run(folder), larger, evaluation, device=torch.device("cpu"))
    page = Page(path)
    assert path.stat().st_size < 2e6 and len(page.tags) < 20_000
    assert "true class mistaken for images class 3 class 4 2 class 5 class 6 1 " in page.text
    assert re.search(r"mistaken for class 3 2 - 0\.0% class 4 class 5 2 100\.0% 50\.0% class 6 ", page.text)
    assert "of 99.95% the class is among the five likeliest" in page.text
    # F1 of class 3: 0; of 5: 2/3; of 4 (two more predicted): 4/6; of 6 (one more): 4/5.
    assert f"macro-F1) is {(996 + 0 + 2 / 3 + 4 / 6 + 4 / 5) / 1000:.2%}." in page.text
    assert "All 1,000 classes" in page.text and "class 999" in page.text


@pytest.mark.parametrize("count", [10, 39, 40])
def test_few_classes_have_a_matrix(run: Path, dataset: Dataset, tmp_path, count: int) -> None:
    folder = copied(run, tmp_path / "run")
    larger, evaluation = many_classes(dataset, count)
    page = Page(write_report(load_run(folder), larger, evaluation, device=torch.device("cpu")))
    assert ("Confusion matrix" in page.headings) == (count < 40)
    assert ("Confusions" in page.headings) == (count == 40)


def test_an_unfinished_run_has_a_page_that_says_so(run: Path, tmp_path, capsys) -> None:
    folder = copied(run, tmp_path / "run")
    (folder / "result.json").unlink()
    first, _ = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(first + '{"epoch": 2, "train_lo')  # being written
    assert main(["report", str(folder)]) == 0
    page = Page(folder / "report.html")
    assert "recipe tiny: not finished" in page.text and "1 of 2 epochs" in page.text
    assert f"{json.loads(first)['test_accuracy']:.2%}" in page.text and len(page.loaded) == 3 * 2
    assert "refresh" not in page.source
    (folder / "metrics.jsonl").unlink()
    assert main(["report", str(folder)]) == 0
    assert "The first epoch is not over yet" in Page(folder / "report.html").text
    shutil.copy(run / "report.html", folder)  # of a finished run that lost its result.json
    assert main(["report", str(folder)]) == 2
    assert "left as it is, since a new page would show less (the run has" in capsys.readouterr().err
    assert (folder / "report.html").read_bytes() == (run / "report.html").read_bytes()


def test_watch_follows_a_run_until_its_report_is_there(run: Path, tmp_path) -> None:
    folder = copied(run, tmp_path / "run")
    (tmp_path / "x").write_text("not for the web")
    result = (folder / "result.json").read_bytes()
    (folder / "result.json").unlink()
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=watch, args=(folder,), kwargs={"port": 0, "log": lines.put}, daemon=True).start()
    [address] = re.findall(r"http://127\.0\.0\.1:\d+", lines.get(timeout=60))

    def get(path: str, **headers: str) -> tuple[str, str | None]:
        """The body, and after how many seconds the browser asks again."""
        request = urllib.request.Request(address + path, headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert answer.headers["Cache-Control"] == "no-store"
            return answer.read().decode(), answer.headers["Refresh"]

    page, refresh = get("/")
    assert "2 of 2 epochs" in page and "No process is training it" in page and refresh == "5"
    with hold_folder(folder):
        assert "It is training" in get("/")[0]
    assert main(["report", str(folder)]) == 0  # marked as unfinished, and older than what follows
    os.utime(folder / "report.html", (1, 1))
    (folder / "result.json").write_bytes(result)
    page, refresh = get("/")
    assert "has no page (yet)" in page and refresh == "5"
    shutil.copy(run / "report.html", folder)
    assert get("/") == ((run / "report.html").read_text(), None)
    assert json.loads(get("/recipe.json")[0]) == json.loads((run / "recipe.json").read_text())
    for outside in ("/../x", "/%2e%2e/x", "//etc/passwd", "/?"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(outside)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        get("/", Host="elsewhere.test:8000")


def test_watch_draws_a_page_once_for_each_epoch(run: Path, tmp_path, monkeypatch) -> None:
    folder, drawn = copied(run, tmp_path / "run"), []
    monkeypatch.setattr(watch_module, "progress_page", lambda found, _: drawn.append(len(found.epochs)) or "")
    for moment in (1, 1, 2):
        watch_module._drawn(folder, moment, True)
    assert drawn == [2, 2]


@pytest.mark.parametrize(("port", "reason"), [("70000", "port must be 0-65535"), ("1", "Permission denied")])
def test_watch_refuses_what_it_cannot_serve(run: Path, port: str, reason: str, tmp_path, capsys) -> None:
    if port == "1" and os.geteuid() == 0:
        pytest.skip("root may use any port")
    assert main(["watch", str(run), "--port", port]) == 2
    assert f"--port {port}: cannot be used" in (said := capsys.readouterr().err) and reason in said
    assert main(["watch", str(tmp_path)]) == 2 and "not a run's folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"name": "fast", **PRESETS["fast"].to_dict(), "seed": 3, "flip": False, "max_lr": 0.0125},
        {"name": "assignment", **PRESETS["assignment"].to_dict(), "cuda_graph": False, "epochs": 2},
    ],
)
def test_the_pages_command_trains_the_same_recipe(changes: dict[str, Any]) -> None:
    recipe = Recipe(**changes)
    program, *words = shlex.split(train_command(recipe, None))
    assert program == "fasttrain" and words.pop(0) == "train"
    assert _parse_recipe(TrainCommand, "train", words).settings == recipe


def test_the_pages_command_names_the_images_but_no_folder_of_this_machine() -> None:
    images = RunImages(name="folder:pets", data="folder:/home/someone/pets", data_dir="/x")
    assert train_command(Recipe(), images) == "fasttrain train --recipe default --data folder:pets"
    assert train_command(Recipe(name="mine"), None) == "fasttrain train --recipe recipe.json"
    bad = dataclasses.replace(images, skip_bad=True)
    assert train_command(Recipe(), bad) == "fasttrain train --recipe default --data folder:pets --skip-bad"


@pytest.mark.parametrize(
    ("name", "is_said"), [("CIFAR-100", False), ("folder:pets", False), ("CIFAR-10 (JPEG q75)", True)]
)
def test_images_that_imitate_a_release_are_called_that(run: Path, name: str, is_said: bool, tmp_path) -> None:
    folder = copied(run, tmp_path / "run", dataset=name)
    page = Page(report(folder, data_dir=tmp_path / "none", device="cpu"))
    assert ("not the original release" in page.text) == is_said
    assert "on synthetic images" not in page.text


def test_report_again_measures_the_checkpoint_and_agrees(run: Path, dataset_dir: Path, capsys) -> None:
    before = Page(run / "report.html")
    assert main(["report", str(run), "--data-dir", str(dataset_dir), "--device", "cpu"]) == 0
    assert str(run / "report.html") in capsys.readouterr().out
    assert Page(run / "report.html").text == before.text


def test_a_run_from_before_there_were_views_is_still_read(run: Path, tmp_path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(run, folder)
    recipe, result = (json.loads((folder / name).read_text()) for name in ("recipe.json", "result.json"))
    del recipe["test_views"]
    (folder / "recipe.json").write_text(json.dumps(recipe | {"test_flip": True}))
    (folder / "result.json").write_text(json.dumps(result | {"test_accuracy_flip": 0.5}))
    found = load_run(folder)
    assert found.recipe.test_views == "mirror" and found.result["test_accuracy_views"] == 0.5


def test_a_page_about_another_accuracy_than_the_runs_says_so(run: Path, dataset_dir: Path, tmp_path) -> None:
    folder = copied(run, tmp_path / "run", test_accuracy=0.9)
    shutil.copy(run / "last.pt", folder)
    report(folder, data_dir=dataset_dir, device="cpu")
    assert "measured again" in Page(folder / "report.html").text


@pytest.mark.parametrize("best_epoch", [1, 2])
def test_a_best_epoch_before_the_last_is_called_flattering(run: Path, tmp_path, best_epoch: int) -> None:
    folder = copied(run, tmp_path / "copy", best_epoch=best_epoch, best_test_accuracy=0.99)
    text = Page(report(folder, data_dir=tmp_path)).text
    assert ("99.00% at epoch 1, was chosen on the test images" in text) == (best_epoch == 1)


def test_names_from_files_are_escaped(run: Path, dataset_dir: Path, tmp_path) -> None:
    data, folder = tmp_path / "data", copied(run, tmp_path / "run", dataset=HOSTILE)
    shutil.copytree(dataset_dir, data)
    inner = data / cifar.CIFAR10.folder
    (inner / cifar.NAME_FILE).write_text(json.dumps({"name": HOSTILE}))
    classes = [HOSTILE, *cifar.read(dataset_dir).classes[1:]]
    (inner / cifar.CIFAR10.classes_file).write_text("\n".join(classes) + "\n")
    torch.save(torch.load(run / "last.pt") | {"classes": classes}, folder / "last.pt")
    report(folder, data_dir=data, device="cpu")
    assert main(["compare", str(folder), "--out", str(tmp_path / "compare.html")]) == 0
    for page in (Page(folder / "report.html"), Page(tmp_path / "compare.html")):
        assert html.escape(HOSTILE, quote=False).split("alert")[0] in page.source
    assert "script" not in Page(folder / "report.html").tags
    scripts = re.findall("<script>(.*?)</script>", page.source, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(digests) == 1 and f"script-src 'sha256-{digests[0]}'" in page.source  # the page's own
    assert page.source.count("&lt;script&gt;") == 1  # the name of the images


def test_without_the_images_a_sentence_stands_for_their_sections(run: Path, tmp_path) -> None:
    folder = copied(run, tmp_path / "run")
    report(folder, data_dir=tmp_path / "none", device="cpu")
    page = Page(folder / "report.html")
    assert "none does not hold the run's images, synthetic: name their folder with --data-dir" in page.text
    assert len(page.loaded) == 10 and "Confusion matrix" not in page.headings
    assert not (tmp_path / "none").exists()  # nothing was generated in their stead


def test_a_page_is_not_replaced_by_one_that_shows_less(
    run: Path, dataset_dir: Path, tmp_path, monkeypatch, capsys
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = (folder / "report.html").read_bytes()
    report_it = ["report", str(folder), "--device", "cpu"]
    assert main([*report_it, "--data-dir", str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "left as it is" in said and "none does not hold the run's images" in said and said.count("\n") == 1
    (folder / "last.pt").unlink()
    assert main(report_it) == 2 and "holds no last.pt" in capsys.readouterr().err
    assert (folder / "report.html").read_bytes() == before
    (folder / "report.html").unlink()
    assert main(report_it) == 0
    assert len(Page(folder / "report.html").loaded) == 5 * 2 + 24  # the samples, but no mistakes


def test_other_images_than_the_runs_are_not_measured(run: Path, dataset_dir: Path, tmp_path) -> None:
    folder = copied(run, tmp_path / "run", dataset="CIFAR-10")
    report(folder, data_dir=dataset_dir, device="cpu")
    page = Page(folder / "report.html")
    assert "does not hold the run's images, CIFAR-10:" in page.text and len(page.loaded) == 10
    assert "not the original" not in page.text


def test_a_page_that_cannot_be_written_leaves_the_old_one(run: Path, tmp_path, monkeypatch, capsys) -> None:
    folder = copied(run, tmp_path / "run")
    before = report(folder, data_dir=tmp_path / "none", device="cpu").read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fasttrain.system.files.os.fsync", full)
    assert main(["report", str(folder), "--data-dir", str(tmp_path / "none"), "--device", "cpu"]) == 2
    assert "report.html: cannot be written (No space left on device)" in capsys.readouterr().err
    assert (folder / "report.html").read_bytes() == before
    assert not list(folder.glob(".*"))


def test_without_the_checkpoint_the_samples_stay(run: Path, dataset_dir: Path, tmp_path) -> None:
    folder = copied(run, tmp_path / "run")
    (folder / "lr_find.json").unlink()
    report(folder, data_dir=dataset_dir, device="cpu")
    page = Page(folder / "report.html")
    assert "holds no last.pt" in page.text and "the LR finder was not used" in page.text
    assert len(page.loaded) == 4 * 2 + 24


def test_a_profilers_trace_is_listed_where_there_is_one(run: Path, tmp_path) -> None:
    folder = copied(run, tmp_path / "run")
    assert "trace.json" not in Page(report(folder, data_dir=tmp_path / "none", device="cpu")).links
    (folder / "trace.json").write_text("{}")
    assert "trace.json" in Page(report(folder, data_dir=tmp_path / "none", device="cpu")).links


def test_losses_that_are_no_numbers_leave_gaps(run: Path, tmp_path) -> None:
    folder = copied(run, tmp_path / "run")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(row | {"train_loss": None, "test_loss": None}) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text)
    report(folder, data_dir=tmp_path / "none", device="cpu")
    assert main(["compare", str(folder), "--out", str(tmp_path / "compare.html")]) == 0


def test_a_failing_report_does_not_fail_the_training(
    dataset_dir: Path, tmp_path, monkeypatch, capsys
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no\nink")

    monkeypatch.setattr("fasttrain.report.html.write_report", fail)
    recipe = Recipe(epochs=1, batch_size=32, width=8, loader="tensor")
    train(recipe, data_dir=dataset_dir, out=tmp_path, device="cpu")
    [folder] = tmp_path.iterdir()
    assert (folder / "result.json").exists() and not (folder / "report.html").exists()
    assert capsys.readouterr().out.count("no report.html (no ink); try again: ") == 1


def test_the_report_leaves_generators_and_threads_alone(run: Path, dataset_dir: Path) -> None:
    def state() -> tuple[object, ...]:
        keys = np.random.get_state(legacy=False)["state"]["key"].tolist()  # type: ignore[index]
        precision = torch.get_float32_matmul_precision()
        generators = (random.getstate(), keys, torch.get_rng_state().tolist())
        return (*generators, torch.get_num_threads(), precision, torch.is_grad_enabled())

    before = state()
    report(run, data_dir=dataset_dir, device="cpu")
    assert state() == before


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("recipe.json", None, "not a run's folder"),
        ("recipe.json", '{"epoks": 3}', "unknown recipe key 'epoks'"),
        ("result.json", "[1, 2]", "result.json: corrupt"),
        ("result.json", "{}", "result.json: test_accuracy is missing"),
        ("machine.json", None, "machine.json: cannot be read"),
        ("metrics.jsonl", "", "metrics.jsonl: empty"),
        ("metrics.jsonl", '{"epoch": 1, "train_l', "metrics.jsonl line 1: corrupt"),
        ("metrics.jsonl", '{"epoch": "one"}', "metrics.jsonl line 1: epoch is 'one'"),
    ],
)
def test_a_bad_folder_is_one_line_status_2_and_the_old_page_stays(
    name: str, content: str | None, said: str, run: Path, tmp_path, capsys
) -> None:
    folder = copied(run, tmp_path / "run")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    for out, args in (
        ("report.html", ["report"]),
        ("old.html", ["compare", "--out", str(folder / "old.html")]),
    ):
        (folder / out).write_text("old")
        assert main([*args, str(folder)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
        assert (folder / out).read_text() == "old"


# --------------------------------------------------------------------------------------------- comparison


@pytest.fixture
def runs(run: Path, tmp_path: Path) -> list[Path]:
    """Three seeds of one recipe, and one run of another."""
    folders = []
    for seed, cutout, accuracy in ((0, 8, 0.5), (1, 8, 0.6), (2, 8, 0.7), (0, 0, 0.9)):
        folder = copied(run, tmp_path / f"{seed}-{cutout}", test_accuracy=accuracy)
        recipe = json.loads((folder / "recipe.json").read_text()) | {"seed": seed, "cutout": cutout}
        (folder / "recipe.json").write_text(json.dumps(recipe))
        shutil.copy(run / "report.html", folder)
        folders.append(folder)
    return folders


def test_runs_that_differ_in_the_seed_alone_form_a_group(runs: list[Path]) -> None:
    groups = group_runs([load_run(folder) for folder in runs])
    assert [[run.folder for run in members] for members in groups] == [runs[:3], runs[3:]]


def test_settings_are_told_apart_from_those_that_all_share(runs: list[Path]) -> None:
    groups = group_runs(
        [load_run(folder) for folder in [*runs, copied(runs[0], runs[0].parent / "x", seed=7)]]
    )
    differing, shared = compare_settings([*groups, groups[0]])
    assert differing == {"cutout": [(0, [1]), (8, [0, 2])]}  # the more frequent value last
    recipe = load_run(runs[0]).recipe.to_dict()
    assert shared.items() >= {key: recipe[key] for key in recipe if key not in ("seed", "cutout")}.items()
    assert "seed" not in shared and shared["images"] == "synthetic"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("result.json", {"dataset": "other"}),
        ("result.json", {"precision": "fp16"}),
        ("machine.json", {"cpu_cores": 99}),
    ],
)
def test_other_images_precision_or_machine_make_another_group(
    runs: list[Path], file: str, change: dict
) -> None:
    values = json.loads((runs[1] / file).read_text())
    (runs[1] / file).write_text(json.dumps(values | change))
    groups = group_runs([load_run(folder) for folder in runs[:3]])
    assert [len(members) for members in groups] == [2, 1]


def test_compare_writes_mean_range_and_n(runs: list[Path], tmp_path) -> None:
    out = tmp_path / "page.html"
    # The first folder twice: it is still one run.
    assert main(["compare", *map(str, [*runs, runs[0]]), "--out", str(out)]) == 0
    page = Page(out)
    assert re.search(r"\b2 tiny 3 60\.00% \(50\.00% to 70\.00%\) ", page.text)  # line 1 is the better group
    assert re.search(r"\b1 tiny 1 90\.00% [\d.,]+ ", page.text)  # n = 1: no range
    assert "cutout 0: 1 8: 2 " in page.text
    assert page.links == [f"{name}/report.html" for name in ("0-0", "2-8", "1-8", "0-8")]  # the best first
    assert len(page.loaded) == 3 * 2 and all(uri.startswith("data:image/png;base64,") for uri in page.loaded)


def test_accuracy_is_drawn_over_the_training_seconds_until_then(runs: list[Path], monkeypatch) -> None:
    """Of a group: the mean of its runs' seconds and accuracies, and the range of the accuracies."""
    charts: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        "fasttrain.report.plots.chart", lambda curves, **kw: charts.append((curves, kw)) or (lambda *_: None)
    )
    for folder, seconds, accuracy in zip(runs, (1.0, 2.0, 3.0, 40.0), (0.5, 0.6, 0.7, 0.9), strict=True):
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        rows = [row | {"seconds": seconds, "test_accuracy": accuracy} for row in rows]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["compare", *map(str, runs), "--out", str(runs[0].parent / "page.html")]) == 0
    [curves, settings] = next(chart for chart in charts if chart[1]["x_name"] == "seconds of training")
    means = [
        ([40.0, 80.0], [0.9, 0.9]),
        ([2.0, 4.0], pytest.approx([0.6, 0.6])),
    ]  # copied runs: by result.json
    assert [(curve.xs, curve.ys) for curve in curves] == means
    assert [curve.band for curve in curves] == [None, ([0.5, 0.5], [0.7, 0.7])]
    assert settings["log_x"] and settings["y_from"] == pytest.approx(0.4)


def test_twenty_lines_can_be_told_apart_and_the_table_has_the_plots_strokes() -> None:
    strokes = [(series % len(plots.LIGHT.series), plots.dashes(series)) for series in range(20)]
    assert len(set(strokes)) == 20 and strokes[0][1] == ()
    source = render(
        "compare.html.j2",
        **dict.fromkeys(("over_seconds", "over_epochs", "loss"), plots.Picture("", "", "")),
        y_from=0.0,
        rows=[],
        groups=[
            {"name": "a", "n": 2, "figures": dict.fromkeys(("test_accuracy", "train_seconds"), (0, 0, 0))}
        ]
        * 20,
        differing={},
        shared={},
    )
    drawn = re.findall(r'stroke="var\(--series-(\d)\)" stroke-dasharray="([\d. ]*)"', source)
    assert [
        (int(colour), tuple(float(part) / 2 for part in dashes.split())) for colour, dashes in drawn
    ] == strokes


def test_compare_leaves_out_what_has_not_finished(runs: list[Path], tmp_path, capsys) -> None:
    (runs[0] / "result.json").unlink()
    (tmp_path / "profile").mkdir()
    out = tmp_path / "page.html"
    assert main(["compare", *map(str, [*runs, tmp_path / "profile"]), "--out", str(out)]) == 0
    assert (
        f"left out, as no run has finished there: {runs[0]}, {tmp_path / 'profile'}"
        in capsys.readouterr().out
    )
    assert len(Page(out).links) == len(runs) - 1
    assert main(["compare", str(runs[0]), "--out", str(out)]) == 2
    assert "has not finished" in capsys.readouterr().err


def test_compare_without_runs_is_one_line_and_status_2(capsys) -> None:
    assert main(["compare"]) == 2
    assert "no run named" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<!DOCTYPE html><body>{frames}<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(({{contentDocument: page}}) => ({{
    pictures: [...page.images].map(image => image.naturalWidth),
    width: page.documentElement.clientWidth,
    content: page.documentElement.scrollWidth,
    sources: [...page.images].map(image => image.currentSrc.length),
    paper: getComputedStyle(page.body).backgroundColor,
    sideways: [...page.querySelectorAll("body *")].filter(element =>
      element.scrollWidth > element.clientWidth && getComputedStyle(element).overflowX === "auto").length,
    sorted: [...page.querySelectorAll("th button")].flatMap(button => [button, button]).map(button => {{
      button.click();
      const rows = [...page.querySelectorAll(".sortable tbody tr")];
      return rows.map(row => row.cells[button.parentElement.cellIndex].innerText.trim());
    }}),
  }}));
  document.body.textContent = JSON.stringify(found);
}});
</script>"""


def browse(folder: Path, frames: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Show frames in a browser; returns what the script found in each, and every request that left.

    What the console said counts as a request, too.
    """
    requests: list[str] = []

    class Recorder(BaseHTTPRequestHandler):
        """A proxy that answers nothing: whatever the browser wants from a network arrives here."""

        def handle_one_request(self) -> None:
            requests.append(self.rfile.readline(1000).decode(errors="replace"))
            self.close_connection = True

    server = HTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (folder / "probe.html").write_text(PROBE.format(frames=frames), encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    # What the browser would ask for on its own account: clock, sign-in, updates. Nobody listens on port 9.
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--disable-features=NetworkTimeServiceQuerying", "--gaia-url=http://127.0.0.1:9"]
    command += ["--component-updater=url-source=http://127.0.0.1:9"]
    command += [f"--user-data-dir={folder / 'profile'}", f"--proxy-server=127.0.0.1:{server.server_port}"]
    command += ["--enable-logging=stderr", "--dump-dom", (folder / "probe.html").as_uri()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    finally:
        server.shutdown()
        server.server_close()
    body = re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)
    assert body is not None, done.stderr
    requests += [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(html.unescape(body[1])), requests


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or Chrome")
def test_pages_show_whole_at_any_width_in_both_schemes_and_ask_for_nothing(
    run: Path, runs: list[Path], dataset: Dataset, tmp_path
) -> None:
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "compare.html")]) == 0
    larger, evaluation = many_classes(dataset, 1000)
    thousand = write_report(
        load_run(copied(run, tmp_path / "thousand")), larger, evaluation, device=torch.device("cpu")
    )
    (tmp_path / "progress.html").write_text(progress_page(load_unfinished(run)), encoding="utf-8")
    shown = [
        (source, width, scheme)
        for source in (
            run / "report.html",
            thousand,
            tmp_path / "compare.html",
            tmp_path / "progress.html",
        )
        for width in (390, 1280)
        for scheme in ("light", "dark")
    ]
    # A frame, since a headless window cannot be as narrow as a phone; its scheme is its element's.
    frames = "".join(
        f'<iframe width="{width}" height="800" style="border: 0; color-scheme: {scheme}" '
        f'srcdoc="{html.escape(source.read_text(encoding="utf-8"))}"></iframe>'
        for source, width, scheme in shown
    )
    found, requests = browse(tmp_path, frames)
    assert requests == [], requests
    assert len(found) == len(shown)
    for (source, width, scheme), page in zip(shown, found, strict=True):
        assert page["pictures"] and all(pixels > 0 for pixels in page["pictures"]), source
        assert page["content"] <= page["width"] <= width, (source, width)
        if source.name == "compare.html":  # a phone scrolls down only, in tables too
            assert page["sideways"] == 0, width
        assert page["paper"] == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(18, 22, 29)")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or Chrome")
def test_a_heading_sorts_the_runs(runs: list[Path], tmp_path) -> None:
    for folder, seconds in zip(runs, (9.0, 100.0, 20.0, 3.0), strict=True):
        result = json.loads((folder / "result.json").read_text()) | {"train_seconds": seconds}
        (folder / "result.json").write_text(json.dumps(result))
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "compare.html")]) == 0
    page = html.escape((tmp_path / "compare.html").read_text(encoding="utf-8"))
    [found], problems = browse(tmp_path, f'<iframe width="1280" height="800" srcdoc="{page}"></iframe>')
    assert problems == []
    pressed_once, pressed_again = found["sorted"][::2], found["sorted"][1::2]
    assert pressed_once[0] == ["2", "2", "2", "1"] and pressed_once[1] == ["2-8", "1-8", "0-8", "0-0"]
    assert pressed_again[3] == ["50.00%", "60.00%", "70.00%", "90.00%"]
    assert pressed_once[4] == ["100", "20", "9", "3"] and pressed_again[4] == ["3", "9", "20", "100"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or Chrome")
def test_the_browser_test_would_see_a_request(tmp_path) -> None:
    """The control of the test above."""
    found, requests = browse(tmp_path, '<iframe srcdoc="<img src=http://elsewhere.test/x.png>"></iframe>')
    assert found[0]["pictures"] == [0]
    assert any("elsewhere.test" in line for line in requests)
