"""Names of values: one for each, whatever graph it belongs to."""

import onnx_ir as ir

from qcompile.passes.graph import Decide


def unique_names(model: ir.Model, decide: Decide) -> None:
    """Rename what bodies of If, Loop and Scan call like a value of another graph.

    Two branches may both have an `x` (ONNX forbids only that one hides what surrounds it, and old files do even that).
    Behind this step a name means one value in the whole model: constants can leave their body, nodes can be looked up
    by name, and shape inference with data propagation cannot take the values of one branch for those of another. What
    a body takes and gives goes by position, so all its names are free; those of the main graph stay.
    """
    graphs = list(model.graphs())
    everywhere = {value.name for graph in graphs for value in _values(graph)}
    seen = {value.name for value in _values(model.graph)}
    renamed = 0
    for graph in graphs[1:]:
        for value in _values(graph):
            if value.name in seen:
                value.name = _free(str(value.name), everywhere)
                everywhere.add(value.name)
                renamed += 1
            seen.add(value.name)
    if renamed:
        decide("", "named", f"{renamed} values of bodies were called like others", values=renamed)


def _values(graph: ir.Graph) -> list[ir.Value]:
    """The values that a graph itself defines, those without a name left out."""
    found = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return [value for value in dict.fromkeys(found) if value.name]


def _free(wanted: str, taken: set[str | None]) -> str:
    count = 1
    while f"{wanted}_{count}" in taken:
        count += 1
    return f"{wanted}_{count}"
