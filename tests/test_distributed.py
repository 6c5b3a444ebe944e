"""Two real processes on gloo, beside one process that takes the same steps on the whole batch."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fasttrain import distributed, trainer
from fasttrain.checkpoint.file import load_checkpoint
from fasttrain.checkpoint.manager import Pace
from fasttrain.data import dataset
from fasttrain.data.sampler import Shard
from fasttrain.data.sources import cifar, synthetic
from fasttrain.distributed import World
from fasttrain.errors import LostRankError, UserError
from fasttrain.evaluation import evaluate
from fasttrain.model import build_model
from fasttrain.runtime import Runtime
from tests.distributed_job import FOUND_LR, RUN_RECIPE, STEP_RECIPE, steps
from tests.helpers import CPU, loader_of
from tests.soak.trainings import outcome, same

ROOT = Path(__file__).resolve().parents[1]
TEST_IMAGES = 41  # no two ranks can have equally many

RUNTIME = Runtime(device=torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    synthetic.generate(folder, train_count=64, test_count=TEST_IMAGES)
    return folder


def start(*arguments: object, ranks: int = 2) -> subprocess.Popen:
    """These words under torchrun."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        + [str(argument) for argument in arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def job(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What distributed_job.py left, and what it printed."""
    out = tmp_path_factory.mktemp("job")
    process = start(ROOT / "tests" / "distributed_job.py", data, out)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, printed + errors
    return out, printed


def only(out: Path) -> Path:
    [folder] = out.iterdir()
    return folder


@pytest.mark.parametrize("kind", ["tensor", "dali"])
@pytest.mark.parametrize(("size", "flip_order"), [(2, "random"), (4, "alternating")])
def test_the_ranks_parts_are_the_whole_batch_to_the_last_bit(
    kind: str, size: int, flip_order: str, data: Path
) -> None:
    recipe = dataclasses.replace(STEP_RECIPE, flip_order=flip_order)
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    dataset = cifar.read(data)

    def epochs(shard: Shard) -> list[tuple[torch.Tensor, torch.Tensor]]:
        loader = loader_of(dataset, recipe, loader=kind, shard=shard)
        return [(images.clone(), labels.clone()) for _ in range(2) for images, labels in loader]

    whole, parts = epochs(Shard()), [epochs(Shard(rank, size)) for rank in range(size)]
    for (images, labels), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        assert torch.equal(torch.cat([share[1] for share in shares]), labels)


@pytest.mark.parametrize("size", [2, 3, TEST_IMAGES])
def test_every_test_image_is_on_one_rank(size: int, data: Path) -> None:
    dataset = cifar.read(data)

    def epoch(shard: Shard) -> torch.Tensor:
        loader = loader_of(dataset, STEP_RECIPE, train=False, shard=shard)
        return torch.cat([images for images, _ in loader])

    assert torch.equal(torch.cat([epoch(Shard(rank, size)) for rank in range(size)]), epoch(Shard()))
    with pytest.raises(UserError, match="41 test images for 42 ranks"):
        epoch(Shard(0, TEST_IMAGES + 1))


def test_a_batch_that_cannot_be_dealt_out_is_refused() -> None:
    assert World(size=4).share(512) == 128 and World().share(511) == 511
    with pytest.raises(UserError, match=r"--batch-size 511: .* 4 ranks; use 508 or 512$"):
        World(size=4).share(511)
    with pytest.raises(UserError, match=r"use 8$"):
        World(size=4).share(4)


def test_an_incomplete_environment_is_refused(monkeypatch) -> None:
    assert World.join(CPU).size == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="RANK=None: start the ranks with torchrun"):
        World.join(CPU)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="--device mps: trains on one rank only"):
        World.join(torch.device("mps"))


class Silent(World):
    """A world whose other rank never wishes anything."""

    def all_reduce_max(self, *values: int) -> list[int]:
        return list(values)


