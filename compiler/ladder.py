"""Without data: how far each step takes a model, from no data at all to tokens that it generates itself."""

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from qcompile.compiler.console.progress import Progress, Silent
from qcompile.compiler.data.calibration import Data
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.measure.distance import effect_of
from qcompile.compiler.measure.phases import phase
from qcompile.compiler.plan import quantizes
from qcompile.compiler.recipe import Recipe, Step
from qcompile.compiler.results.ladder import MIXED, NORMS, NOTHING, SELF, Ladder, Rung
from qcompile.compiler.stages import Walked, finish, prepare_model, walk
from qcompile.passes.base import Pass
from qcompile.passes.contract import Reads


@phase("ladder")
def climb(source: Path, recipe: Recipe, made: Sequence[Pass], data: Data, progress: Progress) -> list[Rung]:
    """The rungs below the one that `data` stands for: the finished model of each, measured on the check batches.

    made: the passes of the recipe.

    Case 1: no data: the passes that need no statistics.
    Case 2: norms as a proxy: the passes that need no more than the scale of each channel.
    Case 3: the tokens that the model sampled, without random ones: all passes.
    Case 4: no rung where it would be the same as another one.
    Ranges of integer activations, where a pass takes them, are those of the tokens that the model ran on every rung.
    """
    if not any(map(quantizes, made)):
        return []
    again, correlations, scales = (
        {p.name for p in made if p.reads & what}
        for what in ({Reads.OUTPUTS}, {Reads.STATISTICS, Reads.CHANNELS}, {Reads.SCALES})
    )
    statistics = correlations | scales
    guess = replace(data, guess=True)
    wanted = [(NOTHING, _without(recipe, again | statistics), guess)]
    if not data.guess:
        wanted.append((NORMS, _without(recipe, again | correlations), guess))
    if data.own:
        wanted.append((SELF, recipe.passes, replace(data, calibration=data.calibration[: data.own])))
    rungs = []
    for name, passes, given in wanted:
        reads = statistics | again if name == SELF else statistics
        if passes != recipe.passes if name == NOTHING else reads & {step.name for step in passes}:  # else Case 4
            progress.step(f"ladder: {name}")
            rungs.append(_rung(name, source, replace(recipe, passes=passes), given))
    return rungs


def finished(rungs: Sequence[Rung], walked: Walked, outputs: Sequence[Arrays]) -> Ladder | None:
    """The ladder with the finished model on its top; None where there is no rung below it."""
    if not rungs:
        return None
    data = walked.data
    top = _measured(NORMS if data.guess else MIXED, walked, outputs)
    sampled = "that the model sampled and calibration has not seen" if data.real else "of random inputs"
    windows = f"{len(data.checks)} batches of {data.checks[0].rows} rows {sampled}"
    kept = len(walked.report.mixed.kept) if walked.report.mixed is not None else 0
    if kept:
        windows += f"; {kept} nodes are kept in float in the last step alone"
    return Ladder((*rungs, top), windows)


def _rung(name: str, source: Path, recipe: Recipe, data: Data) -> Rung:
    prepared = prepare_model(source, recipe.keeping_none, Silent())
    read = data.calibration if prepared.observes or not data.guess else []
    walked = walk(prepared, replace(data, calibration=read))
    return _measured(name, walked, finish(walked, Silent()))


def _measured(name: str, walked: Walked, outputs: Sequence[Arrays]) -> Rung:
    effect = effect_of(walked.plan, [original for _, original in walked.outputs])
    distance = effect.distance(outputs)
    passes = tuple(str(step) for step in walked.prepared.recipe.passes)
    return Rung(name, passes, distance, effect.told(distance))


def _without(recipe: Recipe, names: Set[str]) -> tuple[Step, ...]:
    return tuple(step for step in recipe.passes if step.name not in names)
