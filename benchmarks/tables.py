"""Print the README's tables from the files under benchmarks/results/.

    python -m benchmarks.tables          # write them into README.md
    python -m benchmarks.tables --check  # fail if README.md says anything else

Each table stands between two marker comments; nothing between them is written by hand.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.report import RESULTS
from fasttrain.machine import hardware_name

README = Path(__file__).parents[1] / "README.md"


def markdown(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table: text to the left, figures to the right."""
    lines = [columns, ["---" if index == 0 else "---:" for index in range(len(columns))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def software(machine: dict[str, Any]) -> str:
    commit = f"{str(machine['git_commit'])[:9]}{' with local changes' if machine['git_dirty'] else ''}"
    return f"torch {machine['torch']}, DALI {machine['dali']}, commit {commit}"


def runs_table(results: Path) -> str:
    """One row per training run whose files lie under results/runs/; its note.txt, if any, goes below."""
    rows, machines, notes = [], [], []
    for path in sorted((results / "runs").glob("*/result.json")):
        result = json.loads(path.read_text())
        machine = json.loads((path.parent / "machine.json").read_text())
        machines.append(f"{hardware_name(machine)}; {software(machine)}")
        seconds = result["epoch_seconds"]
        note = path.parent / "note.txt"
        if note.exists():
            notes.append(f"{result['recipe']['name']}, {result['epochs']} epochs: {note.read_text().strip()}")
        rows.append(
            [
                f"[{result['recipe']['name']}](benchmarks/results/runs/{path.parent.name})",
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


def rows_table(results: Path, benchmark: str, columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """The rows of every machine's file of one benchmark, each table over its machine and its n."""
    parts = []
    for path in sorted(results.glob(f"{benchmark}-*.json")):
        values = json.loads(path.read_text())
        table = markdown(list(columns), [[cell(row) for cell in columns.values()] for row in values["rows"]])
        parts.append(
            f"{table}\n\nBatch {values['batch_size']}, median of {values['rounds']} rounds taken in turn, "
            f"± half the range. Machine: {hardware_name(values['machine'])}; {software(values['machine'])}."
        )
    return "\n\n".join(parts)


def step_table(results: Path) -> str:
    return rows_table(
        results,
        "step",
        {
            "training step": lambda row: row["variant"],
            "ms": lambda row: f"{row['step_ms']:,.1f} ±{row['spread']:.1%}",
            "speed-up": lambda row: f"{row['speed_up']:.2f}x",
            "of matmul rate": lambda row: f"{row['mfu']:.0%}",
        },
    )


def loader_table(results: Path) -> str:
    return rows_table(
        results,
        "loader",
        {
            "loader, alone": lambda row: row["loader"],
            "images/s": lambda row: f"{row['images_per_sec']:,.0f} ±{row['spread']:.1%}",
        },
    )


def reliability_table(results: Path) -> str:
    """One row per machine that ran the fault campaign."""
    rows, machines = [], []
    for path in sorted(results.glob("soak-*.json")):
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


TABLES: dict[str, Callable[[Path], str]] = {
    "runs": runs_table,
    "step": step_table,
    "loader": loader_table,
    "reliability": reliability_table,
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
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
