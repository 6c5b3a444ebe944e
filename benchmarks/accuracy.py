"""What the presets reach over several seeds, and what each field of a recipe does to the accuracy.

    python -m benchmarks.accuracy --data-dir data                         # ablations of the preset `default`
    python -m benchmarks.accuracy --data-dir data --base fast --seeds 10
    python -m benchmarks.accuracy --data-dir data --mode final            # the presets, on the test images

Ablations change one field at a time and train on the same seeds, hence from the same first weights and on the
same images in the same order; the figure of interest is the difference within each pair. They never see the
test images: a tenth of each class's training images is held out and measured on. The final runs train on all
training images and are measured on the test images; nothing is chosen by them. They also say how long a
training takes.

Run it again to continue where it stopped: finished runs are read, an unfinished one is resumed. Each is a
run's folder in OUT/<mode>/<variant>/seed-<n>/, without its checkpoints once it has finished. A finished run
that is put there counts as if it had been trained here, if its recipe (but for its name and test_views) and
its images are the right ones.
"""

import dataclasses
import gc
import json
import statistics
import sys
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from benchmarks.harness import require_counts, run, save, show, software
from benchmarks.stats import compare, describe, mean_interval
from benchmarks.workloads import training_flop
from fasttrain import trainer
from fasttrain.data.dataset import Dataset
from fasttrain.data.load_dataset import load_dataset
from fasttrain.errors import Interrupted, UserError
from fasttrain.recipe import Recipe, flag, load_recipe
from fasttrain.report.run import Run, load_run
from fasttrain.system.machine import pick_device
from fasttrain.system.run_folder import RECIPE_FILE, RESULT_FILE

CHANGES: dict[str, tuple[Any, ...]] = {
    "batch_size": (256, 512),
    "label_smoothing": (0.0, 0.1, 0.2),
    "weight_decay": (0.0, 0.05, 0.2, 0.8),
    "ema_epochs": (0.0, 0.5, 1.0),
    "flip_order": ("random", "alternating"),
    "cutout": (0, 8),
    "crop_padding": (2, 4),
    "activation": ("relu", "gelu"),
    "init": ("default", "dirac"),
    "bn_momentum": (0.1, 0.3),
    "bn_bias_lr_scale": (1.0, 4.0),
    "logit_scale": (0.25, 1.0),
}
"""Values that an ablation tries, one at a time; those that the base recipe has already are left out."""

