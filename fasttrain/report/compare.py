"""One page that compares several finished runs: a table, and their curves in common plots."""

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


def compare(folders: Sequence[Path], out: Path) -> None:
    """Write the page `out` about the runs in these folders.

    Runs that agree in settings, images, precision and machine, and differ only in their seed, form a group,
    shown as its mean and range. Folders without a finished run are left out, with a line that names them.
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
    write_page(
        out,
        "compare.html.j2",
        groups=[_describe(group, differing, out) for group, differing in groups],
        loss=_picture(groups, "test_loss", "Test loss of every epoch"),
        accuracy=_picture(groups, "test_accuracy", "Test accuracy of every epoch", percent=True),
    )


Group = tuple[list[Run], dict[str, Any]]
"""The runs of one group, and the settings in which it differs from the other groups."""


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group the runs that differ only in their seed, in the order of each group's first run."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr(_settings(run)), []).append(run)
    settings = [_settings(members[0]) for members in groups.values()]
    differing = [key for key in settings[0] if len({repr(values[key]) for values in settings}) > 1]
    return [
        (members, {key: values[key] for key in differing})
        for members, values in zip(groups.values(), settings, strict=True)
    ]


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


def _describe(runs: list[Run], differing: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return a row of the table. Figures are (mean, smallest, largest)."""
    figures = ("test_accuracy", "best_test_accuracy", "train_seconds", "images_per_sec")
    values = {key: [run.result[key] for run in runs] for key in figures}
    return {
        "name": runs[0].recipe.name,
        "dataset": runs[0].result["dataset"],
        "differing": {key: value for key, value in differing.items() if key not in ("name", "images")},
        "epochs": runs[0].recipe.epochs,
        "figures": {key: (np.mean(column), min(column), max(column)) for key, column in values.items()},
        "runs": [
            {
                "name": run.folder.resolve().name,
                "seed": run.recipe.seed,
                "accuracy": run.result["test_accuracy"],
                "folder": Path(os.path.relpath(run.folder.resolve(), out.parent.resolve())).as_posix(),
                "has_report": (run.folder / "report.html").exists(),
            }
            for run in runs
        ],
    }


def _picture(groups: Sequence[Group], key: str, alt: str, percent: bool = False) -> Picture:
    curves = []
    for index, (runs, _) in enumerate(groups):
        # Runs of one recipe have the same epochs unless a file is corrupt; zip stops with the shortest.
        rows = np.array(list(zip(*(run.column(key) for run in runs), strict=False)))
        epochs = runs[0].column("epoch")[: len(rows)]
        band = (rows.min(1).tolist(), rows.max(1).tolist()) if len(runs) > 1 else None
        curves.append(Curve(epochs, rows.mean(1).tolist(), index, band=band))
    name = "test accuracy" if percent else "test loss"
    return plots.picture(plots.chart(curves, x_name="epoch", y_name=name, percent=percent), alt)
