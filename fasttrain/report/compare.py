"""One page that compares finished runs: what each reached and when, and in which settings they differ."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fasttrain.errors import UserError
from fasttrain.report import plots
from fasttrain.report.pages import write_page
from fasttrain.report.plots import Curve, Picture
from fasttrain.report.run import Run, load_run
from fasttrain.system.run_folder import RESULT_FILE, run_folder

BELOW_THE_LAST = 0.1
"""Plots of the accuracy begin so far below the lowest final one: the rest would hide the differences."""

WIDE_RANGE = 8
"""If the longest run takes so many times as long as the shortest, seconds are drawn on a logarithmic axis."""

Group = list[Run]
"""Runs that differ only in their seed."""


def compare(folders: Sequence[Path], out: Path) -> None:
    """Write the page `out` about the runs in these folders.

    Runs that agree in settings, images, precision and machine, and differ only in their seed, form a group: a
    line of their mean, with a band over their range. The groups are numbered, that of the highest mean final
    accuracy first. Folders without a finished run are left out, with a line that names them.
    Raises UserError if none is finished, if one is damaged, or if `out` cannot be written.
    """
    if not folders:
        raise UserError("no run named; expected the folders of finished runs, such as runs/*")
    once = {path.resolve(): path for path in folders}.values()  # a folder given twice is still one run
    finished = [folder for folder in once if (run_folder(folder) / RESULT_FILE).is_file()]
    others = ", ".join(str(folder) for folder in once if folder not in finished)
    if others and finished:
        print(f"left out, as no run has finished there: {others}")
    groups = group_runs([load_run(folder) for folder in finished or once])
    groups.sort(key=lambda runs: -_mean(runs, "test_accuracy"))
    differing, shared = compare_settings(groups)
    rows = [_row(run, series, out) for series, runs in enumerate(groups) for run in runs]
    write_page(
        out,
        "compare.html.j2",
        rows=sorted(rows, key=lambda row: -row["result"]["test_accuracy"]),
        groups=[_summarize(runs) for runs in groups],
        differing=differing,
        shared=shared,
        y_from=_lowest_shown(groups),
        over_seconds=_accuracy_over_seconds(groups),
        over_epochs=_accuracy_over_epochs(groups),
        loss=_loss_over_epochs(groups),
    )


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group the runs that differ only in their seed, in the order of each group's first run."""
    groups: dict[str, Group] = {}
    for run in runs:
        groups.setdefault(repr(_settings(run)), []).append(run)
    return list(groups.values())


Values = list[tuple[Any, list[int]]]
"""The values of one setting, each with the indices of the groups that have it; the most frequent last."""


def compare_settings(groups: Sequence[Group]) -> tuple[dict[str, Values], dict[str, Any]]:
    """Return the settings in which the groups differ, with their values, and the settings that all share."""
    settings = [_settings(runs[0]) for runs in groups]
    differing: dict[str, Values] = {}
    shared: dict[str, Any] = {}
    for key in settings[0]:
        values: dict[str, tuple[Any, list[int]]] = {}
        for index, of_group in enumerate(settings):
            values.setdefault(repr(of_group[key]), (of_group[key], []))[1].append(index)
        if len(values) > 1:
            *rest, most_frequent = sorted(values.values(), key=lambda value: len(value[1]))
            differing[key] = [*sorted(rest, key=lambda value: _sortable(value[0])), most_frequent]
        else:
            shared[key] = settings[0][key]
    return differing, shared


def _sortable(value: object) -> tuple[bool, float, str]:
    """Return a key that sorts numbers by their size, and after them everything else by its text."""
    is_number = isinstance(value, int | float)
    return not is_number, float(value) if isinstance(value, int | float) else 0.0, str(value)


def _settings(run: Run) -> dict[str, Any]:
    """Return everything that decides a run's figures, except the seed."""
    settings = run.recipe.to_dict()
    del settings["seed"]
    return settings | {
        "images": run.result["dataset"],
        "machine": run.hardware,
        "precision in use": run.result["precision"],
        "loader in use": run.result["loader"],
        "compile in use": run.result["compile"],
    }


def _mean(runs: Group, key: str) -> float:
    return float(np.mean([run.result[key] for run in runs]))


def _row(run: Run, series: int, out: Path) -> dict[str, Any]:
    """Return what the page shows of one run; series: its group's index."""
    folder = run.folder.resolve()
    return {
        "series": series,
        "name": folder.name,
        "report": Path(os.path.relpath(folder / "report.html", out.parent.resolve())).as_posix(),
        "has_report": (folder / "report.html").exists(),
        "recipe": run.recipe,
        "result": run.result,
    }


def _summarize(runs: Group) -> dict[str, Any]:
    """Return what the page shows of one group. Figures are (mean, smallest, largest)."""
    figures = {}
    for key in ("test_accuracy", "train_seconds"):
        values = [run.result[key] for run in runs]
        figures[key] = (np.mean(values), min(values), max(values))
    return {"name": runs[0].recipe.name, "n": len(runs), "figures": figures}


def _epoch_values(runs: Group, key: str) -> np.ndarray:
    """Return a figure of every epoch, a row per epoch and a column per run.

    Runs of a group have the same epochs unless a file is corrupt; then the shortest decides.
    """
    return np.array(list(zip(*(run.column(key) for run in runs), strict=False)))


def _curve(xs: Sequence[float], values: np.ndarray, series: int) -> Curve:
    """Return the line of a group's mean, and a band over its range if there are several runs."""
    band = (values.min(1).tolist(), values.max(1).tolist()) if values.shape[1] > 1 else None
    return Curve(xs, values.mean(1).tolist(), series, band=band, end_label=str(series + 1))


def _accuracy_over_seconds(groups: Sequence[Group]) -> Picture:
    """Draw the accuracy after each epoch over the training seconds until then: the mean of a group."""
    curves = []
    for series, runs in enumerate(groups):
        seconds = np.cumsum(_epoch_values(runs, "seconds").mean(1)).tolist()
        curves.append(_curve(seconds, _epoch_values(runs, "test_accuracy"), series))
    totals = [curve.xs[-1] for curve in curves]
    draw = plots.chart(
        curves,
        x_name="seconds of training",
        y_name="test accuracy",
        percent=True,
        log_x=max(totals) > WIDE_RANGE * min(totals),
        y_from=_lowest_shown(groups),
    )
    return plots.picture(draw, "Test accuracy over seconds of training")


def _lowest_shown(groups: Sequence[Group]) -> float:
    """Return where plots of the accuracy begin."""
    last = min(run.column("test_accuracy")[-1] for runs in groups for run in runs)
    return max(last - BELOW_THE_LAST, 0.0)


def _accuracy_over_epochs(groups: Sequence[Group]) -> Picture:
    draw = plots.chart(
        _over_epochs(groups, "test_accuracy"),
        x_name="epoch",
        y_name="test accuracy",
        percent=True,
        y_from=_lowest_shown(groups),
    )
    return plots.picture(draw, "Test accuracy after every epoch")


def _loss_over_epochs(groups: Sequence[Group]) -> Picture:
    draw = plots.chart(_over_epochs(groups, "test_loss"), x_name="epoch", y_name="test loss")
    return plots.picture(draw, "Test loss after every epoch")


def _over_epochs(groups: Sequence[Group], key: str) -> list[Curve]:
    curves = []
    for series, runs in enumerate(groups):
        values = _epoch_values(runs, key)
        curves.append(_curve(runs[0].column("epoch")[: len(values)], values, series))
    return curves
