"""Additive attention masks: values that hold numbers like -1e4, -3.4e38 or -inf beside ordinary ones."""

from collections.abc import Collection, Sequence

import onnx_ir as ir

from qcompile.passes.graph import is_constant
from qcompile.passes.tensors import largest

# From here on a number is what masks are filled with (-1e4, -65504, -1e9, the lowest float, -inf) rather than a score.
# An 8-bit grid that spans it has steps of 35 and more: it has no room for scores.
FILL = 9e3
_KNOWN = "qcompile.fill"
_GIVEN = "qcompile.infinities"

# What gives the numbers it reads, or sums and products of them, by the positions of the inputs that hold them.
_CARRIES: dict[str, tuple[int, ...]] = {
    "Where": (1, 2),
    **dict.fromkeys(("Add", "Sub", "Mul", "Max", "Min"), (0, 1)),
    **dict.fromkeys(("Neg", "Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand"), (0,)),
    **dict.fromkeys(("Slice", "Gather", "Split", "Tile", "Flatten", "Trilu", "ScatterND", "Clip"), (0,)),
    "Pad": (0, 2),
}
_ATTENTION = {"Attention", "MultiHeadAttention", "GroupQueryAttention", "GroupQueryAttentionF16"}
_PRODUCTS = {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "FusedMatMul", "LSTM", "GRU", "RNN"} | _ATTENTION
# Bodies that may multiply whatever they are handed.
_LOOPS = {"Loop", "Scan"}
_MEETS = _PRODUCTS | _LOOPS
# Query, key and value, the first inputs of an attention, are multiplied; masks and biases come behind them.
_OPERANDS = 3
# What gives finite numbers of infinite ones, or none: an infinite operand goes no further.
_BOUND = {"Softmax", "LogSoftmax", "Sigmoid", "HardSigmoid", "Tanh", "Clip", "Min", "Max", "Exp", "Erf"} | _ATTENTION
# What stands between the sum of scores and a mask and its Softmax.
_BETWEEN = {"Add", "Sub", "Where", "Mul", "Div", "Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze"} | {
    *("Max", "Min", "Clip")  # a lowest number for what a mask of the lowest float makes infinite
}


def holds_fill(value: ir.Value) -> bool:
    """Whether a constant of floats has a number of magnitude FILL and more, or an infinite one."""
    if value.const_value is None:
        return False
    if _KNOWN not in value.meta:
        value.meta[_KNOWN] = _holds_fill(value.const_value)
    return bool(value.meta[_KNOWN])


def _holds_fill(tensor: ir.TensorProtocol) -> bool:
    return tensor.dtype.is_floating_point() and tensor.dtype.bitwidth >= 16 and largest(tensor) >= FILL


def masked(model: ir.Model) -> set[ir.Value]:
    """The values of the main graph that hold, or may hold, the fill of a mask.

    Case 1: one that is computed from a constant with such a number, by sums, products, choices and moves alone.
    Case 2: what is added to the scores of an attention before its Softmax and comes out of no product: a mask, whatever
            it holds, also where it is an input of the model; and the sum.
    Case 3: an input of which the data is infinite somewhere (`mark_infinite`), and what carries it on.
    """
    found = {value for value in _added_to_scores(model) if value is not None}
    found |= {value for value in model.graph.inputs if _GIVEN in value.meta}
    for node in model.graph:
        if node.op_type in ("Constant", "ConstantOfShape") and _fills(node):
            found.update(node.outputs)
        carried = [node.inputs[i] for i in _carried(node) if i < len(node.inputs)]
        if any(own is not None and (own in found or (is_constant(own) and holds_fill(own))) for own in carried):
            found.update(node.outputs)
            found.update(own for own in carried if own is not None and is_constant(own) and holds_fill(own))
    return found


def mark_infinite(model: ir.Model, names: Collection[str]) -> None:
    """Have `masked` know the graph inputs of these names, which are fed infinities."""
    for value in model.graph.inputs:
        if value.name in names:
            value.meta[_GIVEN] = True


def reaches_product(value: ir.Value) -> bool:
    """Whether an infinity in a value would meet a product: it is the operand of one, or of what leads there.

    A sum before a Softmax leads to none. What a body makes of it is not followed out of the body.
    """
    reached, seen = [value], {value}
    for current in reached:  # grows while it is walked
        for use in current.uses():
            node = use.node
            packed = node.domain == "qcompile" and node.op_type.startswith("MatMul")
            if (packed or node.op_type in _MEETS) and not (node.op_type in _BOUND and use.idx >= _OPERANDS):
                return True
            if node.op_type in _BOUND or (node.op_type == "Where" and use.idx == 0):
                continue
            onward = [
                own for own in node.outputs if own not in seen and (own.dtype is None or own.dtype.is_floating_point())
            ]
            seen.update(onward)
            reached += onward
    return False


def _carried(node: ir.Node) -> Sequence[int]:
    """Positions of the inputs whose numbers are in the node's outputs."""
    if node.domain != "":
        return ()
    return range(len(node.inputs)) if node.op_type == "Concat" else _CARRIES.get(node.op_type, ())


def _fills(node: ir.Node) -> bool:
    numbers = [attribute for name, attribute in node.attributes.items() if name in ("value", "value_float")]
    for attribute in numbers:
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            return _holds_fill(tensor)
        if attribute.type == ir.AttributeType.FLOAT:
            return abs(attribute.as_float()) >= FILL
    return False


def _added_to_scores(model: ir.Model) -> set[ir.Value | None]:
    """Case 2: of each Add that leads to a Softmax, the operand that depends on no product beside one that does."""
    multiplied = _behind_products(model)
    found: set[ir.Value | None] = set()
    for node in model.graph:
        if node.op_type != "Softmax":
            continue
        stack, seen = [node.inputs[0]], set[ir.Node]()
        while stack:
            value = stack.pop()
            producer = value.producer() if value is not None else None
            if producer is None or producer in seen or producer.op_type not in _BETWEEN:
                continue
            seen.add(producer)
            if producer.op_type in ("Add", "Sub") and any(own in multiplied for own in producer.inputs):
                found.update(own for own in producer.inputs if own not in multiplied)
            stack.extend(own for own in producer.inputs if own in multiplied)
    return found


def _behind_products(model: ir.Model) -> set[ir.Value]:
    """The values that depend on a product."""
    found: set[ir.Value] = set()
    for node in model.graph:
        if node.op_type in _PRODUCTS or any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found
