"""Print the README's tables, and draw its plots, from the files under benchmarks/results/.

    python -m benchmarks.tables          # write them into README.md
    python -m benchmarks.tables --check  # fail if README.md says anything else

Each table stands between two marker comments; nothing between them is written by hand.
"""

import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import accuracy as recipes
from benchmarks import airbench, paper_model
from benchmarks.harness import PUBLISHED as RESULTS
from benchmarks.harness import markdown, software
from benchmarks.pictures import draw_scaling
from benchmarks.research import published
from fasttrain.system.machine import hardware_name

README = Path(__file__).parents[1] / "README.md"


def runs_table(results: Path) -> str:
    """One row per training run under results/<machine>/runs/; its note.txt, if any, goes below."""
    rows, machines, notes = [], [], []
    for path in sorted(results.glob("*/runs/*/result.json"), key=lambda path: path.parent.name):
        result = json.loads(path.read_text())
        machine = json.loads((path.parent / "machine.json").read_text())
        machines.append(f"{hardware_name(machine)}; {software(machine)}")
        seconds = result["epoch_seconds"]
        note = path.parent / "note.txt"
        if note.exists():
            notes.append(f"{result['recipe']['name']}, {result['epochs']} epochs: {note.read_text().strip()}")
        rows.append(
            [
                f"[{result['recipe']['name']}]({link(path.parent)})",
                result["dataset"],
                str(result["epochs"]),
                f"{result['test_accuracy']:.2%}",
                f"{result['best_test_accuracy']:.2%}",
                f"{statistics.median(seconds):,.1f} ({min(seconds):,.1f}-{max(seconds):,.1f})",
                f"{result['images_per_sec']:,.0f}",
                f"{result['data_wait_share']:.2%}",
                "-" if result["mfu"] is None else f"{result['mfu']:.0%}",
                f"{result['peak_resident_gib']:.2f}",
                f"{result['device']}, {result['precision']}",
            ]
        )
    columns = ["recipe", "images", "epochs", "test accuracy", "best epoch's", "s/epoch", "images/s"]
    columns += ["data wait", "of matmul rate", "resident GiB", "device"]
    caption = (
        "n = 1 run a row, so no spread is known. Accuracy is the final epoch's; the best epoch's was chosen "
        "on the test images. Seconds: median (range) over the epochs, training only."
    )
    caption = " ".join([caption, *notes, f"Machine: {'; '.join(dict.fromkeys(machines))}."])
    return f"{markdown(columns, rows)}\n\n{caption}"


def files_of(results: Path, benchmark: str) -> list[Path]:
    """Every machine's files of one benchmark, <benchmark>.json or <benchmark>-<what>.json in its folder."""
    found = [*results.glob(f"*/{benchmark}.json"), *results.glob(f"*/{benchmark}-*.json")]
    return sorted(found, key=lambda path: (path.name, path.parent.name))


def link(path: Path) -> str:
    """The path as the README links to it."""
    return Path(os.path.relpath(path, README.parent)).as_posix()


def results_of(results: Path, benchmark: str) -> Iterable[dict[str, Any]]:
    """What every machine's file of one benchmark holds."""
    for path in files_of(results, benchmark):
        yield json.loads(path.read_text())


