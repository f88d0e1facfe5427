"""How long the products of a model take here, in every format that a budget chooses from."""

from pathlib import Path

from qcompile.compiler.console.progress import Progress, Silent
from qcompile.compiler.plan import effective
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.results.timings import Timings
from qcompile.compiler.stages import prepare_model
from qcompile.compiler.sweep.budget.choose import check_packs, chosen_of
from qcompile.compiler.sweep.budget.fastest import Clock, speeds_of
from qcompile.compiler.sweep.budget.prices import measuring


def time_products(model: Path | str, recipe: Recipe | None = None, *, progress: Progress | None = None) -> Timings:
    """Times for `--for-machine`: of each product, float and in each format that the recipe's target has for it; those
    that were measured here before are taken from the cache.

    Raises UserError for bad input, and for targets whose runtime is not here.
    """
    source, progress, recipe = Path(model), progress or Silent(), effective(recipe or Recipe())
    check_packs(recipe)
    prepared = prepare_model(source, measuring(recipe), progress, dry=True)
    units, choices = chosen_of(prepared.model, recipe)
    decoder = prepared.plan.logits is not None
    speeds = speeds_of(prepared.model, recipe, units, choices, Clock(needed=True), progress, decoder=decoder)
    assert speeds is not None, "what is needed is measured"
    return speeds.table
