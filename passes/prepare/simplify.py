"""Forms that exporters write and runtimes do not fuse, as those that they do; the numbers stay."""

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, add_initializer, insert_before, producer_of, small_array

# Operand positions at which a constant of this value changes nothing.
_NEUTRAL = {
    "And": ((0, 1), True),
    "Or": ((0, 1), False),
    "Mul": ((0, 1), 1),
    "Add": ((0, 1), 0),
    "Div": ((1,), 1),
    "Sub": ((1,), 0),
}
_MOVES = {"Unsqueeze", "Squeeze", "Expand", "Reshape", "Slice", "Transpose", "Identity"}
_ROOM = 2.0**15  # scores up to this, half of what float16 can hold, must not make a masked one infinite


def divide(model: ir.Model, decide: Decide) -> None:
    """x * (1 / d) becomes x / d, the end of a normalization as runtimes know it (equal within a rounding).

    A Reciprocal stays where anything else than such a Mul reads it.
    """
    divided = 0
    for node in list(model.graph):
        if node.op_type != "Reciprocal" or node.domain != "":
            continue
        reason = _other_reader(node)
        if reason:
            decide(node.name or "", "kept", reason)
            continue
        for product, position in node.outputs[0].uses():
            factor = product.inputs[1 - position]
            product.op_type = "Div"
            product.replace_input_with(0, factor)
            product.replace_input_with(1, node.inputs[0])
            divided += 1
        model.graph.remove(node, safe=True)
    if divided:
        decide("", "simplified", f"{divided} Mul by a Reciprocal became Div", nodes=divided)


def _other_reader(node: ir.Node) -> str:
    """Why a Reciprocal stays, or an empty string."""
    result = node.outputs[0]
    if result.is_graph_output() or not result.uses():
        return f"the Reciprocal is {'a graph output' if result.is_graph_output() else 'unused'}"
    for reader, _ in result.uses():
        if (reader.op_type, reader.domain, reader.graph) != ("Mul", "", node.graph):
            return f"the Reciprocal is also read by {reader.op_type} {reader.name}"
        if reader.inputs[0] is reader.inputs[1]:
            return f"Mul {reader.name} squares the Reciprocal"
    return ""


def remove_neutral(model: ir.Model, decide: Decide) -> None:
    """Bypass And(x, True), Or(x, False), x * 1, x / 1, x + 0 and x - 0 with a constant that cannot widen x."""
    removed = 0
    for node in list(model.graph):
        place = _neutral(node)
        if place is None or node.outputs[0].is_graph_output():
            continue
        kept, constant = node.inputs[1 - place], node.inputs[place]
        assert kept is not None
        assert constant is not None
        rank = len(constant.shape or ())
        if rank and (kept.shape is None or len(kept.shape) < rank):
            decide(node.name or "", "kept", f"the constant of {node.op_type} may give its result a higher rank")
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], kept)
        model.graph.remove(node, safe=True)
        removed += 1
    if removed:
        decide("", "removed", f"{removed} nodes with a constant that changes nothing", nodes=removed)


def _neutral(node: ir.Node) -> int | None:
    """The position of the operand that changes nothing."""
    if node.domain != "" or node.op_type not in _NEUTRAL:
        return None
    positions, wanted = _NEUTRAL[node.op_type]
    for position in positions:
        array = small_array(node.inputs[position], 1)
        if array is not None and array.size == 1 and array.item() == wanted:
            return position
    return None


def remove_guards(model: ir.Model, decide: Decide) -> None:
    """Bypass Where(IsNaN(s), 0, s) behind s = Softmax(scores + mask), mask = Where(_, finite, finite).

    A softmax gives NaN for rows that are -inf throughout, which a mask of finite constants does not make. The one
    difference: where scores are NaN or infinite already (or beyond 2^15 in a type that has no room below the mask, in
    which case the guard stays), NaN stays NaN.
    """
    removed = 0
    for node in list(model.graph):
        softmax = _guarded(node)
        if softmax is None or node.outputs[0].is_graph_output():
            continue
        reason = _can_be_infinite(softmax)
        if reason:
            decide(node.name or "", "kept", reason)
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], softmax.outputs[0])
        model.graph.remove(node, safe=True)
        removed += 1
    if removed:
        decide("", "removed", f"{removed} guards against NaN behind finite masks", nodes=removed)


