"""Observers of the smallest and the largest number of an activation: min-max, and its moving average."""

from collections.abc import Set
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from qcompile.passes.affine import Array
from qcompile.passes.errors import UserError
from qcompile.passes.observers.base import Observer, Outputs, State
from qcompile.passes.observers.nodes import add_outputs, by_channel, constant, has, lost, scalar
from qcompile.passes.observers.room import RowExtremes, append_row_extremes
from qcompile.passes.spec import ActivationSpec


class Extremes(Observer):
    """The exact extremes of every batch so far.

    low, high: float32, () or (channels,); None before the first batch. A batch without rows gives +inf and -inf, which
    changes neither. row_extremes: how the extremes of single rows vary, for a range of the whole tensor.
    keys: of its state, which mean the same in that of any class derived from it.
    bounds: what no number of the value can be beyond, as the operator that gives it says. channels_first: a value of
    rank 3 is (N, C, L), as one-dimensional convolutions have it, and not tokens of C numbers each.
    """

    keys: ClassVar[Set[str]] = frozenset({"low", "high", "row_counts", "row_sums"})
    bounds: tuple[float, float] = (-np.inf, np.inf)
    channels_first: bool = False

    def __init__(self, value: str, *, axis: int | None = None) -> None:
        super().__init__(value, axis=axis)
        self.low: Array | None = None
        self.high: Array | None = None
        self.row_extremes = RowExtremes()

    @property
    def prefix(self) -> str:
        """What the names of nodes begin with: the value, and the channel axis."""
        return self.value if self.axis is None else f"{self.value}.axis{self.axis}"

    def append(self, graph: onnx.GraphProto) -> None:
        """`prefix`.low and .high, float32 () or (channels,); `value`.faults, float32 (): 0, NaN where a number is no
        finite one (a maximum alone would hide a NaN), but for rows of which none is; `nodes.lost`.
        """
        low, high, faults = f"{self.prefix}.low", f"{self.prefix}.high", f"{self.value}.faults"
        if has(graph, low):
            return
        source = by_channel(graph, self.value, self.axis)
        axes = [] if self.axis is None else [constant(graph, "qcompile.axis1", [1])]
        graph.node.append(helper.make_node("ReduceMin", [source, *axes], [low], keepdims=0))
        graph.node.append(helper.make_node("ReduceMax", [source, *axes], [high], keepdims=0))
        add_outputs(graph, [low, high])
        if self.axis is None:
            append_row_extremes(graph, self.value, pictures=3 if self.channels_first else 4)
        if not has(graph, faults):
            zero = scalar(graph, "qcompile.zero", np.float32(0))
            graph.node.append(helper.make_node("Mul", [source, zero], [f"{self.value}.zeros"]))
            graph.node.append(helper.make_node("ReduceSum", [f"{self.value}.zeros"], [faults], keepdims=0))
            add_outputs(graph, [faults, lost(self.value)])

    def update(self, outputs: Outputs) -> None:
        """Minima and maxima."""
        batch = self.batch(outputs)
        if batch is None:
            return
        low, high = batch
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        if self.axis is None:
            positions, width = map(int, outputs[f"{self.value}.row.sizes"])
            self.row_extremes.add(outputs[f"{self.value}.row.peaks"], positions, width)

    def batch(self, outputs: Outputs) -> tuple[Array, Array] | None:
        """(low, high) of the batch, None for one without finite rows; UserError where another number is not finite."""
        low, high = (np.array(outputs[f"{self.prefix}.{end}"], np.float32) for end in ("low", "high"))
        self.check_finite(outputs[f"{self.value}.faults"])
        return None if (low > high).any() or outputs[lost(self.value)] == 1 else (low, high)

    def expected(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """`range`, `restrained` and widened where few rows were seen; see `RowExtremes.widened`. What is one number
        throughout does not vary, and has no room.
        """
        low, high = self.range(spec)
        if self.axis is not None or self.low is None or self.high is None or self.low == self.high:
            return low, high
        if (share := self.row_extremes.enough) < 1:
            low, high = self.between(max(share, self.restrained(spec, low, high)), low, high)
        wide = self.row_extremes.widened((float(low), float(high)), (float(self.low), float(self.high)))
        ends = np.clip(np.array(wide), min(self.bounds[0], float(low)), max(self.bounds[1], float(high)))
        return np.float32(ends[0]), np.float32(ends[1])  # type: ignore[return-value]

    def restrained(self, spec: ActivationSpec, low: Array, high: Array) -> float:
        """How far from the extremes (0) to `range` (1), which is given, what few rows showed lets it go."""
        return 1.0

    def between(self, share: npt.ArrayLike, low: Array, high: Array) -> tuple[Array, Array]:
        """The ranges, of the shape of `share`, so far from the extremes to low … high, scalars; after a batch."""
        share = np.asarray(share)
        widest = self.with_zero(self.low, self.high)
        ends = (np.asarray(end + share * (own - end), np.float32) for end, own in zip(widest, (low, high), strict=True))
        return next(ends), next(ends)

    def state(self) -> State:
        """low, high; of a whole tensor row_counts (rows, numbers, groups) and row_sums, too."""
        if self.low is None or self.high is None:
            return {}
        known = self.row_extremes
        counts = np.array([known.rows, known.numbers, known.groups])
        rows = {} if known.sums is None else {"row_counts": counts, "row_sums": known.sums}
        return {"low": self.low, "high": self.high} | rows

    def restore(self, state: State) -> None:
        """From `state`."""
        self.low, self.high = state.get("low"), state.get("high")
        rows, numbers, groups = map(int, state.get("row_counts", (0, 0, 0)))
        self.row_extremes = RowExtremes(rows, numbers, groups, state.get("row_sums"))

    def with_zero(self, low: Array | None, high: Array | None) -> tuple[Array, Array]:
        """The range widened to zero; (0, 0) before the first batch."""
        zero = np.zeros((), np.float32)
        return (zero, zero) if low is None or high is None else (np.minimum(low, zero), np.maximum(high, zero))


class MinMax(Extremes):
    """From the smallest number to the largest one."""

    name: ClassVar[str] = "minmax"

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """The extremes and zero, whatever the grid."""
        return self.with_zero(self.low, self.high)


class MovingAverage(Extremes):
    """The exponentially weighted mean of the extremes of the batches: range += constant * (batch - range).

    The last batches weigh most, so the order of the data matters. The first batch begins it.
    mean_low, mean_high: float32, () or (channels,); None before the first batch.
    """

    name: ClassVar[str] = "moving-average"

    def __init__(self, value: str, *, axis: int | None = None, constant: float = 0.01) -> None:
        super().__init__(value, axis=axis)
        if not 0 < constant <= 1:
            raise UserError(f"moving-average: constant must be above 0 and at most 1, got {constant}")
        self.constant = constant
        self.mean_low: Array | None = None
        self.mean_high: Array | None = None

    def update(self, outputs: Outputs) -> None:
        """A step of both means."""
        super().update(outputs)
        batch = self.batch(outputs)
        if batch is not None:
            self.mean_low, self.mean_high = self._step(self.mean_low, batch[0]), self._step(self.mean_high, batch[1])

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """The means and zero, whatever the grid."""
        return self.with_zero(self.mean_low, self.mean_high)

    def restrained(self, spec: ActivationSpec, low: Array, high: Array) -> float:
        """Not at all: means of extremes are beyond no error that was weighed, and half of all batches beyond them."""
        return 0.0

    def state(self) -> State:
        """low, high, mean_low, mean_high."""
        if self.mean_low is None or self.mean_high is None:
            return {}
        return super().state() | {"mean_low": self.mean_low, "mean_high": self.mean_high}

    def restore(self, state: State) -> None:
        """From `state`."""
        super().restore(state)
        self.mean_low, self.mean_high = state.get("mean_low"), state.get("mean_high")

    def _step(self, old: Array | None, new: Array) -> Array:
        return new if old is None else np.asarray(old + np.float32(self.constant) * (new - old), np.float32)
