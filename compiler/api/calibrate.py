"""`qcompile calibrate`: the walk of a recipe without what follows it, and what the observers learnt in a file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from qcompile.compiler.console.progress import Progress, Silent
from qcompile.compiler.data.calibration import Calibration, Given
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.files.load import check_result_path
from qcompile.compiler.plan import reading, steps_that
from qcompile.compiler.recipe import Recipe, Step, parse_passes
from qcompile.compiler.stages import drawn, walk_model
from qcompile.compiler.walk import saved_statistics
from qcompile.passes import lists
from qcompile.passes.affine import Array
from qcompile.passes.contract import Reads
from qcompile.passes.errors import UserError
from qcompile.passes.extensions import parameters
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.extremes import Extremes
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.table import PASSES

DEFAULT_PASSES = parse_passes(lists.INTEGER)


@dataclass(frozen=True)
class Seen:
    """What was seen of an activation, [observed_low, observed_high], and the range that its observer gives.

    clipped: the share of the numbers that lie outside of the range; None where no histogram tells.
    """

    value: str
    observed_low: float
    observed_high: float
    low: float
    high: float
    clipped: float | None

    @property
    def width(self) -> float:
        """Of the range: 255 steps of an 8-bit grid."""
        return self.high - self.low


@dataclass(frozen=True)
class Calibrated:
    """A file of statistics that was written: its bytes, its data in words, and every activation in it."""

    size: int
    data: str
    seen: Sequence[Seen]


def calibrate_model(
    model: Path | str,
    recipe: Recipe | None = None,
    *,
    output: Path | str,
    calibration: Given = (),
    progress: Progress | None = None,
) -> Calibrated:
    """Save what the observers of the recipe learn (default: of smooth,qdq), for `compile_model(statistics=output)`.

    Raises UserError for bad input, and for a recipe without a pass that takes ranges.
    """
    recipe, progress = recipe or Recipe(passes=DEFAULT_PASSES), progress or Silent()
    source, target = Path(model), Path(output)
    if not steps_that(recipe, read=Reads.RANGES):
        told = f"add {reading(Reads.RANGES)}"
        raise UserError(f"calibrate: no pass of the list takes ranges from calibration data: {told}")
    calibration = Calibration.of(calibration)
    check_result_path([source], target, named(calibration.paths))
    progress.step("loading")
    walked = walk_model(source, recipe, calibration, progress, checks=False)
    chosen = next(p for p in walked.passes if Reads.RANGES in p.reads)
    if not walked.watched:
        raise UserError(f"calibrate: the model has no activation that {chosen.name} would quantize")
    header = saved_statistics.Header(
        walked.report.source_hash,
        saved_statistics.shaping(recipe.passes),
        chosen.observer,
        walked.report.data,
        walked.report.versions,
        saved_statistics.fingerprint(walked.model),
        walked.report.calibrated,
        drawn(recipe),
    )
    progress.step("saving")
    size = saved_statistics.save(target, header, walked.watched)
    observers = {own.value: own for own in walked.watched.values()}
    return Calibrated(size, walked.report.data, seen(observers, chosen.activation_grid or ActivationSpec()))


def with_observer(recipe: Recipe, observer: str) -> Recipe:
    """The recipe with another observer for the passes that take ranges by one of the user's choice."""
    steps = steps_that(recipe, read=Reads.RANGES)
    own = {step.name for step in steps if "observer" in parameters(PASSES[step.name])}
    if steps and not own:
        raise UserError(f"calibrate: {steps[0].name} has its own way to learn ranges: leave --observer out")
    changed = [
        Step(step.name, {**step.parameters, "observer": observer}) if step.name in own else step
        for step in recipe.passes
    ]
    return replace(recipe, passes=tuple(changed))


def seen(observers: Mapping[str, Observer], spec: ActivationSpec) -> list[Seen]:
    """What each observer saw, and its range for the grid; before values that share a scale are joined."""
    found = []
    for name, observer in observers.items():
        low, high = _ends(*observer.expected(spec))
        known = isinstance(observer, Extremes) and observer.low is not None and observer.high is not None
        ends = _ends(observer.low, observer.high) if known else (low, high)  # type: ignore[attr-defined]
        clipped = _clipped(observer, low, high) if isinstance(observer, Histogram) else None
        found.append(Seen(name, *ends, low, high, clipped))
    return found


def _ends(low: Array, high: Array) -> tuple[float, float]:
    """Of all channels together."""
    return float(np.min(low)), float(np.max(high))


def _clipped(observer: Histogram, low: float, high: float) -> float:
    outside = total = 0.0
    for own in observer.distributions():
        below = own.below(np.array([low, high]))
        outside += below[0] if low > own.edges[0] else 0.0
        outside += own.total - below[1] if high < own.edges[-1] else 0.0
        total += own.total
    return outside / total if total else 0.0
