"""Files are damaged and read: each must be refused in one line, or be read as if nothing had changed."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fasttrain import trainer
from fasttrain.checkpoint.file import LAST
from fasttrain.checkpoint.fingerprint import fingerprint
from fasttrain.checkpoint.state import RunState
from fasttrain.data.build_loader import build_loader
from fasttrain.data.dataset import Dataset
from fasttrain.data.run_images import RunImages
from fasttrain.data.sources import cifar, synthetic
from fasttrain.errors import UserError
from fasttrain.model import build_model
from fasttrain.recipe import Recipe, load_recipe
from fasttrain.report.compare import compare
from fasttrain.report.run import load_run
from fasttrain.runtime import Runtime
from fasttrain.step import TrainStep
from fasttrain.system.machine import describe
from tests.soak.bad_images import BadImages
from tests.soak.cases import Case
from tests.soak.damage import JSON_VALUES, damage_bytes, damage_value, time_limit
from tests.soak.trainings import same

CPU = torch.device("cpu")
RUNTIME = Runtime(device=CPU, precision="fp32", loader="tensor")
HANG_SECONDS = 60
"""Reading a damaged file that takes longer counts as a hang."""
NARROW = 2
"""Width of the network: its weights do not matter here, and this is a thousandth of the work."""


def tiny_run(dataset: Dataset, recipe: Recipe, steps: int) -> RunState:
    """A run that has trained for some steps of its first epoch."""
    torch.manual_seed(recipe.seed)
    loader = build_loader(dataset, recipe, train=True, loader="tensor", device=CPU)
    step = TrainStep(
        build_model(recipe, len(dataset.classes), mean=dataset.mean, std=dataset.std),
        recipe,
        RUNTIME,
        max_lr=0.01,
        total_steps=recipe.epochs * len(loader),
    )
    identity = fingerprint(recipe, dataset, RUNTIME, world_size=1)
    state = RunState(step, loader, dataset, fingerprint=identity, machine=describe(CPU))
    for _, (images_NCHW, labels_N) in zip(range(steps), loader, strict=False):  # draws no batch too many
        step(images_NCHW, labels_N)
    return state


class BadInputs:
    """Damages one file of a kind at a time; each method returns what a correct program makes of it.

    A reader either raises UserError, or returns True where the damage changed nothing that counts.
    """

    rng: random.Random

    def __init__(self, work: Path) -> None:
        self.work = work
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
        return self._reads_recipe(damage_bytes(json.dumps(self.recipe.to_dict()).encode(), self.rng))

    def recipe_values(self) -> bool:
        values = damage_value(self.recipe.to_dict(), self.rng, JSON_VALUES)
        return self._reads_recipe(json.dumps(values).encode())

    def _reads_recipe(self, content: bytes) -> bool:
        path = self.work / "recipe.json"
        path.write_bytes(content)
        read = load_recipe(str(path))  # another value may be a recipe too, but then a valid one
        return Recipe(**read.to_dict()) == read

    def run_files(self) -> bool:
        return self._reads_run(lambda content: damage_bytes(content, self.rng))

    def run_values(self) -> bool:
        def damage(content: bytes) -> bytes:
            has_lines = b"\n{" in content  # it is metrics.jsonl
            *others, line = content.splitlines() if has_lines else [content]
            line = json.dumps(damage_value(json.loads(line), self.rng, JSON_VALUES)).encode()
            return b"\n".join([*others, line]) + b"\n"

        return self._reads_run(damage)

    def _reads_run(self, damage: Callable[[bytes], bytes]) -> bool:
        names = ("recipe.json", "machine.json", "data.json", "metrics.jsonl", "result.json")
        damaged = self.work / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(self.folder, damaged)
        path = damaged / self.rng.choice(names)
        path.write_bytes(damage(path.read_bytes()))
        # Damaged, it says nothing, or it speaks of other images, which nothing matches.
        images = RunImages.of_run(damaged)
        read = load_run(damaged)
        if self.rng.random() < 0.1:  # drawing takes a second
            compare([damaged, self.folder], self.work / "compare.html")
        known = images is None or images.are(self.dataset) == (images.sha256 == self.dataset.content_hash)
        return known and read.steps_per_epoch >= 0 and bool(read.hardware)

    def records(self) -> bool:
        damaged = self.work / "records"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(self.work / "images", damaged)
        path = self.rng.choice([path for path in sorted(damaged.rglob("*")) if path.is_file()])
        path.write_bytes(damage_bytes(path.read_bytes(), self.rng))
        read = cifar.read(damaged)  # a set that names itself has no checksums to be held against ...
        identity = "the images' SHA-256"
        now = fingerprint(self.recipe, read, RUNTIME, world_size=1)
        unchanged = now[identity] == self.run.fingerprint[identity]
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


class BadInputCampaign:
    """Each turn damages one file. results: how many were refused, and how many read as if undamaged."""

    name = "bad-inputs"

    def __init__(self, _: list[Case], work: Path) -> None:
        runs, images = BadInputs(work), BadImages(work / "bad-images")
        self._owners = runs, images
        self._kinds: list[Callable[[], bool]] = [
            runs.checkpoint_bytes,
            runs.checkpoint_values,
            runs.recipe_file,
            runs.recipe_values,
            runs.run_files,
            runs.run_values,
            runs.records,
            *images.kinds(),
        ]
        self.results: dict[str, Any] = {"tried": 0, "refused": 0, "harmless": 0, "wrong": []}

    def turn(self, number: int, rng: random.Random) -> None:
        results, kind = self.results, self._kinds[number % len(self._kinds)]
        for owner in self._owners:
            owner.rng = rng
        results["tried"] += 1
        wrong = None
        try:
            with time_limit(HANG_SECONDS):
                if kind():
                    results["harmless"] += 1
                else:
                    wrong = "accepted in silence"
        except UserError as error:
            wrong = "more than one line" if "\n" in str(error) else None
            results["refused"] += 1
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong:
            results["wrong"].append(f"{kind.__name__}: {wrong}")
