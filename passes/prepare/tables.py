"""Tables that are stored by columns: a head's weight that its embedding looks up through a Transpose, and its like."""

import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, turned_before
from qcompile.passes.linears import dimensions, is_weight, on_a_grid, turns
from qcompile.passes.prepare.writer import Writer
from qcompile.passes.tensors import lazy

# Of a value that is a matrix or its transpose: which of both.
Views = dict[ir.Value, bool]


def turn_tables(model: ir.Model, decide: Decide) -> None:
    """Let lookups read their table (V, K) itself, and whatever multiplies by it one Transpose of it.

    A matrix has views: itself, and what Transposes make of a view. A Gather along axis 0 looks up rows of the view that
    it reads, one along axis 1 rows of that view's transpose.
    Case 1: the form whose rows are looked up is not the stored one: the constant is turned round, lazily.
    Case 2: a Gather along axis 1 becomes one along axis 0, and a Transpose of what it gives.
    Case 3: a view behind several Transposes becomes the constant, or the one Transpose of it.
    Lookups of both forms keep the form that most of them read; the others read the Transpose, as products do.
    """
    names = Names(model)
    for weight in list(model.graph.initializers.values()):
        if is_weight(weight) and not weight.is_graph_output():
            views = _views(weight)
            if any(view.is_graph_output() for view in views):
                continue
            found = [_looked_up(node, form) for node, form, _ in _readers(views)]
            turned = found.count(True) > found.count(False)
            if turned or _is_roundabout(views):
                _settle(model.graph, weight, views, names, turned=turned)
                decide(
                    weight.name or "", "turned", "stored as its lookups read it" if turned else "read without detours"
                )


def _views(weight: ir.Value) -> Views:
    """Every view of the weight, and whether it is the transpose."""
    found, waiting = {weight: False}, [weight]
    for value in waiting:
        for node in (use.node for use in value.uses()):
            if turns(node) and node.graph is weight.graph and node.outputs[0] not in found:
                found[node.outputs[0]] = not found[value]
                waiting.append(node.outputs[0])
    return found


def _readers(views: Views) -> list[tuple[ir.Node, bool, int]]:
    """What reads views and makes no other of them: the node, the form that it reads, and as which input."""
    uses = ((use.node, form, use.idx) for view, form in views.items() for use in view.uses())
    return [(node, form, place) for node, form, place in uses if node.outputs[0] not in views]


def _looked_up(node: ir.Node, form: bool) -> bool | None:
    """The form whose rows the node looks up; None where it is no lookup, or one that stays as it is: also of scales."""
    indices = node.inputs[1] if node.op_type == "Gather" and node.domain == "" else None
    if indices is None or indices.const_value is not None or on_a_grid(node.outputs[0]):
        return None
    if _axis(node) == 0:
        return form
    return None if indices.shape is None else not form


def _axis(node: ir.Node) -> int:
    return node.attributes.get_int("axis", 0) % 2


def _is_roundabout(views: Views) -> bool:
    """Whether a reader sees the weight behind two Transposes and more, or by columns (Cases 2 and 3)."""
    by_columns = any(_looked_up(node, form) not in (None, form) for node, form, _ in _readers(views))
    weight, *turned = views
    return by_columns or any(weight not in view.producer().inputs for view in turned)  # type: ignore[union-attr]


def _settle(graph: ir.Graph, weight: ir.Value, views: Views, names: Names, *, turned: bool) -> None:
    readers = _readers(views)
    if turned:
        _turn(weight)
    other: ir.Value | None = None
    for node, form, place in readers:
        looked_up = _looked_up(node, form)
        if looked_up == turned and _axis(node) == 1:  # Case 2
            _by_rows(node, weight, names, graph)
        elif form == turned:
            node.replace_input_with(place, weight)
        else:
            if other is None:
                other = turned_before(graph[0], weight, names.fresh(f"{weight.name}_transpose"))
            node.replace_input_with(place, other)
    for view in reversed(list(views)[1:]):
        turn = view.producer()
        assert turn is not None
        graph.remove(turn, safe=True)


def _turn(weight: ir.Value) -> None:
    """Case 1: the constant becomes its transpose."""
    assert weight.const_value is not None
    shape = tuple(reversed(dimensions(weight)))
    weight.const_value = lazy(weight.const_value, lambda array: array.T, shape=shape, name=weight.name)
    weight.shape = ir.Shape(shape)


def _by_rows(node: ir.Node, table: ir.Value, names: Names, home: ir.Graph) -> None:
    """Case 2: (K, …) from (…, K)."""
    indices = node.inputs[1]
    assert indices is not None
    assert indices.shape is not None
    rank, write = len(indices.shape), Writer(node, names, home)
    rows = write.op("Gather", [table, indices], "rows", {"axis": 0})
    write.end(write.transpose(rows, [rank, *range(rank)], "columns"))
