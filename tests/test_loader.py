"""Both loaders, held to one contract and to each other."""

import contextlib
import gc
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fasttrain.data import build_loader as build_loader_module
from fasttrain.data import load_dataset as load_dataset_module
from fasttrain.data.build_loader import fit_batch_size, pick_loader
from fasttrain.data.dataset import Dataset, Split
from fasttrain.data.load_dataset import load_dataset
from fasttrain.data.loader import Loader
from fasttrain.data.sampler import Sampler
from fasttrain.data.sources import cifar, synthetic
from fasttrain.data.sources.download import DownloadError
from fasttrain.errors import UserError
from fasttrain.recipe import Recipe
from fasttrain.system.fallbacks import Fallbacks
from tests import helpers
from tests.helpers import CPU

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PLAIN = {"crop_padding": 0, "flip": False, "cutout": 0}
KINDS = ["dali", "tensor"]

try:
    import nvidia.dali  # noqa: F401
except ImportError:
    KINDS = ["tensor"]
needs_dali = pytest.mark.skipif("dali" not in KINDS, reason="DALI has no wheel here")


def chw(image_HWC: np.ndarray) -> np.ndarray:
    return image_HWC.transpose(2, 0, 1)


def random_dataset(train: int = 600, test: int = 130) -> Dataset:
    rng = np.random.default_rng(0)
    splits = [
        Split(rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, n).astype(np.uint8))
        for n in (train, test)
    ]
    return Dataset("random", Path("nowhere"), tuple("abcdefghij"), splits[0], splits[1], MEAN, STD)


