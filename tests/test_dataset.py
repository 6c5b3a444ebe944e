import numpy as np
import pytest

from fasttrain.data import dataset
from fasttrain.data.dataset import Dataset, Split
from fasttrain.errors import UserError


def test_statistics_match_float64() -> None:
    # More than one chunk, a different spread per channel.
    images = np.random.default_rng(0).integers(0, [90, 180, 256], (1700, 8, 8, 3), np.uint8)
    mean, std = dataset.channel_statistics(images)
    reference = images.astype(np.float64) / 255
    assert mean == pytest.approx(reference.mean((0, 1, 2)), rel=1e-12)
    assert std == pytest.approx(reference.std((0, 1, 2)), rel=1e-12)


def test_a_tenth_of_each_class_is_held_out_and_the_test_images_are_gone() -> None:
    labels = np.repeat(np.arange(3), [25, 7, 40]).astype(np.uint8)  # sorted, as a folder's are
    images = np.arange(len(labels) * 12, dtype=np.uint16).view(np.uint8).reshape(-1, 2, 4, 3)
    untouchable = Split(images[:0], labels[:0])
    whole = Dataset("pets", None, ("a", "b", "c"), Split(images, labels), untouchable, (0,) * 3, (1,) * 3)
    held = dataset.hold_out_images(whole)
    assert np.bincount(held.test.labels).tolist() == [2, 1, 4]
    numbers = [
        split.images.reshape(len(split.labels), -1)[:, :2].copy().view(np.uint16)[:, 0] // 12
        for split in (held.train, held.test)
    ]
    assert sorted(np.concatenate(numbers)) == list(range(72)) and not {*numbers[0]} & {*numbers[1]}
    assert all(labels[number] == label for number, label in zip(numbers[1], held.test.labels, strict=True))
    assert np.diff(numbers[1][-4:]).tolist() == [10, 10, 10]
    assert held.mean == pytest.approx(held.train.images.mean((0, 1, 2)) / 255)
    assert held.name == "pets, a tenth of the training images held out"


def test_a_class_of_one_image_cannot_be_held_out() -> None:
    split = Split(np.zeros((3, 2, 2, 3), np.uint8), np.array([0, 0, 1]))
    with pytest.raises(UserError, match="at least two training images of each class; b has 1"):
        dataset.hold_out_images(Dataset("pets", None, ("a", "b"), split, split, (0,) * 3, (1,) * 3))
