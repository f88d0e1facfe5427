"""What a list's own rounding makes of weights at a few bits: by that, what each of them changes is measured.

Behind a rotation, error compensation leaves a fifth of what nearest rounding changes in SmolLM2's products together,
but a hundredth of it in one of them and half in another: where few directions carry an input, most of what one row
of a weight loses is made up for by others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qcompile.compiler.console.progress import Progress
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.plan import steps_that
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.settings.steps import Step
from qcompile.compiler.stages import Prepared, gather_data, prepare_model, walk
from qcompile.compiler.sweep.budget.units import Unit
from qcompile.passes.affine import Array, Grid, Quantized
from qcompile.passes.contract import Fact
from qcompile.passes.formats.hadamard import HADAMARD
from qcompile.passes.linears import Linear, constant, find_linears, is_lm_head, vocabulary_size
from qcompile.passes.rotation import Rotation
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.state import weight_state
from qcompile.passes.table import PASSES

# Three bits: what one unit changes so is far above the noise of floats, and small enough that what all of them change
# together is about the sum.
PROBE: Grid = QuantSpec(3, PerGroup(64))
_NAMED = Step("int3", {"group": 64})


@dataclass(frozen=True)
class _Rounded:
    """codes: of a weight (K, N) behind the rotation of its input, if there is one."""

    codes: Quantized
    rotation: Rotation | None

    def weight(self) -> Array:
        """What stands in the place of the weight where its input is as the file has it, (K, N)."""
        made = self.codes.dequantize()
        return made if self.rotation is None else self.rotation.rows_before(made)


@dataclass(frozen=True)
class Probe:
    """What each weight becomes while what it changes is measured. known: by node, what was rounded by the list.

    rotated: those that are not known, of products, are rounded behind a rotation.
    """

    known: Mapping[str, _Rounded]
    rotated: bool = False

    def of(self, linear: Linear) -> Array:
        """Of a product, (K, N)."""
        if (own := self.known.get(linear.name)) is not None:
            return own.weight()
        w = linear.read()
        rotation = Rotation.of(len(w), 0) if self.rotated else None
        turned = w if rotation is None else rotation.rows(w)
        return _Rounded(round_to_nearest(turned, PROBE, None), rotation).weight()


NEAREST = Probe({})


def rounding_of(recipe: Recipe) -> tuple[Step, ...]:
    """The steps that rotate inputs and choose codes, without the refinements that take most of their time."""
    chosen = [step.name for step in steps_that(recipe, ensure=Fact.CODES)]
    if not chosen:
        return ()
    turning = [step for step in recipe.passes if PASSES.required(step.name).turns]
    quick = {"sweeps": 0, "refit": False}
    return (*turning, *(Step(own.name, {**own.parameters, **quick}) for own in recipe.passes if own.name in chosen))


def turns(recipe: Recipe) -> bool:
    """Whether inputs of products are rotated."""
    return any(PASSES.required(step.name).turns for step in recipe.passes)


def rounded_by(
    prepared: Prepared,
    units: Sequence[Unit],
    recipe: Recipe,
    calibration: Calibration,
    evaluation: Calibration | None,
    progress: Progress,
    *,
    bound: bool,
) -> Probe:
    """Each product of units without a table as the steps of `rounding_of` round it by the calibration data that runs
    through the float model; those without codes (of inputs that were not observed, of lists without such steps) to
    nearest.

    prepared: the model of the units; it is loaded anew. evaluation, bound: as in `gather_data`.
    """
    if not (steps := rounding_of(recipe)):
        return Probe({}, turns(recipe))
    progress.step("budget: rounding all weights once")
    packing = tuple(replace(own, parameters={}) for own in steps_that(recipe, ensure=Fact.PACKED))
    vocabulary = vocabulary_size(prepared.model)
    asked = {own.name: own for unit in units if not unit.embeddings for own in unit.linears}
    head = _NAMED if any(is_lm_head(own, vocabulary) for own in asked.values()) else None
    passes = (*steps, *packing)
    plain = replace(prepared.recipe, passes=passes, keep_worst=None, weights=_NAMED, lm_head=head, embedding=None)
    made = prepare_model(prepared.source, plain, progress)
    data = gather_data(made, calibration, evaluation=evaluation, aside=True, bound=bound)
    made.job.passes = [own for own in made.job.passes if Fact.PACKED not in own.ensures]  # codes are all that is wanted
    walk(made, replace(data, checks=[], evaluation=[]))
    found = dict[str, _Rounded]()
    for linear in find_linears(made.model.graph):
        codes = weight_state(linear.weight).codes.get(linear.transposed)
        if codes is not None and linear.name in asked:
            found[linear.name] = _Rounded(codes, _turning(linear))
    return Probe(found, turns(recipe))


def _turning(linear: Linear) -> Rotation | None:
    """What turns the input of a product, if something does."""
    node = linear.activation.producer()
    if node is None or node.op_type != HADAMARD or node.inputs[1] is None:
        return None
    return Rotation(np.sign(constant(node.inputs[1]).numpy()[:, 0]).astype(np.float32))