def ramp_dataset(count: int) -> Dataset:
    """Every pixel tells its place: red = row, green = column, blue = 255; so an offset can be read off."""
    image = np.empty((32, 32, 3), np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = np.arange(32)[:, None] + 100, np.arange(32) + 100, 255
    split = Split(np.broadcast_to(image, (count, 32, 32, 3)).copy(), np.zeros(count, np.uint8))
    return Dataset("ramp", Path("nowhere"), ("a",), split, split, (0.0, 0.0, 0.0), (1 / 255,) * 3)


def loader_of(
    kind: str, dataset: Dataset, *, train: bool = True, device: torch.device = CPU, **fields
) -> Loader:
    recipe = Recipe(**{"batch_size": 128, **fields})
    return helpers.loader_of(dataset, recipe, train=train, loader=kind, device=device)


def epoch(batches) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All batches at once, uncopied: what a loader has handed out stays as it was."""
    return list(batches)


@needs_dali
def test_both_give_identical_values_labels_and_strides_on_the_test_split() -> None:
    dataset = random_dataset()
    pairs = zip(
        epoch(loader_of("dali", dataset, train=False)),
        epoch(loader_of("tensor", dataset, train=False)),
        strict=True,
    )
    for (images, labels), (expected_images, expected_labels) in pairs:
        assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)
        assert images.dtype == expected_images.dtype and images.stride() == expected_images.stride()


@needs_dali
@pytest.mark.parametrize("train", [True, False])
def test_images_too_large_to_be_padded_in_memory_are_padded_batch_by_batch(train: bool, monkeypatch) -> None:
    dataset = random_dataset()
    expected = epoch(loader_of("dali", dataset, train=train))
    monkeypatch.setattr(build_loader_module, "PADDED_GIB_MAX", 0)
    monkeypatch.setattr(build_loader_module, "pad", lambda *_: pytest.fail("padded as a whole"))
    for (images, labels), (wanted, wanted_labels) in zip(
        epoch(loader_of("dali", dataset, train=train)), expected, strict=True
    ):
        assert torch.equal(images, wanted) and torch.equal(labels, wanted_labels)
    with pytest.raises(UserError, match=r"--loader tensor: holds all images in memory, here 0\.0 GiB"):
        loader_of("tensor", dataset, train=train)


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_another_resolution_than_the_recipes_are_refused(kind: str) -> None:
    with pytest.raises(UserError, match="--resolution 64: the images of random have 32 pixels a side"):
        loader_of(kind, random_dataset(), resolution=64)
    with pytest.raises(UserError, match="--resolution 64: the images of --data cifar10 have 32 pixels"):
        load_dataset("cifar10", Path("nowhere"), log=pytest.fail, resolution=64)


@needs_dali
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"crop_padding": 3},
        {"crop_padding": 0},
        {"flip": False},
        {"cutout": 0},
        {"flip_order": "alternating"},
    ],
)
def test_both_give_identical_batches_in_training(fields: dict[str, Any]) -> None:
    dataset = random_dataset()
    ours, reference = (loader_of(kind, dataset, **fields) for kind in ("dali", "tensor"))
    for _ in range(2):
        for (images, labels), (expected_images, expected_labels) in zip(ours, reference, strict=True):
            assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_pixels(kind: str) -> None:
    dataset = random_dataset(test=20)
    [(images, labels)] = epoch(loader_of(kind, dataset, train=False))
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), dataset.test.images)
    assert labels.tolist() == dataset.test.labels.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_uint8_channels_last_with_int64_labels(kind: str) -> None:
    images, labels = next(iter(loader_of(kind, random_dataset())))
    assert images.shape == (128, 3, 32, 32) and images.dtype == torch.uint8
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (128,) and labels.dtype == torch.int64


@pytest.mark.parametrize("kind", KINDS)
def test_training_drops_the_last_batch_and_evaluation_counts_every_image_once(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(build_loader_module, "EVAL_BATCH_SIZE", 50)
    dataset = random_dataset(train=600, test=130)
    train, test = loader_of(kind, dataset), loader_of(kind, dataset, train=False)
    assert len(train) == 4 and [len(labels) for _, labels in train] == [128] * 4
    for _ in range(2):  # a second evaluation must see the same
        batches = epoch(test)
        assert [len(labels) for _, labels in batches] == [50, 50, 30]
        assert torch.cat([labels for _, labels in batches]).tolist() == dataset.test.labels.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_every_epoch_is_a_full_reshuffle_without_repeats(kind: str) -> None:
    dataset = random_dataset(train=512)
    batches = loader_of(kind, dataset, **PLAIN)
    place = {chw(image).tobytes(): index for index, image in enumerate(dataset.train.images)}
    orders = []
    for _ in range(3):
        images = torch.cat([images for images, _ in epoch(batches)])
        orders.append([place[image.numpy().tobytes()] for image in images.contiguous()])
        assert len(set(orders[-1])) == 512
    for first, second in ((0, 1), (1, 2), (0, 2)):
        assert abs(np.corrcoef(np.argsort(orders[first]), np.argsort(orders[second]))[0, 1]) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_are_uniform_over_9_by_9_and_half_of_the_images_are_mirrored(kind: str) -> None:
    count = 8100
    batches = loader_of(kind, ramp_dataset(count), batch_size=count, cutout=0)
    images, _ = next(iter(batches))
    row, column = images[:, 0, :, 0].numpy().astype(int) - 100, images[:, 1, 0, :].numpy().astype(int) - 100
    # Row 4 of the padded image is row 0: at offset 4 the middle of the crop shows its own row.
    row_offset = row[:, 16] - 16 + 4
    mirrored = column[:, 15] > column[:, 16]
    middle = np.where(mirrored, column[:, 15], column[:, 16])
    column_offset = middle - 16 + 4
    counts = np.zeros((9, 9))
    np.add.at(counts, (row_offset, column_offset), 1)
    # Each of 81 cells expects 100; chi-squared with 80 degrees of freedom exceeds 140 once in 25,000 runs.
    assert ((counts - 100) ** 2 / 100).sum() < 140
    assert abs(mirrored.mean() - 0.5) < 0.025
    assert (images[:, 2] == 255).all()  # the border is reflected, not black


@pytest.mark.parametrize("kind", KINDS)
def test_the_border_is_the_images_own_reflection(kind: str) -> None:
    batches = loader_of(kind, ramp_dataset(256), batch_size=256, cutout=0, flip=False)
    images, _ = next(iter(batches))
    rows = set(map(tuple, (images[:, 0, :, 0].int() - 100).tolist()))
    reflected = [*range(4, 0, -1), *range(32), *range(30, 26, -1)]
    assert rows == {tuple(reflected[offset : offset + 32]) for offset in range(9)}


@pytest.mark.parametrize("kind", KINDS)
def test_cutout_is_one_8_by_8_square_at_the_mean_anywhere_in_the_image(kind: str) -> None:
    dataset = ramp_dataset(5000)  # its mean is 0, which no pixel has
    batches = loader_of(kind, dataset, batch_size=5000, crop_padding=0, flip=False)
    images, _ = next(iter(batches))
    hole = (images == 0).all(1)
    assert (hole.sum((1, 2)) == 64).all()
    rows, columns = hole.any(2), hole.any(1)
    assert (rows.sum(1) == 8).all() and (columns.sum(1) == 8).all()
    for stripe in (rows, columns):
        corners = stripe.int().argmax(1).bincount(minlength=25).numpy()
        assert len(corners) == 25 and ((corners - 200) ** 2 / 200).sum() < 60  # 24 degrees of freedom


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("on", ["crop_padding", "flip", "cutout"])
def test_each_augmentation_works_alone(kind: str, on: str) -> None:
    dataset = random_dataset()
    [(plain, _), *_] = epoch(loader_of(kind, dataset, **PLAIN))
    [(changed, _), *_] = epoch(
        loader_of(kind, dataset, **PLAIN | {on: {"crop_padding": 4, "flip": True}.get(on, 8)})
    )
    same = (plain == changed).all(1).float().mean((1, 2))
    expected = {"crop_padding": 0.02, "flip": 0.5, "cutout": 1 - 64 / 1024}[on]
    assert abs(same.mean().item() - expected) < 0.15


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_batches_for_any_number_of_threads(kind: str) -> None:
    dataset = random_dataset()
    one, two, other = (
        epoch(loader_of(kind, dataset, loader_threads=threads, seed=seed))
        for threads, seed in ((1, 3), (2, 3), (1, 4))
    )
    assert all(torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(one, two, strict=True))
    assert not torch.equal(one[0][0], other[0][0])


@pytest.mark.parametrize("kind", KINDS)
def test_another_seed_augments_otherwise(kind: str) -> None:
    dataset = ramp_dataset(128)  # all images alike: whatever differs is the augmentation
    one, other = (next(iter(loader_of(kind, dataset, seed=seed)))[0] for seed in (3, 4))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_augments_otherwise(kind: str) -> None:
    first, second = epoch(loader_of(kind, ramp_dataset(256)))
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_restored_state_goes_on_bit_exactly_in_the_middle_of_an_epoch(kind: str) -> None:
    dataset = random_dataset()
    first, second = loader_of(kind, dataset), loader_of(kind, dataset)
    epoch(first)
    batches = iter(first)
    next(batches)
    state = first.state_dict()
    expected = epoch(batches) + epoch(first)
    second.load_state_dict(state)
    restored = epoch(second) + epoch(second)
    assert len(restored) == 3 + 4
    assert all(
        torch.equal(a, b) and torch.equal(x, y) for (a, x), (b, y) in zip(expected, restored, strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_cutout_leaves_the_mean_of_each_channel(kind: str) -> None:
    [(plain, _), *_] = epoch(loader_of(kind, random_dataset(), **PLAIN))
    [(cut, _), *_] = epoch(loader_of(kind, random_dataset(), **PLAIN | {"cutout": 8}))
    for channel, value in enumerate((125, 123, 114)):  # MEAN, in pixel values
        changed = cut[:, channel][cut[:, channel] != plain[:, channel]]
        assert len(changed) > 0.9 * 128 * 64 and (changed == value).all()


@needs_dali
def test_images_on_the_device_and_on_the_host_are_gathered_alike() -> None:
    from fasttrain.data.dali import DeviceStore, HostStore

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (50, 40, 40, 3), dtype=np.uint8), rng.integers(0, 10, 50, np.uint8)
    indices = rng.permutation(50)[:20]
    stores = HostStore(images, labels), DeviceStore(images, labels, CPU)
    for found in (list(map(torch.as_tensor, store.gather(indices))) for store in stores):
        assert np.array_equal(found[0], images[indices]) and found[0].is_contiguous()
        assert found[1].tolist() == labels[indices].tolist() and found[1].dtype == torch.int64


@needs_dali
@pytest.mark.parametrize("train", [True, False])
def test_a_chunk_holds_several_batches_and_changes_none_of_them(train: bool, monkeypatch) -> None:
    from fasttrain.data import dali

    monkeypatch.setattr(build_loader_module, "EVAL_BATCH_SIZE", 100)
    dataset = random_dataset(train=650, test=650)
    wanted = loader_of("tensor", dataset, batch_size=100, train=train)
    expected = [epoch(wanted) for _ in range(2)]
    for images, chunk in ((100, 1), (250, 2), (10_000, len(wanted))):
        monkeypatch.setattr(dali, "CHUNK_BYTES", images * 32 * 32 * 3)
        loader = loader_of("dali", dataset, batch_size=100, train=train)
        assert loader._batches_per_chunk == chunk
        for batches in expected:
            for ours, theirs in zip(epoch(loader), batches, strict=True):
                assert all(map(torch.equal, ours, theirs))


@needs_dali
def test_a_gpus_chunks_fit_into_its_memory_and_its_grids(monkeypatch) -> None:
    from fasttrain.data.dali import batches_per_chunk

    def images_of(sampler: Sampler, free: int, resolution: int = 32) -> int:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
        return sampler.batch_size * batches_per_chunk(sampler, resolution, torch.device("cuda"))

    sampler = Sampler(50_000, 512, train=True, seed=0)
    assert images_of(sampler, 80 << 30) == 16_384
    assert images_of(sampler, 1 << 30) == 5120 <= (1 << 30) / 64 / (32 * 32 * 3)
    assert images_of(sampler, 1 << 20) == 512  # one batch, whatever it takes
    assert images_of(sampler, 80 << 30, resolution=256) == 6656 <= (80 << 30) / 64 / (256 * 256 * 3)
    assert images_of(Sampler(1000, 100, train=True, seed=0), 80 << 30) == 1000  # an epoch


@needs_dali
def test_the_pipeline_launches_one_warp_for_all_images_and_takes_no_scalar_of_each(monkeypatch) -> None:
    """On a GPU a flip, or a condition, costs a kernel or a copy per image."""
    from nvidia.dali import fn

    called: list[tuple[str, dict[str, Any]]] = []

    def recorded(name: str) -> Any:
        make = getattr(fn, name)

        def operator(*args: Any, **settings: Any) -> Any:
            called.append((name, settings))
            return make(*args, **settings)

        return operator

    for name in ("external_source", "warp_affine", "erase", "flip", "crop_mirror_normalize", "slice"):
        monkeypatch.setattr(fn, name, recorded(name))
    next(iter(loader_of("dali", random_dataset())))
    assert [name for name, _ in called] == ["external_source", "external_source", "warp_affine", "erase"]
    assert called[1][1]["ndim"] == [2, 1]  # a matrix and a corner per image, each one tensor


@needs_dali
def test_a_gpus_images_come_on_a_stream_of_their_own(monkeypatch) -> None:
    from fasttrain.data import dali

    device, entered, waited_for = torch.device("cuda"), [], []
    stream, training = SimpleNamespace(wait_stream=waited_for.append), object()
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: training)
    monkeypatch.setattr(torch.cuda, "stream", lambda it: entered.append(it) or contextlib.nullcontext())
    for name in ("to", "pin_memory"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor, *_, **__: tensor.long())
    store = dali.DeviceStore(np.zeros((5, 8, 8, 3), np.uint8), np.arange(5), device)
    assert store.settings["cuda_stream"] is stream and not store.settings["no_copy"]
    assert waited_for == [training]  # once, for the images
    assert store.gather(np.array([4, 2]))[1].tolist() == [4, 2] and entered == [stream]


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_that_was_started_gives_the_same_batches(kind: str) -> None:
    started, other = (loader_of(kind, random_dataset()) for _ in range(2))
    started.start()
    started.start()
    for _ in range(2):
        for ours, theirs in zip(epoch(started), epoch(other), strict=True):
            assert all(map(torch.equal, ours, theirs))
    started.start()
    started.load_state_dict({"step": 1})
    other.load_state_dict({"step": 1})
    started.start()
    for ours, theirs in zip(epoch(started), epoch(other), strict=True):
        assert all(map(torch.equal, ours, theirs))


@needs_dali
def test_a_loader_that_is_dropped_closes_its_pipeline_at_once() -> None:
    """A pipeline left to the garbage collector may be shut down in the middle of a capture."""
    loader = loader_of("dali", random_dataset())
    loader.start()
    gone = weakref.ref(loader._pipeline)
    gc.collect()
    gc.disable()
    try:
        del loader
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("resident_share", [0.0, 0.25])
@pytest.mark.parametrize("train", [True, False])
def test_dalis_gpu_pipeline_gives_what_its_cpu_backend_gives(
    train: bool, resident_share: float, monkeypatch
) -> None:
    from fasttrain.data import dali

    monkeypatch.setattr(dali, "RESIDENT_SHARE", resident_share)
    dataset, device = random_dataset(), torch.device("cuda", 0)
    pairs = zip(
        epoch(loader_of("dali", dataset, train=train, device=device)),
        epoch(loader_of("dali", dataset, train=train)),
        strict=True,
    )
    for (images, labels), (expected_images, expected_labels) in pairs:
        assert images.device == labels.device == device
        assert images.stride() == expected_images.stride() and images.dtype == expected_images.dtype
        assert torch.equal(images.cpu(), expected_images)
        assert torch.equal(labels.cpu(), expected_labels)


@pytest.mark.gpu
def test_the_gpu_pipeline_hands_its_batches_over_without_a_host_sync(monkeypatch) -> None:
    """Of torch's: that DALI's own threads do not wait for the training is seen in a trace."""
    from fasttrain.data import dali

    monkeypatch.setattr(dali, "CHUNK_IMAGES", 128)  # every batch runs the pipeline
    batches = loader_of("dali", random_dataset(), device=torch.device("cuda", 0))
    epoch(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        epoch(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_sampler_is_a_pure_function_of_seed_and_step() -> None:
    sampler = Sampler(100, 30, train=True, seed=1)
    in_order = [sampler(step).tolist() for step in range(9)]
    assert [Sampler(100, 30, train=True, seed=1)(step).tolist() for step in reversed(range(9))] == in_order[
        ::-1
    ]
    assert sampler.steps_per_epoch == 3
    assert Sampler(100, 30, train=False, seed=1).steps_per_epoch == 4


def test_a_batch_larger_than_the_training_set_is_refused() -> None:
    with pytest.raises(UserError, match="--batch-size 700"):
        loader_of("tensor", random_dataset(), batch_size=700)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(512, 512), (511, 128), (256, 128), (255, 64), (16, 8), (15, 4), (4, 2), (3, 2), (2, 2)],
)
def test_a_presets_batch_shrinks_to_a_power_of_two_that_leaves_an_epoch_two_steps(
    count: int, expected: int
) -> None:
    said: list[str] = []
    dataset = random_dataset(count)
    fitted = fit_batch_size(Recipe(name="default", batch_size=512), dataset, said.append)
    assert fitted == Recipe(batch_size=expected)
    assert [line.split(":")[0] for line in said] == (
        [] if expected == 512 else [f"--batch-size {expected} instead of 512"]
    )
    chosen = Recipe(batch_size=600)
    assert fit_batch_size(chosen, dataset, pytest.fail) == chosen


def test_without_dali_the_torch_loader_takes_over_in_one_line(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(build_loader_module, "dali_unusable", build_loader_module.dali_unusable.__wrapped__)
    said: list[str] = []
    assert pick_loader("auto", CPU, Fallbacks(said.append)) == "tensor"
    assert len(said) == 1 and "DALI" in said[0]
    with pytest.raises(UserError, match="--loader dali"):
        pick_loader("dali", CPU, Fallbacks(said.append))
    assert pick_loader("tensor", CPU, Fallbacks(said.append)) == "tensor" and len(said) == 1


@pytest.fixture
def no_network(monkeypatch) -> None:
    def download(root: Path, release: cifar.Release) -> None:
        raise DownloadError("no mirror answered")

    monkeypatch.setattr(load_dataset_module, "download", download)
    generate = synthetic.generate
    monkeypatch.setattr(synthetic, "generate", lambda root: generate(root, train_count=50, test_count=20))


def test_auto_falls_back_loudly_and_cifar10_never_does(no_network, tmp_path) -> None:
    said: list[str] = []
    assert load_dataset("auto", tmp_path, log=said.append).name == "synthetic"
    assert len(said) == 1 and "NOT CIFAR-10" in said[0] and "no mirror answered" in said[0]
    with pytest.raises(UserError, match="no mirror answered"):
        load_dataset("cifar10", tmp_path, log=said.append)


def test_files_on_disk_are_taken_without_a_download(no_network, tmp_path) -> None:
    synthetic.generate(tmp_path)
    assert load_dataset("auto", tmp_path, log=pytest.fail).name == "synthetic"
    with pytest.raises(UserError, match="--data cifar10"):
        load_dataset("cifar10", tmp_path, log=pytest.fail)


@pytest.mark.parametrize("kind", KINDS)
def test_an_alternating_flip_shows_every_image_both_ways_in_two_epochs(kind: str) -> None:
    dataset = random_dataset(train=512)
    batches = loader_of(kind, dataset, **PLAIN | {"flip": True}, flip_order="alternating", batch_size=128)
    as_it_is = {chw(image).tobytes(): index for index, image in enumerate(dataset.train.images)}
    mirrored = {chw(image[:, ::-1]).tobytes(): index for index, image in enumerate(dataset.train.images)}
    epochs = []
    for _ in range(4):
        seen = [image.contiguous().numpy().tobytes() for images, _ in epoch(batches) for image in images]
        flips = {
            mirrored[image] if image in mirrored else as_it_is[image]: image in mirrored for image in seen
        }
        assert len(flips) == 512
        epochs.append(np.array([flips[index] for index in range(512)]))
    assert abs(epochs[0].mean() - 0.5) < 0.1
    assert (
        (epochs[1] == ~epochs[0]).all() and (epochs[2] == epochs[0]).all() and (epochs[3] == epochs[1]).all()
    )
    other = loader_of(kind, dataset, **PLAIN | {"flip": True}, flip_order="alternating", seed=1)
    assert not np.array_equal(epochs[0], other.augmentation.first_flips)


def test_the_order_of_flips_changes_no_other_draw() -> None:
    dataset = random_dataset()
    one, other = (loader_of("tensor", dataset, flip_order=order) for order in ("random", "alternating"))
    for step in (0, 5):
        draws = [batches.augmentation.draw(step, 1, batches.sampler(step)) for batches in (one, other)]
        assert all(
            np.array_equal(getattr(draws[0], f), getattr(draws[1], f)) for f in ("rows", "cutout_corners")
        )
        assert not np.array_equal(draws[0].mirrored, draws[1].mirrored)
