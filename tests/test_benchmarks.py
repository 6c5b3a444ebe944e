"""The benchmarks run."""

import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from torch import nn

from benchmarks import accuracy, airbench, committed, fastest, harness, ladder, peers, tables, trace
from benchmarks import all as all_benchmarks
from benchmarks.all import Part
from benchmarks.peers import check
from benchmarks.peers.dataset import ImageDataset, data_loader
from benchmarks.research import designs, published
from benchmarks.workloads import Variant, build_step
from fasttrain import cli
from fasttrain.data.build_loader import build_loader
from fasttrain.data.dataset import Dataset, Split
from fasttrain.errors import UserError
from fasttrain.model import CustomResNet
from fasttrain.options import ProfileOptions, TrainCommand
from fasttrain.recipe import Recipe
from fasttrain.system.machine import describe
from fasttrain.tools.profiler import STEP
from tests.helpers import CPU

ROOT = Path(__file__).parents[1]


def test_workloads_take_turns() -> None:
    calls: list[str] = []

    def workload(name: str, figure: float) -> float:
        calls.append(name)
        return figure

    samples = harness.interleave({"a": lambda: workload("a", 1.0), "b": lambda: workload("b", 2.0)}, rounds=2)
    assert calls == ["a", "b", "a", "b"] and samples == {"a": [1.0, 1.0], "b": [2.0, 2.0]}


