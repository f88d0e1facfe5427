"""Rotating inputs of products, so that neither they nor their weights have outliers (QuaRot, Ashkboos et al. 2024)."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.passes.absorb import weight_users
from qcompile.passes.affine import Array, Grid
from qcompile.passes.base import Pass, Region
from qcompile.passes.formats import functions
from qcompile.passes.formats.base import DOMAIN
from qcompile.passes.formats.hadamard import HADAMARD
from qcompile.passes.graph import Names, add_initializer
from qcompile.passes.held import confirmed, row_weights, too_few
from qcompile.passes.linears import Linear, constant, find_linears
from qcompile.passes.policy import Policy
from qcompile.passes.rotation import LEAST, MATRIX, Rotation
from qcompile.passes.rounding import Rounding, round_to_nearest
from qcompile.passes.scale_search import MARGIN
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.state import weight_state
from qcompile.passes.statistics import Statistics
from qcompile.passes.targets import TARGETS
from qcompile.passes.workers import mapped

# Columns of all the weights of an input that tell what turning it gains.
_SAMPLES = 96
# The share of the squared output error that may be left for a node at run time to be worth it: any gain beyond the
# noise where the kernel library has the node (120 of them take 2 % of a decoder's time); where its body runs, which is
# three nodes, a twentieth.
_WORTH_IT, _WORTH_A_BODY = 1 - MARGIN, 0.95
# What a float16 activation may reach where it is turned: sums of a block are up to √64 times as large as the largest.
# Half of the range is left to rows that were not seen.
_HALF_MOST = 3e4
_OVERFLOWS = "turned, its input might leave the range of float16"
_UNTOLD = "no statistics of rows tell that float16 holds its input, turned: awq and gptq have them collected"
_NO_GAIN = "turning its input leaves too much of the squared error for a node at run time"


class Rotate(Pass):
    """Turn products' inputs in blocks of 64 channels by a Hadamard matrix with random signs, and their weights as much.

    (X R) (Rᵀ W) = X W: a node turns X, once for all products that read it; see `rotation`.
    Case 1: inputs whose quantized products have less error so on rows held aside; without data by the error of the
            weights. For targets that compute a node by its body, less by a twentieth.
    Case 2: blocks are the largest power of two up to 64 that divides the channels; below 16 the input stays as it is.
    Case 3: a weight that other nodes read, or that is read both ways round, is not turned, nor the input of its product
            for the sake of others.
    Case 4: a float16 input is turned only where rows that were run, all of them, show that it stays within the range of
            float16 so (`Rotation.reach`); with guessed statistics or none it stays as it is.
    judge: False turns every input that can be turned, whatever it gains.
    """

    name: ClassVar[str] = "rotate"
    decided: ClassVar[str] = "which inputs rotate turns"
    turns: ClassVar[bool] = True

    def __init__(
        self,
        policy: Policy,
        rounding: Rounding,
        activations: ActivationSpec | None = None,
        *,
        judge: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.policy, self.rounding, self.judge, self.seed = policy, rounding, judge, seed
        self.activations = activations

    def call(self, region: Region) -> None:
        """Turn the inputs of the region's linears; each linear has a decision."""
        inputs = self.quantized_inputs(region, self.policy)
        refused = {value: self._refused(list(linears), region) for value, linears in inputs.items()}
        judged = [value for value in inputs if self.judge and not refused[value]]
        left = mapped(
            share_left,
            judged,
            load=lambda value: self._loaded(value, inputs[value], region),
            given=(self.rounding, self.activations),
        )
        gained = dict(zip(judged, left, strict=True))
        for value, linears in inputs.items():
            share = gained.get(value)
            reason = refused[value] or (_NO_GAIN if share is not None and share > self._enough else "")
            if not reason:
                self._turn(region, value, list(linears))
            if value in region.statistics:
                region.statistics[value].forget()
            for linear in linears:
                detail: dict[str, Any] = {} if share is None else {"relative_loss": share}
                self.decide(linear.name, "skipped" if reason else "rotated", reason or "in blocks", **detail)
        read = {linear.activation for linear in find_linears(region.live_nodes())}
        for value in inputs.keys() - read:  # their Gram matrices are of no more use, and may be large
            region.statistics.pop(value, None)

    @property
    def _enough(self) -> float:
        native = TARGETS[self.policy.target].operators == "qcompile"
        return _WORTH_IT if native else _WORTH_A_BODY

    def call_rest(self, model: ir.Model) -> None:
        """Make one of the nodes that linears of several regions gave an input."""
        made: dict[tuple[ir.Value | None, ...], ir.Value] = {}
        for node in [own for own in model.graph if (own.op_type, own.domain) == (HADAMARD, DOMAIN)]:
            turned = made.setdefault(tuple(node.inputs), node.outputs[0])
            if turned is not node.outputs[0]:
                ir.convenience.replace_all_uses_with(node.outputs[0], turned)
                model.graph.remove(node, safe=True)

    def _refused(self, linears: list[Linear], region: Region) -> str:
        """Why the input of these cannot be turned, or an empty string."""
        first = linears[0]
        rotation = Rotation.of(first.shape[0], self.seed)
        if rotation is None:  # Case 2
            return f"{first.shape[0]} channels have no blocks of {LEAST} and more"
        if reason := foreign(linears):  # Case 3
            return reason
        if constant(first.weight).dtype != ir.DataType.FLOAT16:
            return ""
        known = region.statistics.get(first.activation)  # Case 4
        if known is None or known.sample is None:
            return _UNTOLD
        return "" if rotation.reach(known.absmax).max() <= _HALF_MOST else _OVERFLOWS

    def _loaded(
        self, value: ir.Value, linears: Mapping[Linear, Grid], region: Region
    ) -> tuple[Rotation | None, Statistics | None, list[tuple[Array, Grid]]]:
        """What `share_left` judges an input by."""
        rotation = Rotation.of(next(iter(linears)).shape[0], self.seed)
        return rotation, region.statistics.get(value), self._sampled(value, linears)

    def _sampled(self, value: ir.Value, linears: Mapping[Linear, Grid]) -> list[tuple[Array, Grid]]:
        """Some columns of each weight, as many of each as it is wide."""
        rng = np.random.default_rng([self.seed, zlib.crc32(str(value.name).encode())])
        share = min(1.0, _SAMPLES / sum(linear.shape[1] for linear in linears))
        sampled = []
        for linear, spec in linears.items():
            n = linear.shape[1]
            columns = np.sort(rng.choice(n, int(np.ceil(n * share)), replace=False))
            sampled.append((np.ascontiguousarray(linear.read()[:, columns]), spec))
        return sampled

    def _turn(self, region: Region, value: ir.Value, linears: list[Linear]) -> None:
        """Case 1: a node before the first of the linears, and its output as the input of all of them."""
        rotation = Rotation.of(linears[0].shape[0], self.seed)
        assert rotation is not None
        model, first, names = region.model, linears[0].node, Names(region.model)
        functions.register(model, HADAMARD)
        inputs = [value, _matrix(model, rotation, constant(linears[0].weight).dtype)]
        node = ir.node(HADAMARD, inputs, domain=DOMAIN, name=f"{first.name}.rotate")
        turned = node.outputs[0]
        turned.name, turned.shape = names.fresh(f"{value.name}.rotated"), value.shape
        turned.type = value.type or ir.TensorType(constant(linears[0].weight).dtype)
        model.graph.insert_before(first, node)
        region.nodes.insert(region.nodes.index(first), node)
        for weight, transposed in {(linear.weight, linear.transposed): linear for linear in linears}:
            _turn_weight(weight, transposed, rotation)
        for linear in linears:
            linear.node.replace_input_with(0, turned)
        if value in region.statistics:
            region.statistics[turned] = region.statistics[value].rotated(rotation)


