"""The pictures of README.md and docs/, drawn from the files under benchmarks/results/.

Each SVG carries the checksum of the files that it was drawn from: a test holds the two together.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import committed
from benchmarks.committed import ROOT, CommittedRun, files_of
from fasttrain.system.machine import hardware_name

OVERVIEW = ROOT / "docs" / "overview.svg"


def sources(results: Path) -> dict[Path, list[Path]]:
    """Every picture with the files that it is drawn from."""
    loader = next(iter(files_of(results, "loader")))
    fastest: dict[str, CommittedRun] = {}
    for run in sorted(committed.runs(results, current=True), key=lambda run: run.result["train_seconds"]):
        fastest.setdefault(run.preset, run)
    runs = [fastest[preset].metrics for preset in sorted(fastest)]
    scaling = {path.with_suffix(".svg"): [path] for path in files_of(results, "scaling")}
    return {OVERVIEW: [loader, *runs], **scaling}


def draw_all(results: Path) -> None:
    for picture, files in sources(results).items():
        draw = draw_overview if picture == OVERVIEW else draw_scaling
        with figure_in(picture, files) as figure:
            draw(figure, files)


@contextmanager
def figure_in(picture: Path, files: list[Path]) -> Iterator[Any]:
    """A matplotlib figure that ends up as this SVG: the same bytes for the same files, on white."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "fasttrain", "svg.fonttype": "none"}):
        figure = Figure(layout="constrained")
        yield figure
        figure.savefig(picture, metadata={"Date": None, "Description": checksum(files)})


def draw_overview(figure: Any, files: list[Path]) -> None:
    """The accuracy of the presets over their epochs, and the loaders on all cores beside each other."""
    loader, *metrics = files
    figure.set_size_inches(10, 3.4)
    left, right = figure.subplots(1, 2)
    draw_accuracy(left, metrics)
    draw_loaders(right, json.loads(loader.read_text()))


def draw_accuracy(axes: Any, metrics: list[Path]) -> None:
    for path in metrics:
        run = CommittedRun(path.parent)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        epochs, accuracy = [row["epoch"] for row in rows], [100 * row["test_accuracy"] for row in rows]
        label = f"{run.preset}: {accuracy[-1]:.2f} % after {epochs[-1]} epochs"
        axes.plot(epochs, accuracy, marker="o", markersize=3, label=label)
    axes.set(xlabel="epochs", ylabel="test accuracy, %", ylim=(50, 95))
    axes.set_title(f"{run.result['dataset']}, the fastest run of each", fontsize="medium")
    axes.legend(loc="lower right", fontsize="small")
    axes.grid(True, linewidth=0.4)


def draw_loaders(axes: Any, values: dict[str, Any]) -> None:
    """Loaders that deliver normalised batches; those of bytes leave that to the network."""
    from matplotlib.ticker import MaxNLocator

    most = max(row.get("cores", 0) for row in values["rows"])
    rows = [
        row
        for row in values["rows"]
        if row.get("cores") == most and not row["loader"].endswith("bytes") and "reused" not in row["loader"]
    ]
    rows.sort(key=lambda row: row["images_per_sec"])
    speeds = [row["images_per_sec"] for row in rows]
    colours = ["tab:green" if row["loader"].startswith("fasttrain") else "silver" for row in rows]
    bars = axes.barh(
        [row["loader"] for row in rows],
        speeds,
        xerr=[row["spread"] * row["images_per_sec"] for row in rows],
        color=colours,
    )
    axes.bar_label(bars, [f"{speed:,.0f}" for speed in speeds], padding=4, fontsize="small")
    axes.set(xlabel="images/s: crop, flip, cutout, normalise", xlim=(0, 1.5 * max(speeds)))
    machine = hardware_name(values["machine"])
    axes.set_title(f"loaders on {machine}, n = {values['rounds']}", fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(True, axis="x", linewidth=0.4)
    axes.set_axisbelow(True)


def draw_scaling(figure: Any, files: list[Path]) -> None:
    """Seconds against each axis of a scaling file, both logarithmic."""
    [source] = files
    values = json.loads(source.read_text())
    names = list(values["fits"])
    figure.set_size_inches(3 * len(names), 2.8)
    for axes, name in zip(figure.subplots(1, len(names)), names, strict=True):
        rows = [row for row in values["rows"] if row["axis"] == name]
        xs, ys = [row["value"] for row in rows], [row["seconds"] for row in rows]
        axes.errorbar(xs, ys, [row["spread"] * row["seconds"] for row in rows], marker="o", markersize=4)
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds")
        axes.set_title(f"exponent {values['fits'][name]['exponent']:.2f}", fontsize="medium")
        axes.set_xticks(xs, [f"{x:,}" for x in xs], fontsize="small")
        axes.minorticks_off()
        axes.grid(True, linewidth=0.4)


def checksum(files: list[Path]) -> str:
    """Of the files' bytes, one after the other."""
    return f"sha256:{hashlib.sha256(b''.join(path.read_bytes() for path in files)).hexdigest()}"


def drawn_from(picture: Path) -> str | None:
    """The checksum of the files that an SVG was drawn from."""
    found = re.search(r"sha256:[0-9a-f]{64}", picture.read_text(encoding="utf-8"))
    return found and found.group()
