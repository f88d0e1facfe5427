"""Nodes that do nothing when a model runs."""

import onnx_ir as ir

from qcompile.passes.prepare.edit import Decide, small_array


def remove_identities(model: ir.Model, decide: Decide) -> None:
    """Bypass Identity, and Dropout outside of training, in bodies too; one that names an output stays."""
    removed = 0
    for node in list(model.graph.all_nodes()):
        if not _does_nothing(node):
            continue
        value, output = node.inputs[0], node.outputs[0]
        if value is None or output.is_graph_output():
            continue
        ir.convenience.replace_all_uses_with(output, value)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        removed += 1
    if removed:
        decide("", "removed", f"{removed} Identity and Dropout nodes", nodes=removed)


def _does_nothing(node: ir.Node) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Dropout":
        mask_used = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
        training = node.inputs[2] if len(node.inputs) > 2 else None
        mode = small_array(training)
        return not mask_used and (training is None or (mode is not None and not mode.any()))
    return node.op_type == "Identity"
