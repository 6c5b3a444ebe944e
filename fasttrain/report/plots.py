"""Every plot of the project: in the pages, in a notebook, and as a file.

`chart`, `lr_find`, `schedule` and `epoch_seconds` define a plot. `picture` draws it for a page, in a light
and a dark version on a transparent background. `figure` draws it for a notebook or a file, on white. Plots
contain no names from files: those belong in the page's text, where they are escaped and can be selected.
"""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

INCHES = (4.6, 2.9)
"""Size of a figure: about a phone's width, so that its labels stay legible there."""

DOTS_PER_INCH = 200

DASHES = ((), (4.0, 1.5), (1.0, 1.0), (6.0, 1.5, 1.0, 1.5))
"""Lengths of dashes and gaps, in widths of the line: a line's style once all colours are taken."""

Draw = Callable[[Any, "Palette"], None]
"""A function that draws one plot on matplotlib's axes, in the colours of a palette."""


@dataclass(frozen=True)
class Palette:
    """The colours of one scheme, for the plots and for the page's style sheet."""

    paper: str
    ink: str
    muted: str
    line: str
    series: tuple[str, ...]


# Blue and orange first: they can be told apart with any kind of colour vision.
LIGHT = Palette(
    paper="#ffffff",
    ink="#1c2330",
    muted="#586174",
    line="#d9dee6",
    series=("#1464c0", "#c4560a", "#157a52", "#8648c9", "#b3256f", "#6f6200"),
)

DARK = Palette(
    paper="#12161d",
    ink="#e6eaf1",
    muted="#9aa5b6",
    line="#303845",
    series=("#74b3ff", "#ff9f55", "#4fd1a0", "#c7a3ff", "#ff8cc3", "#d8c552"),
)


@dataclass(frozen=True)
class Picture:
    """One figure in both schemes, as data URIs, and a description of it in words."""

    light: str
    dark: str
    alt: str


@dataclass(frozen=True)
class Curve:
    """One line of a chart. Missing values are NaN. series: its index, which decides colour and dashes.

    band: lower and upper edge. end_label: a short text at the line's end.
    """

    xs: Sequence[float]
    ys: Sequence[float]
    series: int
    label: str = ""
    band: tuple[Sequence[float], Sequence[float]] | None = None
    end_label: str = ""


def dashes(series: int) -> tuple[float, ...]:
    """Return the dashes of the line with this index: none until every colour has been taken once."""
    return DASHES[series // len(LIGHT.series) % len(DASHES)]


def chart(
    curves: Sequence[Curve],
    *,
    x_name: str,
    y_name: str,
    percent: bool = False,
    log_x: bool = False,
    mark_x: float | None = None,
    y_from: float | None = None,
    ring: tuple[float, float] | None = None,
) -> Draw:
    """Define a chart of lines over one axis.

    percent: y is a share from 0 to 1, labelled in percent. mark_x: draw a vertical line there, with its
    value. y_from: where the axis of y begins, if not at the lowest value. ring: a point to mark by a ring.
    """

    def draw(axes: Any, palette: Palette) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

        for curve in curves:
            colour = palette.series[curve.series % len(palette.series)]
            # Mark every value while they can be told apart: a single epoch would draw no line.
            marker = "o" if len(curve.xs) <= 40 else None
            style = {"color": colour, "linestyle": (0, dashes(curve.series)), "marker": marker}
            axes.plot(curve.xs, curve.ys, label=curve.label, markersize=3, **style)
            if curve.end_label:
                end = curve.xs[-1], curve.ys[-1]
                text = {"xytext": (4, -2), "textcoords": "offset points", "fontsize": 7, "color": colour}
                axes.annotate(curve.end_label, end, **text)
            if curve.band is not None:
                axes.fill_between(curve.xs, *curve.band, color=colour, alpha=0.2, linewidth=0)
        if log_x:
            axes.set_xscale("log")
            low, high = axes.get_xlim()
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:,g}")
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if percent:
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
        if mark_x is not None:
            axes.axvline(mark_x, color=palette.ink, linestyle="--", linewidth=1, label=f"{mark_x:.3g}")
        if ring is not None:
            axes.plot(*ring, "o", markersize=9, markerfacecolor="none", markeredgecolor=palette.ink)
        if y_from is not None:
            axes.set_ylim(bottom=y_from)
        axes.set_xlabel(x_name)
        axes.set_ylabel(y_name)
        if any(curve.label for curve in curves):
            axes.legend(frameon=False, labelcolor=palette.ink)

    return draw


