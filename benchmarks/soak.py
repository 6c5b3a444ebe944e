"""A fault campaign: training runs are killed and resumed, and files are damaged and read.

    python -m benchmarks.soak                        # what the README's table reports
    python -m benchmarks.soak --faults 5 --bad-inputs 100 --epochs 20

Every run is killed at random moments of a fixed seed until it has finished, and must then hold the very bits
of a run that nobody disturbed. Every damaged file must be refused in one line, or change nothing.
"""

import copy
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import run, save, show
from fasttrain import __main__ as command_line
from fasttrain import trainer
from fasttrain.checkpoint.file import LAST, load_checkpoint
from fasttrain.checkpoint.fingerprint import fingerprint
from fasttrain.checkpoint.state import Progress, RunState
from fasttrain.data import dali, dataset
from fasttrain.data.build import build_loader, pick_loader
from fasttrain.data.sources import cifar, synthetic
from fasttrain.errors import UserError
from fasttrain.model import build_model
from fasttrain.recipe import Recipe, load_recipe
from fasttrain.report.run import load_run
from fasttrain.step import TrainStep
from fasttrain.system.files import write_json
from fasttrain.system.machine import describe

CPU = torch.device("cpu")
HANG_SECONDS = 60
"""Reading a damaged file that takes longer counts as a hang."""
NARROW = 2
"""Width of the network where the weights do not matter: a thousandth of the work."""

