"""What test_distributed.py runs on two ranks: `torchrun --nproc-per-node 2 distributed_job.py DATA OUT`.

Whole trainings leave their folders under OUT, the bare steps OUT/<name>-<rank>.pt.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import torch

from fasttrain import trainer
from fasttrain.data import dataset
from fasttrain.data.sources import cifar
from fasttrain.distributed import World
from fasttrain.errors import Interrupted
from fasttrain.model import build_model
from fasttrain.recipe import Recipe
from fasttrain.step import TrainStep
from tests.helpers import CPU, loader_of, step_of

STEPS = 6
STEP_RECIPE = Recipe(
    batch_size=16,
    network="compact",
    width=4,
    first_layer_share=0.5,
    compute_dtype="fp32",
    loader="tensor",
    max_lr=1e-3,
)
RUN_RECIPE = dataclasses.replace(
    STEP_RECIPE, name="tiny", epochs=2, dropout=0.1, max_lr="auto", ema_epochs=0.5, test_views="shifts"
)
FOUND_LR = 0.005


def steps(dataset: dataset.Dataset, world: World, *, sync_batchnorm: bool) -> dict[str, object]:
    """Weights, buffers and metrics after a few steps of a narrow network."""
    torch.manual_seed(0)
    model = build_model(STEP_RECIPE, len(dataset.classes), mean=dataset.mean, std=dataset.std)
    if sync_batchnorm:
        world.synchronize_batchnorm(model)
    step = step_of(STEP_RECIPE, model=model, max_lr=1e-3, total_steps=STEPS, world=world)
    loader = loader_of(dataset, STEP_RECIPE, shard=world.shard)
    while step.step < STEPS:
        for batch in loader:
            if step.step < STEPS:
                step(*batch)
    return {"model": model.state_dict(), "metrics": step.take_metrics()}


def after_step(number: int, rank: int, action) -> mock._patch:
    """Call `action` on the training step of this rank, once, when it has taken this many."""
    take, left = TrainStep.__call__, [action]

    def stepped(self: TrainStep, *batch: torch.Tensor) -> None:
        take(self, *batch)
        if self.step == number and self.world.rank == rank and left:
            left.pop()(self)

    return mock.patch.object(TrainStep, "__call__", stepped)


def poison(step: TrainStep) -> None:
    with torch.no_grad():
        next(iter(step.model.parameters())).fill_(float("nan"))


def find_max_lr(*_: object) -> float:
    assert os.environ["RANK"] == "0", "only the first rank looks for a rate"
    return FOUND_LR


def main(data: Path, out: Path) -> None:
    world, dataset = World.join(CPU), cifar.read(data)
    for name, sync in (("synced", True), ("local", False)):
        torch.save(steps(dataset, world, sync_batchnorm=sync), out / f"{name}-{world.rank}.pt")

    def train(name: str, **options: object) -> None:
        trainer.train(RUN_RECIPE, data_dir=data, out=out / name, device="cpu", report=False, **options)

    with (
        mock.patch.object(trainer, "measure_matmul_tflops", lambda *_, **__: 1.0),
        mock.patch.object(trainer.Trainer, "_find_max_lr", find_max_lr),
    ):
        train("whole")
        with after_step(6, 1, lambda _: os.kill(os.getpid(), signal.SIGTERM)):
            try:
                train("stopped", save_every="1")
            except Interrupted as stop:
                torch.save(str(stop), out / f"stop-{world.rank}.pt")
        train("stopped", resume="auto")
        with after_step(6, 1, poison):
            train("rolled-back", on_nan="rollback")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
