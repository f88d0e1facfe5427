"""What each unit alone changes in the model's outputs, and how that grows and shrinks with its format."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from qcompile.compiler.data.calibration import Data
from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.measure.distance import effect_of
from qcompile.compiler.mixed.if_nodes import ALL_FLOAT, Setting
from qcompile.compiler.mixed.ranking import Ranked, Ranking
from qcompile.compiler.mixed.sensitivity import Steps, check_memory
from qcompile.compiler.mixed.switchable import Switched
from qcompile.compiler.mixed.windows import check_windows, float_outputs
from qcompile.compiler.stages import Prepared
from qcompile.compiler.sweep.budget.rounded import NEAREST, PROBE, Probe
from qcompile.compiler.sweep.budget.units import Unit
from qcompile.passes.affine import Array, Grid
from qcompile.passes.graph import add_initializer
from qcompile.passes.linears import Embedding, constant
from qcompile.passes.rotation import Rotation
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.state import remember
from qcompile.passes.tensors import read

# Columns of a weight that tell its errors.
_COLUMNS = 64


def measured(prepared: Prepared, data: Data, units: Sequence[Unit], progress: Steps, probe: Probe = NEAREST) -> Ranking:
    """Each unit alone as the probe has it, all others in float: KL of a decoder's logits, else the relative error of
    the outputs; by the name of its first weight, in the order of the units. One run of a few windows for each, which
    begins at the first segment that it changes. The float weights and those of the probe are in memory.

    Raises UserError where there is no data to measure on, or not enough memory.
    """
    plan, provider, started = prepared.plan, prepared.recipe.provider, time.monotonic()
    batches, windows = measurable(prepared, data)
    effect = effect_of(plan, float_outputs(prepared.source, plan, batches, provider))
    switched = Switched(probed(prepared.model, units, probe), {}, batches, effect.outputs, provider)
    found = list[Ranked]()
    for number, unit in enumerate(units):
        done = time.monotonic() - started
        left = f", {done / number * (len(units) - number):.0f} s left" if number else ""
        progress.step(f"budget: weight {number + 1} of {len(units)}{left}")
        distance = effect.distance(switched.run(Setting.of(unit.names)))
        found.append(Ranked(unit.names_of_weights[0], "MatMul", unit.weights, 0, distance))
    every = Setting.of(name for unit in units for name in unit.names)
    plain, coded = (effect.distance(switched.run(setting)) for setting in (ALL_FLOAT, every))
    return Ranking(effect.metric, windows, plain, coded, tuple(found), time.monotonic() - started)


def measurable(prepared: Prepared, data: Data) -> tuple[list[Batch], str]:
    """(batches that units are measured on, what they are); UserError as of `measured`, before any work is done."""
    batches, windows = check_windows(prepared.plan, data)
    check_memory(prepared.model, sum(batch.rows for batch in batches) * (prepared.plan.vocabulary or 0))
    return batches, windows


def probed(model: ir.Model, units: Sequence[Unit], probe: Probe = NEAREST) -> ir.Model:
    """A copy in which every node of the units reads what the probe makes of its weight, with its float form as twin;
    tables, and what shares them, are rounded to nearest, as the compile does.
    """
    clone = model.clone()
    nodes = {str(node.name): node for node in clone.graph}
    made: dict[str, ir.Value] = {}

    def read_probed(name: str, slot: int, weight: ir.Value, made_of: Callable[[], Array], *, turned: bool) -> None:
        """What is made of the weight is (K, N), and read as (N, K) where it is turned."""
        node, key = nodes[name], f"{weight.name}.probed.{'rows' if turned else 'columns'}"
        remember(node)
        if key not in made:
            tensor, rounded = constant(weight), made_of()
            array = np.ascontiguousarray(rounded.T if turned else rounded).astype(tensor.dtype.numpy())
            made[key] = add_initializer(clone.graph, key, ir.tensor(array, dtype=tensor.dtype, name=key))
        node.replace_input_with(slot, made[key])

    for unit in units:
        own = NEAREST if unit.embeddings else probe
        for linear in unit.linears:
            read_probed(linear.name, 1, linear.weight, partial(own.of, linear), turned=False)
        for lookup in unit.embeddings:
            read_probed(lookup.name, 0, lookup.table, partial(_nearest, lookup), turned=True)
    return clone


def _nearest(lookup: Embedding) -> Array:
    table = np.asarray(read(constant(lookup.table)).T, np.float32)
    return round_to_nearest(table, PROBE, None).dequantize()


def errors(unit: Unit, choices: Sequence[Sequence[Grid]], *, rotated: bool) -> list[float]:
    """The squared errors of a unit's weights for each choice of a grid for each of its sites, relative to those on that
    of the probe: what a distance that grows with the square of small changes is to be multiplied by. 0 of weights that
    the probe has exactly.

    rotated: inputs of linears are turned (`passes.rotation`), so that the weights are, too; but not those that share a
    table.
    """
    sums = np.zeros(1 + len(choices))
    sites: list[tuple[Array, bool]] = [(_sampled(own.mapped()), not unit.embeddings) for own in unit.linears]
    sites += [(_sampled(read(constant(own.table)).T), False) for own in unit.embeddings]
    for (w, turn), *grids in zip(sites, *choices, strict=True):
        rotation = Rotation.of(len(w), 0) if rotated and turn else None
        own = w if rotation is None else rotation.rows(w)
        for i, grid in enumerate([PROBE, *grids]):
            sums[i] += np.square(round_to_nearest(own, grid, None).dequantize() - own).sum(dtype=np.float64)
    return [float(own / sums[0]) if sums[0] else 0.0 for own in sums[1:]]


def _sampled(w: Array) -> Array:
    """Columns of w (K, N), evenly spread."""
    return np.ascontiguousarray(w[:, :: max(1, w.shape[1] // _COLUMNS)], np.float32)