def rows_table(results: Path, benchmark: str, columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """The rows of every machine's file of one benchmark, each table over its machine and its n."""
    parts = []
    for values in results_of(results, benchmark):
        table = markdown(list(columns), [[cell(row) for cell in columns.values()] for row in values["rows"]])
        batch = f"Batch {values['batch_size']}. " if "batch_size" in values else ""
        parts.append(f"{table}\n\n{batch}{caption(values)}")
    return "\n\n".join(parts)


def caption(values: dict[str, Any]) -> str:
    """What stands under a table: n, spread and machine."""
    return (
        f"Median of {values['rounds']} rounds taken in turn, ± half the range. "
        f"Machine: {hardware_name(values['machine'])}; {software(values['machine'])}."
    )


def step_table(results: Path) -> str:
    return rows_table(
        results,
        "step",
        {
            "training step": lambda row: row["variant"],
            "batch": lambda row: f"{row['batch_size']:,}",
            "ms": lambda row: f"{row['step_ms']:,.1f} ±{row['spread']:.1%}",
            "images/s": lambda row: f"{row['images_per_sec']:,.0f}",
            "of matmul rate": lambda row: "{:.0%} ({:.0%}-{:.0%})".format(row["mfu"], *row["mfu_range"]),
        },
    )


def ladder_table(results: Path) -> str:
    return rows_table(
        results,
        "ladder",
        {
            "step with its data": lambda row: row["rung"],
            "ms": lambda row: f"{row['step_ms']:,.1f} ±{row['spread']:.1%}",
            "this rung": lambda row: f"{row['speed_up']:.2f}x",
            "in all": lambda row: f"{row['speed_up_in_all']:.2f}x",
            "of matmul rate": lambda row: f"{row['mfu']:.0%}",
            "GiB beyond the weights": lambda row: (
                "-" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}"
            ),
        },
    )


def start_table(results: Path) -> str:
    return rows_table(
        results,
        "start",
        {
            "process": lambda row: row["start"],
            "seconds": lambda row: f"{row['seconds']:.2f} ±{row['spread']:.1%}",
        },
    )


def folder_table(results: Path) -> str:
    return rows_table(
        results,
        "folder",
        {
            "JPEG files": lambda row: row["images"],
            "way": lambda row: row["way"],
            "images/s": lambda row: f"{row['images_per_sec']:,.0f} ±{row['spread']:.1%}",
            "times ImageFolder's": lambda row: f"{row['times_theirs']:.1f}" if row["times_theirs"] else "-",
        },
    )


def designs_table(results: Path) -> str:
    return rows_table(
        results,
        "designs",
        {
            "DALI pipeline": lambda row: row["design"],
            "images/s": lambda row: f"{row['images_per_sec']:,.0f} ±{row['spread']:.1%}",
        },
    )


def loader_table(results: Path) -> str:
    """Per machine: every loader on so many cores and in a step, then ours over batch sizes."""
    parts = []
    for values in results_of(results, "loader"):
        rows = values["rows"]
        cores = sorted({row["cores"] for row in rows if "cores" in row})
        alone = {(row["loader"], row["cores"]): row for row in rows if "cores" in row}
        in_step = {row["loader"]: row for row in rows if "step_ms" in row}
        best = next(iter(alone.values()))["loader"]
        step_batch = next(iter(in_step.values()))["step_batch_size"]
        columns = ["loader"]
        for count in cores:
            columns += [f"images/s, {count} core{'s' if count > 1 else ''}", "ours is"]
        columns.append(f"in a step of {step_batch}")
        body = []
        for name in dict.fromkeys(name for name, _ in alone):
            cells = [name]
            for count in cores:
                row = alone[name, count]
                ratio = alone[best, count]["images_per_sec"] / row["images_per_sec"]
                cells += [f"{row['images_per_sec']:,.0f} ±{row['spread']:.1%}", f"{ratio:.1f}x"]
            row = in_step.get(name)
            cells.append("" if row is None else f"{row['overhead']:+.1%} ±{row['spread']:.1%}")
            body.append(cells)
        width = len(columns) - 1
        body += [[name, "not installed", *[""] * (width - 1)] for name in values["missing"]]
        sizes = [row for row in rows if "batch_size" in row]
        names = list(dict.fromkeys(row["loader"] for row in sizes))
        by_size = [
            [f"{size:,}"]
            + [
                f"{row['images_per_sec']:,.0f} ±{row['spread']:.1%}"
                for row in sizes
                if row["batch_size"] == size
            ]
            for size in dict.fromkeys(row["batch_size"] for row in sizes)
        ]
        parts.append(
            f"{markdown(columns, body)}\n\n{markdown(['images/s at batch', *names], by_size)}\n\n"
            f"Crop, flip and cutout of {values['images']:,} images, batch {values['batch_size']} where none "
            "is named. Each batch is normalised in floating point, but for the rows called bytes: there the "
            "network would still do it. In a step: how much longer it takes than on one reused batch. "
            f"{caption(values)}"
        )
    return "\n\n".join(parts)


