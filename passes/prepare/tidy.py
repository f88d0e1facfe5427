"""Order and names; nothing unused."""

from collections import Counter

import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from qcompile.passes.errors import UserError
from qcompile.passes.graph import Decide


def sort(model: ir.Model, decide: Decide) -> None:
    """Bring nodes behind what they read, which old files do not always do."""
    before = list(model.graph.all_nodes())
    try:
        model.graph.sort()
    except ValueError as error:
        raise UserError(f"the graph has a cycle ({error}); export the model again") from error
    if before != list(model.graph.all_nodes()):
        decide("", "sorted", "nodes stood before what they read")


def inline_functions(model: ir.Model, decide: Decide) -> None:
    """Put the bodies of model-local functions in place of their calls, but for qcompile's own operators."""
    inlined = [f"{f.domain}.{f.name}" for f in model.functions.values() if f.domain != "qcompile"]
    if inlined:
        InlinePass(criteria=lambda function: function.domain != "qcompile")(model)
        decide("", "inlined", f"{len(inlined)} model-local functions: {', '.join(sorted(set(inlined))[:5])}")


def remove_unused(model: ir.Model, decide: Decide) -> None:
    """Remove nodes, initializers, functions and opset imports that no output needs.

    And what is left out behind the last operand of a node by an empty name: it ends in one that it has.
    """
    before = model.graph.num_nodes()
    for step in (
        RemoveUnusedNodesPass(),
        RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        RemoveUnusedOpsetsPass(),
    ):
        step(model)
    if removed := before - model.graph.num_nodes():
        decide("", "removed", f"{removed} unused nodes", nodes=removed)


def remove_traces(model: ir.Model, decide: Decide) -> None:
    """Remove what torch notes about its own source at every node: stack traces, paths of the exporter's machine."""
    removed = 0
    for graph in model.graphs():
        for node in graph:
            for properties in (node.metadata_props, *(output.metadata_props for output in node.outputs)):
                for key in [key for key in properties if key.startswith("pkg.torch")]:
                    removed += len(properties.pop(key))
    if removed:
        decide("", "removed", f"{removed / 1e6:.1f} MB of the exporter's stack traces", bytes=removed)


def name_nodes(model: ir.Model, decide: Decide) -> None:
    """Give every node a name of its own, that reports and patterns can use: `<op>_<i>` where there is none."""
    nodes = [node for node in model.graph.all_nodes() if node.op_type != "Constant"]
    taken = Counter(node.name for node in nodes if node.name)
    seen: set[str] = set()
    renamed = 0
    for index, node in enumerate(nodes):
        name = wanted = node.name or f"{node.op_type}_{index}"
        count = 0
        while name in seen or (name != node.name and name in taken):
            count += 1
            name = f"{wanted}_{count}"
        renamed += name != node.name
        node.name = name
        seen.add(name)
    if renamed:
        decide("", "named", f"{renamed} nodes had no name of their own", nodes=renamed)
