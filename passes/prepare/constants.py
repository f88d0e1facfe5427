"""Constants where the passes look for them: initializers of the main graph that nothing overrides."""

import onnx_ir as ir

from qcompile.passes.prepare.edit import Decide, add_initializer
from qcompile.passes.tensors import read

# External tensors this small are read: shape inference and the steps below want to see axes, shapes and scalars.
_SMALL = 1024


def fix_defaults(model: ir.Model, decide: Decide) -> None:
    """Make a graph input with a default value (old exporters list every weight) a plain initializer."""
    graph = model.graph
    defaults = [value for value in graph.inputs if value.is_initializer()]
    if not defaults:
        return
    kept = [value for value in graph.inputs if not value.is_initializer()]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    decide("", "fixed", f"{len(defaults)} graph inputs with default values became constants", inputs=len(defaults))


def load_small(model: ir.Model) -> None:
    """Bring small external tensors into memory."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < _SMALL:
                value.const_value = ir.Tensor(read(tensor).copy(), tensor.dtype, name=tensor.name)


def lift_constants(model: ir.Model, decide: Decide) -> None:
    """Replace the main graph's Constant nodes by initializers; those of subgraphs stay where they are."""
    lifted = 0
    for node in list(model.graph):
        if node.op_type != "Constant" or node.domain != "":
            continue
        output = node.outputs[0]
        tensor = ir.convenience.get_const_tensor(output)
        if tensor is None or output.is_graph_output():
            why = "a graph output" if tensor is not None else "of a kind that no initializer can hold"
            decide(node.name or "", "kept", f"the Constant is {why}")
            continue
        name = output.name or ""
        model.graph.remove(node)
        value = add_initializer(model.graph, name, tensor)
        ir.convenience.replace_all_uses_with(output, value)
        lifted += 1
    if lifted:
        decide("", "lifted", f"{lifted} Constant nodes became initializers", nodes=lifted)
