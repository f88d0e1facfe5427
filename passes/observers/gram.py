"""The Gram matrix of an activation, and its largest magnitudes: what error-compensating passes need."""

from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper

from qcompile.passes.affine import Array
from qcompile.passes.observers.base import Observer, Outputs, State
from qcompile.passes.observers.nodes import add_outputs, constant, matrix
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.statistics import Statistics

_GRAM, _ABSMAX, _ROWS = ".gram", ".absmax", ".rows_seen"


class Gram(Observer):
    """XᵀX (K, K), max |x| (K,) and the number of rows of an activation X (…, K).

    others: more activations, whose rows are taken together with its own: those that the same weights multiply.
    """

    name: ClassVar[str] = "gram"

    def __init__(self, value: str, *others: str) -> None:
        super().__init__(value, axis=-1)
        self.others = others
        self.statistics: Statistics | None = None

    def append(self, graph: onnx.GraphProto) -> None:
        """`value`.gram (K, K) and `value`.absmax (K,), float32; `value`.rows_seen (1,), int64."""
        value = self.value
        rows, transposed = matrix(graph, value), f"{value}.transposed"
        if self.others:
            every = [rows, *(matrix(graph, other) for other in self.others)]
            rows = f"{value}.all_rows"
            graph.node.append(helper.make_node("Concat", every, [rows], axis=0))
        axis0 = constant(graph, "qcompile.axis0", [0])
        graph.node.extend(
            [
                helper.make_node("Transpose", [rows], [transposed], perm=[1, 0]),
                helper.make_node("MatMul", [transposed, rows], [value + _GRAM]),
                helper.make_node("Abs", [rows], [f"{value}.abs"]),
                helper.make_node("ReduceMax", [f"{value}.abs", axis0], [value + _ABSMAX], keepdims=0),
                helper.make_node("Shape", [rows], [value + _ROWS], end=1),
            ]
        )
        add_outputs(graph, [value + _ROWS], TensorProto.INT64)
        add_outputs(graph, [value + _GRAM, value + _ABSMAX])

    def update(self, outputs: Outputs) -> None:
        """Sums and maxima. The diagonal of the sums has every NaN, which a maximum may hide."""
        gram, absmax, rows = (outputs[self.value + end] for end in (_GRAM, _ABSMAX, _ROWS))
        if not rows[0]:
            return
        self.check_finite(absmax, gram.diagonal())
        own = self.statistics
        if own is None:
            self.statistics = Statistics(int(rows[0]), gram, absmax)
            return
        own.rows += int(rows[0])
        own.gram += gram
        np.maximum(own.absmax, absmax, out=own.absmax)

    def range(self, spec: ActivationSpec) -> tuple[Array, Array]:
        """Of each channel, symmetric: the sign of the largest value is not known."""
        assert self.statistics is not None
        return -self.statistics.absmax, self.statistics.absmax

    def state(self) -> State:
        """gram, absmax, rows."""
        own = self.statistics
        return {"gram": own.gram, "absmax": own.absmax, "rows": np.array(own.rows)} if own else {}

    def restore(self, state: State) -> None:
        """From `state`."""
        self.statistics = Statistics(int(state["rows"]), state["gram"], state["absmax"]) if state else None
