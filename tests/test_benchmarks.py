"""The README and the result files agree, and the benchmarks run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report, tables

ROOT = Path(__file__).parents[1]


def test_the_readme_says_what_the_result_files_say() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert tables.render(text) == text, "run make tables"


def test_a_changed_result_changes_the_readme(tmp_path: Path) -> None:
    [first, *_] = sorted((report.RESULTS / "runs").glob("*/result.json"))
    copy = tmp_path / "runs" / "one"
    copy.mkdir(parents=True)
    for name in ("machine.json", "result.json"):
        (copy / name).write_text((first.parent / name).read_text())
    assert "12.34%" not in tables.runs_table(tmp_path)
    result = json.loads((copy / "result.json").read_text()) | {"test_accuracy": 0.1234}
    (copy / "result.json").write_text(json.dumps(result))
    assert "12.34%" in tables.runs_table(tmp_path)


def test_every_committed_run_names_its_data_its_machine_and_a_clean_commit() -> None:
    for folder in (report.RESULTS / "runs").iterdir():
        result = json.loads((folder / "result.json").read_text())
        machine = json.loads((folder / "machine.json").read_text())
        assert result["dataset"] and result["precision"] and machine["torch"] and machine["git_commit"]
        assert machine["git_dirty"] is False
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert rows[-1]["test_accuracy"] == result["test_accuracy"] and len(rows) == result["epochs"]


def test_workloads_take_turns() -> None:
    calls: list[str] = []

    def workload(name: str, figure: float) -> float:
        calls.append(name)
        return figure

    samples = report.interleave({"a": lambda: workload("a", 1.0), "b": lambda: workload("b", 2.0)}, rounds=2)
    assert calls == ["a", "b", "a", "b"] and samples == {"a": [1.0, 1.0], "b": [2.0, 2.0]}
    assert report.spread([9.0, 10.0, 12.0]) == pytest.approx(0.15)


@pytest.mark.parametrize(
    "command",
    [
        ["benchmarks.step", "--rounds", "1", "--batch-size", "8", "--device", "cpu"],
        ["benchmarks.loader", "--rounds", "1", "--batch-size", "64", "--images", "256", "--device", "cpu"],
        ["benchmarks.profile", "--steps", "1", "--recipe", "{recipe}", "--trace", "{tmp}/trace.json"],
    ],
)
def test_the_benchmark_scripts_run(command: list[str], tmp_path: Path) -> None:
    recipe = tmp_path / "small.json"
    recipe.write_text(json.dumps({"batch_size": 8}))
    arguments = [part.format(recipe=recipe, tmp=tmp_path) for part in command]
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"FASTTRAIN_RESULTS": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    if command[0] == "benchmarks.profile":
        assert "mkldnn" in done.stdout or "conv" in done.stdout
        assert (tmp_path / "trace.json").exists()
    else:
        [path] = tmp_path.glob(f"{command[0].split('.')[1]}-*.json")
        values = json.loads(path.read_text())
        assert values["rows"] and values["samples"] and values["machine"]["torch"]
