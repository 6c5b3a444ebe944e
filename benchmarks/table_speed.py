"""The tables about speed: steps, loaders, scaling, starts, and what the fault campaign found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.committed import files_of, link, results_of
from benchmarks.harness import markdown, software
from benchmarks.layers import PASSES
from benchmarks.table_accuracy import NOT_MEASURED
from fasttrain.system.machine import hardware_name

Cell = Callable[[dict[str, Any]], str]


def each_file(results: Path, benchmark: str, page: Callable[[dict[str, Any]], str]) -> str:
    """What `page` makes of every machine's file of one benchmark, one below the other."""
    return "\n\n".join(map(page, results_of(results, benchmark)))


def rows_table(results: Path, benchmark: str, columns: dict[str, Cell], below: Cell | None = None) -> str:
    """The rows of every machine's file of one benchmark, each table over its machine and its n.

    A cell is made of its row's figures and, where the row lacks them, the file's; what stands below of the
    file's.
    """

    def page(values: dict[str, Any]) -> str:
        body = [[cell(values | row) for cell in columns.values()] for row in values["rows"]]
        return f"{markdown(list(columns), body)}\n\n{(below or with_batch)(values)}"

    return each_file(results, benchmark, page)


def caption(values: dict[str, Any]) -> str:
    """n, spread and machine, as they stand under a table."""
    return f"Median of {values['rounds']} rounds taken in turn, ± half the range. {machine(values)}"


def with_batch(values: dict[str, Any]) -> str:
    """The caption, after the batch size if the file has one for all rows."""
    batch = f"Batch {values['batch_size']}. " if "batch_size" in values else ""
    return f"{batch}{caption(values)}"


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


def ways_table(results: Path) -> str:
    """A preset's epoch on a GPU, step by step or captured, eager or compiled."""

    def below(values: dict[str, Any]) -> str:
        first = values["rows"][0]
        return (
            f"`{values['recipe']}`, batch {values['batch_size']}, {values['precision']}, {first['loader']}; "
            f"one run of {len(first['epoch_seconds'])} epochs a row, the median of all but the first. "
            f"Set-up: compiling, from a warm cache, and capturing. {machine(values)}"
        )

    columns: dict[str, Cell] = {
        "step": lambda row: (
            ("eager" if row["compile"] == "off" else "compiled") + ", captured" * row["cuda_graph"]
        ),
        "s an epoch": lambda row: f"{row['seconds']:.3f}",
        "images/s": lambda row: f"{row['images_per_sec']:,.0f}",
        "ms a step": lambda row: f"{1000 * row['batch_size'] / row['images_per_sec']:.2f}",
        "of matmul rate": lambda row: f"{row['mfu']:.0%}",
        "first epoch, s": lambda row: f"{row['epoch_seconds'][0]:.3f}",
        "set-up, s": lambda row: f"{row['compile_seconds']:.1f}",
        "GPU GiB": lambda row: "-" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.2f}",
    }
    return rows_table(results, "ways", columns, below)


def layers_table(results: Path) -> str:
    """Every convolution of a step on a GPU: milliseconds, and TFLOP/s, of its three passes."""
    return each_file(results, "layers", _layers)


def _layers(values: dict[str, Any]) -> str:
    batch_size = 512
    found: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for row in values["rows"]:
        if row["batch_size"] == batch_size:
            found.setdefault((row["layer"], row["inputs"]), {})[row["pass"]] = row
    body = []
    for (layer, inputs), passes in found.items():
        row = passes["forward"]
        cells = [f"{passes[name]['ms']:.3f} ({passes[name]['tflops']:.0f})" for name in PASSES]
        body.append([layer, f"{inputs}-{row['outputs']}", str(row["side"]), *cells])
    worst = max(row["error"] for row in values["rows"])
    columns = ["convolution", "channels", "side", *(f"{name}, ms (TFLOP/s)" for name in PASSES)]
    return (
        f"{markdown(columns, body)}\n\nBatch {batch_size}, bf16, channels_last. Against float32, no pass "
        f"at any batch size differs by more than {worst:.1e} of the norm. {machine(values)}"
    )


def trace_table(results: Path) -> str:
    """What a GPU and the host's threads do in a step, for the training and for DALI, by a trace."""
    return each_file(results, "trace", _trace)


