"""Products of a constant matrix in other forms than activation times (K, N): of more axes, or on the left."""

import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, decided, is_constant, take_over
from qcompile.passes.linears import dimensions
from qcompile.passes.prepare.constant_types import FLOATS
from qcompile.passes.prepare.writer import Writer
from qcompile.passes.state import set_node

# A weight with a smaller side is not worth two Transposes of what it meets on the right.
_WORTH = 32
_MIN_OPSET = 13  # the first in which Squeeze and Unsqueeze take their axes as an input


def turn_products(model: ir.Model, decide: Decide) -> int:
    """Bring MatMuls with a constant into the form x (…, K) times W (K, N).

    Case 1: leading axes of size 1 of a constant on the right go, (1, 1, K, N) is (K, N). Where they give the result
            more axes than x has, it gets them behind the product.
    Case 2: W x with W (N, K) on the left is (xᵀ Wᵀ)ᵀ. A Transpose that x comes from, or that alone reads the result,
            goes with the ones this would add.
    Others stay, with their reason: x of an unknown rank, a vector, a matrix for each index of a batch on the left, a
    small matrix on the left. Weights are turned by nodes that `fold_constants` makes constants of.
    Returns how many were changed.
    """
    names, fixed, changed = Names(model), decided(model), 0
    for node in list(model.graph.all_nodes()):
        if (node.op_type, node.domain) != ("MatMul", "") or model.opset_imports.get("", 0) < _MIN_OPSET:
            continue
        left, right = node.inputs
        if left is None or right is None or fixed.issuperset(node.inputs):
            continue
        if _is_factor(right):
            reason = _right(node, left, right, names, model.graph)
        elif _is_factor(left):
            reason = _left(node, left, right, names, model.graph)
        else:
            continue
        if reason:
            set_node(node, left=reason)
            decide(node.name or "", "skipped", reason)
        elif reason is not None:
            changed += 1
    if changed:
        decide("", "turned", f"{changed} products with a constant that was no (K, N) on the right", nodes=changed)
    return changed


def _is_factor(value: ir.Value) -> bool:
    return is_constant(value) and value.const_value is not None and value.const_value.dtype in FLOATS


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without leading ones, of two axes at least."""
    while len(shape) > 2 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _right(node: ir.Node, x: ir.Value, weight: ir.Value, names: Names, home: ir.Graph) -> str | None:
    """Case 1. Empty when it was changed, None when there was nothing to do, else the reason why not."""
    shape = dimensions(weight)
    if len(shape) == 1:
        return "its weight is a vector"
    short = _without_ones(shape)
    if short == shape:
        return None
    if x.shape is None:
        return f"the rank of its input is unknown, and its weight has {len(shape)} axes"
    write = Writer(node, names, home)
    product = write.op("MatMul", [x, write.reshape(weight, short, "weight")])
    write.end(write.unsqueeze(product, range(_missing(len(x.shape), len(shape), len(short))), "axes"))
    return ""


def _missing(rank: int, before: int, after: int) -> int:
    """Axes that a product with an operand of rank `rank` loses when its constant gets `after` axes for `before`."""
    return max(rank, before) - max(rank, after)


def _left(node: ir.Node, weight: ir.Value, x: ir.Value, names: Names, home: ir.Graph) -> str | None:
    """Case 2; as `_right`."""
    shape = dimensions(weight)
    short = _without_ones(shape)
    if len(shape) == 1:
        return "its weight is a vector"
    if len(short) > 2:
        return f"the constant is the left operand, a matrix for each of {short[0]}"
    if min(short) < _WORTH:
        return f"the constant is the left operand, and {short[0]} x {short[1]} too small to turn its input round for it"
    if x.shape is None:
        return "the constant is the left operand, and the rank of the right one is unknown"
    rank, write = len(x.shape), Writer(node, names, home)
    turned = write.transpose(write.reshape(weight, short, "weight"), [1, 0], "weight_transposed")
    product = write.op("MatMul", [x if rank == 1 else _swapped(write, x, rank), turned])
    back = _back(node, rank) if 1 < rank >= len(shape) else None
    if back is not None and back.graph is not None and node.graph is not None:
        take_over(back.outputs[0], product, names)
        back.graph.remove(back, safe=True)
        node.graph.remove(node, safe=True)
        return ""
    product = product if rank == 1 else write.transpose(product, _swap(rank), "output_transposed")
    write.end(write.unsqueeze(product, range(_missing(rank, len(shape), 2)), "axes"))
    return ""


def _swap(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2]


def _swaps(node: ir.Node | None, rank: int) -> bool:
    """Whether a node is a Transpose of the last two axes."""
    if node is None or (node.op_type, node.domain) != ("Transpose", ""):
        return False
    return list(node.attributes.get_ints("perm") or reversed(range(rank))) == _swap(rank)


def _swapped(write: Writer, x: ir.Value, rank: int) -> ir.Value:
    """x with its last two axes swapped: what it is a Transpose of, or a new one."""
    producer = x.producer()
    if producer is not None and _swaps(producer, rank) and producer.inputs[0] is not None:
        return producer.inputs[0]
    return write.transpose(x, _swap(rank), "input_transposed")


def _back(node: ir.Node, rank: int) -> ir.Node | None:
    """The Transpose that alone reads the result and undoes it."""
    output, uses = node.outputs[0], list(node.outputs[0].uses())
    if output.is_graph_output() or len(uses) != 1 or uses[0].node.graph is not node.graph:
        return None
    return uses[0].node if _swaps(uses[0].node, rank) else None
