"""What these images cost a recipe whose accuracy on the original CIFAR-10 is known.

    python -m benchmarks.research.published --data-dir data [--seeds 5]

airbench94 of cifar10-airbench (`pip install airbench`) has its own network, optimizer and augmentation. On
the original images its author had 94.01% on average of 1,000 runs, predictions averaged over mirrored and
shifted images. On other images, such as CIFAR-10 encoded as JPEGs, the difference comes from the images only,
apart from the precision: on a GPU it trains in float16, as published, on a CPU in float32.

Every training leaves a file in OUT; run it again to continue where it stopped.
"""

import contextlib
import functools
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest import mock

import torch

from benchmarks import peers
from benchmarks.accuracy import points
from benchmarks.airbench import Sample, read_table, without_gpu, working_in, write_images
from benchmarks.harness import require_counts, run, save, show
from benchmarks.stats import mean_interval
from fasttrain.data.dataset import Dataset
from fasttrain.data.load_dataset import load_dataset
from fasttrain.errors import UserError
from fasttrain.system.files import write_json
from fasttrain.system.machine import describe, pick_device
from fasttrain.system.precision import keep_freed_memory

ON_THE_ORIGINALS = {"accuracy_tta": 0.9401, "n": 1000}
"""airbench94's mean, as the head of its lib_airbench94.py gives it."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train airbench94 as published on images of your own choice."""

    seeds: int = 3
    """Seeds 0, 1, ... train once each."""
    out: Path = Path("runs/published")
    """Where the figures of each training are, and are written."""
    data: Literal["auto", "cifar10", "synthetic"] = "auto"
    """As in fasttrain train."""
    data_dir: Path | None = None
    """As in fasttrain train."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """On a CPU a training takes hours of a core."""

    def __post_init__(self) -> None:
        require_counts(seeds=self.seeds)


@contextlib.contextmanager
def on_cpu(package: Any) -> Iterator[None]:
    """Let airbench, made for GPUs and half precision, train in float32 on a CPU."""

    loader = functools.partial(package.utils.CifarLoader, gpu="cpu")
    with (
        without_gpu(),
        mock.patch.object(package.utils, "CifarLoader", loader),
        mock.patch.object(package.lib_airbench94, "CifarLoader", loader),
    ):
        yield


def trained(package: Any, dataset: Dataset, seed: int, device: torch.device) -> Sample:
    """One training, with what it was trained on."""
    torch.manual_seed(seed)
    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        write_images(dataset, Path(folder) / "cifar10")
        if device.type == "cpu":
            stack.enter_context(on_cpu(package))
        with working_in(Path(folder)), contextlib.redirect_stdout(io.StringIO()) as printed:
            package.train94(run=1)
    sample = read_table(package.utils.logging_columns_list, printed.getvalue())
    precision = "fp32" if device.type == "cpu" else "fp16"
    return {
        "dataset": dataset.name,
        "machine": describe(device),
        "precision": precision,
        "seed": seed,
        **sample,
    }


def collect(dataset: Dataset, samples: list[Sample]) -> dict[str, Any]:
    """What the JSON file holds: the two accuracies, and what is missing to the original images' figure."""
    with_averages = mean_interval([sample["accuracy_tta"] for sample in samples])
    published = ON_THE_ORIGINALS["accuracy_tta"]
    return {
        "dataset": dataset.name,
        "accuracy": mean_interval([sample["accuracy"] for sample in samples]),
        "accuracy_tta": with_averages,
        "published": ON_THE_ORIGINALS,
        "cost": {
            "mean": with_averages["mean"] - published,
            "interval": with_averages["interval"] and [x - published for x in with_averages["interval"]],
            "n": with_averages["n"],
        },
        "samples": samples,
    }


def table(values: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, as text, of what `collect` gives."""
    columns = ["images", "accuracy, %", "with averaged predictions, %", "difference, points", "n"]
    published = values["published"]
    return columns, [
        [
            "the original CIFAR-10, published",
            "-",
            f"{100 * published['accuracy_tta']:.2f}",
            "-",
            f"{published['n']:,}",
        ],
        [
            values["dataset"],
            points(values["accuracy"]),
            points(values["accuracy_tta"]),
            points(values["cost"], "+"),
            str(values["cost"]["n"]),
        ],
    ]


def main(options: Options) -> None:
    device = pick_device(options.device)
    try:
        peers.load("torchvision")  # airbench imports it, and there is a remedy for a wheel that does not fit
        import airbench as package
    except ImportError as error:
        raise UserError(f"airbench: not installed ({error}): pip install -e '.[bench]'") from error
    if device.type == "cpu":
        keep_freed_memory()
    dataset = load_dataset(options.data, options.data_dir)
    options.out.mkdir(parents=True, exist_ok=True)
    samples = []
    for seed in range(options.seeds):
        file = options.out / f"seed-{seed}.json"
        if not file.exists():
            print(f"seed {seed}", file=sys.stderr)
            write_json(file, trained(package, dataset, seed, device))
        samples.append(json.loads(file.read_text(encoding="utf-8")))
        if samples[-1]["dataset"] != dataset.name:
            raise UserError(
                f"{file}: its images are {samples[-1]['dataset']}, not {dataset.name}; move it away"
            )
        path = save("published", device, collect(dataset, samples))
    show("airbench94; mean (95% interval)", *table(json.loads(path.read_text(encoding="utf-8"))))
    print(path)


if __name__ == "__main__":
    run(main, Options)