def test_ranks_ask_each_other_about_once_a_second(monkeypatch) -> None:
    step = 0
    monkeypatch.setattr(time, "perf_counter", lambda: step / 20)  # 20 steps a second
    pace, questions = Pace(Silent(size=2), 0), []
    for step in range(1, 100):
        if pace.due(step):
            questions.append(step)
            assert pace.ask(step, wish=step > 50) is (step > 50)
    assert questions == [1, 21, 41, 61, 81]
    alone = Pace(World(), 0)
    assert [alone.due(step) and alone.ask(step, wish=step == 2) for step in (1, 2, 3)] == [False, True, False]


def distance(left: dict, right: dict) -> float:
    """How far apart two networks' weights and statistics are: the norm of all differences."""
    keys = [key for key, value in left.items() if value.is_floating_point()]
    return torch.cat([(left[key] - right[key]).flatten() for key in keys]).norm().item()


def test_two_ranks_train_as_one_process_on_the_whole_batch(job, data: Path) -> None:
    """With BatchNorm over the whole batch, up to rounding; by default, BatchNorm sees another batch."""
    out, _ = job
    dataset = cifar.read(data)
    one = steps(dataset, World(), sync_batchnorm=False)
    synced, local = (torch.load(out / f"{name}-0.pt") for name in ("synced", "local"))
    moved = distance(one["model"], steps_begin(dataset))
    assert distance(synced["model"], one["model"]) < 1e-3 * moved
    assert distance(local["model"], one["model"]) > 1e-2 * moved
    assert synced["metrics"] == pytest.approx(one["metrics"], rel=1e-4)


def steps_begin(dataset: dataset.Dataset) -> dict:
    """The network of `steps` before its first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.distributed_job.STEPS", 0)
        return steps(dataset, World(), sync_batchnorm=False)["model"]


@pytest.mark.parametrize("name", ["synced", "local"])
def test_all_ranks_hold_the_same_weights_and_metrics(name: str, job) -> None:
    out, _ = job
    first, second = (torch.load(out / f"{name}-{rank}.pt") for rank in (0, 1))
    for key, value in first["model"].items():
        if name == "synced" or "running" not in key:
            assert torch.equal(value, second["model"][key]), key
    assert first["metrics"] == second["metrics"]


def test_a_job_leaves_one_folder_and_speaks_with_one_voice(job) -> None:
    out, printed = job
    folder = only(out / "whole")
    assert {path.name for path in folder.iterdir()} == {
        *("recipe.json", "machine.json", "data.json", "metrics.jsonl", "result.json"),
        *("last.pt", "previous.pt", "best.pt"),
    }
    result = json.loads((folder / "result.json").read_text())
    assert result["ranks"] == 2 and result["max_lr"] == FOUND_LR
    assert json.loads((folder / "machine.json").read_text())["ranks"] == 2
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert printed.count("2 epochs of 4 steps of 16, cpu on 2 ranks") == 4
    assert printed.count("test accuracy") == 3


def test_the_evaluation_is_that_of_one_process(job, data: Path) -> None:
    folder = only(job[0] / "whole")
    state = load_checkpoint(folder / "last.pt")
    model = build_model(RUN_RECIPE, len(state["classes"]))
    model.load_state_dict(state["model"])
    loader = loader_of(cifar.read(data), STEP_RECIPE, train=False)
    test = evaluate(model, loader, RUNTIME, views="shifts")
    [*_, row] = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(test.labels_N) == TEST_IMAGES
    assert (row["test_accuracy"], row["test_accuracy_views"]) == (test.accuracy, test.accuracy_views)
    assert row["test_loss"] == pytest.approx(test.loss, rel=1e-5)


def test_a_signal_to_one_rank_stops_both_and_the_run_ends_with_the_same_bits(job) -> None:
    """Dropout and metrics are each rank's own: they too go on where they were."""
    out, _ = job
    said = [torch.load(out / f"stop-{rank}.pt") for rank in (0, 1)]
    assert said[0] == said[1] and "SIGTERM: saved at step 6 of 8" in said[0]
    assert "resume with: torchrun --nproc-per-node 2 -m fasttrain train --resume" in said[0]
    assert same(outcome(only(out / "stopped")), outcome(only(out / "whole")))


def test_a_nan_on_one_rank_takes_both_back(job) -> None:
    result = json.loads((only(job[0] / "rolled-back") / "result.json").read_text())
    assert (result["rollbacks"], result["max_lr"]) == (1, FOUND_LR / 2)


