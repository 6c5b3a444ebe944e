"""What the images' quality costs: the same training on images encoded once more, at lower and lower quality.

    python -m benchmarks.research.quality --data-dir data
    python -m benchmarks.research.quality --data-dir data --qualities 50 25 --seeds 5

Training images and the held-out ones that measure the accuracy are encoded alike. On images that are JPEGs
already this shows the slope below their quality, and hints at the cost of the first encoding, which cannot be
seen. Runs are paired by seed, as in benchmarks/accuracy.py; run it again to continue where it stopped.
"""

import dataclasses
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from benchmarks.accuracy import accuracies, compared_table, hardware, trained
from benchmarks.harness import require_counts, run, save, show
from benchmarks.stats import compare
from fasttrain.data.dataset import Dataset, Split, channel_statistics
from fasttrain.data.load_dataset import load_dataset
from fasttrain.errors import UserError
from fasttrain.recipe import load_recipe
from fasttrain.report.run import Run
from fasttrain.system.machine import pick_device


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train on the same images at several JPEG qualities, over the same seeds."""

    qualities: tuple[int, ...] = (75, 50, 25)
    """JPEG qualities that the images are encoded with once more, from 1 to 95."""
    base: str = "fast"
    """The recipe: a preset or a recipe's JSON file."""
    seeds: int = 3
    """Seeds 0, 1, ... train at every quality once each."""
    epochs: int = 3
    """Instead of the recipe's own."""
    width: int = 16
    """Channels of the network's first convolution."""
    out: Path = Path("runs/quality")
    """Where the runs' folders are, and are made."""
    data: Literal["auto", "cifar10", "cifar100", "synthetic"] = "auto"
    """As in fasttrain train."""
    data_dir: Path | None = None
    """As in fasttrain train."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        require_counts(seeds=self.seeds, epochs=self.epochs, width=self.width)
        for quality in self.qualities:
            if not 1 <= quality <= 95:
                raise UserError(f"--qualities {quality}: expected from 1 to 95")


def encode(images_NHWC: np.ndarray, quality: int) -> np.ndarray:
    """The images (N, 3, H, W) uint8 after a JPEG encoder of this quality, with halved colour (4:2:0)."""
    encoded_NHWC = np.empty_like(images_NHWC)
    for image_HWC, encoded_HWC in zip(images_NHWC, encoded_NHWC, strict=True):
        file = io.BytesIO()
        Image.fromarray(image_HWC).save(file, "JPEG", quality=quality, subsampling="4:2:0")
        encoded_HWC[:] = np.asarray(Image.open(file))
    return encoded_NHWC


def at_quality(dataset: Dataset, quality: int) -> Dataset:
    """The data set with all its images encoded once more."""
    train, test = (
        Split(encode(split.images, quality), split.labels) for split in (dataset.train, dataset.test)
    )
    mean, std = channel_statistics(train.images)
    name = f"{dataset.name}, encoded once more at q{quality}"
    return dataclasses.replace(dataset, name=name, train=train, test=test, mean=mean, std=std)


def main(options: Options) -> None:
    device = pick_device(options.device)
    recipe = dataclasses.replace(load_recipe(options.base), epochs=options.epochs, width=options.width)
    original = load_dataset(options.data, options.data_dir, hold_out=True)
    runs: dict[str, dict[int, Run]] = {}
    for quality in (None, *options.qualities):
        name = "as they are" if quality is None else f"q{quality}"
        dataset = original if quality is None else at_quality(original, quality)
        for seed in range(options.seeds):
            print(f"{name}, seed {seed}", file=sys.stderr)
            seeded = dataclasses.replace(recipe, seed=seed)
            folder = options.out / recipe.name / name.replace(" ", "-") / f"seed-{seed}"
            runs.setdefault(name, {})[seed] = trained(seeded, dataset, folder, options.device)
    values: dict[str, Any] = {
        "dataset": original.name,
        "train_images": len(original.train.labels),
        "test_images": len(original.test.labels),
        "recipe": recipe.to_dict(),
        "width": options.width,
        "hardware": hardware(runs),
        "rows": compare({name: accuracies(by_seed) for name, by_seed in runs.items()}),
        "runs": [
            {"quality": name, "seed": seed, "test_accuracy": one.result["test_accuracy"]}
            for name, by_seed in runs.items()
            for seed, one in by_seed.items()
        ],
    }
    path = save("quality", device, values)
    show(f"{original.name}; mean (95% interval)", *compared_table("images", values["rows"]))
    print(path)


if __name__ == "__main__":
    run(main, Options)
