"""Grouped-query attention as exporters write it: where it is, and which heads it repeats."""

import itertools
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.passes.graph import small_array
from qcompile.passes.prepare.sizes import named_sizes


@dataclass(frozen=True, eq=False)
class Repeated:
    """A value (batch, groups · repeats, rows, width) that has each head of `single` (batch, groups, 1, …) repeated."""

    single: ir.Value
    groups: int
    repeats: int


@dataclass(frozen=True, eq=False)
class Attention:
    """result = Softmax(scale (query @ keys) + mask) @ values.

    spine: the nodes from the product with the keys to the one with the values. scales: those that scale the query
    before it, turn: those that scale and transpose the keys. All in order.
    masks: the nodes of the spine that add a mask, with its position.
    """

    query: ir.Value
    keys: Repeated
    values: Repeated
    spine: list[ir.Node]
    scales: list[ir.Node]
    turn: list[ir.Node]
    masks: list[tuple[ir.Node, int]]


def repeated(value: ir.Value | None) -> Repeated | None:
    """What Reshape(Expand(Unsqueeze(x, 2))) repeats, told by the sizes after each of the three."""
    results = repetition(value)
    if results is None:
        return None
    joined, wide, single = (named_sizes(result) for result in results)
    if len(wide) != 5 or None in wide or not isinstance(wide[1], int) or not isinstance(wide[2], int):
        return None
    batch, groups, _, rows, width = wide
    if single != [batch, groups, 1, rows, width] or joined != [batch, wide[1] * wide[2], rows, width]:
        return None
    return Repeated(results[2], wide[1], wide[2])


def repetition(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value] | None:
    """What the nodes of Reshape(Expand(Unsqueeze(x))) give, the last first."""
    results: list[ir.Value] = []
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        node = value.producer() if value is not None else None
        if node is None or (node.op_type, node.domain) != (op_type, ""):
            return None
        results.append(node.outputs[0])
        value = node.inputs[0]
    return results[0], results[1], results[2]


def find_attention(node: ir.Node, values: Repeated) -> Attention | str:
    """The attention that ends in this product with the values, or why it cannot be told."""
    scores = _back(node, 0)
    if not scores or scores[-1][0].op_type != "MatMul":
        return "no product with keys is found before the probabilities"
    product = scores[-1][0]
    turn = _back(product, 1)
    step, position = turn[-1] if turn else (product, 1)
    keys = repeated(step.inputs[position])
    if keys is None or (keys.groups, keys.repeats) != (values.groups, values.repeats):
        return "the keys do not repeat heads as the values do"
    if [step.attributes["perm"].as_ints() for step, _ in turn if step.op_type == "Transpose"] != [(0, 1, 3, 2)]:
        return "the keys are not transposed once"
    scales = list(itertools.takewhile(lambda found: found[0].op_type in ("Mul", "Div"), _back(product, 0)))
    step, position = scales[-1] if scales else (product, 0)
    query = step.inputs[position]
    if query is None or len(query.shape or ()) != 4 or not isinstance(named_sizes(query)[3], int):
        return "the shape of the query is unknown"
    masks = [(step, 1 - position) for step, position in scores if step.op_type == "Add"]
    spine, before, turned = ([step for step, _ in found[::-1]] for found in ([(node, 0), *scores], scales, turn))
    return Attention(query, keys, values, spine, before, turned, masks)


def _back(node: ir.Node, position: int) -> list[tuple[ir.Node, int]]:
    """The nodes before an input, each with the operand to go on from, up to a MatMul or what cannot be followed."""
    steps: list[tuple[ir.Node, int]] = []
    value = node.inputs[position]
    while value is not None and len(value.uses()) == 1 and not value.is_graph_output():
        step = value.producer()
        onward = _onward(step) if step is not None and step.domain == "" else None
        if step is None or onward is None:
            break
        steps.append((step, onward))
        if step.op_type == "MatMul":
            break
        value = step.inputs[onward]
    return steps


def _onward(node: ir.Node) -> int | None:
    """The operand to follow through a node that treats all heads alike."""
    if node.op_type in ("MatMul", "Transpose"):
        return 0
    if node.op_type == "Softmax":
        return 0 if node.attributes.get_int("axis", -1) in (-1, 3) else None
    if node.op_type in ("Mul", "Div"):
        scalars = [small_array(value, 1) is not None for value in node.inputs]
        return 0 if scalars[1] else 1 if scalars[0] and node.op_type == "Mul" else None
    if node.op_type == "Add":
        alike = [_same_for_heads(value) for value in node.inputs]
        return alike.index(False) if sum(alike) == 1 else None
    return None


def _same_for_heads(value: ir.Value | None) -> bool:
    """Whether a mask (…, heads, rows, keys) has one entry for all heads."""
    if value is None or value.shape is None or len(value.shape) > 4:
        return False
    return len(value.shape) < 3 or value.shape[-3] == 1