GOALS = (0.90, 0.94)
"""Test accuracies that a training may reach, and after how many seconds."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train recipes that differ in one field over the same seeds, or the presets for the final claim."""

    mode: Literal["ablations", "final"] = "ablations"
    """ablations: on held-out training images. final: the presets, on the test images."""
    base: str = "default"
    """The recipe that ablations change: a preset or a recipe's JSON file."""
    changes: tuple[str, ...] = ()
    """What ablations try, as label_smoothing=0.2 init=dirac; by default a value or two of each field."""
    presets: tuple[str, ...] = ("assignment", "default", "fast", "speedrun", "laptop")
    """What the final mode trains."""
    seeds: int = 5
    """Seeds 0, 1, ... train every recipe once each."""
    epochs: int | None = None
    """Instead of the recipe's own: fewer make it cheap."""
    width: int | None = None
    """Instead of the recipe's own: a narrow network makes it cheap."""
    compile: Literal["auto", "off", "default", "reduce-overhead", "max-autotune"] | None = None
    """Instead of the recipe's own."""
    loader: Literal["auto", "dali", "tensor"] | None = None
    """Instead of the recipe's own."""
    out: Path = Path("runs/accuracy")
    """Where the runs' folders are, and are made."""
    data: Literal["auto", "cifar10", "cifar100", "synthetic"] = "auto"
    """As in fasttrain train."""
    data_dir: Path | None = None
    """As in fasttrain train."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""

    def __post_init__(self) -> None:
        require_counts(seeds=self.seeds, epochs=self.epochs, width=self.width)


# --------------------------------------------------------------------------------------------- what to train


def variants(options: Options) -> dict[str, Recipe]:
    """The recipes to train, by name; of ablations the base comes first."""
    if options.mode == "final":
        recipes = {recipe.name: recipe for recipe in map(load_recipe, options.presets)}
    else:
        base = load_recipe(options.base)
        recipes = {base.name: base}
        for field, value in changes(options):
            changed = Recipe.from_dict(base.to_dict() | {field: value})
            if changed != base:
                recipes[f"{base.name}-{field}={value}"] = changed
    named = {field: getattr(options, field) for field in ("epochs", "width", "compile", "loader")}
    settings = {field: value for field, value in named.items() if value is not None}
    return {name: dataclasses.replace(with_views(recipe), **settings) for name, recipe in recipes.items()}


def with_views(recipe: Recipe) -> Recipe:
    """The recipe with averaged predictions: its own, or those over mirror images if it has none."""
    return dataclasses.replace(recipe, test_views="mirror") if recipe.test_views == "none" else recipe


def changes(options: Options) -> list[tuple[str, Any]]:
    """Fields and values to try. Raises UserError for a change that is not written as field=value."""
    if not options.changes:
        return [(field, value) for field, values in CHANGES.items() for value in values]
    found = []
    for text in options.changes:
        field, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--changes {text}: expected field=value, as label_smoothing=0.2")
        try:
            found.append((field, json.loads(value)))
        except ValueError:  # a word
            found.append((field, value))
    return found


def trained(recipe: Recipe, dataset: Dataset, folder: Path, device: str) -> Run:
    """The finished run of this recipe in a folder of its own: read, resumed or trained.

    A signal ends the process after the run's state was saved.
    Raises UserError if a run of another recipe or of other images lies there.
    """
    begun = sorted(path.parent for path in folder.glob(f"*/{RECIPE_FILE}"))
    for run_folder in begun:
        require_same(load_recipe(str(run_folder / RECIPE_FILE)), recipe, run_folder)
    finished = [run_folder for run_folder in begun if (run_folder / RESULT_FILE).exists()]
    if finished:
        found = load_run(finished[-1])
    else:
        if begun:  # a resumed run keeps its own test_views
            recipe = load_recipe(str(begun[-1] / RECIPE_FILE))
        resume = begun[-1] if begun else None
        try:
            found = trainer.train(
                recipe, data=dataset, out=folder, device=device, resume=resume, report=False
            )
        except Interrupted as stopped:
            print("saved; the same command resumes from here", file=sys.stderr)
            sys.exit(stopped.status)
        gc.collect()  # a loader's callbacks refer to it: its images would stay for a while
        for checkpoint in found.folder.glob("*.pt"):
            checkpoint.unlink()  # those of hundreds of runs would fill the disk
    if found.result["dataset"] != dataset.name:
        raise UserError(
            f"{found.folder}: its images are {found.result['dataset']}, not {dataset.name}; move it away"
        )
    return found


def require_same(found: Recipe, wanted: Recipe, folder: Path) -> None:
    """Raise UserError, naming the fields, unless both train the same."""
    theirs = found.to_dict()
    differing = [
        f"{flag(key)} {theirs[key]} instead of {value}"
        for key, value in wanted.to_dict().items()
        if key not in ("name", "test_views") and theirs[key] != value
    ]
    if differing:
        raise UserError(f"{folder}: a run with {', '.join(differing)}; move it away")


# ---------------------------------------------------------------------------------------------- what it says


def ablation_rows(runs: dict[str, dict[int, Run]]) -> list[dict[str, Any]]:
    """Per variant its accuracy, and how it differs from the base, the first one."""
    base = next(iter(runs))
    accuracy = {
        f"none, {name}" if name == base else name.removeprefix(f"{base}-"): accuracies(by_seed)
        for name, by_seed in runs.items()
    }
    views = next(iter(runs[base].values())).recipe.test_views
    accuracy[f"test_views={views}"] = {  # of the same runs: the two figures of a run are a pair
        seed: one.result["test_accuracy_views"]
        for seed, one in runs[base].items()
        if "test_accuracy_views" in one.result
    }
    return compare(accuracy)


def accuracies(runs: dict[int, Run]) -> dict[int, float]:
    return {seed: one.result["test_accuracy"] for seed, one in runs.items()}


def hardware(runs: dict[str, dict[int, Run]]) -> list[str]:
    """The machines and precisions that trained them."""
    everything = [one for by_seed in runs.values() for one in by_seed.values()]
    return sorted({f"{one.hardware}, {one.result['precision']}" for one in everything})


def final_rows(runs: dict[str, dict[int, Run]]) -> list[dict[str, Any]]:
    """Per preset its epochs, both accuracies, its times, and where it ran."""
    rows = []
    for name, by_seed in runs.items():
        results = [one.result for one in by_seed.values()]
        averaged = [result["test_accuracy_views"] for result in results if "test_accuracy_views" in result]
        rows.append(
            {
                "recipe": name,
                "epochs": results[0]["epochs"],
                "flop": training_flop(next(iter(by_seed.values()))),
                "accuracy": mean_interval([result["test_accuracy"] for result in results]),
                "accuracy_views": mean_interval(averaged) if averaged else None,
                "train_seconds": statistics.median(result["train_seconds"] for result in results),
                "times": times(list(by_seed.values())),
                "hardware": hardware({name: by_seed}),
                "software": sorted({software(one.machine) for one in by_seed.values()}),
            }
        )
    return rows


def times(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Mean, spread and n of each figure of the clock over the runs of one recipe.

    The first run's compiling and wall seconds stand apart: it may have met a cold cache.
    """
    results = [one.result for one in runs]
    curves = [(one.result["epoch_seconds"], one.column("test_accuracy")) for one in runs]
    figures: dict[str, list[float]] = {
        "seconds per epoch": [seconds for result in results for seconds in result["epoch_seconds"]],
        "train seconds": [result["train_seconds"] for result in results],
        "compile seconds, first run": [results[0]["compile_seconds"]],
        "wall seconds, first run": [results[0]["wall_seconds"]],
        "wall seconds, later runs": [result["wall_seconds"] for result in results[1:]],
        "data wait share": [result["data_wait_share"] for result in results],
        **{
            f"train seconds to {goal:.0%}": [
                seconds for curve in curves if (seconds := seconds_to(goal, *curve)) is not None
            ]
            for goal in GOALS
        },
        "mfu": [result["mfu"] for result in results if result["mfu"] is not None],
    }
    return {figure: describe(values) for figure, values in figures.items() if values}


