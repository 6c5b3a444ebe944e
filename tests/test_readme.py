"""What the README shows runs, and what it documents is what is written."""

import re
from pathlib import Path

import pytest

import fasttrain
from fasttrain.data.sources import synthetic
from fasttrain.report.run import EPOCH_LOSSES, Run

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What the Python of the README leaves, run on as many images as one of its batches holds."""
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    folder = tmp_path_factory.mktemp("readme")
    synthetic.generate(folder / "data", train_count=256, test_count=40)
    names: dict[str, object] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FASTTRAIN_DATA", raising=False)
        patch.chdir(folder)
        exec(code, names)
        assert isinstance(names["run"], Run)
        assert [path.name for path in (folder / "runs").iterdir()] == [names["run"].folder.name]
        assert (names["run"].folder / "curves.png").read_bytes().startswith(b"\x89PNG")
        assert (names["run"].folder / "report.html").exists()
    return names["run"]


def test_the_python_of_the_readme_trains_plots_and_loads(run: Run) -> None:
    assert run.recipe.name == "laptop" and len(run.epochs) == 1
    assert all(hasattr(fasttrain, name) for name in re.findall(r"fasttrain\.(\w+)\(", README))


def test_the_documented_keys_of_metrics_jsonl_are_the_written_ones(run: Run) -> None:
    table = README.split("<!-- keys of metrics.jsonl -->")[1].split("<!-- end of keys -->")[0]
    units = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\|", table, re.MULTILINE))
    [written] = run.epochs
    assert list(units) == list(written)
    assert {key for key, unit in units.items() if "null" in unit} == set(EPOCH_LOSSES)
    for key, unit in units.items():
        assert unit != "0 to 1" or 0 <= written[key] <= 1, key
