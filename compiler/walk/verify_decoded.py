"""Decoded weights against their codes: each DequantizeLinear runs by itself, wherever its reader lies."""

import numpy as np
import onnx_ir as ir

from qcompile.compiler.results.errors import NodeError
from qcompile.compiler.walk.extract import extract
from qcompile.passes.affine import Array
from qcompile.passes.errors import UserError
from qcompile.passes.state import node_state, set_node
from qcompile.runtime.sessions import run

# A code times its scale, in the element type of the scale: only that type's own rounding may differ.
_EXACT = {ir.DataType.FLOAT16: 2e-3, ir.DataType.BFLOAT16: 1e-2}


def check_decoded(model: ir.Model, provider: str) -> list[NodeError]:
    """Errors of weights that are decoded before their reader, of the weight itself: ‖Ŵ - W‖ / ‖W‖.

    UserError where ONNX Runtime decodes something else than what the codes stand for.
    """
    found = []
    for node in model.graph:
        decoded = node_state(node).decoded
        if decoded is None:
            continue
        set_node(node, decoded=None)
        value = node.outputs[0]
        (given,) = run(extract(model, [], [value]).session(provider), [str(value.name)], {})
        own, wanted = decoded.dequantize(), decoded.wanted()
        exact = _ratio(np.asarray(given, np.float32), own)
        if not exact <= _EXACT.get(ir.DataType.from_numpy(given.dtype), 1e-5):
            raise UserError(
                f"node {decoded.reader}: its decoded weight differs from its codes by {exact:.1e} in this ONNX "
                "Runtime; please report it with the model"
            )
        found.append(NodeError(decoded.reader, _ratio(own, wanted), exact, weights=wanted.size))
    return found


def _ratio(a: Array, b: Array) -> float:
    difference, reference = float(np.linalg.norm(a - b)), float(np.linalg.norm(b))
    return difference / reference if reference else float(difference > 0)