def _guarded(node: ir.Node) -> ir.Node | None:
    """The Softmax whose NaNs the Where replaces by a constant."""
    if node.op_type != "Where" or node.domain != "" or small_array(node.inputs[1], 1) is None:
        return None
    test, value = node.inputs[0], node.inputs[2]
    check = producer_of(test)
    softmax = producer_of(value)
    if check is None or check.op_type != "IsNaN" or check.inputs[0] is not value:
        return None
    rank = len(node.inputs[1].shape or ()) if node.inputs[1] is not None else 0
    fits = not rank or (value is not None and value.shape is not None and len(value.shape) >= rank)
    return softmax if softmax is not None and softmax.op_type == "Softmax" and fits else None


def _can_be_infinite(softmax: ir.Node) -> str:
    """Why a row of the Softmax may be -inf throughout, or an empty string."""
    scores = softmax.inputs[0]
    total = producer_of(scores)
    if total is None or total.op_type != "Add" or total.domain != "":
        return "no mask is added before the Softmax"
    masks = [found for value in total.inputs if (found := _mask(value)) is not None]
    if not masks:
        return "the mask is not made by a Where of two constants"
    for array in masks[0]:
        with np.errstate(over="ignore"):
            low = array.astype(np.float64).min(initial=0)
            if not np.isfinite(np.array(low - _ROOM).astype(array.dtype)) or not np.isfinite(array).all():
                return f"masked scores may be infinite: the mask holds {low:g} in {array.dtype}"
    return ""


def _mask(value: ir.Value | None) -> list[np.ndarray] | None:
    """The two constants that the mask is made of."""
    node = producer_of(value)
    while node is not None and node.domain == "" and node.op_type in _MOVES:
        node = producer_of(node.inputs[0])
    if node is None or node.op_type != "Where" or node.domain != "":
        return None
    arrays = [small_array(branch) for branch in node.inputs[1:]]
    return [array for array in arrays if array is not None] if all(array is not None for array in arrays) else None


def sign_tables(model: ir.Model, decide: Decide) -> None:
    """Concat(-a, b) * t becomes Concat(a, b) * (±t) where several products share the table t (rotary embeddings).

    Exact: a sign moves from one factor to the other. One Mul of t replaces the Neg of every product.
    """
    names = Names(model)
    found: dict[tuple[ir.Value, tuple[float, ...]], list[tuple[ir.Node, ir.Node]]] = defaultdict(list)
    for node in model.graph:
        for position in (0, 1):
            signs = _signs(node, position)
            table = node.inputs[1 - position] if signs else None
            if signs and table is not None:
                joined = node.inputs[position]
                assert joined is not None
                found[table, signs].append((node, joined.producer()))  # type: ignore[arg-type]
                break
    negations = 0
    for (table, signs), products in found.items():
        if len(products) < 2:
            continue
        assert table.dtype is not None
        array = np.array(signs).astype(table.dtype.numpy())
        factor = add_initializer(model.graph, names.fresh(f"{table.name}_signs"), ir.tensor(array, dtype=table.dtype))
        name = names.fresh(f"{table.name}_signed")
        signed = insert_before(products[0][0], "Mul", [table, factor], name=name, output=name)
        signed.shape, signed.type = table.shape, table.type
        for product, concat in products:
            negations += _drop_signs(concat)
            product.replace_input_with(0 if product.inputs[0] is table else 1, signed)
    if negations:
        decide("", "simplified", f"the signs of {negations} Neg went into the tables they meet", nodes=negations)


def _drop_signs(concat: ir.Node) -> int:
    """Join what the Neg nodes read in their place; how many there were."""
    negations = 0
    for i, part in enumerate(concat.inputs):
        negation = producer_of(part)
        if negation is not None and negation.op_type == "Neg":
            concat.replace_input_with(i, negation.inputs[0])
            negations += 1
    return negations


def _signs(node: ir.Node, position: int) -> tuple[float, ...]:
    """The signs along the last axis of Mul's operand, a Concat with negated parts that nobody else reads; or none."""
    if node.op_type != "Mul" or node.domain != "":
        return ()
    joined, table = node.inputs
    if position:
        joined, table = table, joined
    concat = producer_of(joined)
    if joined is None or concat is None or concat.op_type != "Concat" or len(joined.uses()) > 1:
        return ()
    if joined.is_graph_output() or joined.shape is None or table is None or not table.shape or table.dtype is None:
        return ()
    if concat.attributes["axis"].as_int() not in (-1, len(joined.shape) - 1):
        return ()
    signs: list[float] = []
    for part in concat.inputs:
        producer = producer_of(part)
        width = part.shape[-1] if part is not None and part.shape else None
        if not isinstance(width, int):
            return ()
        negated = producer is not None and producer.op_type == "Neg" and producer.domain == ""
        signs += [-1.0 if negated else 1.0] * width
    return tuple(signs) if -1.0 in signs and table.shape[-1] == len(signs) else ()