RECIPES = (
    Recipe(name="soak", epochs=2, batch_size=8, dropout=0.1, loader="auto"),
    Recipe(name="soak", epochs=2, batch_size=8, dropout=0.1, loader="tensor", compute_dtype="fp32"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Kill and resume training runs, damage and read files, and count what goes wrong."""

    faults: int = 65
    """Signals sent to training processes: four SIGKILLs to every SIGTERM."""
    bad_inputs: int = 1000
    """Damaged files tried."""
    epochs: int = 200
    """Epochs of the run whose memory is watched."""
    seed: int = 0
    """Seeds the moments of the signals and the damage."""


# ----------------------------------------------------------------------------------------- killed and resumed


def start(action: Callable[[], int], log: Path) -> int:
    """Run `action` in a fork of this process, which has all imports behind it; returns its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        with log.open("a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        # Both take seconds, and a run's weights depend on neither.
        trainer.measure_matmul_tflops = lambda *_, **__: 1.0
        trainer._report = lambda *_: None
        command_line.STARTED = time.perf_counter()
        status = action()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def finish(process: int, deadline: float | None = None) -> int | None:
    """Wait for a process; returns its status, negative for a signal; None if it runs on at the deadline."""
    while True:
        done, status = os.waitpid(process, 0 if deadline is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.perf_counter() >= deadline:
            return None
        time.sleep(0.005)


def start_training(data_dir: Path, work: Path, index: int, out: Path, resume: Path | None) -> int:
    """`fasttrain train`, as typed, saving after every step; returns its process id."""
    which = ["--resume", str(resume)] if resume else ["--recipe", str(work / f"recipe-{index}.json")]
    flags = ["--data-dir", str(data_dir), "--out", str(out), "--device", "cpu", "--save-every", "1"]
    return start(lambda: command_line.main(["train", *which, *flags]), work / "log")


def last_line(path: Path) -> str:
    return path.read_text().strip().splitlines()[-1]


def outcome(folder: Path) -> list[Any]:
    """All of a finished run that must not depend on how often it was killed."""
    state = load_checkpoint(folder / LAST)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timeless = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "lr")
    figures = [[row[key] for key in timeless] for row in rows]
    best = load_checkpoint(folder / "best.pt")
    return [state["model"], state["optimizer"], state["rng"], state["scheduler"], best["model"], figures]


def kill_campaign(data_dir: Path, work: Path, faults: int, rng: random.Random) -> dict[str, Any]:
    """Send `faults` signals to training processes and resume each run until it has finished."""
    results: dict[str, Any] = {"faults": 0, "kills": 0, "runs": 0, "recovered": 0, "bit_equal": 0, "lost": []}
    references: list[tuple[list[Any], float]] = []
    for index, recipe in enumerate(RECIPES):
        write_json(work / f"recipe-{index}.json", recipe.to_dict())
        begun = time.perf_counter()
        status = finish(start_training(data_dir, work, index, work / "reference", None))
        if status != 0:
            raise UserError(f"the undisturbed run ended with status {status}: {last_line(work / 'log')}")
        [folder] = (work / "reference").iterdir()
        references.append((outcome(folder), time.perf_counter() - begun))
        shutil.rmtree(work / "reference")
    while results["faults"] < faults:
        index = results["runs"] % len(RECIPES)
        expected, seconds = references[index]
        recovered, equal = disturb(data_dir, work, index, seconds, faults, rng, results, expected)
        results["runs"] += 1
        results["recovered"] += recovered
        results["bit_equal"] += equal
        print(f"{results['faults']}/{faults} faults, {results['runs']} runs", file=sys.stderr)
    return results


def disturb(
    data_dir: Path,
    work: Path,
    index: int,
    seconds: float,
    faults: int,
    rng: random.Random,
    results: dict[str, Any],
    expected: list[Any],
) -> tuple[bool, bool]:
    """Train one run to its end through signals; returns whether it got there, and with the expected bits."""
    out = work / f"run-{results['runs']}"
    folder: Path | None = None
    lived = lost = 0.0
    try:
        while True:
            begun = time.perf_counter()
            process = start_training(data_dir, work, index, out, folder)
            left = results["faults"] < faults
            status = finish(process, begun + rng.uniform(0.1, 0.8 * seconds) if left else None)
            if status is None:
                number = signal.SIGTERM if results["faults"] % 5 == 4 else signal.SIGKILL
                os.kill(process, number)
                status = finish(process)
                results["faults"] += 1
                results["kills"] += number == signal.SIGKILL
            begun_runs = [path.parent for path in out.glob("*/recipe.json")]
            folder = begun_runs[0] if begun_runs else None
            if folder is not None and (folder / "result.json").exists():
                return True, same(outcome(folder), expected)
            if status not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                print(f"status {status}: {last_line(work / 'log')}", file=sys.stderr)
                return False, False
            lived += time.perf_counter() - begun
            kept = 0.0
            if folder is not None and (folder / LAST).exists():
                kept = load_checkpoint(folder / LAST)["progress"]["wall_seconds"]
            if status == -signal.SIGKILL:
                results["lost"].append(max(lived - kept - lost, 0.0))
            lost = lived - kept
    finally:
        shutil.rmtree(out, ignore_errors=True)


def same(value: Any, other: Any) -> bool:
    """Equal to the last bit, tensors included."""
    if isinstance(value, Tensor) or isinstance(other, Tensor):
        return isinstance(value, Tensor) and isinstance(other, Tensor) and torch.equal(value, other)
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(same(value[key], other[key]) for key in value)
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(map(same, value, other))
    return bool(value == other)


# ---------------------------------------------------------------------------------------------- damaged files


def tiny_run(dataset: dataset.Dataset, recipe: Recipe, steps: int) -> RunState:
    """A run that has trained for some steps of its first epoch."""
    torch.manual_seed(recipe.seed)
    loader = build_loader(dataset, recipe, train=True, kind="tensor", device=CPU)
    step = TrainStep(
        build_model(recipe, len(dataset.classes), mean=dataset.mean, std=dataset.std),
        recipe,
        max_lr=0.01,
        total_steps=recipe.epochs * len(loader),
        device=CPU,
        compute_dtype=torch.float32,
    )
    identity = fingerprint(recipe, dataset, loader="tensor", precision="fp32", compile_mode=None, device=CPU)
    state = RunState(step, loader, dataset, fingerprint=identity, machine=describe(CPU))
    for _, (images_NCHW, labels_N) in zip(range(steps), loader, strict=False):  # draws no batch too many
        step(images_NCHW, labels_N)
    return state


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut, blank, repeat or replace a part."""
    first = rng.randrange(len(content) + 1)
    last = min(len(content), first + rng.choice((1, 1, 1, 2, 8, 100, 4000)))
    kind = rng.choice(("flip", "flip", "flip", "cut", "drop", "blank", "repeat", "noise", "nest"))
    if kind == "flip" and first < len(content):
        changed = bytearray(content)
        changed[first] ^= 1 << rng.randrange(8)
        return bytes(changed)
    middle = {
        "blank": bytes(last - first),
        "repeat": content[first:last] * 2,
        "noise": rng.randbytes(last - first),
        "nest": b"[" * 100_000,
    }.get(kind, b"")
    return content[:first] + middle + (b"" if kind == "cut" else content[last:])


def damage_value(state: Any, rng: random.Random) -> Any:
    """A copy in which one leaf of nested dicts and lists is gone, or of another type, shape or sign."""
    if isinstance(state, dict) and state:
        key = rng.choice(list(state))
        if rng.random() < 0.15:
            return {name: value for name, value in state.items() if name != key}
        return state | {key: damage_value(state[key], rng)}
    if isinstance(state, list) and state and rng.random() < 0.9:
        index = rng.randrange(len(state))
        return [*state[:index], damage_value(state[index], rng), *state[index + 1 :]]
    if isinstance(state, Tensor) and rng.random() < 0.7:
        poisoned = state.float().flatten().clone()
        if len(poisoned):
            poisoned[rng.randrange(len(poisoned))] = rng.choice((float("nan"), float("inf")))
        return rng.choice((state[..., None], state.double(), poisoned.reshape(state.shape)))
    return rng.choice(
        (None, "text", float("nan"), float("-inf"), -1, -0.5, [], {}, [[]], torch.ones(3), b"\0")
    )


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError within the block when it takes longer. For the main thread."""

    def give_up(*_: object) -> None:
        raise TimeoutError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class BadInputs:
    """Damages one file of a kind at a time; each method returns what a correct program makes of it.

    A reader either raises UserError, or returns True where the damage changed nothing that counts.
    """

    def __init__(self, work: Path, rng: random.Random) -> None:
        self.work, self.rng = work, rng
        synthetic.generate(work / "images", train_count=20, test_count=5)
        self.dataset = cifar.read(work / "images")
        self.recipe = Recipe(name="soak", epochs=2, batch_size=4, width=NARROW, dropout=0.1, loader="tensor")
        self.state = copy.deepcopy(tiny_run(self.dataset, self.recipe, 3).state_dict()) | {"ranks": []}
        torch.save(self.state, work / LAST)
        self.run = tiny_run(self.dataset, self.recipe, 0)
        self.content = (work / LAST).read_bytes()
        self.folder = finished_run(work)

    def checkpoint_bytes(self) -> bool:
        (self.work / LAST).write_bytes(damage_bytes(self.content, self.rng))
        return self._loads_the_same()

    def checkpoint_values(self) -> bool:
        torch.save(damage_value(self.state, self.rng), self.work / LAST)
        return self._loads_the_same()

    def _loads_the_same(self) -> bool:
        self.run.load(self.work / LAST)
        restored = self.run.state_dict()
        untouched = {
            key: value for key, value in self.state.items() if key not in ("progress", "optimizer", "ranks")
        }
        return (
            all(same(restored[key], value) for key, value in untouched.items())
            and same(restored["optimizer"]["state"], self.state["optimizer"]["state"])
            and restored["progress"]["epochs"] == self.state["progress"]["epochs"]
        )

    def recipe_file(self) -> bool:
        path = self.work / "recipe.json"
        path.write_bytes(damage_bytes(json.dumps(self.recipe.to_dict()).encode(), self.rng))
        read = load_recipe(str(path))  # another value may be a recipe too, but then a valid one
        return Recipe(**read.to_dict()) == read

    def run_files(self) -> bool:
        names = ("recipe.json", "machine.json", "metrics.jsonl", "result.json")
        damaged = self.work / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(self.folder, damaged)
        path = damaged / self.rng.choice(names)
        path.write_bytes(damage_bytes(path.read_bytes(), self.rng))
        read = load_run(damaged)
        return read.steps_per_epoch >= 0 and bool(read.hardware)

    def records(self) -> bool:
        damaged = self.work / "records"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(self.work / "images", damaged)
        path = self.rng.choice([path for path in sorted(damaged.rglob("*")) if path.is_file()])
        path.write_bytes(damage_bytes(path.read_bytes(), self.rng))
        read = cifar.read(damaged)  # a set that names itself has no checksums to be held against ...
        identity = ("dataset", "the images' SHA-256")
        now = fingerprint(self.recipe, read, loader="tensor", precision="fp32", compile_mode=None, device=CPU)
        unchanged = all(now[key] == self.run.fingerprint[key] for key in identity)
        same_statistics = (read.mean, read.std) == (self.dataset.mean, self.dataset.std)
        return same_statistics or not unchanged  # ... but no run is resumed on other images


def finished_run(work: Path) -> Path:
    """The folder of a finished run; its files are the ones that a reader of runs meets."""
    original = trainer.measure_matmul_tflops
    trainer.measure_matmul_tflops = lambda *_, **__: 1.0
    try:
        recipe = Recipe(name="soak", epochs=2, batch_size=4, width=NARROW, loader="tensor")
        trainer.train(recipe, data_dir=work / "images", out=work / "runs", device="cpu", report=False)
    finally:
        trainer.measure_matmul_tflops = original
    [folder] = (work / "runs").iterdir()
    return folder


def bad_input_campaign(work: Path, count: int, rng: random.Random) -> dict[str, Any]:
    """Damage `count` files; returns how many were refused, how many changed nothing, and what went wrong."""
    inputs = BadInputs(work, rng)
    kinds = (
        inputs.checkpoint_bytes,
        inputs.checkpoint_values,
        inputs.recipe_file,
        inputs.run_files,
        inputs.records,
    )
    results: dict[str, Any] = {"tried": 0, "refused": 0, "harmless": 0, "wrong": []}
    for turn in range(count):
        kind = kinds[turn % len(kinds)]
        results["tried"] += 1
        try:
            with time_limit(HANG_SECONDS):
                if kind():
                    results["harmless"] += 1
                else:
                    results["wrong"].append(f"{kind.__name__} {turn}: accepted in silence")
        except UserError as error:
            if "\n" in str(error):
                results["wrong"].append(f"{kind.__name__} {turn}: more than one line")
            results["refused"] += 1
        except Exception as error:
            results["wrong"].append(f"{kind.__name__} {turn}: {type(error).__name__}: {error}")
    return results


# ----------------------------------------------------------------------------------------------------- memory


def memory_campaign(data_dir: Path, work: Path, epochs: int) -> dict[str, float]:
    """Resident MiB after every epoch of one long run: the most in its first half, and in its second."""
    samples: list[float] = []
    finish_epoch = Progress.finish_epoch

    def sample(progress: Progress, row: dict[str, float]) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        samples.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        finish_epoch(progress, row)

    def action() -> int:
        Progress.finish_epoch = sample  # type: ignore[assignment,method-assign]
        # A run of one batch: of so small a set, DALI's full ones in flight would fill only within 260 epochs.
        dali.CHUNK_BYTES = 0
        recipe = Recipe(name="soak", epochs=epochs, batch_size=8, width=NARROW)
        trainer.train(recipe, data_dir=data_dir, out=work / "memory", device="cpu", report=False)
        write_json(work / "memory.json", {"samples": samples})
        return 0

    status = finish(start(action, work / "log"))
    if status != 0:
        raise UserError(f"the long run ended with status {status}: {last_line(work / 'log')}")
    samples = json.loads((work / "memory.json").read_text())["samples"]
    return {"epochs": epochs, "first": max(samples[: epochs // 2]), "second": max(samples[epochs // 2 :])}


def main(options: Options) -> None:
    torch.set_num_threads(1)  # a process whose torch has threads must not fork
    pick_loader("auto", CPU, lambda _: None)  # imports DALI once, for all forks
    rng = random.Random(options.seed)
    with TemporaryDirectory() as folder:
        work = Path(folder)
        synthetic.generate(work / "data", train_count=64, test_count=40)
        memory = memory_campaign(work / "data", work, options.epochs)
        killed = kill_campaign(work / "data", work, options.faults, rng)
        damaged = bad_input_campaign(work, options.bad_inputs, rng)
    lost = killed.pop("lost")
    figures = {
        **killed,
        "lost_seconds": {
            "median": statistics.median(lost),
            "min": min(lost),
            "max": max(lost),
            "n": len(lost),
        },
        "bad_inputs": damaged,
        "memory_mib": memory,
        "seed": options.seed,
    }
    path = save("soak", CPU, figures)
    show("faults", ["figure", "value"], [[key, str(value)] for key, value in figures.items()])
    print(path)
    if damaged["wrong"] or not killed["runs"] == killed["recovered"] == killed["bit_equal"]:
        raise UserError(
            "soak: not every run was recovered bit for bit, or a damaged file was mistaken for a good one"
        )
    if memory["second"] > 1.05 * memory["first"]:
        raise UserError(f"soak: memory grew from {memory['first']:.0f} to {memory['second']:.0f} MiB")


if __name__ == "__main__":
    run(main, Options)