def test_another_world_size_is_refused(job, data: Path, tmp_path, monkeypatch) -> None:
    whole = only(job[0] / "whole")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("recipe.json", "machine.json", "last.pt"):
        (folder / name).write_bytes((whole / name).read_bytes())
    with pytest.raises(UserError, match="world size is 1 and was 2"):
        trainer.train(RUN_RECIPE, data_dir=data, out=tmp_path, device="cpu", report=False, resume=folder)


def test_sigterm_waits_for_what_a_lost_rank_says(data: Path, tmp_path, monkeypatch) -> None:
    """torchrun's comes while the last checkpoint is still being written: after the loop, before the line."""
    handlers = []

    class Writer(trainer.CheckpointWriter):
        def __exit__(self, *error) -> None:
            handlers.append(signal.getsignal(signal.SIGTERM))
            super().__exit__(*error)

    def lose_a_rank(*_: object) -> None:
        raise RuntimeError("[pair.cc:547] Connection closed by peer: gloo")

    monkeypatch.setattr(trainer, "CheckpointWriter", Writer)
    monkeypatch.setattr(trainer.Trainer, "train_epoch", lose_a_rank)
    recipe = dataclasses.replace(RUN_RECIPE, max_lr=0.01)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(UserError, match="lost another rank"):
            trainer.train(recipe, data_dir=data, out=tmp_path, device="cpu", report=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert handlers == [signal.SIG_IGN]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
            "Failed to recv, got 0 bytes",
        ),
        (
            RuntimeError("Gloo connectFullMesh failed with [gloo/pair.cc:152] timed out connecting: refused"),
            "timed out connecting: refused",
        ),
    ],
)
def test_a_rank_that_is_lost_before_the_ranks_have_met_is_one_line(error, reason, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", fail)
    monkeypatch.setattr(distributed, "ignore_sigterm", lambda: None)
    with pytest.raises(LostRankError, match=rf"^lost another rank \({reason}\): "):
        World.join(CPU)


LOSE_RANK_2 = """
import os, signal, torch
from fasttrain.distributed import World
signal.signal(signal.SIGTERM, signal.SIG_IGN)
world = World.join(torch.device("cpu"))
world.begin()
if world.rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        world.barrier()
except Exception as error:
    print(f"{type(error).__name__} {error}", flush=True)
"""


def test_all_ranks_name_the_one_that_is_lost() -> None:
    """gloo tells only the two beside it: the others learn of it when these end."""
    process = start("--no-python", sys.executable, "-c", LOSE_RANK_2, ranks=4)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert printed.count("LostRankError lost rank 2 (") == printed.count("Error") == 3, printed + errors


def test_ranks_that_torchrun_has_not_started_end_in_silence() -> None:
    """As under srun: the store is in the first rank, and is gone before the others end."""
    code = (
        "import torch, time\nfrom fasttrain.distributed import World\n"
        "with World.join(torch.device('cpu')) as world:\n    world.begin()\n    world.close()\n"
        "time.sleep(1.5 * world.rank)\n"
    )
    ended = [(rank.communicate(timeout=60)[1], rank.returncode) for rank in some_ranks(code, 2)]
    assert ended == [("", 0), ("", 0)]


WITH_SHORT_ANSWERS = """
import os, signal, subprocess, sys, time, torch
from fasttrain import distributed
distributed.ANSWER_SECONDS = 2
def freeze(seconds=60):
    subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"], stderr=subprocess.DEVNULL)
    os.kill(os.getpid(), signal.SIGSTOP)
def meet(exchange=distributed.World.barrier):
    try:
        exchange(world)
    except Exception as error:
        print(f"{type(error).__name__} {error}", file=sys.stderr, flush=True)
        time.sleep(6 if world.rank == 0 else 0)  # it has the store
        sys.exit(1)
world = distributed.World.join(torch.device("cpu"))
meet()
"""

FREEZE_RANK_1 = """
if world.rank == 1:
    time.sleep(3)  # it works alone for longer than an answer may take
    meet()
    freeze()
meet()
if world.rank == 2:
    time.sleep(5)  # the first has ended by then
meet()
"""

FREEZE_RANK_1_FOR_A_WHILE = """
if world.rank == 1:
    for _ in range(3):  # longer than an answer may take, but not at a time
        freeze(1)
        time.sleep(1.5)
meet()
"""

FREEZE_RANK_0 = """
if world.rank == 0:
    freeze()
meet()
"""

FREEZE_RANK_0_AT_THE_END = """
world.begin()
if world.rank == 0:
    freeze()
meet(distributed.World.close)
"""

TRAIN_TWICE = """
world.close()
if world.rank == 0:
    time.sleep(4)  # it draws the report
world = distributed.World.join(torch.device("cpu"))
meet()
"""


@pytest.mark.parametrize(
    ("scenario", "frozen", "said"),
    [
        (FREEZE_RANK_1, 1, "LostRankError lost rank 1 (no sign of life for 2 s): it has ended, is stopped"),
        (FREEZE_RANK_0, 0, "LostRankError lost another rank (torch's store is silent): "),  # it holds it
        (FREEZE_RANK_0_AT_THE_END, 0, "LostRankError lost another rank ("),
        (FREEZE_RANK_1_FOR_A_WHILE, None, ""),
        (TRAIN_TWICE, None, ""),
    ],
    ids=["frozen", "frozen with the store", "frozen at the end", "frozen a while", "busy after a training"],
)
def test_outside_the_training_a_rank_without_signs_of_life_is_named(
    scenario: str, frozen: int | None, said: str
) -> None:
    processes = some_ranks(WITH_SHORT_ANSWERS + scenario, 3 if frozen == 1 else 2)
    try:
        errors = [p.communicate(timeout=60)[1] for n, p in enumerate(processes) if n != frozen]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for error in errors:
        assert error.startswith(said) and error.count("\n") == (1 if said else 0)


STOP_RANK_0 = """
import os, sys, time, torch
if os.environ["RANK"] == "0":
    from fasttrain.__main__ import main
    sys.argv = ["fasttrain", "train", "--device", "cpu"]
    sys.exit(main())
from fasttrain.distributed import World
from fasttrain.system import roll_call
World.join(torch.device("cpu"))
while roll_call._store().add("arrivals", 0) == 0:
    time.sleep(0.1)
"""


def test_a_signal_before_the_training_ends_a_rank_in_one_line() -> None:
    waiting, other = some_ranks(STOP_RANK_0, 2)
    try:
        assert other.wait(60) == 0  # the first waits for it, and it is gone
        waiting.terminate()
        _, errors = waiting.communicate(timeout=10)
    finally:
        waiting.kill()
    assert (errors, waiting.returncode) == ("fasttrain train: SIGTERM: stopped\n", 128 + signal.SIGTERM)


def some_ranks(code: str, size: int) -> list[subprocess.Popen[str]]:
    """Ranks that run this code, started as by srun, without torchrun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
        }
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def pid_of_rank(rank: int, torchrun: int) -> int:
    """The process that torchrun started as this rank."""
    for child in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun has no child of rank {rank}")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the rank's process in Linux's /proc")
def test_a_killed_rank_ends_the_job_with_its_reason(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    flags = ["--data-dir", data, "--out", out, "--device", "cpu", "--epochs", "1000", "--batch-size", "8"]
    flags += ["--width", "4", "--compute-dtype", "fp32", "--loader", "tensor", "--save-every", "1"]
    process = start("-m", "fasttrain", "train", *flags)
    try:
        while not list(out.glob("*/previous.pt")):  # it trains
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        os.kill(pid_of_rank(1, process.pid), signal.SIGKILL)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors  # torchrun's summary, of rank 1
    lines = [line for line in errors.splitlines() if line.startswith("fasttrain train:")]
    assert len(lines) == 1, errors
    assert "lost rank 1 (" in lines[0] and "connection" in lines[0].lower() and "typically" not in lines[0]
    resumes = f"torchrun --nproc-per-node 2 -m fasttrain train --resume {only(out)}"
    assert f"; continue from the last checkpoint: {resumes}" in lines[0]
    assert "Traceback" not in errors.split("lost rank 1")[0]
    assert load_checkpoint(only(out) / "last.pt")["scheduler"]["step"] > 0
