"""An exported graph made readable: module names on linears and weights, named dimensions, no tracing metadata."""

import ast
import re
from collections.abc import Iterable

import onnx_ir as ir

from qcompile.models.trace import Signature

_SCOPES = "pkg.torch.onnx.name_scopes"


def tidy(model: ir.Model, signature: Signature, *, prefix: str) -> None:
    """Rewrite names and metadata in place; the computation stays as it is.

    1. The signature's dimensions replace the exporter's symbols (s53 becomes sequence), everywhere.
    2. A MatMul or Gemm by a constant is named after its torch module, its weight too; so is an embedding's Gather.
    3. `prefix`, the wrapper's attribute, goes from the other initializers' names.
    4. Metadata (stack traces, scopes) goes.
    """
    _name_dimensions(model, signature)
    _name_modules(model, prefix)
    _drop_metadata(model)
    model.producer_name, model.producer_version = f"qcompile ({model.producer_name})", model.producer_version


def _values(model: ir.Model) -> Iterable[ir.Value]:
    yield from model.graph.inputs
    for node in model.graph.all_nodes():
        yield from node.outputs


def _name_dimensions(model: ir.Model, signature: Signature) -> None:
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for found, wanted in zip(value.shape or (), signature.inputs[value.name or ""], strict=True):
            if isinstance(found, ir.SymbolicDim) and isinstance(wanted, str) and found.value:
                names[str(found.value)] = wanted
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])
    for value in model.graph.outputs:
        if value.shape is not None:
            dims = zip(signature.outputs[value.name or ""], value.shape, strict=True)
            value.shape = ir.Shape([new or old for new, old in dims])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return None if dim.value is None else re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(dim.value))


def _name_modules(model: ir.Model, prefix: str) -> None:
    for value in list(model.graph.initializers.values()):
        _rename(model, value, (value.name or "").removeprefix(prefix))
    taken: set[str] = set()
    for node in model.graph:
        weight = _weight_of(node)
        module = _module(node).removeprefix(prefix)
        if weight is None or not module or module in taken:
            continue
        taken.add(module)
        node.name = module
        if re.fullmatch(r"val_\d+", weight.name or "") or node.op_type == "Gather":
            _rename(model, weight, f"{module}.weight")


def _weight_of(node: ir.Node) -> ir.Value | None:
    """The constant matrix that a linear or an embedding works with, behind a Transpose or not."""
    position = {"MatMul": 1, "Gemm": 1, "Gather": 0}.get(node.op_type)
    value = None if position is None else node.inputs[position]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":
        value = producer.inputs[0]
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    return value


def _module(node: ir.Node) -> str:
    """The torch module that a node was traced from; "" when it is not known."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if len(scopes) > 1 else ""


def _rename(model: ir.Model, value: ir.Value, name: str) -> None:
    if name not in model.graph.initializers:
        value.name = name


def _drop_metadata(model: ir.Model) -> None:
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*_values(model), *model.graph.initializers.values()):
        value.metadata_props.clear()
