"""The tables about accuracy: runs, presets, ablations, and what the images cost."""

import statistics
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import airbench, committed
from benchmarks.accuracy import compared_table, points, table
from benchmarks.committed import CommittedRun, link, preset_name, results_of
from benchmarks.harness import markdown, software
from benchmarks.research import published
from fasttrain.recipe import Recipe, flag
from fasttrain.report.settings import changed_settings
from fasttrain.system.machine import hardware_name

NOT_MEASURED = "Not measured yet."


def presets_table(results: Path) -> str:
    """The presets at a glance, by machine: the accuracy over seeds, and the pace of the committed run."""
    rows, datasets, flags = [], set(), []
    paces = {(r.preset, r.result["epochs"], r.hardware): r for r in committed.runs(results, current=True)}
    for values in results_of(results, "final"):
        for row in values["rows"]:
            name = preset_name(row["recipe"])
            [hardware] = row["hardware"]
            run = paces.get((name, row["epochs"], hardware))
            if run is None:
                continue
            accuracy = f"{points(row['accuracy'])}, n = {row['accuracy']['n']}"
            datasets.add(values["dataset"])
            cells = [name, str(row["epochs"]), accuracy, f"{row['train_seconds']:,.1f}"]
            rows.append([*cells, seconds_per_epoch(run), run.hardware])
            flags.append(extra_flags(run))
    rows.sort(key=lambda cells: cells[0])
    columns = ["preset", "epochs", "test accuracy, %", "training, s", "an epoch, s", "machine"]
    caption = (
        f"{', '.join(sorted(datasets))}, not the original images. Accuracy: mean (95% confidence interval) "
        "over n seeds; one seed shows no spread. Seconds: training only; the median over seeds, and the "
        "median (range) over the epochs of one run. [What ran beside them](docs/results.md#the-runs)."
    )
    extra, compiling = "; ".join(filter(None, flags)), "compiles so short a training only from a warm cache"
    notes = [f"Extra flags: {extra}. `--compile auto` {compiling}."] if extra else []
    return "\n\n".join([markdown(columns, rows), caption, *notes])


def extra_flags(run: CommittedRun) -> str:
    """The flags that changed a run's training, besides its preset, and what compiling took, or ""."""
    changed = changed_settings(Recipe(**run.recipe)).items()
    flags = " ".join(f"{flag(field)} {value}" for field, value in changed if field != "test_views")
    if not flags:
        return ""
    text = f"`{run.preset}`, {hardware_name(run.machine)}: `{flags}`"
    if run.result["compile"] != "off":
        seconds = run.result["compile_seconds"], run.result["wall_seconds"]
        text += " ({:.1f} s to compile, {:.1f} s in all)".format(*seconds)
    return text


def seconds_per_epoch(run: CommittedRun) -> str:
    seconds = run.result["epoch_seconds"]
    digits = 1 if min(seconds) >= 10 else 3
    return "{:,.{n}f} ({:,.{n}f}-{:,.{n}f})".format(
        statistics.median(seconds), min(seconds), max(seconds), n=digits
    )


def runs_table(results: Path, *, current: bool) -> str:
    """One row per training run under results/<machine>/runs/; what their notes say is listed below."""
    rows, notes = [], []
    found = committed.runs(results, current=current)
    for run in found:
        result = run.result
        if run.note:
            notes.append(f"- {run.preset}, {result['test_accuracy']:.2%}: {run.note}")
        differences = ", ".join(
            f"{field}={value:.3g}" if isinstance(value, float) else f"{field}={value}"
            for field, value in run.differences.items()
            if field != "epochs"  # which has a column
        )
        rows.append(
            [
                f"[{run.preset}]({link(run.folder)})",
                *([] if current else [differences]),
                str(result["epochs"]),
                f"{result['test_accuracy']:.2%}",
                f"{result['best_test_accuracy']:.2%}",
                seconds_per_epoch(run),
                f"{result['images_per_sec']:,.0f}",
                f"{result['data_wait_share']:.2%}",
                "-" if result["mfu"] is None else f"{result['mfu']:.0%}",
                f"{result['peak_resident_gib']:.2f}",
                run.hardware,
                run.machine["git_commit"][:9],
            ]
        )
    columns = ["preset", *([] if current else ["with"]), "epochs", "test accuracy", "best epoch's"]
    columns += ["seconds an epoch", "images/s", "data wait", "of matmul rate", "resident GiB"]
    columns += ["machine", "commit"]
    datasets = ", ".join(sorted({run.result["dataset"] for run in found}))
    versions = "; ".join(sorted({run.software.rpartition(", ")[0] for run in found}))
    caption = (
        f"{datasets}; n = 1 run a row, so no spread is known. Accuracy is the last epoch's; the best "
        "epoch's was chosen on the test images. Seconds: median (range) over the epochs, training only. "
        f"{versions}."
    )
    return "\n\n".join([markdown(columns, rows), caption, *(["\n".join(notes)] if notes else [])])