def seconds_to(goal: float, epoch_seconds: list[float], epoch_accuracy: list[float]) -> float | None:
    """Training seconds up to the first epoch whose test accuracy reaches the goal; None if none does."""
    clock = accumulate(epoch_seconds)
    return next((s for s, a in zip(clock, epoch_accuracy, strict=True) if a >= goal), None)


def collect(options: Options, dataset: Dataset, recipes: dict[str, Recipe], runs: Any) -> dict[str, Any]:
    """What the JSON file holds: the rows, and every run's figures with where they come from."""
    rows = ablation_rows(runs) if options.mode == "ablations" else final_rows(runs)
    everything = [(name, seed, one) for name, by_seed in runs.items() for seed, one in by_seed.items()]
    keys = ("test_accuracy", "test_accuracy_views", "max_lr", "train_seconds", "wall_seconds")
    return {
        "mode": options.mode,
        "dataset": dataset.name,
        "train_images": len(dataset.train.labels),
        "test_images": len(dataset.test.labels),
        "width": next(iter(recipes.values())).width,
        "epochs": {name: recipes[name].epochs for name in runs},
        "n": min(len(by_seed) for by_seed in runs.values()),
        "recipes": {name: recipes[name].to_dict() for name in runs},
        "hardware": hardware(runs),
        "rows": rows,
        "runs": [
            {
                "variant": name,
                "seed": seed,
                "compile": one.result["compile"],
                "resumed": one.result.get("resumed", 0),
                **{key: one.result.get(key) for key in keys},
            }
            for name, seed, one in everything
        ],
    }


