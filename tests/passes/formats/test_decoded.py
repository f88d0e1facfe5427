"""passes/formats/decoded.py: where a weight is decoded that a body reads."""

import numpy as np
import onnx_ir as ir
import pytest
from preparing import parse, run

from qcompile.passes.formats.decoded import sink

K = 6
_DECODED = "w = DequantizeLinear <axis = 1> (q, s) "
_MATMUL, _GEMM = "MatMul(x, w)", "Gemm(x, w, b)"


def _if(product: str) -> str:
    return (
        f"g = If (c) <then_branch = t () => (float[2,{K}] t) {{ t = {product} }}, "
        f"else_branch = e () => (float[2,{K}] e) {{ e = Neg(x) }}> "
    )


def _loop(product: str) -> str:
    return (
        f"g = Loop (n, c, x) <body = l (int64 i, bool go, float[2,{K}] v) => (bool on, float[2,{K}] o) "
        f"{{ on = Identity(go) p = {product} o = Add(p, v) }}> "
    )


@pytest.mark.parametrize(
    ("body", "inside", "outside", "own"),
    [
        (_DECODED + _if(_MATMUL) + "y = Neg(g)", 1, 0, 2),  # Case 1
        (_DECODED + _loop(_MATMUL) + "y = Neg(g)", 1, 0, 2),
        (_DECODED + _if(_MATMUL) + "h = MatMul(x, w) y = Add(g, h)", 1, 1, 2),
        (_DECODED + _if(_GEMM) + "y = Neg(g)", 1, 0, 0),  # Case 2
        (_DECODED + _loop(_GEMM) + "y = Neg(g)", 0, 1, 0),  # Case 3
        ("a = Abs(s) w = DequantizeLinear <axis = 1> (q, a) " + _if(_MATMUL) + "y = Neg(g)", 0, 1, 0),
        (_DECODED + "y = MatMul(x, w)", 0, 1, 0),
    ],
)
def test_where_it_is_decoded(body: str, inside: int, outside: int, own: int) -> None:
    """inside, outside: nodes that decode, in bodies and in the main graph. own: initializers that bodies have."""
    random = np.random.default_rng(0)
    constants = {
        "q": random.integers(-8, 8, (K, K)).astype(np.int8),
        "s": random.uniform(0.1, 1, K).astype(np.float32),
        "b": random.standard_normal(K).astype(np.float32),
        "n": np.array(3),
    }
    read = {name: array for name, array in constants.items() if f"{name})" in body or f"{name}," in body}
    model = parse(body, inputs=f"float[2,{K}] x, bool c", outputs=f"float[2,{K}] y", **read)
    feeds = [{"x": random.standard_normal((2, K)).astype(np.float32), "c": np.array(c)} for c in (True, False)]
    before = [run(model, one) for one in feeds]
    sink(model)
    for one, wanted in zip(feeds, before, strict=True):
        np.testing.assert_array_equal(run(model, one), wanted)
    bodies = [graph for graph in model.graphs() if graph is not model.graph]
    assert sum(_decodes(graph) for graph in bodies) == inside
    assert _decodes(model.graph) == outside
    assert sum(len(graph.initializers) for graph in bodies) == own
    assert all(value.uses() for value in model.graph.initializers.values()), "nothing is left that no node reads"


def _decodes(graph: ir.Graph) -> int:
    return sum(node.op_type == "DequantizeLinear" for node in graph)
