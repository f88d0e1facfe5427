"""Nodes that do nothing when a model runs, and conversions to a type that is known."""

import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, small_array, take_over


def remove_identities(model: ir.Model, decide: Decide) -> None:
    """Bypass Identity, idle Casts, and Dropout outside of training, in bodies too; outputs keep their names."""
    removed, names = 0, Names(model)
    for node in list(model.graph.all_nodes()):
        value, output = node.inputs[0] if node.inputs else None, node.outputs[0]
        if value is None or not _does_nothing(node) or (output.is_graph_output() and not _may_be_output(value, node)):
            continue
        if output.is_graph_output():
            output.shape = value.shape if output.shape is None else output.shape
            take_over(output, value, names)
        else:
            ir.convenience.replace_all_uses_with(output, value)
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        removed += 1
    if removed:
        decide("", "removed", f"{removed} Identity, Cast and Dropout nodes", nodes=removed)


def _may_be_output(value: ir.Value, node: ir.Node) -> bool:
    """Whether a value can be an output of the node's graph in place of what the node makes of it."""
    producer = value.producer()
    return producer is not None and producer.graph is node.graph and not value.is_graph_output()


def name_casts(model: ir.Model, decide: Decide) -> None:
    """Make a CastLike to a type that is known a Cast, which does not read what it is to be like."""
    turned = 0
    for node in model.graph.all_nodes():
        kind = node.inputs[1].dtype if node.op_type == "CastLike" and node.inputs[1] is not None else None
        if node.domain == "" and kind is not None and kind not in (ir.DataType.UNDEFINED, ir.DataType.STRING):
            node.op_type = "Cast"
            node.attributes.add(ir.AttrInt64("to", int(kind)))
            node.resize_inputs(1)
            turned += 1
    if turned:
        decide("", "renamed", f"{turned} CastLike to a known type became Cast", nodes=turned)


def _does_nothing(node: ir.Node) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Dropout":
        mask_used = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
        training = node.inputs[2] if len(node.inputs) > 2 else None
        mode = small_array(training)
        return not mask_used and (training is None or (mode is not None and not mode.any()))
    if node.op_type == "Cast" and node.inputs[0] is not None and node.inputs[0].dtype is not None:
        return node.inputs[0].dtype == node.attributes.get_int("to", ir.DataType.UNDEFINED)
    return node.op_type == "Identity"
