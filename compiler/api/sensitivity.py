"""The integer nodes of a model by what each of them alone changes."""

from dataclasses import replace
from pathlib import Path

from qcompile.compiler.console.progress import Progress, Silent
from qcompile.compiler.data.calibration import Calibration, Given
from qcompile.compiler.facts.model import versions
from qcompile.compiler.files.load import model_hash
from qcompile.compiler.mixed import keep
from qcompile.compiler.mixed.ranking import Ranking, RankingCache
from qcompile.compiler.mixed.sensitivity import Mixture
from qcompile.compiler.plan import ensuring, packages, steps_that
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.stages import walk_model
from qcompile.passes import lists
from qcompile.passes.contract import Fact
from qcompile.passes.errors import UserError

DEFAULT_PASSES = parse_passes(lists.INTEGER)


def rank_nodes(
    model: Path | str,
    recipe: Recipe | None = None,
    *,
    calibration: Given = (),
    progress: Progress | None = None,
) -> Ranking:
    """The ranking of a model's integer nodes (of smooth,qdq by default), from the cache where it was made before.

    What the recipe says of nodes to keep in float is left out. Raises UserError for bad input, and for a recipe without
    a pass that makes nodes integer.
    """
    source, progress, calibration = Path(model), progress or Silent(), Calibration.of(calibration)
    recipe = (recipe or Recipe(passes=DEFAULT_PASSES)).keeping_none
    if not steps_that(recipe, ensure=Fact.INTEGER):
        raise UserError(f"sensitivity: no pass of the list makes nodes integer: add {ensuring(Fact.INTEGER)}")
    progress.step("loading")
    cache = RankingCache(source, model_hash(source), recipe.to_dict(), versions() | packages(recipe), calibration)
    known = cache.get()
    if known is not None:
        return known
    # With a node to keep, data is gathered for dynamic, too.
    walked = walk_model(source, replace(recipe, keep_worst=1), calibration, progress, checks=False)
    progress.step("sensitivity: float outputs and switches")
    late = keep.integer_pass(walked.passes)
    ranking = Mixture(walked.model, late, walked.plan, walked.data, source, recipe.provider).rank(progress)
    cache.put(ranking)
    return ranking
