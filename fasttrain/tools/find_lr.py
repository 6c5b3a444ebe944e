"""`fasttrain find-lr`: search for a peak learning rate, print every try, and draw the curves."""

from pathlib import Path

from fasttrain.data.build import pick_loader
from fasttrain.data.load import load_dataset
from fasttrain.errors import UserError
from fasttrain.lr_finder import find_max_lr
from fasttrain.recipe import Recipe
from fasttrain.report import plots
from fasttrain.system.files import write_atomically
from fasttrain.system.machine import pick_device
from fasttrain.system.precision import pick_compute_dtype, prepare


def find_lr(
    recipe: Recipe,
    *,
    data: str,
    data_dir: Path | None,
    skip_bad: bool,
    device: str,
    start_lr: float,
    end_lr: float,
    num_iter: int,
    repeats: int,
    plot: Path,
) -> None:
    """Search, print every try and the suggestion, and write the curves to `plot`, a PNG.

    Raises UserError on anything that the user can mend; what would come to light only when the plot is
    written is looked for before the search.
    """
    if plot.suffix != ".png" or not plot.parent.is_dir():
        raise UserError(f"--plot {plot}: expected the name of a .png file in a folder that is there")
    run_device = pick_device(device)
    prepare(run_device, recipe.compute_dtype)
    search = find_max_lr(
        load_dataset(data, data_dir, print, resolution=recipe.resolution, skip_bad=skip_bad),
        recipe,
        kind=pick_loader(recipe.loader, run_device, print),
        device=run_device,
        dtype=pick_compute_dtype(recipe.compute_dtype, run_device),
        start_lr=start_lr,
        end_lr=end_lr,
        num_iter=num_iter,
        repeats=repeats,
        announce=print,
    )
    print(f"suggested --max-lr {search}")
    drawn = plots.figure([plots.lr_find([(c.lrs, c.losses) for c in search.curves], search.suggestion)])
    write_atomically(plot, lambda file: drawn.savefig(file, format="png"))
    print(f"curves -> {plot}")
