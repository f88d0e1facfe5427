"""Grouped-query attention without copies of the keys and values for every head."""

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, add_initializer, insert_before, take_over
from qcompile.passes.prepare.attention import Attention, find_attention, repeated
from qcompile.passes.prepare.sizes import named_sizes, sizes


def group_heads(model: ir.Model, decide: Decide) -> None:
    """Attend with queries (batch, groups, repeats, rows, width) to keys and values (batch, groups, 1, rows, width).

    MatMul broadcasts what Expand and Reshape write out for each head, the whole cache `repeats` times for each token.
    The sizes that prove the repetition are those of the graph's values, symbols by name.
    """
    names = Names(model)
    grouped = 0
    added: dict[object, ir.Value] = {}
    for node in list(model.graph):
        values = repeated(node.inputs[1]) if (node.op_type, node.domain) == ("MatMul", "") else None
        if values is None:
            continue
        found = find_attention(node, values)
        if isinstance(found, str):
            decide(node.name or "", "kept", found)
            continue
        _group(model.graph, found, names, added)
        grouped += 1
    if grouped:
        decide(
            "", "simplified", f"{grouped} attentions read keys and values once for each group of heads", nodes=grouped
        )


def _group(graph: ir.Graph, found: Attention, names: Names, added: dict[object, ir.Value]) -> None:
    """Rewrite the attention; `added` holds what several of them share."""
    groups, repeats, (product, *between, last) = found.keys.groups, found.keys.repeats, found.spine
    query, first = found.query, (*found.scales, product)[0]
    shape = _constant(graph, [0, groups, repeats, -1, named_sizes(query)[3]], "grouped", names, added)
    name = names.fresh(f"{query.name}_grouped")
    grouped = insert_before(first, "Reshape", [query, shape], name=name, output=name)
    grouped.type, grouped.shape = query.type, _in_groups(query, groups, repeats)
    first.replace_input_with(first.inputs.index(query), grouped)
    for step in found.turn:
        for i, value in enumerate(step.inputs):
            if repeated(value) is not None:
                step.replace_input_with(i, found.keys.single)
        if step.op_type == "Transpose":
            step.attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 2, 4, 3])
        step.outputs[0].shape = _in_groups(step.outputs[0], groups, 1)
    for step, position in found.masks:
        mask = step.inputs[position]
        if mask is not None and len(mask.shape or ()) == 4:
            step.replace_input_with(position, _widened(graph, step, mask, names, added))
    for step in (*found.scales, product, *between):
        if step.op_type == "Softmax":
            step.attributes["axis"] = ir.AttrInt64("axis", -1)
        step.outputs[0].shape = _in_groups(step.outputs[0], groups, repeats)
    _close(graph, found, last, names, added)


def _close(graph: ir.Graph, found: Attention, last: ir.Node, names: Names, added: dict[object, ir.Value]) -> None:
    """The product with the values, and its heads side by side again.

    A Transpose (0, 2, 1, 3) that goes straight into a Reshape takes the five axes itself.
    """
    groups, repeats, output, name = found.keys.groups, found.keys.repeats, last.outputs[0], last.name or ""
    place = _merging(output) or last
    inner = names.fresh(f"{output.name}_grouped")
    result = insert_before(place, "MatMul", [last.inputs[0], found.values.single], name=name, output=inner)
    result.type, result.shape = output.type, _in_groups(output, groups, repeats)
    if place is not last:
        moved, name = place.outputs[0], place.name or ""
        new = insert_before(
            place, "Transpose", [result], {"perm": [0, 3, 1, 2, 4]}, name=name, output=names.fresh(f"{name}_grouped")
        )
        take_over(moved, new, names)
        if result.shape is not None:
            new.shape = ir.Shape([result.shape[i] for i in (0, 3, 1, 2, 4)])
        graph.remove([place, last], safe=True)
        return
    shape = _constant(graph, [0, groups * repeats, -1, named_sizes(output)[3]], "joined", names, added)
    new = insert_before(last, "Reshape", [result, shape], name=f"{name}_heads", output=names.fresh(f"{name}_heads"))
    take_over(output, new, names)
    graph.remove(last, safe=True)


def _merging(value: ir.Value) -> ir.Node | None:
    """The Transpose (0, 2, 1, 3) that alone reads the value, if a Reshape to known sizes alone reads what it gives."""
    nodes = []
    for op_type in ("Transpose", "Reshape"):
        if len(value.uses()) != 1 or value.is_graph_output():
            return None
        node, position = next(iter(value.uses()))
        if (node.op_type, node.domain, position) != (op_type, "", 0):
            return None
        nodes.append(node)
        value = node.outputs[0]
    transpose, reshape = nodes
    wanted = sizes(reshape.inputs[1])
    perm = transpose.attributes.get("perm")
    # A 0 copies the size of an axis by its number, which is another one from the third of five axes on.
    return transpose if wanted and 0 not in wanted[2:] and perm and perm.as_ints() == (0, 2, 1, 3) else None


def _in_groups(value: ir.Value, groups: int, repeats: int) -> ir.Shape | None:
    """(batch, heads, …) as (batch, groups, repeats, …)."""
    return ir.Shape([value.shape[0], groups, repeats, *value.shape[2:]]) if value.shape is not None else None


def _constant(
    graph: ir.Graph, numbers: list[object], name: str, names: Names, added: dict[object, ir.Value]
) -> ir.Value:
    key = (name, *numbers)
    if key not in added:
        array = np.array(numbers, np.int64)
        added[key] = add_initializer(graph, names.fresh(f"{name}_shape"), ir.tensor(array))
    return added[key]


def _widened(graph: ir.Graph, place: ir.Node, mask: ir.Value, names: Names, added: dict[object, ir.Value]) -> ir.Value:
    """A mask (batch, 1, rows, keys) as (batch, 1, 1, rows, keys)."""
    if mask not in added:
        axis = _constant(graph, [1], "mask_axis", names, added)
        name = names.fresh(f"{mask.name}_grouped")
        added[mask] = insert_before(place, "Unsqueeze", [mask, axis], name=name, output=name)
        added[mask].type, added[mask].shape = mask.type, _in_groups(mask, 1, 1)
    return added[mask]
