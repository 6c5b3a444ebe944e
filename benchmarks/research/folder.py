"""Images per second from JPEG files: the first read of a folder, and the epochs from what it leaves.

    python -m benchmarks.research.folder [--rounds 3] [--cores 2] [--data PATH]

Two questions, each beside what decodes in every epoch: torchvision's ImageFolder under torch's DataLoader,
and DALI's own reader and decoder, by nvJPEG too where there is an NVIDIA GPU. The first read lists, decodes
and checks every file, computes the statistics and writes the cache. The epochs after it come from that cache,
and ours are cropped, mirrored and cut as well; the others are decoded, scaled, cropped to the centre and
nothing more. Workers and pipelines are started before the clock.

Without --data the folder is generated: textures as JPEG of quality 75, small ones and photographs' size.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import peers
from benchmarks.harness import Workload, interleave, on_cores, run, save, say, show
from benchmarks.loaders import rate
from benchmarks.stats import spread
from benchmarks.workloads import endless, train_loader
from fasttrain.data.sources import folder, synthetic
from fasttrain.data.sources.image import decode
from fasttrain.recipe import Recipe
from fasttrain.system.machine import cpu_cores, pick_device

CPU = torch.device("cpu")
BATCH_SIZE = 512
FIRST_READ, FROM_CACHE, DALI_READER, NVJPEG, THEIRS = (
    "fasttrain, first read",
    "fasttrain, from the cache",
    "DALI, decoded in every epoch",
    "DALI, decoded by nvJPEG in every epoch",
    "ImageFolder + DataLoader",
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time JPEG files on the CPU: the first read, and the epochs after it."""

    rounds: int = 3
    """Samples of each, taken in turn."""
    cores: int = 2
    """How many cores, for our threads and for their worker processes."""
    data: Path | None = None
    """A folder of your own, with train/<class>/*; by default two are generated."""
    small: int = 10_000
    """Generated images of 32x32 pixels."""
    photos: int = 1_000
    """Generated images of 500x375 pixels."""
    resolution: int = 32
    """What all are scaled to."""
    seconds: float = 1.0
    """Length of a sample from the cache."""


def write_folder(root: Path, images: int, size: tuple[int, int]) -> Path:
    """A folder of JPEGs for the benchmark, a fifth of them for the test; returns it."""
    rng = np.random.default_rng(0)
    classes = list(synthetic.PATTERNS)
    labels = np.arange(images) % len(classes)
    for start in range(0, images, 500):
        part = labels[start : start + 500]
        pixels = synthetic.images(part.astype(np.uint8), rng).transpose(0, 2, 3, 1)
        for index, (label, image_HWC) in enumerate(zip(part, pixels, strict=True), start):
            name = root / ("test" if index % 50 < len(classes) else "train") / classes[label]
            name.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_HWC).resize(size).save(name / f"{index:06}.jpg", quality=75)
    return root


def read_anew(root: Path, resolution: int) -> Workload:
    """Images per second of first reads, each into a cache of its own."""
    number = count()

    def sample() -> float:
        with tempfile.TemporaryDirectory() as cache:
            start = time.perf_counter()
            dataset = folder.read(root, Path(cache, str(next(number))), resolution=resolution)
            return (len(dataset.train.labels) + len(dataset.test.labels)) / (time.perf_counter() - start)

    return sample


def from_cache(root: Path, cache: Path, options: Options) -> Workload:
    """Images per second of our loader, once the folder is decoded."""
    dataset = folder.read(root, cache, resolution=options.resolution)
    recipe = Recipe(
        resolution=options.resolution,
        batch_size=min(BATCH_SIZE, len(dataset.train.labels)),
        loader_threads=options.cores,
    )
    stream = endless(train_loader(dataset, recipe, CPU))
    return lambda: rate(stream, CPU, options.seconds)


def dali_reader(root: Path, options: Options, device: torch.device) -> Workload:
    """Images per second of DALI's reader and decoder: nvJPEG on an NVIDIA GPU, libjpeg-turbo on a CPU."""
    stream = dali_batches(sorted((root / "train").glob("*/*")), options, device)
    next(stream)  # builds the pipeline, which raises ImportError where DALI is not installed
    return lambda: rate(stream, device, options.seconds)


