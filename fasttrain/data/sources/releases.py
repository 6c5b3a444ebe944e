"""The published releases of CIFAR: where each comes from, and what its files hold."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

Channels = tuple[float, float, float]
"""Red, green and blue."""

IMAGE_SHAPE = (32, 32, 3)
PLANES_SHAPE = (3, 32, 32)
"""The shape of an image in memory, and in a file: there, a plane of red, one of green, one of blue."""


@dataclass(frozen=True)
class Release:
    """One published release: where it comes from, and what its files hold.

    sha256: that of every file with images, by name; the last is the test file, the others hold the same
    number of images each.
    label_bytes: bytes before an image's pixels; the last of them is the label.
    classes: names to use if `classes_file` is missing; empty if that file is required.
    mean, std: those of the training images' pixels, as publications quote them; None if they disagree.
    """

    name: str
    folder: str
    sha256: Mapping[str, str]
    label_bytes: int
    classes_file: str
    classes: tuple[str, ...]
    url: str
    archive_bytes: int
    archive_md5: str
    train_images: int = 50_000
    test_images: int = 10_000
    mean: Channels | None = None
    std: Channels | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.sha256)

    @property
    def train_files(self) -> tuple[str, ...]:
        return self.files[:-1]

    @property
    def test_file(self) -> str:
        return self.files[-1]

    @property
    def record_bytes(self) -> int:
        """Bytes of one label and image in a file."""
        return self.label_bytes + math.prod(IMAGE_SHAPE)

    @property
    def archive(self) -> str:
        return self.url.rsplit("/", 1)[1]

    def file_bytes(self, name: str) -> int:
        """Return the size in bytes of one of the files, as released."""
        is_test = name == self.test_file
        count = self.test_images if is_test else self.train_images // len(self.train_files)
        return count * self.record_bytes


# The releases' page gives the md5 of the archives, but no checksum of the files inside. The SHA-256 here are
# those that the Ruby package torchvision checks on every read; two unrelated projects found the same one for
# CIFAR-10's test file.
CIFAR10 = Release(
    name="CIFAR-10",
    folder="cifar-10-batches-bin",
    sha256={
        "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
        "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
        "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
        "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
        "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
    },
    label_bytes=1,
    classes_file="batches.meta.txt",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    archive_bytes=170_052_171,
    archive_md5="c32a1d4ab5d03f1284b67883e8d87530",
    mean=(0.4914, 0.4822, 0.4465),  # as cifar10-airbench among others
    std=(0.2470, 0.2435, 0.2616),
)

CIFAR100 = Release(
    name="CIFAR-100",
    folder="cifar-100-binary",
    sha256={
        "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
        "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
    },
    label_bytes=2,  # one of 20 coarse classes, then one of 100 fine ones
    classes_file="fine_label_names.txt",
    classes=(),
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    archive_bytes=168_513_733,
    archive_md5="03b5dce01913d631647c71ecec9e9cb8",
)

RELEASES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
"""The releases by their names in `--data`."""
