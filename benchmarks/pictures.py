"""The README's plots, drawn from the files under benchmarks/results/ beside which they lie.

Each SVG carries the checksum of the file that it was drawn from: a test holds the two together.
"""

import hashlib
import json
import re
from pathlib import Path


def draw_scaling(source: Path) -> Path:
    """Seconds against each axis of a scaling file, both logarithmic; returns the SVG beside it."""
    import matplotlib
    from matplotlib.figure import Figure

    values = json.loads(source.read_text())
    axes_names = list(values["fits"])
    with matplotlib.rc_context({"svg.hashsalt": "fasttrain", "svg.fonttype": "none"}):
        figure = Figure(figsize=(3 * len(axes_names), 2.8), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(axes_names)), axes_names, strict=True):
            rows = [row for row in values["rows"] if row["axis"] == name]
            xs, ys = [row["value"] for row in rows], [row["seconds"] for row in rows]
            axes.errorbar(xs, ys, [row["spread"] * row["seconds"] for row in rows], marker="o", markersize=4)
            axes.set(xscale="log", yscale="log", xlabel=name, ylabel="seconds")
            axes.set_title(f"exponent {values['fits'][name]['exponent']:.2f}", fontsize="medium")
            axes.set_xticks(xs, [f"{x:,}" for x in xs], fontsize="small")
            axes.minorticks_off()
            axes.grid(True, linewidth=0.4)
        target = source.with_suffix(".svg")
        figure.savefig(target, metadata={"Date": None, "Description": checksum(source)})
    return target


def checksum(source: Path) -> str:
    return f"sha256:{hashlib.sha256(source.read_bytes()).hexdigest()}"


def drawn_from(picture: Path) -> str | None:
    """The checksum of the file that an SVG was drawn from."""
    found = re.search(r"sha256:[0-9a-f]{64}", picture.read_text(encoding="utf-8"))
    return found and found.group()
