"""The pages and the committed result files agree."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import pictures, tables
from benchmarks.committed import RESULTS, CommittedRun, preset_name, runs
from benchmarks.table_accuracy import presets_table, runs_table
from benchmarks.table_speed import reliability_table
from fasttrain.recipe import PRESETS


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_a_page_says_what_the_result_files_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.render(text, page) == text, "run make tables"


def test_every_table_stands_once() -> None:
    found = [name for page in tables.pages() for name in tables.MARKED.findall(page.read_text("utf-8"))]
    assert sorted(found) == sorted(tables.TABLES)


def test_an_unknown_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"README.md: no table is called 'speeed'"):
        tables.render(f"<!-- table: speeed -->{tables.END}", tables.ROOT / "README.md")


def test_every_picture_was_drawn_from_the_files_of_today() -> None:
    sources = pictures.sources(RESULTS)
    assert len(sources) >= 2
    for picture, files in sources.items():
        assert pictures.drawn_from(picture) == pictures.checksum(files), "run make tables"


def test_a_picture_is_the_same_bytes_whenever_it_is_drawn(tmp_path: Path) -> None:
    [source] = RESULTS.glob("2-core-amd-epyc/scaling.json")
    drawn = []
    for name in ("one.svg", "two.svg"):
        with pictures.figure_in(tmp_path / name, [source]) as figure:
            pictures.draw_scaling(figure, [source])
        drawn.append((tmp_path / name).read_bytes())
    assert drawn[0] == drawn[1] and b"<svg" in drawn[0]


@pytest.fixture
def one_run(tmp_path: Path) -> Path:
    """A copy of a committed run of `fast`, in results of its own."""
    [source] = RESULTS.glob("*/runs/fast-cifar10-*")
    return Path(shutil.copytree(source, tmp_path / "machine" / "runs" / "one"))


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_changed_result_changes_its_table(one_run: Path) -> None:
    results = one_run.parents[2]
    assert "12.34%" not in runs_table(results, current=True)
    change(one_run / "result.json", test_accuracy=0.1234)
    assert "12.34%" in runs_table(results, current=True)


def test_a_run_that_differs_from_its_preset_is_superseded(one_run: Path) -> None:
    results = one_run.parents[2]
    assert [run.preset for run in runs(results, current=True)] == ["fast"]
    assert not runs(results, current=False)
    change(one_run / "recipe.json", seed=5)
    assert runs(results, current=True)
    change(one_run / "recipe.json", cutout=8, logit_scale=1.0)
    assert not runs(results, current=True)
    assert "| logit_scale=1, cutout=8 |" in runs_table(results, current=False)


def test_a_searched_rate_may_have_been_given() -> None:
    [run] = [run for run in runs(RESULTS, current=True) if run.preset == "assignment"]
    assert run.recipe["max_lr"] == 0.02 and PRESETS["assignment"].max_lr == "auto"


def test_a_preset_that_was_renamed_is_shown_under_its_name_of_today() -> None:
    assert preset_name("none, record-batch-256") == "none, speedrun-batch-256"
    assert preset_name("recorded") == "recorded"
    rows = [line.split(" | ")[0] for line in presets_table(RESULTS).splitlines() if line.startswith("| ")]
    presets = ["| assignment", "| default", "| fast", "| laptop", "| speedrun"]
    assert list(dict.fromkeys(rows)) == ["| preset", "| ---", *presets]
    texts = [table(RESULTS) for table in tables.TABLES.values()]
    assert not any("record |" in text or "record," in text for text in texts)


def test_every_committed_run_names_its_data_its_machine_and_a_clean_commit() -> None:
    folders = [*RESULTS.glob("*/runs/*")]
    assert folders
    for run in map(CommittedRun, folders):
        assert run.result["dataset"] and run.result["precision"] and run.machine["torch"]
        assert run.machine["git_commit"] and run.machine["git_dirty"] is False
        rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
        assert rows[-1]["test_accuracy"] == run.result["test_accuracy"]
        assert len(rows) == run.result["epochs"]


def test_fault_campaigns_add_up(tmp_path: Path) -> None:
    [path, *_] = sorted((RESULTS / "2-core-amd-epyc").glob("soak-seed-*.json"))
    values = json.loads(path.read_text())
    one, two = tmp_path / "one" / "machine", tmp_path / "two" / "machine"
    for folder, seeds in ((one, (0,)), (two, (0, 1))):
        folder.mkdir(parents=True)
        for seed in seeds:
            (folder / f"soak-seed-{seed}.json").write_text(json.dumps(values | {"seed": seed}))
    one_table, two_tables = (reliability_table(results) for results in (one.parent, two.parent))
    once, twice = (
        [int(row.split()[1].replace(",", "")) for row in table.split("\n")[2:11]]
        for table in (one_table, two_tables)
    )
    assert once[0] == values["kill"]["kills"] > 0
    assert twice == [2 * count for count in once]
