"""Order, names, shapes; nothing unused. Whatever its size, a model is never serialized with its weights here."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import onnx_ir as ir
from onnx_ir.passes.common import (
    InlinePass,
    RemoveUnusedFunctionsPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)

from qcompile.passes.errors import UserError
from qcompile.passes.prepare.edit import Decide
from qcompile.passes.prepare.inference import inferred

_WEIGHT = 1024


def sort(model: ir.Model) -> None:
    """Topological order, which old files do not always have."""
    try:
        model.graph.sort()
    except ValueError as error:
        raise UserError(f"the graph has a cycle ({error}); export the model again") from error


def inline_functions(model: ir.Model, decide: Decide) -> None:
    """Put the bodies of model-local functions in place of their calls, but for qcompile's own operators."""
    inlined = [f"{f.domain}.{f.name}" for f in model.functions.values() if f.domain != "qcompile"]
    if inlined:
        InlinePass(criteria=lambda function: function.domain != "qcompile")(model)
        decide("", "inlined", f"{len(inlined)} model-local functions: {', '.join(sorted(set(inlined))[:5])}")


def remove_unused(model: ir.Model, decide: Decide) -> None:
    """Remove nodes, initializers, functions and opset imports that no output needs."""
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


def infer_shapes(model: ir.Model, decide: Decide) -> None:
    """Types and shapes of every value as far as onnx can tell them; what the model says itself is kept."""
    with _without_weights(model):
        proto = ir.serde.serialize_model(model)
    try:
        found = ir.serde.deserialize_model(inferred(proto))
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        decide("", "skipped", f"shapes could not be inferred: {reason}")
        return
    for graph, other in zip(model.graphs(), found.graphs(), strict=True):
        known = {value.name: value for node in other for value in node.outputs}
        for node in graph:
            for value in node.outputs:
                if value.name and value.name in known and not value.is_graph_output():
                    _adopt(value, known[value.name])


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
