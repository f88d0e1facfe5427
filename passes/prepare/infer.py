"""Types and shapes of values. Whatever its size, a model is never serialized with its weights here."""

from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import onnx_ir as ir

from qcompile.passes.base import Oracle
from qcompile.passes.errors import UserError
from qcompile.passes.graph import Decide
from qcompile.passes.map_types import set_maps_aside
from qcompile.passes.prepare.inference import inferred

_WEIGHT = 1024


def infer_anew(model: ir.Model, decide: Decide, ask: Oracle | None = None) -> None:
    """Types and shapes of every value, from graph inputs, constants and what operators make of them.

    Case 1: onnx knows the operator.
    Case 2: it does not (com.microsoft): `ask` says what ONNX Runtime makes of it, and inference goes on from there.
    Case 3: neither knows more: what the file says of the value, unless it contradicts what follows from inputs and
            constants anywhere (a batch made dynamic by hand, a type left over from another precision). Then all that
            it says of inner values is stale, and is dropped.
    What onnx gets wrong where a default is left out is stated first.
    """
    _state_defaults(model, decide)
    try:
        found = _from_scratch(model, ask)
    except UserError:
        raise
    except Exception as error:  # onnx and protobuf raise what they like
        _refused(decide, error)
        return
    named = _symbols(model)
    stale = next((told for value, new in _inner(model, found) if (told := _contradiction(value, new, named))), "")
    if stale:
        decide("", "dropped", f"types and shapes of inner values that the file gives are stale: {stale}")
    for value, new in _inner(model, found):
        if stale:
            value.type, value.shape = None, None
        _adopt(value, new)


def infer_shapes(model: ir.Model, decide: Decide, ask: Oracle | None = None) -> None:
    """Types and shapes of values that have none yet; what the model says itself is kept."""
    try:
        proto = _serialized(model)
        found = _answered(proto, ask)
    except UserError:
        raise
    except Exception as error:  # onnx and protobuf raise what they like
        _refused(decide, error)
        return
    for value, new in _inner(model, found):
        _adopt(value, new)


def infer_new(model: ir.Model, decide: Decide) -> None:
    """Types and shapes of values that were just written, as onnx alone infers them."""
    infer_shapes(model, decide)


def _state_defaults(model: ir.Model, decide: Decide) -> None:
    """An STFT is one-sided unless it says otherwise; onnx 1.23 infers two sides for one that says nothing."""
    for node in model.graph.all_nodes():
        if node.op_type == "STFT" and node.domain == "" and "onesided" not in node.attributes:
            node.attributes["onesided"] = ir.AttrInt64("onesided", 1)
            decide(
                node.name or "", "stated", "an STFT is one-sided where it says nothing, and inference has it otherwise"
            )


def _refused(decide: Decide, error: Exception) -> None:
    reason = (str(error).splitlines() or [""])[0][:200]
    decide("", "skipped", f"shapes could not be inferred: {reason}")


def _serialized(model: ir.Model) -> onnx.ModelProto:
    with _without_weights(model):
        return ir.serde.serialize_model(model)


def _from_scratch(model: ir.Model, ask: Oracle | None) -> ir.Model:
    proto = _serialized(model)
    for graph in _graphs(proto.graph):
        del graph.value_info[:]
        for output in graph.output:
            output.type.tensor_type.ClearField("shape")
    return _answered(proto, ask)


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all bodies in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for body in ([attribute.g] if attribute.HasField("g") else []) + list(attribute.graphs):
                yield from _graphs(body)


def _answered(proto: onnx.ModelProto, ask: Oracle | None) -> ir.Model:
    """Cases 1 and 2."""
    found = _told(proto, ask)
    set_maps_aside(found)
    return ir.serde.deserialize_model(found)


def _told(proto: onnx.ModelProto, ask: Oracle | None) -> onnx.ModelProto:
    found = inferred(proto)
    known = {info.name for info in (*found.graph.value_info, *found.graph.output) if info.HasField("type")}
    unknown = [name for node in found.graph.node for name in node.output if name and name not in known]
    if not unknown or ask is None:
        return found
    proto.graph.value_info.extend(ask(proto, unknown))
    return inferred(proto)


def _inner(model: ir.Model, found: ir.Model) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Values that nodes compute, each with its like; names are unique in the whole model.

    Graph outputs keep what the file says of them, and are left out, but for those that it gives no type.
    """
    known = {value.name: value for graph in found.graphs() for node in graph for value in node.outputs}
    for graph in model.graphs():
        for node in graph:
            for value in node.outputs:
                if value.name in known and (value.type is None or not value.is_graph_output()):
                    yield value, known[value.name]


def _symbols(model: ir.Model) -> set[str]:
    """The names of the sizes of graph inputs."""
    shapes = (value.shape for value in model.graph.inputs if value.shape is not None)
    return {size.value for shape in shapes for size in shape if isinstance(size, ir.SymbolicDim) and size.value}


def _contradiction(value: ir.Value, found: ir.Value, named: set[str]) -> str:
    """How what the file says of a value differs from what was inferred, or an empty string."""
    if value.type is not None and found.type is not None and value.type != found.type:
        return f"{value.name} is {found.type}, not {value.type}"
    old, new = value.shape, found.shape
    if old is None or new is None:
        return ""
    if len(old) != len(new) or any(_differ(*sizes, named) for sizes in zip(old, new, strict=True)):
        return f"{value.name} has shape {new}, not {old}"
    return ""


def _differ(old: int | ir.SymbolicDim, new: int | ir.SymbolicDim, named: set[str]) -> bool:
    """Whether a size that the file states cannot be; a size of the graph's inputs is not one number."""
    if not isinstance(old, int):
        return False
    return old != new if isinstance(new, int) else new.value in named


def _adopt(value: ir.Value, found: ir.Value) -> None:
    if value.type is None:
        value.type = found.type
    if found.shape is None:
        return
    if value.shape is None or len(value.shape) != len(found.shape):
        value.shape = found.shape
        return
    dims = [
        new if not isinstance(old, int) and _says_more(new, old) else old
        for old, new in zip(value.shape, found.shape, strict=True)
    ]
    value.shape = ir.Shape(dims)


def _says_more(new: int | ir.SymbolicDim, old: int | ir.SymbolicDim) -> bool:
    return isinstance(new, int) or (isinstance(old, ir.SymbolicDim) and old.value is None)


@contextmanager
def _without_weights(model: ir.Model) -> Iterator[None]:
    """Weights replaced by references to a file that nobody reads: type and shape are all that inference needs."""
    values = [value for value in model.graph.initializers.values() if value.const_value is not None]
    tensors = [value.const_value for value in values]
    try:
        for value, tensor in zip(values, tensors, strict=True):
            assert tensor is not None
            if tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _WEIGHT:
                shape = ir.Shape(tensor.shape.numpy())
                value.const_value = ir.ExternalTensor(
                    "weights", 0, None, tensor.dtype, shape=shape, name=value.name or ""
                )
        yield
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
