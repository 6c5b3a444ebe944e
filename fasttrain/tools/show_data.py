"""`fasttrain data`: show the data set on the disk as tables."""

from fasttrain.data.dataset import Dataset
from fasttrain.data.sources import cifar


def show_dataset(dataset: Dataset) -> None:
    """Print a release's files and checksums, the images per class, and mean and standard deviation."""
    from rich.markup import escape
    from rich.table import Table

    from fasttrain.system.console import Console

    console = Console(soft_wrap=True)
    console.print(f"{dataset.name} in {dataset.root}", markup=False)
    if dataset.release:
        files = Table("file", "images", "bytes", "checksum")
        for state in cifar.checksum_state(dataset.root, dataset.release):
            checksum = "verified" if state.verified else "not the release"
            files.add_row(state.name, f"{state.records:,}", f"{state.bytes:,}", checksum)
        console.print(files)
    classes = Table("class", "training images", "test images")
    for index, name in enumerate(dataset.classes):
        counts = [int((split.labels == index).sum()) for split in (dataset.train, dataset.test)]
        classes.add_row(escape(name), *(f"{count:,}" for count in counts))
    statistics = Table("channel", "mean", "standard deviation", title="training images, 0 to 1")
    for channel, mean, std in zip(("red", "green", "blue"), dataset.mean, dataset.std, strict=True):
        statistics.add_row(channel, f"{mean:.4f}", f"{std:.4f}")
    console.print(classes)
    console.print(statistics)