def share_left(
    rounding: Rounding,
    activations: ActivationSpec | None,
    rotation: Rotation,
    statistics: Statistics | None,
    sampled: list[tuple[Array, Grid]],
) -> float:
    """The squared error of columns of weights where their input is turned, relative to that where it is not."""
    return Trial(rotation, rounding, statistics, activations).left(sampled)


class Trial:
    """What turning an activation gains for columns of weights, rounded by the statistics of some rows and judged on
    others.

    activations: the grid that it is rounded to behind the list, None where it stays in float.
    """

    def __init__(
        self,
        rotation: Rotation,
        rounding: Rounding,
        statistics: Statistics | None,
        activations: ActivationSpec | None = None,
    ) -> None:
        self.rotation, self.statistics, self.activations = rotation, statistics, activations
        self.known = statistics is not None and not too_few(statistics) and statistics.divisible
        self.rounding: Rounding = rounding if self.known else round_to_nearest

    def left(self, sampled: list[tuple[Array, Grid]]) -> float:
        """The error behind the rotation, relative to that without; each column counts alike."""
        before, after = (self._losses_of(rotation, sampled) for rotation in (None, self.rotation))
        if self.statistics is not None and self.known:
            return confirmed(np.sum(before, axis=0), np.sum(after, axis=0), self.statistics)
        whole = float(np.concatenate(before).sum())
        return float(np.concatenate(after).sum()) / whole if whole > 0 else 1.0

    def _losses_of(self, rotation: Rotation | None, sampled: list[tuple[Array, Grid]]) -> list[Array]:
        """Those of every weight; what they need in memory is gone behind them."""
        side = _Side(rotation)
        if self.statistics is not None and self.known:
            side = _Side.of(rotation, self.statistics, self.activations)
        return [self._losses(side, w, spec) for w, spec in sampled]

    def _losses(self, side: "_Side", w: Array, spec: Grid) -> Array:
        """Squared errors: of rows held aside (h,); of columns (n,) where there are none."""
        turned = w if side.rotation is None else side.rotation.rows(w)
        rounded = self.rounding(turned, spec, side.fitted).dequantize()
        if side.held is None or side.count is None:
            return np.asarray(np.square(rounded - turned).sum(axis=0) * w.shape[1] / (np.square(w).sum() or 1.0))
        wanted = side.held @ turned
        power = float(side.count @ np.square(wanted).sum(axis=1)) / w.shape[1] or 1.0
        return np.asarray(side.count * np.square(side.given @ rounded - wanted).sum(axis=1) / power)


