"""The parts of fasttrain as benchmarks build them: the network, the training step, the loader, and batches.

No benchmark constructs them itself. Random pixels stand for CIFAR-10: no speed depends on the picture.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fasttrain.data.build_loader import LoaderName, build_loader, pick_loader
from fasttrain.data.dataset import Dataset, Split
from fasttrain.data.loader import Loader
from fasttrain.distributed import World
from fasttrain.model import ImageClassifier, build_model, mean_flop_per_image, training_flop_per_image
from fasttrain.recipe import Recipe
from fasttrain.report.run import Run
from fasttrain.runtime import Runtime
from fasttrain.step import TrainStep
from fasttrain.system.fallbacks import Fallbacks
from fasttrain.system.precision import DTYPES, pick_precision, prepare, set_fp32_precision

Batch = tuple[Tensor, Tensor]


def unchanged(model: ImageClassifier) -> None:
    """The network as it is."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to take the step; the defaults are fasttrain's, but for the precision."""

    precision: str
    layout: torch.memory_format = torch.channels_last
    fused: bool = True
    compile_mode: str | None = None
    cuda_graph: bool = False
    """On a GPU, the whole step as one launch."""
    tf32: bool = False
    """On a GPU, let float32 products round their inputs; it holds for the whole process."""
    cudnn_benchmark: bool = True
    """On a GPU, let cuDNN time its kernels and keep the fastest; it holds for the whole process."""
    change: Callable[[ImageClassifier], None] = unchanged
    """Made to the network, in place, before it trains."""
    width: int = 64
    keep_memory: bool = True
    """On a CPU; it holds for the whole process."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return DTYPES[self.precision]


def usual_variant(device: torch.device, **changes: Any) -> Variant:
    """The step as a training on this device takes it: on a GPU compiled and captured in a CUDA graph."""
    on_gpu = device.type == "cuda"
    settings = {
        "precision": pick_precision("auto", device),
        "compile_mode": "default" if on_gpu else None,
        "cuda_graph": on_gpu,
    }
    return Variant(**(settings | changes))


def network(**fields: Any) -> ImageClassifier:
    """The network of a recipe with these fields, for ten classes; `mean` and `std` are the images'."""
    statistics = {key: fields.pop(key) for key in ("mean", "std") if key in fields}
    return build_model(Recipe(**fields), num_classes=10, **statistics)


def flop_per_image(width: int) -> float:
    """Of a training step of the network with this many channels in its first convolution."""
    return training_flop_per_image(network(width=width))


def training_flop(run: Run) -> float:
    """Floating-point operations of a whole training, by the convolutions and the linear layer."""
    recipe, steps = run.recipe, run.recipe.epochs * run.steps_per_epoch
    network = build_model(recipe, num_classes=10)  # the number of classes makes no difference that counts
    return mean_flop_per_image(network, recipe, steps) * steps * recipe.batch_size


def build_step(variant: Variant, device: torch.device, world: World | None = None) -> TrainStep:
    """A training step of this variant, with a network of its own; world: the ranks that share it."""
    if variant.keep_memory:
        prepare(device, "auto")
    torch.manual_seed(0)
    model = network(width=variant.width)
    variant.change(model)
    if variant.compile_mode:
        # Dynamo counts the compiled networks of all widths and batch sizes as one function's, and by default
        # runs those after the eighth eagerly.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    step = TrainStep(
        model,
        Recipe(width=variant.width),
        Runtime(
            device=device,
            precision=variant.precision,
            cuda_graph=variant.cuda_graph and device.type == "cuda",
        ),
        max_lr=0.01,
        total_steps=10**5,  # more than any benchmark takes
        world=world,
    )
    if variant.compile_mode:
        step.compile(variant.compile_mode)
    model.to(memory_format=variant.layout)  # type: ignore[call-overload]  # torch's stubs lack it
    if not variant.fused:
        kept = ("params", "weight_decay", "lr_scale")
        groups = [{key: group[key] for key in kept} for group in step.optimizer.param_groups]
        step.optimizer = torch.optim.AdamW(groups, lr=step.max_lr)
    return step


def timed_step(
    step: TrainStep,
    variant: Variant,
    stream: Iterator[Batch],
    *,
    repeats: int,
    meet: Callable[[], object] = lambda: None,
) -> Callable[[], float]:
    """A warm training step of this variant; each call takes `repeats` of them, returns the seconds of one.

    meet: called before the clock starts, where ranks have to begin at the same time.
    """

    def timed() -> float:
        set_fp32_precision(variant.tf32)
        torch.backends.cudnn.benchmark = variant.cudnn_benchmark
        meet()
        start = time.perf_counter()
        for _ in range(repeats):
            step(*next(stream))
        step.take_metrics()  # waits for the device
        return (time.perf_counter() - start) / repeats

    timed()
    return timed


def random_batch(batch_size: int, device: torch.device, layout: torch.memory_format) -> Batch:
    images = torch.randint(256, (batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    return images.contiguous(memory_format=layout), torch.randint(10, (batch_size,), device=device)


def random_dataset(images: int) -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (images, 32, 32, 3), dtype=np.uint8)
    split = Split(pixels, rng.integers(0, 10, images, dtype=np.uint8))
    return Dataset("random", Path(), tuple("0123456789"), split, split, (0.5,) * 3, (0.25,) * 3)


def loader_names(device: torch.device) -> list[LoaderName]:
    """The loaders that this machine has, the one that a training takes first."""
    return list(dict.fromkeys((pick_loader("auto", device, Fallbacks(lambda _: None)), "tensor")))


def train_loader(
    dataset: Dataset, recipe: Recipe, device: torch.device, loader: LoaderName | None = None
) -> Loader:
    """Our loader of the training images; by default the one that a training takes."""
    return build_loader(dataset, recipe, train=True, device=device, loader=loader or loader_names(device)[0])


def endless(batches: Iterable[Batch], model: ImageClassifier | None = None) -> Iterator[Batch]:
    """Epoch after epoch; with a model, each batch as its first convolution takes it."""
    while True:
        for images_NCHW, labels_N in batches:
            yield (images_NCHW if model is None else model.normalize(images_NCHW)), labels_N
