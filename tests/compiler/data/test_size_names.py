"""Names of sizes that the data contradicts."""

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.size_names import drop_contradicted


def _model() -> ir.Model:
    return ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["": 21]>
        g (float[n,t] a, float[n,u] b, float[m] c) => (float[n,t] y, float[n,u] z, float[m] d)
        <float[n,t] h> { h = Relu(a) y = Neg(h) z = Neg(b) d = Neg(c) }"""
    )


def _names(model: ir.Model) -> set[str | None]:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {size.value for value in values for size in value.shape or () if isinstance(size, ir.SymbolicDim)}


@pytest.mark.parametrize("rows", [(2, 2), (2, 3)])
def test_a_name_of_two_sizes_is_dropped_everywhere(rows: tuple[int, int]) -> None:
    model = _model()
    feeds = {"a": np.zeros((rows[0], 4), np.float32), "b": np.zeros((rows[1], 5), np.float32), "c": np.zeros(7)}
    told = drop_contradicted(model, [Batch(feeds, 2)])
    assert ("'n'" in told) == (rows[0] != rows[1])
    assert _names(model) == ({"n", "t", "u", "m"} if rows[0] == rows[1] else {None, "t", "u", "m"})


def test_batches_may_differ_among_each_other() -> None:
    model = _model()
    batches = [Batch({"a": np.zeros((n, 4)), "b": np.zeros((n, 4 + n))}, n) for n in (1, 2)]
    assert drop_contradicted(model, batches) == ""
    assert _names(model) == {"n", "t", "u", "m"}
