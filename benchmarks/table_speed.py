"""The tables about speed: steps, loaders, scaling, starts, and what the fault campaign found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.committed import files_of, link, results_of
from benchmarks.harness import markdown, software
from fasttrain.system.machine import hardware_name


def rows_table(results: Path, benchmark: str, columns: dict[str, Callable[[dict[str, Any]], str]]) -> str:
    """The rows of every machine's file of one benchmark, each table over its machine and its n."""
    parts = []
    for values in results_of(results, benchmark):
        table = markdown(list(columns), [[cell(row) for cell in columns.values()] for row in values["rows"]])
        batch = f"Batch {values['batch_size']}. " if "batch_size" in values else ""
        parts.append(f"{table}\n\n{batch}{caption(values)}")
    return "\n\n".join(parts)


def caption(values: dict[str, Any]) -> str:
    """n, spread and machine, as they stand under a table."""
    return f"Median of {values['rounds']} rounds taken in turn, ± half the range. {machine(values)}"


def machine(values: dict[str, Any]) -> str:
    return f"Machine: {hardware_name(values['machine'])}; {software(values['machine'])}."


def figure(row: dict[str, Any], key: str = "images_per_sec", digits: int = 0) -> str:
    """A median with half its range."""
    return f"{row[key]:,.{digits}f} ±{row['spread']:.1%}"


def step_table(results: Path) -> str:
    return rows_table(
        results,
        "step",
        {
            "training step": lambda row: row["variant"],
            "batch": lambda row: f"{row['batch_size']:,}",
            "ms": lambda row: figure(row, "step_ms", 1),
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
            "ms": lambda row: figure(row, "step_ms", 1),
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
            "seconds": lambda row: figure(row, "seconds", 2),
        },
    )


def folder_table(results: Path) -> str:
    return rows_table(
        results,
        "folder",
        {
            "JPEG files": lambda row: row["images"],
            "way": lambda row: row["way"],
            "images/s": figure,
            "times ImageFolder's": lambda row: f"{row['times_theirs']:.1f}" if row["times_theirs"] else "-",
        },
    )


def designs_table(results: Path) -> str:
    return rows_table(
        results,
        "designs",
        {
            "DALI pipeline": lambda row: row["design"],
            "images/s": figure,
        },
    )


def loader_table(results: Path) -> str:
    """Every loader on its own and in a step, then ours over batch sizes."""
    parts = []
    for values in results_of(results, "loader"):
        rows = values["rows"]
        parts.append(
            f"{_loaders(rows, values['missing'])}\n\n{_batch_sizes(rows)}\n\nCrop, flip and cutout of "
            f"{values['images']:,} images, batch {values['batch_size']} unless stated. {caption(values)}"
        )
    return "\n\n".join(parts)


def _loaders(rows: list[dict[str, Any]], missing: list[str]) -> str:
    """A row per loader: images/s by cores, how many times that ours delivers, and its cost in a step."""
    cores = sorted({row["cores"] for row in rows if "cores" in row})
    by_cores = {(row["loader"], row["cores"]): row for row in rows if "cores" in row}
    in_step = {row["loader"]: row for row in rows if "step_ms" in row}
    ours = next(iter(by_cores.values()))["loader"]
    columns = ["loader"]
    for count in cores:
        columns += [f"images/s, {count} core{'s' if count > 1 else ''}", "ours is"]
    columns.append(f"in a step of {next(iter(in_step.values()))['step_batch_size']}")
    body = []
    for name in dict.fromkeys(name for name, _ in by_cores):
        cells = [name]
        for count in cores:
            row = by_cores[name, count]
            ratio = by_cores[ours, count]["images_per_sec"] / row["images_per_sec"]
            cells += [figure(row), f"{ratio:.1f}x"]
        step = in_step.get(name)
        cells.append("" if step is None else f"{step['overhead']:+.1%} ±{step['spread']:.1%}")
        body.append(cells)
    body += [[name, "not installed", *[""] * (len(columns) - 2)] for name in missing]
    return markdown(columns, body)


def _batch_sizes(rows: list[dict[str, Any]]) -> str:
    """Images/s of ours, a row per batch size."""
    sizes = [row for row in rows if "batch_size" in row]
    names = list(dict.fromkeys(row["loader"] for row in sizes))
    body = [
        [f"{size:,}", *(figure(row) for row in sizes if row["batch_size"] == size)]
        for size in dict.fromkeys(row["batch_size"] for row in sizes)
    ]
    return markdown(["images/s at batch", *names], body)


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
    for values in results_of(results, "soak"):
        machines.append(machine(values))
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
    columns += ["seconds lost per SIGKILL", "memory, second half of a run to its first"]
    return (
        f"{markdown(columns, rows)}\n\n`make soak`: trainings on the CPU that save after every step, on 64 "
        f"generated images. Seconds lost: median (range). {' '.join(machines)}"
    )