def scaling_table(results: Path) -> str:
    parts = []
    for path in files_of(results, "scaling"):
        values = json.loads(path.read_text())
        body = []
        for axis, fit in values["fits"].items():
            rows = [row for row in values["rows"] if row["axis"] == axis]
            ends = [rows[0], rows[-1]]
            body.append(
                [
                    axis,
                    " to ".join(f"{row['value']:,}" for row in ends),
                    " to ".join(f"{row['seconds']:.3g}" for row in ends),
                    "{:.2f} ({:.2f}-{:.2f})".format(fit["exponent"], *fit["range"]),
                    " to ".join(
                        "-" if row["memory_gib"] is None else f"{row['memory_gib']:.2f}" for row in ends
                    ),
                ]
            )
        columns = ["cost against", "from - to", "seconds", "exponent", "GiB beyond the weights"]
        shared = "; ranks share the batch, one thread each" if "ranks" in values["fits"] else ""
        picture = f"![cost against each axis]({link(path.with_suffix('.svg'))})"
        parts.append(
            f"{markdown(columns, body)}\n\n{picture}\n\nSteps of {values['batch_size']} where the batch does "
            f"not vary; epochs are whole small runs, whose start counts{shared}. {caption(values)}"
        )
    return "\n\n".join(parts)


def reliability_table(results: Path) -> str:
    """One row per machine that ran the fault campaign."""
    rows, machines = [], []
    for path in files_of(results, "soak"):
        values = json.loads(path.read_text())
        machines.append(f"{hardware_name(values['machine'])}; {software(values['machine'])}")
        lost, bad = values["lost_seconds"], values["bad_inputs"]
        rows.append(
            [
                f"{values['kills']} SIGKILL, {values['faults'] - values['kills']} SIGTERM",
                f"{values['recovered']} of {values['runs']}",
                f"{values['bit_equal']} of {values['runs']}",
                f"{bad['tried']:,}",
                str(len(bad["wrong"])),
                f"{lost['median']:.1f} ({lost['min']:.1f}-{lost['max']:.1f}, n = {lost['n']})",
                f"{values['memory_mib']['second'] / values['memory_mib']['first'] - 1:+.1%}",
            ]
        )
    columns = ["faults injected", "runs recovered", "runs bit-equal", "bad inputs tried", "wrong outcomes"]
    columns += ["seconds lost per kill", "memory, second half of a run to its first"]
    caption = (
        "`make soak`: trainings on the CPU that save after every step, on 64 generated images. Bit-equal: "
        "weights, optimizer, random generators and figures of a run that nobody disturbed. Lost: median "
        "(range) of the seconds from the last checkpoint to the SIGKILL, starting up included, while "
        "other work shared the machine. Wrong: a traceback, a hang, or damage that passes for good. "
    )
    return f"{markdown(columns, rows)}\n\n{caption}Machine: {'; '.join(dict.fromkeys(machines))}."


def ablations_table(results: Path) -> str:
    """Per machine and base recipe: what changing one field does to the accuracy on held-out images."""
    parts = []
    for values in results_of(results, "ablations"):
        epochs = next(iter(values["epochs"].values()))
        parts.append(
            f"{markdown(*recipes.table(values))}\n\n{epochs} epochs, width {values['width']}, "
            f"{recipes_caption(values)} Difference: mean over pairs of runs of one seed, hence with the same "
            "first weights and order of images. test_flip is the second figure of the very runs of the first "
            "row. The intervals are not widened for the number of rows: about one in twenty misses."
        )
    return "\n\n".join(parts) or "Not measured yet."


def final_table(results: Path) -> str:
    """Per set of presets: what they reach on the test images, and on which machines."""
    parts = []
    for values in results_of(results, "final"):
        versions = [f"{row['recipe']}: {'; '.join(row['software'])}" for row in values["rows"]]
        parts.append(
            f"{markdown(*recipes.table(values))}\n\nWidth {values['width']}, {trained_caption(values)} "
            f"Training seconds: median. {'. '.join(versions)}."
        )
    return "\n\n".join(parts) or "Not measured yet."