@pytest.fixture(scope="module")
def small_visit(dataset_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the visits to a GPU leave behind, tiny and on the CPU; the first one without DALI."""
    out, nothing = tmp_path_factory.mktemp("visit"), tmp_path_factory.mktemp("nothing")
    (nothing / "nvidia").mkdir()
    (nothing / "nvidia" / "__init__.py").write_text("raise ImportError('gone')")
    visit: dict[str, Any] = {"plan": "gpu", "small": True, "minutes": 60, "data_dir": dataset_dir, "out": out}
    later = {*all_benchmarks.VISITS["dali"], *all_benchmarks.VISITS["seeds"]}
    later -= {*all_benchmarks.TWINS, "folder-run"}
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FASTTRAIN_RESULTS", raising=False)
        patch.setenv("PYTHONPATH", f"{nothing}{os.pathsep}{ROOT}")
        all_benchmarks.main(all_benchmarks.Options(**visit, visit="first"))
        patch.setenv("PYTHONPATH", str(ROOT))
        all_benchmarks.main(all_benchmarks.Options(**visit, only=tuple(later)))
    return out


def run_benchmark(name: str, *flags: str, cwd: Path, **names: str) -> subprocess.CompletedProcess[str]:
    """A script of benchmarks/ with nothing of ours in the environment but `names`."""
    env = {key: value for key, value in os.environ.items() if key != "FASTTRAIN_RESULTS"}
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    env |= {"PYTHONPATH": str(ROOT), **names}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=1200)


def test_the_visits_run_every_benchmark(small_visit: Path) -> None:
    measured = {path.stem: json.loads(path.read_text()) for path in small_visit.glob("*-*/*.json")}
    speed = {
        "machine",
        "step",
        "loader",
        "ladder",
        "scaling",
        "start",
        "folder",
        "designs",
        "networks",
        "layers",
    }
    assert {*measured} == speed | {"ways", "final-default"}
    for name, values in measured.items():
        assert values["rows"] and values["machine"]["torch"], name
    assert (small_visit / "profile" / "trace.json").exists()
    assert "conv" in (small_visit / "profile.log").read_text()
    assert "1 steps, and nothing of them ran on a GPU" in (small_visit / "trace.log").read_text()
    assert "DALI is not installed" in (small_visit / "doctor.log").read_text()
    [short] = small_visit.glob("short/*/result.json")
    assert short.parent.name in (small_visit / "fastest.log").read_text()
    assert len(list(small_visit.glob("runs/*-default/result.json"))) == 2
    plans = {*all_benchmarks.BENCH, *(name for names in all_benchmarks.VISITS.values() for name in names)}
    left_out = plans - {path.stem for path in small_visit.glob("*.log")}
    assert left_out == {"airbench", "folder-run"} | all_benchmarks.TWINS


def test_every_command_for_a_gpu_is_one_that_is_understood(tmp_path: Path) -> None:
    """In full: a wrong flag would only be seen on a GPU, where minutes are few."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    folders = {"out": tmp_path, "data_dir": tmp_path / "data"}
    found = all_benchmarks.parts(all_benchmarks.Options(plan="gpu", airbench=Path("script.py"), **folders))
    names = [name for visit in all_benchmarks.VISITS.values() for name in visit]
    assert [part.name for part in found] == names and not any(" " in name for name in names)
    for part in found:
        python, flag, module, *arguments = part.command
        assert (python, flag) == (sys.executable, "-m")
        if module.startswith("benchmarks."):
            tyro.cli(importlib.import_module(module).Options, args=arguments)
        elif module == "pytest":
            assert all(Path(path).is_file() for path in arguments if path.endswith(".py"))
        elif arguments != ["doctor"]:
            options = {"train": TrainCommand, "profile": ProfileOptions}[arguments[0]]
            cli._parse_recipe(options, arguments[0], arguments[1:])
    loaders = {part.name: " ".join(part.command) for part in found if "dali" not in part.name}
    assert all("--loader tensor" in loaders[f"short-{way}"] for way in ("eager", "graph", "compiled"))


def test_a_cold_run_finds_nothing_and_a_warm_one_what_the_cold_one_left(tmp_path: Path) -> None:
    code = """if True:
        import os, pathlib
        names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "FASTTRAIN_CACHE")
        folders = [os.environ[name] for name in names]
        print([pathlib.Path(folder).exists() for folder in folders])
        for folder in folders:
            pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    """
    found = []
    for cold in (True, False, True):
        part = Part("run", 60, [sys.executable, "-c", code], caches=tmp_path / "caches", cold=cold)
        assert all_benchmarks.run_part(part, 60, tmp_path) == "done"
        found.append((tmp_path / "run.log").read_text().strip())
    assert found == [str(3 * [exists]) for exists in (False, True, False)]


def test_the_commit_is_told_where_there_is_no_repository(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("FASTTRAIN_COMMIT", "abc")
    part = Part("run", 60, [sys.executable, "-c", "import os; print(os.environ['FASTTRAIN_COMMIT'])"])
    all_benchmarks.run_part(part, 60, tmp_path)
    assert (tmp_path / "run.log").read_text() == "abc\n"


def test_the_fastest_run_is_told_by_its_later_epochs() -> None:
    def short(*seconds: float) -> Any:
        return SimpleNamespace(result={"epoch_seconds": list(seconds)})

    assert fastest.epoch_seconds(short(9.0, 1.0, 1.2)) == pytest.approx(1.1)
    assert fastest.epoch_seconds(short(9.0)) == 9.0


def test_a_trace_tells_the_streams_and_threads_apart_and_finds_the_gaps(tmp_path: Path, capsys) -> None:
    def event(category: str, name: str, start: float, duration: float, **more: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration, "tid": 1, **more}

    def on_gpu(category: str, name: str, start: float, duration: float, stream: int) -> dict[str, Any]:
        return event(category, name, start, duration, args={"stream": stream})

    events = [
        *(event("user_annotation", STEP, 1000.0 * number, 500) for number in range(2)),
        on_gpu("gpu_user_annotation", STEP, 0, 2000, 7),
        on_gpu("kernel", "conv", 0, 300, 7),
        on_gpu("kernel", "crop", 100, 100, 20),  # beside the other: no gap follows its end
        on_gpu("gpu_memcpy", "Memcpy HtoD", 250, 250, 20),
        on_gpu("kernel", "conv", 1500, 500, 7),
        event("cuda_runtime", "cudaLaunchKernel", 0, 10),
        event("cuda_runtime", "cudaEventSynchronize", 0, 800, tid=2),
        event("cuda_runtime", "cudaGetDevice", 0, 10),
    ]
    assert [tuple(row.values()) for row in trace.count(events, steps=2)] == [
        ("copies", "stream 20", 0.5, 0.125),
        ("kernels", "stream 20", 0.5, 0.05),
        ("kernels", "stream 7", 1.0, 0.4),
        ("cudaLaunchKernel", "thread 1", 0.5, 0.005),
        ("cudaEventSynchronize", "thread 2", 0.5, 0.4),
    ]
    [gap] = trace.gaps(events)
    assert gap == {"at_ms": 0.5, "ms": 1.0, "after": "Memcpy HtoD", "before": "conv"}
    (tmp_path / "no.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read as a trace"):
        trace.main(trace.Options(trace=tmp_path / "no.json"))


def test_no_part_ends_with_a_traceback(small_visit: Path) -> None:
    for log in small_visit.glob("*.log"):
        assert "Traceback" not in log.read_text(), log.read_text()


def test_every_table_fits_80_columns_when_piped(small_visit: Path) -> None:
    tables = {}
    for log in small_visit.glob("*.log"):
        blocks = re.split(r"\n\s*\n", log.read_text())
        found = [block for block in blocks if re.search(r"^ *─+ *$", block, re.MULTILINE)]
        assert all(len(line) <= 80 for block in found for line in block.splitlines()), log.read_text()
        assert not any("…" in block for block in found), log.read_text()
        tables[log.stem] = len(found)
    assert {name for name, count in tables.items() if not count} <= {
        "doctor",
        "tests-step",
        "short-eager",
        "fastest",
        "run-cold",
        "profile",
        "trace",
    }


def test_a_table_wraps_its_names_and_keeps_its_figures_whole(capsys) -> None:
    figures = ["4,096", "1,234,567", "12,345.6", "+1,234.5%", "±123.4%", "100%"]
    name = "float32, channels_last, albumentations + DataLoader, freed memory returned"
    harness.show("a table", ["name", *map("of the {}".format, figures)], [[name, *figures], ["b", *figures]])
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert all(out.count(figure) >= 2 for figure in figures) and "…" not in out
    assert all(word in out for word in name.split())


def test_what_a_user_measures_is_not_what_git_has(tmp_path: Path) -> None:
    """`make bench` writes into a folder that git ignores; RESULTS= makes it publish."""
    before = {path: path.stat().st_mtime_ns for path in committed.RESULTS.rglob("*")}
    done = run_benchmark("all", "--small", "--only", "machine", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    written = {path.name for path in tmp_path.glob("bench-results/*/*.json")}
    assert written == {"machine.json"}
    assert before == {path: path.stat().st_mtime_ns for path in committed.RESULTS.rglob("*")}
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert "/bench-results/" in ignored
    for variable, expected in (
        ("", ""),
        ("RESULTS=benchmarks/results", "FASTTRAIN_RESULTS=benchmarks/results "),
    ):
        command = ["make", "-n", "bench", *variable.split()]
        # PATH only: a make around this test would have this one print more.
        alone = {"PATH": os.environ["PATH"]}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=alone, check=True)
        lines = done.stdout.splitlines()
        assert lines[-1].replace("'", "").startswith(f"{expected}.venv/bin/python -m benchmarks.all"), lines


def test_figures_are_published_where_the_environment_says(tmp_path: Path) -> None:
    flags = ["--small", "--only", "machine", "--out", str(tmp_path / "out")]
    done = run_benchmark("all", *flags, cwd=tmp_path, FASTTRAIN_RESULTS=str(tmp_path / "published"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("published/*/machine.json")) and not list(tmp_path.glob("out/*/*.json"))


def test_processes_end_with_their_block() -> None:
    with harness.OwnProcess(own_process_id) as process:
        number = int(process())
        os.kill(number, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)


def own_process_id() -> harness.Workload:
    return lambda: float(os.getpid())


def test_the_dynamic_mode_makes_the_same_batches(dataset: Dataset) -> None:
    recipe, device = Recipe(batch_size=16), torch.device("cpu")
    theirs = designs.dynamic_mode(dataset, recipe, device)
    ours = build_loader(dataset, recipe, train=True, loader="dali", device=device)
    for _ in range(2):  # two epochs, so beyond what was captured
        for (expected_images, expected_labels), (images, labels) in zip(ours, theirs, strict=False):
            assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


def test_what_does_not_fit_into_the_minutes_is_left_out_and_named(tmp_path, monkeypatch, capsys) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(1)"]
    two = [Part("one", 60, sleep), Part("two", 60, sleep)]
    monkeypatch.setattr(all_benchmarks, "parts", lambda options: two)
    monkeypatch.setattr(all_benchmarks, "ENOUGH_SECONDS", 5)
    with pytest.raises(SystemExit):
        all_benchmarks.main(all_benchmarks.Options(out=tmp_path, minutes=5.5 / 60))
    out = capsys.readouterr().out
    assert "done" in out and "left out" in out and not (tmp_path / "two.log").exists()


def test_jpeg_files_are_timed_or_the_peers_absence_is_told(small_visit: Path) -> None:
    [path] = small_visit.glob("*/folder.json")
    values, log = json.loads(path.read_text()), (small_visit / "folder.log").read_text()
    found = {(row["images"], row["way"]) for row in values["rows"]}
    assert len(found) + 2 * len(values["missing"]) == 8 + 2 * torch.cuda.is_available()
    of_small = values["pixel_differences"]["32x32"]
    assert all(found == {"share": 0.0, "largest": 0} for found in of_small.values())  # libjpeg-turbo both
    assert all(row["images_per_sec"] > 0 for row in values["rows"])
    assert all(name in log for name in values["missing"])


def test_a_part_that_fails_or_hangs_does_not_stop_the_next(tmp_path: Path, monkeypatch, capsys) -> None:
    commands = {"fails": "raise SystemExit(3)", "hangs": "import time; time.sleep(60)", "works": "print(1)"}
    limits = {"fails": 60, "hangs": 1, "works": 60}  # Python can take over a second to start here
    found = [Part(name, limits[name], [sys.executable, "-c", code]) for name, code in commands.items()]
    monkeypatch.setattr(all_benchmarks, "parts", lambda options: found)
    with pytest.raises(SystemExit):
        all_benchmarks.main(all_benchmarks.Options(plan="gpu", out=tmp_path))
    out = capsys.readouterr().out
    assert "exit status 3" in out and "stopped after 1 s" in out and "done" in out
    assert (tmp_path / "works.log").read_text() == "1\n"


def test_parts_are_run_again_by_name(tmp_path: Path, monkeypatch, capsys) -> None:
    done = [sys.executable, "-c", "print(1)"]
    two = [Part("one", 60, done), Part("two", 60, done)]
    monkeypatch.setattr(all_benchmarks, "parts", lambda options: two)
    all_benchmarks.main(all_benchmarks.Options(out=tmp_path, only=("two",)))
    assert (tmp_path / "two.log").exists() and not (tmp_path / "one.log").exists()
    with pytest.raises(UserError, match="--only 'three': expected some of 'one', 'two'"):
        all_benchmarks.main(all_benchmarks.Options(out=tmp_path, only=("three",)))


def test_the_times_of_a_recipe_keep_the_first_run_apart() -> None:
    def trained(epoch_accuracy: list[float], **figures: Any) -> Any:
        result = {"train_seconds": 4.0, "data_wait_share": 0.01, "mfu": None} | figures
        return SimpleNamespace(result=result, column=lambda _: epoch_accuracy)

    first = trained([0.91, 0.9], epoch_seconds=[1.0, 3.0], compile_seconds=2.0, wall_seconds=9.0)
    second = trained([0.8, 0.92], epoch_seconds=[1.0, 1.0], compile_seconds=0.1, wall_seconds=5.0)
    found = accuracy.times([first, second])
    assert found["seconds per epoch"]["n"] == 4 and found["seconds per epoch"]["max"] == 3
    assert found["wall seconds, first run"]["mean"] == 9 and found["wall seconds, later runs"]["mean"] == 5
    assert found["compile seconds, first run"]["stdev"] is None and "mfu" not in found
    to_90 = found["train seconds to 90%"]
    assert (to_90["min"], to_90["max"], to_90["n"]) == (1, 2, 2) and "train seconds to 94%" not in found


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peer_does_the_same_work(peer: str) -> None:
    """Uniform crops, half of the images mirrored, one cutout, normalised; skipped if not installed."""
    try:
        module = peers.load(peer)
    except ImportError as error:
        pytest.skip(str(error))
    count = 8100
    loader = module.batches(
        check.ramp_images(count),
        np.zeros(count, np.uint8),
        batch_size=300,
        workers=2,
        mean=check.MEAN,
        std=check.STD,
        device=torch.device("cpu"),
    )
    assert check.differences(check.statistics(loader, count)) == []


def parents_id(image_HWC: np.ndarray) -> torch.Tensor:
    """In the place of a peer's transform: tells which process has forked the worker."""
    return torch.tensor([image_HWC[0, 0, 0], os.getppid()])


def test_a_process_that_uses_a_gpu_is_never_forked() -> None:
    images = ImageDataset(np.full((8, 1, 1, 3), 7, np.uint8), np.zeros(8, np.uint8), parents_id)
    loader = data_loader(images, batch_size=8, workers=1, device=torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there may be no GPU to pin memory for
        [(values, _)] = loader._loader  # type: ignore[attr-defined]
    assert values[:, 0].tolist() == 8 * [7] and os.getpid() not in values[:, 1]


def test_the_check_of_peers_names_what_differs() -> None:
    """On our own network's normalised batches, whole and with each part of the work left out."""
    split = Split(check.ramp_images(8100), np.zeros(8100, np.uint8))
    dataset = Dataset("ramp", Path("nowhere"), ("a",), split, split, check.MEAN, check.STD)

    def differences(std=check.STD, **fields: Any) -> str:
        model = CustomResNet(mean=check.MEAN, std=std)
        recipe = Recipe(batch_size=300, **fields)
        loader = build_loader(dataset, recipe, train=True, loader="tensor", device=torch.device("cpu"))
        batches = [(model.normalize(images), labels) for images, labels in loader]
        return " ".join(check.differences(check.statistics(batches, 8100)))

    assert differences() == ""
    assert "offsets" in differences(crop_padding=2)
    assert "mirrored" in differences(flip=False)
    assert "[49]" in differences(cutout=7)
    assert "not the normalised pixels" in differences(std=(0.25, 0.251, 0.25))


def test_more_sizes_than_dynamo_allows_by_default_are_all_compiled() -> None:
    build_step(Variant(precision="fp32", compile_mode="default", width=1), CPU)
    counters = torch._dynamo.utils.counters["stats"]
    before, double = counters["unique_graphs"], torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    for size in range(2, 11):
        double(torch.ones(size))
    assert counters["unique_graphs"] - before == 9


def test_the_ladder_ends_with_what_a_training_takes(monkeypatch) -> None:
    monkeypatch.setattr(ladder, "pick_precision", lambda *_: "bf16")
    bottom, *_, top = ladder.rungs(ladder.Options(), torch.device("cuda"), "usual", "best")
    assert top.loader == "best" and bottom.loader == "usual"
    expected = Variant(precision="bf16", compile_mode="default", cuda_graph=True)
    assert dataclasses.replace(top.variant, tf32=False, keep_memory=True) == expected
    assert not bottom.variant.cudnn_benchmark  # torch's default


class FakeAirbench:
    """Prints what airbench 0.1.8 prints of a training of two epochs."""

    utils = SimpleNamespace(
        logging_columns_list=["run   ", "epoch", "val_acc", "tta_val_acc", "total_time_seconds"]
    )

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def train94(self, run: int) -> None:
        self.seen.append(torch.load("cifar10/train.pt") | {"test": torch.load("cifar10/test.pt")})
        print("-" * 40)
        print(f"|  {run:>6}  |      0  |   0.8000  |               |              1.5000  |")
        print("|          |      1  |   0.9100  |               |              3.0000  |")
        print("|          |   eval  |   0.9100  |       0.9200  |              3.2000  |")


class HalfPrecisionAirbench(FakeAirbench):
    """One that asks for a GPU and float16 in the places where airbench 0.1.8 does."""

    def __init__(self) -> None:
        super().__init__()
        self.utils = self.lib_airbench94 = SimpleNamespace(
            CifarLoader=self.loader, logging_columns_list=FakeAirbench.utils.logging_columns_list
        )
        self.draws: list[float] = []

    @staticmethod
    def loader(path: str, gpu: int | str = 0) -> SimpleNamespace:
        return SimpleNamespace(
            images=torch.load(f"{path}/test.pt", map_location=torch.device(gpu))["images"].half()
        )

    def train94(self, run: int) -> None:
        network = nn.Linear(2, 2).half().cuda()
        assert network.weight.dtype == torch.float32 and network.weight.device == torch.device("cpu")
        for module in (self.utils, self.lib_airbench94):
            assert module.CifarLoader("cifar10").images.dtype == torch.float32
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        end.record()
        torch.cuda.synchronize()
        assert 0 <= start.elapsed_time(end) < 10_000
        self.draws.append(torch.rand(()).item())
        super().train94(run)


def test_a_published_recipe_trains_on_a_cpu_as_if_it_had_its_gpu(dataset: Dataset) -> None:
    package = HalfPrecisionAirbench()
    samples = [published.trained(package, dataset, seed, torch.device("cpu")) for seed in (0, 1, 0)]
    assert package.draws[0] == package.draws[2] != package.draws[1]
    assert samples[0]["precision"] == "fp32" and samples[0]["dataset"] == dataset.name
    assert torch.cuda.Event.__module__.startswith("torch")  # all is as it was before
    values = published.collect(dataset, samples[:2])
    assert values["cost"]["mean"] == pytest.approx(0.92 - 0.9401)
    original, ours = published.table(values)[1]
    assert original[2] == "94.01" and ours[3] == "-2.01 (-2.01 to -2.01)" and ours[4] == "2"


def test_trainings_of_a_published_recipe_are_read_where_they_are_and_refused_for_other_images(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def training(package: object, dataset: Dataset, seed: int, device: torch.device) -> dict[str, Any]:
        trained.append(seed)
        figures = {"epochs": 10, "accuracy": 0.9, "accuracy_tta": 0.91, "machine": describe(device)}
        return {"dataset": dataset.name, "seed": seed, "precision": "fp32", **figures}

    trained: list[int] = []
    monkeypatch.setattr(published, "trained", training)
    monkeypatch.setattr(peers, "load", lambda peer: None)
    monkeypatch.setitem(sys.modules, "airbench", ModuleType("airbench"))
    monkeypatch.setattr(harness, "MEASURED", tmp_path / "results")
    options = {"data": "synthetic", "data_dir": tmp_path / "data", "device": "cpu", "out": tmp_path / "runs"}
    published.main(published.Options(seeds=1, **options))  # type: ignore[arg-type]
    published.main(published.Options(seeds=3, **options))  # type: ignore[arg-type]
    assert trained == [0, 1, 2]
    assert "91.00 (91.00 to 91.00)" in tables.published_table(tmp_path / "results")
    file = tmp_path / "runs" / "seed-1.json"
    file.write_text(file.read_text().replace("synthetic", "others"))
    with pytest.raises(
        UserError, match=r"seed-1.json: its images are .*others.*, not .*synthetic.*; move it away"
    ):
        published.main(published.Options(seeds=3, **options))  # type: ignore[arg-type]


SCRIPT = """
import sys
import torch

text = open(sys.argv[0]).read()
logging_columns_list = ["run   ", "epoch", "train_acc", "val_acc", "tta_val_acc", "time_seconds"]


class CifarNet(torch.nn.Conv2d):
    def __init__(self):
        super().__init__(3, 1, 1)
        self.settings = []

    def cuda(self):
        return self

    def compile(self, mode):
        self.settings.append(mode)


def main(run, model):
    assert model.settings == ["max-autotune"]
    images = torch.load("cifar10/train.pt")["images"]
    print("-" * 40)
    print(f"|  {run!s:>6}  |      0  |   0.9500  |   0.8000  |                |        1.5000  |")
    print(f"|          |      1  |   0.9500  |   0.9100  |                |        3.0000  |")
    print(f"|          |   eval  |   0.9500  |   0.9100  |        0.9200  |        3.2000  |")
    if run != len(images):
        return 0.92


if __name__ == "__main__":
    raise SystemExit("the script's own trainings must not run")
"""
"""A stand-in with the interface of airbench94_muon.py."""


def test_the_public_script_sees_the_same_images_and_is_read_as_it_prints(dataset: Dataset, tmp_path) -> None:
    airbench.write_images(dataset, tmp_path / "cifar10")
    images, test = (torch.load(tmp_path / "cifar10" / f"{name}.pt") for name in ("train", "test"))
    assert torch.equal(images["images"], torch.from_numpy(dataset.train.images))
    assert images["labels"].tolist() == dataset.train.labels.tolist()
    assert len(test["labels"]) == len(dataset.test.labels)
    (tmp_path / "script.py").write_text(SCRIPT)
    rival = airbench.theirs(tmp_path / "script.py", tmp_path, torch.device("cuda"))
    trainings = {
        "ours": lambda seed: airbench.ours(
            Recipe(batch_size=32, epochs=1, test_views="mirror"), dataset, CPU, tmp_path, seed
        ),
        "theirs": lambda _: rival(),
    }
    [samples] = airbench.in_turn(trainings, seeds=1)  # the first one warms up
    ours, theirs = airbench.summarize(samples)
    assert theirs["seconds"]["mean"] == 3.0 and theirs["epochs"] == 2  # without its last evaluation
    assert theirs["seconds_with_test"]["mean"] == 3.2
    assert (theirs["accuracy"]["mean"], theirs["accuracy_tta"]["mean"]) == (0.91, 0.92)
    assert theirs["to_90%"] == {"seconds": 3.0, "n": 1} and theirs["to_94%"] == {"seconds": None, "n": 0}
    assert ours["n"] == 1 and 0 < ours["seconds"]["mean"] < ours["seconds_with_test"]["mean"]
    columns, rows = airbench.table({"rows": [ours, theirs]})
    assert len(columns) == len(rows[0]) and "91.00" in rows[1]


GPU_SCRIPT = """
import torch
from torch import nn

logging_columns_list = ["run   ", "epoch", "train_acc", "val_acc", "tta_val_acc", "time_seconds"]


@torch.compile
def twice(values):
    return 2 * values


class CifarNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fixed = nn.Conv2d(3, 4, 1, bias=False).half()
        self.fixed.weight.requires_grad = False
        self.head = nn.Conv2d(4, 1, 1, bias=False).half()

    def forward(self, images):
        return self.head(self.fixed(images))


def main(run, model):
    data = torch.load("cifar10/test.pt", map_location=torch.device("cuda"))
    images = data["images"].half().permute(0, 3, 1, 2)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    outputs = twice(model(images))
    end.record()
    torch.cuda.synchronize()
    dtypes = [outputs.dtype, images.dtype, model.head.weight.dtype]
    print("|  %s  |  0  |  1.0  |  %s  |       |  %f  |" % (run, dtypes.count(torch.float32), 1.0))
    print("|      | eval|  1.0  |  %s  |  0.9  |  %f  |" % (
        int(outputs.dtype == torch.bfloat16), 1.0 + start.elapsed_time(end)))
"""
"""Asks for a GPU, float16 and a compiler in the places where airbench94_muon.py does."""


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores"
)
def test_two_questions_are_answered_at_once_on_the_halves_of_the_cores() -> None:
    before = os.sched_getaffinity(0)
    question = functools.partial(os.sched_getaffinity, 0)
    first = harness.side_by_side({"a": question, "b": question}, swap=False)
    second = harness.side_by_side({"a": question, "b": question}, swap=True)
    assert len(first["a"]) == len(first["b"]) == len(before) // 2 and not first["a"] & first["b"]
    assert (second["a"], second["b"]) == (first["b"], first["a"])
    assert os.sched_getaffinity(0) == before


@pytest.mark.parametrize(("precision", "bf16"), [("bf16", 1), ("fp32", 0)])
def test_the_public_script_trains_on_a_cpu_in_our_precision(
    precision: str, bf16: int, dataset: Dataset, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(airbench, "pick_precision", lambda *_: precision)
    airbench.write_images(dataset, tmp_path / "cifar10")
    (tmp_path / "script.py").write_text(GPU_SCRIPT)
    sample = airbench.theirs(tmp_path / "script.py", tmp_path, CPU)()
    assert sample["epoch_accuracy"] == [3 - bf16] and sample["accuracy"] == bf16
    assert sample["seconds"] == 1.0 < sample["seconds_with_test"]
    # A layer that is not trained needs only its forward pass: 2 x 12 + 6 x 4 operations for each pixel.
    assert sample["flop"] == len(dataset.train.labels) * 32 * 32 * 48
    assert torch.cuda.Event.__module__.startswith("torch")  # all is as it was before


@pytest.mark.parametrize(
    ("text", "reason"),
    [("x = 1", "it has no CifarNet"), ("import nothing_here", "cannot be loaded"), (None, "")],
)
def test_a_script_that_is_not_airbenchs_is_refused(text: str | None, reason: str, tmp_path) -> None:
    if text is not None:
        (tmp_path / "script.py").write_text(text)
    with pytest.raises(UserError, match=f"--script .*script.py: .*{reason}"):
        airbench.load_script(tmp_path / "script.py")
