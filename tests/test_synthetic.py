import json
from pathlib import Path

import numpy as np
import pytest

from fasttrain.data import dataset
from fasttrain.data.sources import cifar, synthetic
from fasttrain.errors import UserError


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dataset.Dataset:
    root = tmp_path_factory.mktemp("synthetic")
    synthetic.generate(root, train_count=4000, test_count=1000)
    return cifar.read(root)


def content(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / cifar.CIFAR10.folder).iterdir()}


def test_it_is_read_like_the_release(data: dataset.Dataset) -> None:
    assert data.name == "synthetic"
    assert len(data.classes) == 10 and not set(data.classes) & set(cifar.CIFAR10.classes)
    for split, count in ((data.train, 4000), (data.test, 1000)):
        assert split.images.shape == (count, 32, 32, 3)
        assert np.bincount(split.labels).tolist() == [count // 10] * 10
    images = np.concatenate([data.train.images, data.test.images])
    assert len({image.tobytes() for image in images}) == len(images)  # no image twice, none in both splits
    assert not any(state.verified for state in cifar.checksum_state(data.root))


def test_labels_are_shuffled(data: dataset.Dataset) -> None:
    # Nothing may follow from the place in a file: a batch of neighbours must hold every class.
    assert all(len(set(data.train.labels[start : start + 100])) == 10 for start in range(0, 4000, 100))
    assert len({tuple(part) for part in data.train.labels.reshape(-1, 10)}) > 390


def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.generate(tmp_path / folder, train_count=23, test_count=7, seed=seed)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    a, c = content(tmp_path / "a"), content(tmp_path / "c")
    assert [name for name in cifar.CIFAR10.files if a[name] == c[name]] == []
    data = cifar.read(tmp_path / "a")
    assert (len(data.train.labels), len(data.test.labels)) == (23, 7)


def test_a_finished_set_is_left_alone(tmp_path: Path) -> None:
    synthetic.generate(tmp_path, train_count=20, test_count=5)
    path = tmp_path / cifar.CIFAR10.folder / cifar.CIFAR10.test_file
    before = path.stat()
    synthetic.generate(tmp_path, train_count=20, test_count=5)
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_ino == before.st_ino


def test_other_data_is_never_overwritten(tmp_path: Path) -> None:
    synthetic.generate(tmp_path, train_count=20, test_count=5)
    before = content(tmp_path)
    with pytest.raises(UserError, match="another data set"):
        synthetic.generate(tmp_path, train_count=20, test_count=5, seed=1)
    assert content(tmp_path) == before
    (tmp_path / cifar.CIFAR10.folder / cifar.CIFAR10.test_file).unlink()
    with pytest.raises(UserError, match="another data set"):
        synthetic.generate(tmp_path, train_count=20, test_count=5)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synthetic.json, "dumps", fail)  # the last file of the folder
    with pytest.raises(UserError, match="No space left on device"):
        synthetic.generate(tmp_path, train_count=20, test_count=5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("train_count", "test_count"), [(4, 1), (5, 0)])
def test_no_file_may_be_empty(tmp_path: Path, train_count: int, test_count: int) -> None:
    with pytest.raises(ValueError, match="train_count"):
        synthetic.generate(tmp_path, train_count, test_count)


def test_the_name_file_tells_how_it_was_made(tmp_path: Path) -> None:
    synthetic.generate(tmp_path, train_count=20, test_count=5, seed=3)
    identity = json.loads((tmp_path / cifar.CIFAR10.folder / cifar.NAME_FILE).read_text())
    assert identity == {
        "name": "synthetic", "generator": synthetic.GENERATOR, "train_count": 20, "test_count": 5, "seed": 3
    }  # fmt: skip


def features(images: np.ndarray, degree: int) -> np.ndarray:
    """Pixels in -0.5..0.5; or, for degree 2, the autocorrelation of the image at shifts of up to 8 pixels."""
    pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5
    if degree == 1:
        return pixels.reshape(len(pixels), -1)
    power = abs(np.fft.rfft2(pixels - pixels.mean((2, 3), keepdims=True))) ** 2
    correlation = np.fft.irfft2(power).sum(1)
    correlation /= correlation[:, :1, :1]
    return np.concatenate([correlation[:, :9, :9], correlation[:, -8:, :9]], axis=1).reshape(len(pixels), -1)


def linear_accuracy(data: dataset.Dataset, degree: int, penalty: float) -> float:
    """Test accuracy of ridge regression on one-hot labels."""
    train, test = features(data.train.images, degree), features(data.test.images, degree)
    targets = np.eye(10, dtype=np.float32)[data.train.labels]
    weights = np.linalg.solve(train.T @ train + penalty * np.eye(train.shape[1]), train.T @ targets)
    return float(((test @ weights).argmax(1) == data.test.labels).mean())


def test_pixels_say_little_and_texture_says_much(data: dataset.Dataset) -> None:
    assert linear_accuracy(data, degree=1, penalty=1000) < 0.3
    assert linear_accuracy(data, degree=2, penalty=0.1) > 0.6


def test_a_flip_keeps_the_class(data: dataset.Dataset) -> None:
    """Texture classified by weights from upright images must be as easy to classify on flipped ones."""
    flipped = dataset.Split(data.test.images[:, :, ::-1], data.test.labels)
    mirrored = dataset.Dataset(data.name, data.root, data.classes, data.train, flipped, data.mean, data.std)
    upright = linear_accuracy(data, degree=2, penalty=0.1)
    assert linear_accuracy(mirrored, degree=2, penalty=0.1) == pytest.approx(upright, abs=0.03)