def points(figure: dict[str, Any] | None, sign: str = "") -> str:
    """A share or a difference of shares in percent, with its interval."""
    if figure is None:
        return "-"
    text = f"{100 * figure['mean']:{sign}.2f}"
    if figure["interval"]:
        text += " ({:{sign}.2f} to {:{sign}.2f})".format(*(100 * x for x in figure["interval"]), sign=sign)
    return text


def compared_table(what: str, rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, as text, of what `compare` gives; `what` is the names' column."""
    cells = [
        [
            row["name"],
            points(row["accuracy"]),
            points(row["difference"], "+"),
            str((row["difference"] or row["accuracy"])["n"]),
        ]
        for row in rows
    ]
    return [what, "accuracy, %", "difference, points", "n"], cells


def table(values: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, as text, of what `collect` gives."""
    if values["mode"] == "ablations":
        return compared_table("change", values["rows"])
    rows = [
        [
            row["recipe"],
            str(row["epochs"]),
            f"{row['flop'] / 1e15:.2f}",
            points(row["accuracy"]),
            points(row["accuracy_views"]),
            f"{row['train_seconds']:,.1f}",
            "; ".join(row["hardware"]),
            str(row["accuracy"]["n"]),
        ]
        for row in values["rows"]
    ]
    columns = ["recipe", "epochs", "PFLOP", "test accuracy, %", "with averaged predictions, %", "training s"]
    return [*columns, "machine", "n"], rows


def times_table(values: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows, as text, of the times that the final mode's rows hold."""
    rows = [
        [
            f"{row['recipe']}, {figure}",
            f"{found['mean']:,.4g}",
            "-" if found["stdev"] is None else f"{found['stdev']:,.2g}",
            f"{found['min']:,.4g}",
            f"{found['max']:,.4g}",
            str(found["n"]),
        ]
        for row in values["rows"]
        for figure, found in row["times"].items()
    ]
    return ["figure", "mean", "stdev", "min", "max", "n"], rows


def main(options: Options) -> None:
    device = pick_device(options.device)
    recipes = variants(options)
    dataset = load_dataset(options.data, options.data_dir, hold_out=options.mode == "ablations")
    cheap = [f"{options.epochs}-epochs"] * (options.epochs is not None)
    cheap += [f"width-{options.width}"] * (options.width is not None)
    out = options.out / "-".join([options.mode, *cheap])
    about = recipes if options.mode == "final" else [next(iter(recipes))]
    benchmark = "-".join([options.mode, *about, *cheap])

    runs: dict[str, dict[int, Run]] = {}
    for seed in range(options.seeds):  # every recipe before the next seed: if this is stopped, pairs remain
        for number, (name, recipe) in enumerate(recipes.items(), start=1):
            print(f"seed {seed}, recipe {number}/{len(recipes)}: {name}", file=sys.stderr)
            seeded = dataclasses.replace(recipe, seed=seed)
            found = trained(seeded, dataset, out / name / f"seed-{seed}", options.device)
            runs.setdefault(name, {})[seed] = found
            values = collect(options, dataset, recipes, runs)
            path = save(benchmark, device, values)
    show(f"{dataset.name}; mean (95% interval)", *table(values))
    if options.mode == "final":
        show("times", *times_table(values))
    print(path)


if __name__ == "__main__":
    run(main, Options)
