"""`fasttrain find-lr`: search for a peak learning rate, print every try, and draw the curves."""

from fasttrain.checkpoint.network import find_start
from fasttrain.data.build_loader import fit_batch_size
from fasttrain.data.load_dataset import load_from_options
from fasttrain.errors import UserError
from fasttrain.lr_finder import check_search, find_max_lr
from fasttrain.options import FindLrOptions
from fasttrain.recipe import Recipe
from fasttrain.report import plots
from fasttrain.runtime import Runtime
from fasttrain.system.files import require_writable, write_atomically
from fasttrain.system.machine import pick_device


def find_lr(recipe: Recipe, options: FindLrOptions) -> None:
    """Search, print every try and the suggestion, and write the curves to `options.plot`, a PNG.

    Raises UserError for a user's mistake, before the data set is loaded where that is possible; and, after
    the curves are drawn, if the tries together suggest no rate.
    """
    plot = options.plot
    if plot.suffix != ".png":
        raise UserError(f"--plot {plot}: expected the name of a .png file")
    require_writable(plot.parent, f"--plot {plot}")
    check_search(recipe, options.start_lr, options.end_lr, options.num_iter, options.repeats)
    device = pick_device(options.device)
    dataset = load_from_options(options, recipe.resolution)
    recipe = fit_batch_size(find_start(recipe, dataset), dataset, log=print)
    search = find_max_lr(
        dataset,
        recipe,
        Runtime.resolve(recipe, device, compiles=False),
        start_lr=options.start_lr,
        end_lr=options.end_lr,
        num_iter=options.num_iter,
        repeats=options.repeats,
        log=print,
    )
    if not search.problem:
        print(f"suggested --max-lr {search}")
    marked = None if search.problem else search.suggestion
    drawn = plots.figure([plots.lr_find([(c.lrs, c.losses) for c in search.curves], marked)])
    write_atomically(plot, lambda file: drawn.savefig(file, format="png"))
    print(f"curves -> {plot}")
    if search.problem:
        raise UserError(
            f"no rate to suggest: {search.problem}; try more --repeats or --num-iter, or another --start-lr"
        )
