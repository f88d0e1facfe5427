"""A head that is its embedding turned round: exporters that fold the Transpose store the table twice."""

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, is_constant, turned_before
from qcompile.passes.linears import find_embeddings, find_linears
from qcompile.passes.tensors import read

_MIN_BYTES = 1024
_ROWS = 1024  # compared at a time


def tie_heads(model: ir.Model, decide: Decide) -> None:
    """Replace a MatMul's weight (K, V) that equals an embedding's table (V, K) by a Transpose of that table."""
    names = Names(model)
    tables = {embedding.table: None for embedding in find_embeddings(model.graph)}
    weights = {linear.weight: None for linear in find_linears(model.graph) if not linear.transposed}
    for table in tables:
        turned: ir.Value | None = None
        for weight in list(weights):
            if weight in tables or not is_constant(weight) or not _turned(table.const_value, weight.const_value):
                continue
            if weight.is_graph_output() or any(node.graph is not model.graph for node, _ in weight.uses()):
                continue
            if turned is None:
                first = next(node for node in model.graph if weight in node.inputs)
                turned = turned_before(first, table, names.fresh(f"{table.name}_transpose"))
            ir.convenience.replace_all_uses_with(weight, turned)
            del weights[weight]
            model.graph.initializers.pop(weight.name or "")
            decide(weight.name or "", "tied", f"the transposed values of {table.name}")


def _turned(table: ir.TensorProtocol | None, weight: ir.TensorProtocol | None) -> bool:
    """Whether weight is the transpose of table."""
    if table is None or weight is None or table.dtype != weight.dtype or table.nbytes < _MIN_BYTES:
        return False
    if tuple(table.shape) != tuple(reversed(tuple(weight.shape))):
        return False
    a, b = read(table), read(weight)
    return all(np.array_equal(a[i : i + _ROWS], b[:, i : i + _ROWS].T) for i in range(0, len(a), _ROWS))