@dataclass(frozen=True, eq=False)
class _Side:
    """An activation as it is, or turned.

    fitted: what weights are rounded by; its Gram matrix is factored once for all of them. held: rows (h, K) to judge
    on. count: what each of them counts (h,). limit: the end of the grid, that of all rows that are known.
    """

    rotation: Rotation | None
    fitted: Statistics | None = None
    held: Array | None = None
    count: Array | None = None
    grid: ActivationSpec | None = None
    limit: float = 0.0

    @classmethod
    def of(cls, rotation: Rotation | None, statistics: Statistics, grid: ActivationSpec | None) -> "_Side":
        """By statistics that can be split."""
        parts, sample = statistics.split(), statistics.sample
        assert parts is not None
        assert sample is not None
        count = row_weights(parts[1], statistics)
        if rotation is not None:
            parts[0].kept = {}  # the side that is not turned was looked at before
            parts, sample = statistics.turned(rotation), rotation.turned(sample)
            assert parts is not None
        return cls(rotation, *parts, count, grid, float(np.abs(sample).max()))

    @property
    def given(self) -> Array:
        """The rows held aside, on the grid."""
        assert self.held is not None
        if self.grid is None or not self.limit > 0:
            return self.held
        step = np.float32(2 * self.limit / (self.grid.qmax - self.grid.qmin))
        return np.asarray(np.rint(self.held / step) * step, np.float32)


def foreign(linears: list[Linear]) -> str:
    """Why a weight of the linears cannot be turned: somebody else would see it, or it is turned already; else empty."""
    known = {linear.node for linear in linears}
    ways: dict[ir.Value, bool] = {}
    for linear in linears:
        weight = linear.weight
        if weight.is_graph_output():
            return f"the weight {weight.name} is a graph output"
        if weight_state(weight).packed or weight_state(weight).codes:
            return f"the weight {weight.name} is rounded already, for a node of an earlier segment"
        if ways.setdefault(weight, linear.transposed) != linear.transposed:
            return f"the weight {weight.name} is read both ways round"
        for node in weight_users(weight):
            if node not in known:
                tied = node.op_type == "Gather"
                return "weight is tied to the embedding" if tied else f"{weight.name} is also read by {node.name}"
    return ""


def _turn_weight(weight: ir.Value, transposed: bool, rotation: Rotation) -> None:
    tensor = constant(weight)
    stored = np.asarray(tensor.numpy(), np.float32)
    turned = rotation.rows(np.ascontiguousarray(stored.T) if transposed else stored)
    made = np.ascontiguousarray((turned.T if transposed else turned).astype(tensor.dtype.numpy()))
    weight.const_value = ir.tensor(made, dtype=tensor.dtype, name=weight.name)


def _matrix(model: ir.Model, rotation: Rotation, dtype: ir.DataType) -> ir.Value:
    """The initializer of the rotation's matrix, one for all nodes of a type and size."""
    name = f"{MATRIX}{len(rotation.signs)}.{dtype.name.lower()}"
    known = model.graph.initializers.get(name)
    if known is not None:
        return known
    return add_initializer(model.graph, name, ir.tensor(rotation.matrix.astype(dtype.numpy()), dtype=dtype, name=name))
