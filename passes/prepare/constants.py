"""Constants where the passes look for them: initializers of the main graph that nothing overrides."""

from collections.abc import Iterator

import onnx_ir as ir

from qcompile.passes.graph import Decide, add_initializer, is_adapter
from qcompile.passes.tensors import read

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}

# External tensors this small are read: shape inference and the steps below want to see axes, shapes and scalars.
_SMALL = 1024


def fix_defaults(model: ir.Model, decide: Decide) -> None:
    """Make a graph input with a default value (old exporters list every weight) a plain initializer, but for adapters.

    What those hold is the application's.
    """
    graph = model.graph
    defaults = [value for value in graph.inputs if value.is_initializer() and not is_adapter(value)]
    if not defaults:
        return
    kept = [value for value in graph.inputs if value not in defaults]
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
    """Replace the main graph's Constant nodes by initializers, and bring the weights of bodies into the main graph.

    Bodies of If, Loop and Scan read what surrounds them, so a weight that two branches hold can be one initializer.
    What is no weight (numbers, axes, biases) stays in its body, where shape inference sees it.
    """
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
    inner = [pair for graph in model.graph.subgraphs() for pair in _weights_of(graph)]
    for value, tensor in inner:
        _leave_body(value)
        ir.convenience.replace_all_uses_with(value, add_initializer(model.graph, str(value.name), tensor))
    if inner:
        decide("", "lifted", f"{len(inner)} weights of bodies into the main graph", weights=len(inner))


def _weights_of(graph: ir.Graph) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """The float constants of rank 2 and more that a body holds and does not give, with their tensors."""
    held = [value for value in graph.initializers.values() if not value.is_graph_input()]
    held += [node.outputs[0] for node in graph if node.op_type == "Constant" and node.domain == ""]
    for value in held:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is not None and not value.is_graph_output() and tensor.dtype in _FLOATS and len(tensor.shape) > 1:
            yield value, tensor


def _leave_body(value: ir.Value) -> None:
    """Take a constant out of the body that holds it; its readers are left to the caller."""
    producer = value.producer()
    if producer is not None:
        assert producer.graph is not None
        producer.graph.remove(producer)
    else:
        assert value.graph is not None
        value.graph.initializers.pop(str(value.name))
