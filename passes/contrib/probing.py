"""What a few nodes compute, told by running them on small inputs.

Exporters write masks and rotations in dozens of ways. Their numbers on small inputs say what they are, whatever way.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from qcompile.passes.graph import is_constant

Array = npt.NDArray[Any]
_NODES = 400  # behind one value: an exporter's mask has forty
_ELEMENTS = 1 << 20  # of a constant among them


def ancestors(value: ir.Value, stop: frozenset[ir.Value] = frozenset()) -> list[ir.Node] | None:
    """The nodes that a value comes from, in order, none behind those of `stop`; None where they are too many."""
    found: dict[ir.Node, None] = {}
    stack: list[tuple[ir.Value | None, bool]] = [(value, False)]
    while stack:
        own, done = stack.pop()
        node = own.producer() if own is not None and own not in stop else None
        if node is None or node in found:
            continue
        if done:
            found[node] = None
            continue
        if len(stack) > _NODES * 8 or len(found) > _NODES:
            return None
        stack.append((own, True))
        stack.extend((operand, False) for operand in node.inputs)
    return list(found)


def leaves(nodes: Sequence[ir.Node]) -> list[ir.Value]:
    """What the nodes read that none of them makes and that is no constant, in order."""
    made = {value for node in nodes for value in node.outputs}
    read = dict.fromkeys(value for node in nodes for value in node.inputs if value is not None)
    return [value for value in read if value not in made and not is_constant(value)]


def evaluate(values: Sequence[ir.Value], feeds: Mapping[ir.Value, Array]) -> list[Array] | None:
    """The arrays that values hold where those of `feeds` are as given; None where that cannot be told.

    By onnx's reference evaluator: standard operators without bodies, and constants of no great size, alone.
    """
    stop = frozenset(feeds)
    nodes: dict[ir.Node, None] = {}
    for value in values:
        own = ancestors(value, stop)
        if own is None:
            return None
        nodes |= dict.fromkeys(own)
    if any(
        node.domain != "" or any(a.type == ir.AttributeType.GRAPH for a in node.attributes.values()) for node in nodes
    ):
        return None
    constants = dict.fromkeys(v for node in nodes for v in node.inputs if is_constant(v) and v not in stop)
    if set(leaves(list(nodes))) - set(feeds) or any(
        v.const_value.size > _ELEMENTS for v in constants if v and v.const_value
    ):
        return None
    own_feeds = {str(value.name): array for value, array in feeds.items()}
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "probe",
        [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in own_feeds.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(str(value.name)) for value in values],
        [
            onnx.numpy_helper.from_array(np.asarray(v.const_value.numpy()), str(v.name))
            for v in constants
            if v and v.const_value
        ],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", _opset(values[0]))])
    try:
        with np.errstate(all="ignore"):
            return [np.asarray(array) for array in ReferenceEvaluator(model).run(None, own_feeds)]
    except Exception:  # whatever the evaluator does not know
        return None


def _opset(value: ir.Value) -> int:
    node = value.producer()
    graph = node.graph if node is not None else None
    return int((graph.opset_imports if graph is not None else {}).get("", 21))