def final_table(results: Path) -> str:
    """The presets over seeds on the test images; files of the same images and width share a table."""

    def setting(values: dict[str, Any]) -> tuple[str, int]:
        return trained_caption(values), values["width"]

    parts = []
    measured = sorted(results_of(results, "final"), key=setting)
    for (trained, width), group in groupby(measured, key=setting):
        rows = [row | {"recipe": preset_name(row["recipe"])} for values in group for row in values["rows"]]
        software = "\n".join(f"- {row['recipe']}: {'; '.join(row['software'])}" for row in rows)
        parts.append(
            f"{markdown(*table({'mode': 'final', 'rows': rows}))}\n\nWidth {width}, {trained} In "
            f"brackets: 95% confidence interval of the mean (Student's t, over seeds). Training seconds: "
            f"median.\n\n{software}"
        )
    return "\n\n".join(parts) or NOT_MEASURED


def ablations_table(results: Path) -> str:
    """Per base recipe: how changing one field changes the accuracy on held-out images."""
    parts = []
    for values in results_of(results, "ablations"):
        epochs = next(iter(values["epochs"].values()))
        rows = [row | {"name": preset_name(row["name"])} for row in values["rows"]]
        parts.append(
            f"{markdown(*compared_table('change', rows))}\n\n{epochs} epochs, width "
            f"{values['width']}, {recipes_caption(values)}"
        )
    return "\n\n".join(parts) or NOT_MEASURED


def quality_table(results: Path) -> str:
    """How encoding the images more coarsely changes the accuracy on held-out ones."""
    parts = [
        f"{markdown(*compared_table('images', values['rows']))}\n\n"
        f"`{preset_name(values['recipe']['name'])}`, {values['recipe']['epochs']} epochs, width "
        f"{values['width']}, {recipes_caption(values)}"
        for values in results_of(results, "quality")
    ]
    return "\n\n".join(parts) or NOT_MEASURED


def published_table(results: Path) -> str:
    """A published recipe on these images, beside its figure on the original ones."""
    parts = []
    for values in results_of(results, "published"):
        first = values["samples"][0]
        parts.append(
            f"{markdown(*published.table(values))}\n\nairbench94, {first['epochs']} epochs, the last cut "
            "short. In brackets: 95% confidence interval of the mean (Student's t, over seeds); a difference "
            "takes the published mean as exact. Machine: "
            f"{hardware_name(first['machine'])}, {first['precision']}; {software(first['machine'])}."
        )
    return "\n\n".join(parts) or NOT_MEASURED


def airbench_table(results: Path) -> str:
    """Our recipe and the fastest public trainer on one machine."""
    parts = [
        f"{markdown(*airbench.table(values))}\n\n{values['dataset']}. Mean ± standard deviation of n "
        f"trainings, {values['how']}. Seconds to an accuracy: median, by the plain predictions after whole "
        f"epochs. Machine: {hardware_name(values['machine'])}, {values['precision']}; "
        f"{software(values['machine'])}."
        for values in results_of(results, "airbench")
    ]
    return "\n\n".join(parts) or NOT_MEASURED


def recipes_caption(values: dict[str, Any]) -> str:
    """Images, machines and versions, at the end of a caption."""
    return (
        f"{trained_caption(values)} Machine: {'; '.join(values['hardware'])}; {software(values['machine'])}."
    )


def trained_caption(values: dict[str, Any]) -> str:
    return (
        f"trained on {values['train_images']:,} and measured on {values['test_images']:,} images: "
        f"{values['dataset']}."
    )