def _trace(values: dict[str, Any]) -> str:
    rows = values["rows"]
    kernels = max((row for row in rows if row["what"] == "kernels"), key=lambda row: row["per_step"])
    launches = next(row for row in rows if row["what"] == "cudaGraphLaunch")
    sums: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        side = "training" if row["where"] in (kernels["where"], launches["where"]) else "DALI"
        place = f"{side}, {'GPU' if row['where'].startswith('stream') else 'host'}"
        found = sums.setdefault((place, row["what"]), [0.0, 0.0])
        found[0] += row["per_step"] * values["steps"]
        found[1] += row["ms_per_step"]
    body = [[place, what, f"{count:.0f}", f"{ms:.3f}"] for (place, what), (count, ms) in sorted(sums.items())]
    columns = ["where", "what", f"in {values['steps']} steps", "ms a step"]
    return (
        f"{markdown(columns, body)}\n\n`default`, compiled and captured, under the profiler. Between kernels "
        f"the GPU was idle for {values['idle_ms_per_step']:.3f} ms a step. The host's milliseconds are "
        f"mostly waiting: it runs ahead, and a full queue holds it back. {machine(values)}"
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

    def page(values: dict[str, Any]) -> str:
        rows = values["rows"]
        return (
            f"{_loaders(rows, values['missing'])}\n\n{_batch_sizes(rows)}\n\nCrop, flip and cutout of "
            f"{values['images']:,} images, batch {values['batch_size']} unless stated. {caption(values)}"
        )

    return each_file(results, "loader", page)


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
    """What all fault campaigns together injected, and what came out wrong."""
    campaigns = list(results_of(results, "soak"))
    if not campaigns:
        return NOT_MEASURED
    notes = [_campaign(values) for values in campaigns]
    below = (
        "Trainings of every preset in small, on the CPU, that save after every step. Memory and open files: "
        "the most in the second half of a campaign, against its first; the largest growth of any campaign."
    )
    table = markdown(["faults", "of what kind", "outcome"], _faults(campaigns))
    return "\n\n".join([table, below, *notes])


def _campaign(values: dict[str, Any]) -> str:
    lost, arguments = values["kill"]["lost_seconds"], f"--minutes {values['minutes']:g}"
    return (
        f'- `make soak ARGS="{arguments} --seed {values["seed"]}"`. {machine(values)} A SIGKILL lost '
        f"{lost['median']:.1f} s (median; {lost['min']:.1f} to {lost['max']:.1f}, n = {lost['n']}), starting "
        "up included but for imports."
    )


def _added(campaigns: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The counts of one kind of faults in all campaigns, and their wrong outcomes."""
    total: dict[str, Any] = {}
    for values in campaigns:
        for key, value in values[name].items():
            if isinstance(value, int | list):
                total[key] = total[key] + value if key in total else value
    return total


def _faults(campaigns: list[dict[str, Any]]) -> list[list[str]]:
    """A row for each kind of faults: how many, of what kind, and the outcome."""
    names = ("kill", "ranks", "signals", "disks", "host", "bad-inputs")
    kill, ranks, signals, disks, host, files = (_added(campaigns, name) for name in names)
    jobs = ranks["jobs"] - ranks["ended_before"]
    kinds = {
        "stopped": "SIGSTOP",
        "address_space": "ulimit -v",
        "out_of_memory": "a full cgroup",
        "clock": "a clock that jumps",
    }
    rows = [
        [
            f"{kill['kills']:,} SIGKILLs and {kill['faults'] - kill['kills']:,} SIGTERMs in trainings",
            f"{kill['resuming']:,} of the SIGKILLs hit a resumed run, {kill['of_ranks']:,} a rank of several",
            f"{kill['runs'] - kill['bit_equal']} of {kill['runs']:,} runs not bit-equal",
        ],
        [
            f"{jobs:,} jobs of torchrun",
            f"a rank killed ({ranks['kill']}), frozen ({ranks['freeze']}) or told to stop "
            f"({ranks['stop a rank']}), the job told to stop ({ranks['stop the job']})",
            f"{len(ranks['wrong'])} wrong lines, hangs or runs not bit-equal",
        ],
        [
            f"{signals['sent']:,} commands with a signal",
            f"SIGTERM, SIGHUP or SIGINT to one of {campaigns[-1]['signals']['commands']} commands, "
            f"{signals['twice']:,} times a second one within half a second",
            f"{len(signals['wrong'])} without exactly one true line",
        ],
        [
            f"{disks['failed']:,} failing disks",
            "full, read-only, broken or over quota, once or for good: rename, fsync, chmod, append, new file",
            f"{disks['runs'] - disks['bit_equal']} of {disks['runs']:,} runs not bit-equal, "
            f"{len(disks['wrong'])} wrong outcomes in all",
        ],
        [
            f"{host['runs']:,} trainings on a bad host",
            ", ".join(f"{text} ({host[key]})" for key, text in kinds.items() if key in host),
            f"{host['ended']:,} ended, {host['runs'] - host['bit_equal']} not bit-equal after a resume, "
            f"{len(host['wrong'])} wrong outcomes in all",
        ],
        [
            f"{files['tried']:,} damaged files, or with false headers",
            "checkpoints, recipes, runs, images, shards, releases, pickles, Parquet, caches; by bytes "
            "and by structure",
            f"{len(files['wrong'])} tracebacks, hangs or damaged contents accepted as valid",
        ],
    ]
    for name, what in (("epochs", "of one run"), ("runs", "in one process"), ("resumes", "of one run")):
        found = [values["memory"][name] for values in campaigns]
        grown = max(one["second_mib"] / one["first_mib"] - 1 for one in found)
        files_more = max(one["second_files"] - one["first_files"] for one in found)
        count = sum(one["count"] for one in found)
        rows.append([f"{count:,} {name}", what, f"memory {grown:+.1%}, open files {files_more:+.0f}"])
    return rows
