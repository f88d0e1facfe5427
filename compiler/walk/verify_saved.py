"""The saved file against the graph in memory: every node and every byte of every tensor, read back from the disk."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.compiler.files.external_data import attributes_of, tensors_in
from qcompile.compiler.measure.phases import phase
from qcompile.passes.errors import UserError
from qcompile.passes.map_types import set_maps_aside
from qcompile.passes.tensors import chunks

_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


@phase("read the saved file")
def check_saved(path: Path, model: ir.Model) -> None:
    """Raise UserError where the file at `path` is not the model, node by node and byte by byte.

    Nothing is computed, so that nothing is rounded: the two agree, or something is damaged. Both are told apart by
    their serialized nodes, in which a digest stands for each tensor; weights are read in pieces, never held.
    """
    wanted, found = _skeleton(model), _skeleton(read_saved(path))
    for what, a, b in _parts(wanted, found):
        if a != b:
            raise UserError(f"the saved file differs from the verified graph in {what}; nothing was kept")


def read_saved(path: Path) -> ir.Model:
    """The file as it is, its tensors where they lie; UserError where it cannot be read."""
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)  # whatever the end of its name
        set_maps_aside(proto)
        model = ir.serde.deserialize_model(proto)
        ir.external_data.set_base_dir(model.graph, path.parent)
        return model
    except Exception as error:  # onnx_ir's and protobuf's classes share no base but Exception
        cause = str(error).strip().splitlines()
        raise UserError(f"the saved file cannot be read back ({(cause or ['?'])[0]:.200}); nothing was kept") from error


def _parts(wanted: onnx.ModelProto, found: onnx.ModelProto) -> Iterator[tuple[str, object, object]]:
    """What must be equal, in words, and as both have it."""
    yield "its opsets", _opsets(wanted.opset_import), _opsets(found.opset_import)
    for what in ("input", "output"):
        names = [[value.name for value in getattr(proto.graph, what)] for proto in (wanted, found)]
        yield f"its {what}s", names[0], names[1]
    yield from _tensors(wanted.graph, found.graph)
    yield "the number of its nodes", len(wanted.graph.node), len(found.graph.node)
    for a, b in zip(wanted.graph.node, found.graph.node, strict=True):
        yield f"node {a.name or a.output[0]}", _bytes(a), _bytes(b)
    functions = [{(f.domain, f.name, f.overload): f for f in proto.functions} for proto in (wanted, found)]
    yield "the names of its functions", sorted(functions[0]), sorted(functions[1])
    for key, function in functions[0].items():
        yield f"function {key[1]}", _bytes(function), _bytes(functions[1][key])


def _tensors(wanted: onnx.GraphProto, found: onnx.GraphProto) -> Iterator[tuple[str, object, object]]:
    digests = [{tensor.name: tensor.raw_data for tensor in graph.initializer} for graph in (wanted, found)]
    yield "the names of its tensors", sorted(digests[0]), sorted(digests[1])
    for name, digest in digests[0].items():
        yield f"tensor {name}", digest, digests[1][name]


def _opsets(imports: Iterable[onnx.OperatorSetIdProto]) -> list[tuple[str, int]]:
    return sorted((entry.domain, entry.version) for entry in imports)


def _bytes(message: onnx.NodeProto | onnx.FunctionProto) -> bytes:
    content: bytes = message.SerializeToString(deterministic=True)
    return content


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model with a digest in the place of each tensor, and without what says nothing about the computation."""
    with _digested(model):
        proto = ir.serde.serialize_model(model)
    _bare(proto.graph)
    for function in proto.functions:
        del function.value_info[:], function.metadata_props[:]
        _bare_nodes(function.node)
    return proto


def _bare(graph: onnx.GraphProto) -> None:
    """Drop stated types and notes: a reader may infer, leave out or order them in another way."""
    del graph.value_info[:], graph.metadata_props[:], graph.quantization_annotation[:]
    for value in (*graph.input, *graph.output):
        value.CopyFrom(onnx.ValueInfoProto(name=value.name))
    _bare_nodes(graph.node)


def _bare_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        del node.metadata_props[:]
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs) if attribute.type in _GRAPHS else ():
                _bare(graph)


@contextmanager
def _digested(model: ir.Model) -> Iterator[None]:
    """The model with digests for tensors; as it was behind the block."""
    undo: list[Callable[[], None]] = []
    try:
        for graph in model.graphs():
            for value in graph.initializers.values():
                if value.const_value is not None:
                    undo.append(_put_back(value, value.const_value))
                    value.const_value = _digest(value.const_value)
        for node, attribute in list(attributes_of(model)):
            undo.append(_put_attribute(node, attribute))
            made = [_digest(tensor) for tensor in tensors_in(attribute)]
            one = attribute.type == ir.AttributeType.TENSOR
            kind = ir.AttrTensor(attribute.name, made[0]) if one else ir.AttrTensors(attribute.name, made)
            node.attributes[attribute.name] = kind
        yield
    finally:
        for step in undo:
            step()


def _put_back(value: ir.Value, tensor: ir.TensorProtocol) -> Callable[[], None]:
    return lambda: setattr(value, "const_value", tensor)


def _put_attribute(node: ir.Node, attribute: ir.Attr) -> Callable[[], None]:
    return lambda: node.attributes.__setitem__(attribute.name, attribute)


def _digest(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A tensor of 32 bytes that stands for type, shape and content of another."""
    told = hashlib.sha256(f"{tensor.dtype.name} {list(tensor.shape.numpy())} ".encode())
    if tensor.dtype == ir.DataType.STRING:
        told.update(repr(np.asarray(tensor.numpy()).tolist()).encode())
    else:
        for chunk in chunks(tensor):
            told.update(chunk)
    return ir.Tensor(np.frombuffer(told.digest(), np.uint8), name=tensor.name)
