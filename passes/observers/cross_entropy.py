"""The range that least disturbs the softmax that follows: for attention scores and logits."""

from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto

from qcompile.passes.affine import Array
from qcompile.passes.errors import UserError
from qcompile.passes.observers.base import Outputs, State
from qcompile.passes.observers.extremes import Extremes
from qcompile.passes.observers.nodes import add_outputs, has, matrix
from qcompile.passes.observers.softmax import GRIDS, append_losses, candidates
from qcompile.passes.spec import ActivationSpec


class CrossEntropy(Extremes):
    """The candidate range whose grid of `bits` bits has the least Σ KL(softmax(x) ‖ softmax(Q(x))) over rows.

    Rows are the last axis. Every batch gives some, evenly spread, at most as many as hold 16384 numbers (but 4): every
    candidate is a softmax of its own.
    losses: float64 (candidates,), the sums; rows: how many they are over.
    """

    name: ClassVar[str] = "cross-entropy"

    def __init__(self, value: str, *, axis: int | None = None, bits: int = 8) -> None:
        super().__init__(value)
        if axis is not None:
            raise UserError("cross-entropy: a row of a softmax goes through all its numbers; it has one range, no axis")
        if bits not in GRIDS:
            raise UserError(f"cross-entropy: bits must be 8 or 16, got {bits}")
        self.bits, self.rows = bits, 0
        self.losses = np.zeros(len(candidates()))

    def append(self, graph: onnx.GraphProto) -> None:
        """`value`.softmax8.losses (16 for 16 bits), float32 (candidates,), of a batch's sample; .rows, int64 (1,)."""
        super().append(graph)
        prefix = f"{self.value}.softmax{self.bits}"
        if has(graph, f"{prefix}.losses"):
            return
        append_losses(graph, prefix, matrix(graph, self.value), GRIDS[self.bits])
        add_outputs(graph, [f"{prefix}.losses"])
        add_outputs(graph, [f"{prefix}.rows"], TensorProto.INT64)

    def update(self, outputs: Outputs) -> None:
        """Sums of losses."""
        super().update(outputs)
        if self.batch(outputs) is not None:
            losses, rows = (outputs[f"{self.value}.softmax{self.bits}.{end}"] for end in ("losses", "rows"))
            self.check_finite(losses)
            self.losses = self.losses + losses
            self.rows += int(rows[0])

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """The best candidate that the grid can have, cut to the extremes; UserError for one of other levels."""
        if spec.is_float or spec.qmax - spec.qmin + 1 not in (2**self.bits, 2**self.bits - 1):
            raise UserError(f"cross-entropy: {self.value} was observed for {self.bits}-bit integers, not {spec}")
        low, high = self.with_zero(self.low, self.high)
        ends = candidates()
        allowed = -ends[:, 0] == ends[:, 1] if spec.symmetric else np.ones(len(ends), np.bool_)
        best = ends[np.argmin(np.where(allowed, self.losses, np.inf))]
        return np.maximum(low, best[0]), np.minimum(high, best[1])

    def state(self) -> State:
        """low, high, losses, rows."""
        own = super().state()
        return own | {"losses": self.losses, "rows": np.array(self.rows)} if own else {}

    def restore(self, state: State) -> None:
        """From `state`."""
        super().restore(state)
        self.losses, self.rows = state.get("losses", np.zeros(len(self.losses))), int(state.get("rows", 0))