def quality_table(results: Path) -> str:
    """Per machine: what encoding the images more coarsely does to the accuracy on held-out ones."""
    parts = [
        f"{markdown(*recipes.compared_table('images', values['rows']))}\n\n`{values['recipe']['name']}`, "
        f"{values['recipe']['epochs']} epochs, width {values['width']}, {recipes_caption(values)} "
        "Difference: mean over pairs of runs of one seed."
        for values in results_of(results, "quality")
    ]
    return "\n\n".join(parts) or "Not measured yet."


def published_table(results: Path) -> str:
    """Per machine: a published recipe on these images, beside its figure on the original ones."""
    parts = []
    for values in results_of(results, "published"):
        first = values["samples"][0]
        parts.append(
            f"{markdown(*published.table(values))}\n\nairbench94, {first['epochs']} epochs, the last cut "
            "short. In brackets: 95% confidence interval of the mean (Student's t, over seeds); a difference "
            "takes the published mean as exact. Machine: "
            f"{hardware_name(first['machine'])}, {first['precision']}; {software(first['machine'])}."
        )
    return "\n\n".join(parts) or "Not measured yet."


def airbench_table(results: Path) -> str:
    """Per machine: our recipe and the fastest public trainer."""
    parts = [
        f"{markdown(*airbench.table(values))}\n\n{values['dataset']}. Mean ± standard deviation of n "
        "trainings, in turn, after one of each that warms up: the first call, with all that it compiles. "
        "Averaged predictions: ours over an image and its mirror image, airbench's over shifted ones too. "
        "Seconds to an accuracy: median, by the plain predictions after whole epochs. "
        f"Machine: {hardware_name(values['machine'])}; {software(values['machine'])}."
        for values in results_of(results, "airbench")
    ]
    return "\n\n".join(parts) or "Not measured yet."


def recipes_caption(values: dict[str, Any]) -> str:
    """Images, what the brackets are, and machines, in the middle of a caption."""
    return (
        f"{trained_caption(values)} Machine: {'; '.join(values['hardware'])}; {software(values['machine'])}."
    )


def trained_caption(values: dict[str, Any]) -> str:
    """Images, and what the brackets are, in the middle of a caption."""
    return (
        f"trained on {values['train_images']:,} and measured on {values['test_images']:,} images: "
        f"{values['dataset']}. In brackets: 95% confidence interval of the mean (Student's t, over seeds)."
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "runs": runs_table,
    "step": step_table,
    "ladder": ladder_table,
    "loader": loader_table,
    "scaling": scaling_table,
    "paper model": lambda _: paper_model.table(),
    "start": start_table,
    "folder": folder_table,
    "designs": designs_table,
    "reliability": reliability_table,
    "ablations": ablations_table,
    "final": final_table,
    "quality": quality_table,
    "published": published_table,
    "airbench": airbench_table,
}


def render(text: str, results: Path = RESULTS) -> str:
    """The README's text with every table printed anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- table: {name} -->", "<!-- end of table -->"
        pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
        body = f"{start}\n\n{table(results)}\n\n{end}"
        text, count = pattern.subn(lambda _, body=body: body, text)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"README.md: expected {start} ... {end} once, found it {count} times")
    return text


@dataclass(frozen=True, kw_only=True)
class Options:
    """Print the README's tables from benchmarks/results/."""

    check: bool = False
    """Change nothing; exit with status 1 if README.md disagrees with the files."""


def main(options: Options) -> int:
    text = README.read_text(encoding="utf-8")
    rendered = render(text)
    if options.check:
        if rendered != text:
            print("README.md disagrees with benchmarks/results: run make tables", file=sys.stderr)
        return int(rendered != text)
    README.write_text(rendered, encoding="utf-8")
    for source in files_of(RESULTS, "scaling"):
        draw_scaling(source)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
