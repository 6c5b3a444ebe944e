"""What the README and docs/ show runs, what they document is written, and what they link to is there."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

import fasttrain
from benchmarks.tables import END, MARKED, ROOT, pages
from fasttrain.data.sources import synthetic
from fasttrain.recipe import PRESETS
from fasttrain.report.run import EPOCH_LOSSES, Run, load_run

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUNS = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
PYTHON = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
PAGES = pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)

CAPTION_CHARACTERS = 330
"""Three lines of 110."""


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def small_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder whose data/ has as many images as one batch of the blocks holds; a small `laptop`."""
    monkeypatch.setitem(PRESETS, "laptop", dataclasses.replace(PRESETS["laptop"], epochs=2, width=4))
    synthetic.generate(tmp_path / "data", train_count=256, test_count=40)
    monkeypatch.delenv("FASTTRAIN_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_python_block_has_a_test() -> None:
    found = {page.name: len(python_blocks(page.read_text(encoding="utf-8"))) for page in pages()}
    assert {name: count for name, count in found.items() if count} == {"README.md": 2, "python.md": 5}


def test_the_readme_trains_from_python(small_data: Path) -> None:
    names: dict[str, Any] = {}
    exec(python_blocks(README)[0], names)
    assert names["run"].recipe.name == "laptop" and (names["run"].folder / "report.html").exists()


def test_the_readme_uses_our_loader_in_a_loop_of_ones_own(small_data: Path) -> None:
    """On the stand-in, which `cifar10` rightly refuses; the model sees what a network is to see."""
    seen: list[torch.Tensor] = []
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return network.to(images.device)(images)

    names: dict[str, Any] = {"model": model, "loss_fn": nn.functional.cross_entropy}
    exec(python_blocks(README)[1].replace('"cifar10"', '"auto"'), names)
    assert names["loss"].isfinite()
    assert names["images"].dtype == torch.uint8 and names["labels"].dtype == torch.int64
    assert len(seen) == 10 and all(batch.shape == (256, 3, 32, 32) for batch in seen)
    assert not torch.equal(seen[0], seen[1])  # another order, and augmented anew
    pixels = torch.stack(seen).float()
    assert pixels.mean().abs() < 0.1 and 0.8 < pixels.std() < 1.1  # cutout sets some to the mean


@pytest.fixture
def names(small_data: Path) -> dict[str, Any]:
    """What the first Python of docs/python.md leaves."""
    names: dict[str, Any] = {}
    exec(python_blocks(PYTHON)[0], names)
    assert [path.name for path in (small_data / "runs").iterdir()] == [names["run"].folder.name]
    assert (names["run"].folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    return names


@pytest.fixture
def run(names: dict[str, Any]) -> Run:
    return names["run"]


@pytest.mark.parametrize(("block", "package"), [(1, "wandb"), (2, "mlflow")])
def test_a_tracker_gets_every_epoch_and_the_result(
    names: dict[str, Any], block: int, package: str, small_data: Path, monkeypatch
) -> None:
    pytest.importorskip(package)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would take MLflow's larger package
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (small_data / "mlruns").as_uri())
    exec(python_blocks(PYTHON)[block], names)
    newest = load_run(max((small_data / "runs").iterdir()))
    if package == "wandb":
        [written] = (small_data / "wandb").glob("offline-run-*/run-*.wandb")
        content = written.read_bytes()
        assert b"test_accuracy" in content and newest.recipe.name.encode() in content
    else:
        [tracked] = names["mlflow"].search_runs(output_format="list")
        assert tracked.data.metrics["test_accuracy"] == newest.result["test_accuracy"]
        assert tracked.data.params["epochs"] == "1"


def test_a_network_is_used_as_docs_python_says(names: dict[str, Any], small_data: Path, capsys) -> None:
    Image.new("RGB", (40, 30)).save("cat.png")
    exec(python_blocks(PYTHON)[3], names)
    assert names["found"].accuracy == names["run"].result["test_accuracy"]
    assert names["model"].classes == names["fasttrain"].load_dataset("auto").classes
    assert names["card"].exists() and "cat.png" in capsys.readouterr().out


def test_settings_are_chosen_on_held_out_images_as_docs_python_says(small_data: Path) -> None:
    """On the stand-in, which `cifar10` rightly refuses."""
    names: dict[str, Any] = {"fasttrain": fasttrain, "dataclasses": dataclasses}
    exec(python_blocks(PYTHON)[4].replace('"cifar10"', '"auto"').replace("range(5)", "range(1)"), names)
    assert len(names["runs"]) == len([*(small_data / "runs" / "rates").iterdir()]) == 2
    for run in names["runs"]:
        assert run.result["dataset"] == "synthetic, a tenth of the training images held out"


def test_docs_runs_lists_the_keys_of_metrics_jsonl(run: Run) -> None:
    assert run.recipe.name == "laptop" and len(run.epochs) == 1
    table = RUNS.split("<!-- keys of metrics.jsonl -->")[1].split("<!-- end of keys -->")[0]
    units = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|", table, re.MULTILINE))
    [written] = run.epochs
    assert list(units) == list(written)
    assert {key for key, unit in units.items() if "null" in unit} == set(EPOCH_LOSSES)
    for key, unit in units.items():
        assert unit != "0 to 1" or 0 <= written[key] <= 1, key


def test_the_readme_is_short_and_its_first_screen_says_what_matters() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    screen = "\n".join(lines[:30])
    for wanted in ("![", "<!-- table: presets -->", END, "make train", "make test", " GiB"):
        assert wanted in screen, wanted


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*pages(), ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_every_relative_link_resolves(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@PAGES
def test_a_caption_has_three_lines_at_most(page: Path) -> None:
    for table in MARKED.finditer(page.read_text(encoding="utf-8")):
        for paragraph in table.group().split("\n\n"):
            if not paragraph.startswith(("|", "- ", "![", "<!--")):
                assert len(paragraph) <= CAPTION_CHARACTERS, paragraph


def test_the_readme_leads_to_every_page() -> None:
    for page in pages()[1:]:
        assert f"(docs/{page.name})" in README


def test_the_tree_in_docs_design_names_every_module_and_no_other() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    tree = text.split("    fasttrain/")[1].split("    benchmarks/")[0]
    modules = {path.stem for path in (ROOT / "fasttrain").rglob("*.py")} - {"__init__"}
    assert modules <= set(re.findall(r"\w+", tree))
    assert set(re.findall(r"(\w+)\.py", tree)) <= modules


def test_versions_agree() -> None:
    """Ruff before a commit is that of `make check`; CITATION.cff names the package's version."""
    ruff = re.search(r"^ruff==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert ruff and f"rev: v{ruff[1]} " in (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"version: {fasttrain.__version__}\n" in (ROOT / "CITATION.cff").read_text()