def lr_find(curves: Sequence[tuple[Sequence[float], Sequence[float]]], max_lr: float | None) -> Draw:
    """Define the plot of the LR finder's tries, each with rates and losses; a dashed line marks max_lr."""
    return chart(
        [Curve(lrs, losses, series, f"try {series + 1}") for series, (lrs, losses) in enumerate(curves)],
        x_name="learning rate",
        y_name="smoothed loss",
        log_x=True,
        mark_x=max_lr,
    )


def schedule(lrs: Sequence[float], betas: Sequence[float] | None) -> Draw:
    """Define the plot of every step's learning rate, with Adam's beta1 if the recipe cycles it."""

    def draw(axes: Any, palette: Palette) -> None:
        blue, orange = palette.series[:2]
        axes.plot(lrs, color=blue)
        axes.set_xlabel("step")
        axes.set_ylabel("learning rate", color=blue)
        if betas is not None:
            right = axes.twinx()
            _style(right, palette)
            right.grid(False)
            right.plot(betas, color=orange)
            right.set_ylabel("beta1", color=orange)

    return draw


def epoch_seconds(seconds: Sequence[float], wait_shares: Sequence[float]) -> Draw:
    """Define the plot of a bar per epoch: training, and on top of it the time spent waiting for data."""

    def draw(axes: Any, palette: Palette) -> None:
        from matplotlib.ticker import MaxNLocator

        total, waiting = np.asarray(seconds), np.asarray(seconds) * np.asarray(wait_shares)
        epochs = np.arange(1, len(total) + 1)
        axes.bar(epochs, total - waiting, color=palette.series[0], label="training")
        axes.bar(epochs, waiting, bottom=total - waiting, color=palette.series[1], label="waiting for data")
        axes.set_ylim(0, 1.25 * total.max())  # room for the legend
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel("seconds")
        axes.legend(frameon=False, labelcolor=palette.ink, ncols=2, loc="upper right")

    return draw


def image_uri(image_HWC: np.ndarray) -> str:
    """Encode an image, (H, W, 3) uint8, pixel for pixel, as the data URI of a PNG."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, image_HWC, format="png")
    return _uri(buffer)


def picture(draw: Draw, alt: str) -> Picture:
    """Draw the plot for a page; alt: a description of it in words."""
    light, dark = (_uri(_png(figure([draw], palette), transparent=True)) for palette in (LIGHT, DARK))
    return Picture(light=light, dark=dark, alt=alt)


def figure(draws: Sequence[Draw], palette: Palette = LIGHT) -> Any:
    """Draw the plots side by side on one matplotlib Figure, which a notebook can display."""
    # Figure, never pyplot, which keeps figures and a backend in global state. Without pyplot a notebook does
    # not know how to display a figure, hence _repr_png_.
    from matplotlib.figure import Figure

    class PngFigure(Figure):
        def _repr_png_(self) -> bytes:
            return _png(self).getvalue()

    width, height = INCHES
    drawn = PngFigure(figsize=(width * len(draws), height), dpi=DOTS_PER_INCH, layout="constrained")
    for axes, draw in zip(drawn.subplots(1, len(draws), squeeze=False)[0], draws, strict=True):
        _style(axes, palette)
        draw(axes, palette)
    return drawn


def _png(drawn: Any, transparent: bool = False) -> io.BytesIO:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", transparent=transparent)
    return buffer


def _style(axes: Any, palette: Palette) -> None:
    axes.tick_params(which="both", color=palette.line, labelcolor=palette.muted)
    axes.xaxis.label.set_color(palette.muted)
    axes.yaxis.label.set_color(palette.muted)
    axes.grid(True, color=palette.line, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(palette.line)


def _uri(png: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