def dali_batches(
    files: list[Path], options: Options, device: torch.device, *, shuffle: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches (N, side, side, 3) uint8 and labels on the device, epoch after epoch."""
    from nvidia.dali import fn, pipeline_def, types

    on_gpu, side = device.type == "cuda", options.resolution
    classes = {name: label for label, name in enumerate(sorted({file.parent.name for file in files}))}

    @pipeline_def(
        batch_size=min(BATCH_SIZE, len(files)),
        num_threads=options.cores,
        device_id=(device.index or 0) if on_gpu else None,
    )
    def pipeline() -> Any:
        content, labels = fn.readers.file(
            files=[str(file) for file in files],
            labels=[classes[file.parent.name] for file in files],
            random_shuffle=shuffle,
            initial_fill=len(files),
        )
        images = fn.decoders.image(content, device="mixed" if on_gpu else "cpu", output_type=types.RGB)
        images = fn.resize(images, size=side, mode="not_smaller")
        images = fn.crop(images, crop=(side, side))
        return images, labels.gpu() if on_gpu else labels

    built = pipeline()
    stream = torch.cuda.current_stream(device) if on_gpu else None
    while True:
        images_NHWC, labels_N1 = (torch.from_dlpack(output.as_tensor()) for output in built.run(stream))
        yield images_NHWC, labels_N1[:, 0].long()


def pixel_differences(root: Path, options: Options, device: torch.device) -> dict[str, float]:
    """How DALI's decoder differs from what training and predict see, over one batch of files.

    share: of the bytes, those that differ. largest: of the differences, from 0 to 255.
    """
    files = sorted((root / "train").glob("*/*"))[:BATCH_SIZE]
    images_NHWC, _ = next(dali_batches(files, options, device, shuffle=False))
    expected_NHWC = np.stack([decode(file, options.resolution) for file in files])
    difference = np.abs(images_NHWC.cpu().numpy().astype(int) - expected_NHWC)
    return {"share": float((difference > 0).mean()), "largest": int(difference.max())}


def image_folder(root: Path, options: Options) -> Workload:
    """Images per second of one epoch of torchvision's. Raises ImportError where it is not installed."""
    peers.load("torchvision")
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    side = options.resolution
    transform = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])
    loader: Iterable[Any] = DataLoader(
        ImageFolder(str(root / "train"), transform),
        batch_size=BATCH_SIZE,
        shuffle=True,
        num_workers=options.cores,
        persistent_workers=True,
        multiprocessing_context="fork",  # torch's default on Linux
    )

    def epoch() -> Iterator[int]:
        for _, labels_N in loader:
            yield len(labels_N)

    def sample() -> float:
        start = time.perf_counter()
        return sum(epoch()) / (time.perf_counter() - start)

    sample()  # starts the workers
    return sample


def measure(options: Options, root: Path) -> dict[str, Any]:
    """Samples in images per second by name, who is missing and why, and how DALI's pixels differ."""
    torch.set_num_threads(options.cores)
    missing: dict[str, str] = {}
    differences: dict[str, dict[str, float]] = {}
    workloads: dict[str, Workload] = {}
    try:  # first: its workers are forked, which hangs once DALI's threads are there
        workloads[THEIRS] = image_folder(root, options)
    except ImportError as error:
        missing[THEIRS] = str(error)
    with tempfile.TemporaryDirectory() as cache:
        workloads[FIRST_READ] = read_anew(root, options.resolution)
        workloads[FROM_CACHE] = from_cache(root, Path(cache), options)
        device = pick_device()
        for name, where in {DALI_READER: CPU, NVJPEG: device}.items():
            if name == DALI_READER or device.type == "cuda":
                try:
                    workloads[name] = dali_reader(root, options, where)
                    differences[name] = pixel_differences(root, options, where)
                except ImportError as error:
                    missing[name] = str(error)
        samples = interleave(workloads, options.rounds)
        return {"samples": samples, "missing": missing, "pixel_differences": differences}


def main(options: Options) -> None:
    cores = min(options.cores, cpu_cores())
    rows: list[dict[str, Any]] = []
    samples: dict[str, Any] = {}
    differences: dict[str, Any] = {}
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        if options.data:
            folders = {options.data.name: options.data}
        else:
            sizes = {"32x32": (options.small, (32, 32)), "500x375": (options.photos, (500, 375))}
            folders = {name: write_folder(Path(temporary, name), *what) for name, what in sizes.items()}
        for name, root in folders.items():
            found = on_cores(cores, measure, options, root)
            samples[name], missing = found["samples"], found["missing"]
            differences[name] = found["pixel_differences"]
            medians = {way: float(np.median(values)) for way, values in samples[name].items()}
            for way, values in samples[name].items():
                theirs = medians.get(THEIRS)
                row = {"images": name, "way": way, "images_per_sec": medians[way], "spread": spread(values)}
                rows.append(row | {"times_theirs": medians[way] / theirs if theirs else None})
    facts = {"rounds": options.rounds, "cores": cores, "resolution": options.resolution}
    facts |= {"small": options.small, "photos": options.photos}
    figures = {"rows": rows, "missing": missing, "samples": samples, "pixel_differences": differences}
    path = save("folder", CPU, facts | figures)
    show(
        f"JPEG files on {cores} cores, median of {options.rounds}",
        ["images", "way", "images/s", "spread", "times ImageFolder's"],
        [
            [
                row["images"],
                row["way"],
                f"{row['images_per_sec']:,.0f}",
                f"±{row['spread']:.1%}",
                "" if row["times_theirs"] is None else f"{row['times_theirs']:.1f}",
            ]
            for row in rows
        ],
    )
    for images, ways in differences.items():
        for way, difference in ways.items():
            say(
                f"{images}, {way}: {difference['share']:.1%} of the bytes differ from what training and "
                f"predict see, by {difference['largest']} at most"
            )
    for name, reason in missing.items():
        say(f"{name}: {reason}")
    print(path)


if __name__ == "__main__":
    run(main, Options)
