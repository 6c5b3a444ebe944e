"""`fasttrain report`: write a run's page again, from its folder."""

from pathlib import Path

from fasttrain.checkpoint.network import load_trained_model
from fasttrain.data.run_images import RunImages, find_dataset
from fasttrain.report.html import given, write_progress, write_report
from fasttrain.report.run import load_run, load_unfinished
from fasttrain.system.machine import pick_device
from fasttrain.system.run_folder import RECIPE_FILE, RESULT_FILE, run_folder
from fasttrain.tools.evaluate_checkpoint import evaluate_model


def report(
    folder: Path,
    *,
    data: str = "auto",
    data_dir: Path | None = None,
    skip_bad: bool = False,
    device: str = "auto",
) -> Path:
    """Write a run's report.html again; returns its path.

    That of an unfinished run is marked as such, and shows the epochs so far. Of a finished one, the figures
    on the test images come from evaluating last.pt again. Nothing is downloaded or generated: without the
    run's images, or without last.pt, a sentence replaces their sections.
    data, data_dir, skip_bad: where the run's images are now, as run_images.find_dataset takes them.
    Raises UserError if there is no run, if there is a page that would lose a section, or if the page cannot
    be written.
    """
    folder = run_folder(folder)
    if (folder / RECIPE_FILE).exists() and not (folder / RESULT_FILE).exists():
        return write_progress(load_unfinished(folder))
    run = load_run(folder)
    folder = run.folder
    run_device = pick_device(device)
    images = RunImages.of_run(folder) or RunImages(name=run.result["dataset"])
    dataset = given(
        images,
        lambda wanted: find_dataset(
            wanted, data, data_dir, skip_bad=skip_bad, resolution=run.recipe.resolution
        ),
    )
    evaluation = given(
        dataset, lambda found: evaluate_model(load_trained_model(folder, run_device), found, run_device)
    )
    return write_report(run, dataset, evaluation, device=run_device)
