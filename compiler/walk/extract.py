"""Cutting a runnable piece out of a graph: the nodes between some values and others, and the weights they use."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from qcompile.compiler.files.well_formed import all_nodes
from qcompile.passes.bodies import bodies
from qcompile.passes.graph import MICROSOFT
from qcompile.passes.state import node_state
from qcompile.passes.tensors import chunks, read
from qcompile.runtime.sessions import session

# Initializers below this many bytes stay inside the protobuf, where shape inference can read them.
_INLINE = 4096
# Bytes of a table from which a product reads it as it lies.
_TURNED = 64 << 20
# The location of those that a session is handed in memory.
_HANDED = "in-memory"
_IN_MEMORY = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.UINT8, ir.DataType.INT8}


@dataclass
class Piece:
    """A part of a model as a ModelProto of its own.

    inputs: names of the graph inputs and carried values it reads; outputs: names of what it gives.
    weights: the large initializers, declared in the proto as external and handed to the session in memory.
    stored: of those that lie in a file, where. A session maps these itself: it copies what it is handed. Elsewhere the
    file may not be there, so this does not go along to another process.
    prepack, kernels: as in `runtime.session`.
    """

    proto: onnx.ModelProto
    inputs: list[str]
    outputs: list[str]
    weights: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    stored: dict[str, ir.ExternalTensor] = field(default_factory=dict)
    prepack: bool = True
    kernels: str = "portable"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"stored": {}}

    def session(self, provider: str = "cpu", *, accuracy_level: int = 0, optimize: bool = True) -> Any:
        """An ONNX Runtime session of the piece; accuracy_level and optimize as in `runtime.session`."""
        proto, folder, mapped = self._located()
        return session(
            proto.SerializeToString(),
            providers=(provider,),
            accuracy_level=accuracy_level,
            optimize=optimize,
            folder=folder,
            weights={name: array for name, array in self.weights.items() if name not in mapped},
            spin=False,
            kernels=self.kernels,
            prepack=self.prepack,
        )

    def _located(self) -> tuple[onnx.ModelProto, Path | None, set[str]]:
        """(proto, folder, names): the proto with the places of the tensors of these names, which lie in one folder.

        A session can be told one: that with most bytes.
        """
        sizes: dict[Path, int] = {}
        for tensor in self.stored.values():
            sizes[_folder(tensor)] = sizes.get(_folder(tensor), 0) + tensor.nbytes
        if not sizes:
            return self.proto, None, set()
        folder, proto = max(sizes, key=lambda own: sizes[own]), onnx.ModelProto()
        places = {name: tensor for name, tensor in self.stored.items() if _folder(tensor) == folder}
        proto.CopyFrom(self.proto)
        for declared in proto.graph.initializer:
            if declared.name in places:
                own = places[declared.name]
                del declared.external_data[:]
                place = {"location": Path(own.path).name, "offset": own.offset or 0, "length": own.nbytes}
                for key, value in place.items():
                    declared.external_data.add(key=key, value=str(value))
        return proto, folder, set(places)

    def unturn(self) -> None:
        """Have products read large float32 tables as they lie: x Tᵀ by com.microsoft's FusedMatMul.

        ONNX Runtime computes the Transpose of a constant when a session is made: a tied head is then there twice.
        """
        turned = {node.output[0]: node for node in self.proto.graph.node if self._turns_large(node)}
        for node in self.proto.graph.node:
            if node.op_type == "MatMul" and node.domain == "" and node.input[1] in turned:
                node.op_type, node.domain, node.input[1] = "FusedMatMul", MICROSOFT, turned[node.input[1]].input[0]
                node.attribute.append(helper.make_attribute("transB", 1))
        read = {name for node in all_nodes(self.proto) for name in node.input}
        read.update(output.name for output in self.proto.graph.output)
        for name, node in turned.items():
            if name not in read:
                self.proto.graph.node.remove(node)
        if turned and all(own.domain != MICROSOFT for own in self.proto.opset_import):
            self.proto.opset_import.append(helper.make_opsetid(MICROSOFT, 1))

    def _turns_large(self, node: onnx.NodeProto) -> bool:
        if node.op_type != "Transpose" or node.domain != "" or node.input[0] not in self.weights:
            return False
        table, order = self.weights[node.input[0]], [list(own.ints) for own in node.attribute if own.name == "perm"]
        return table.dtype == np.float32 and table.ndim == 2 and table.nbytes >= _TURNED and order in ([], [[1, 0]])

    def add_weight(self, name: str, array: npt.NDArray[Any]) -> str:
        """Add an initializer that the model does not have; returns its name."""
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        if array.nbytes < _INLINE:
            inline = TensorProto(name=name, data_type=kind, dims=array.shape, raw_data=array.tobytes())
            self.proto.graph.initializer.append(inline)
        else:
            self.proto.graph.initializer.append(_declared(name, kind, array.shape))
            self.weights[name] = array
        return name


def extract(
    model: ir.Model, given: Sequence[ir.Value], wanted: Sequence[ir.Value], inside: Sequence[ir.Value] = ()
) -> Piece:
    """The nodes that compute `wanted` from `given`, from graph inputs and from initializers.

    Everything that a node of the piece reads lies in it or is an input; nothing else is an input.
    inside: values that are computed, too, for what will be added to the piece.
    """
    nodes, used = _needed(given, [*wanted, *inside])
    proto = onnx.ModelProto(ir_version=min(model.ir_version, 13))
    for domain, version in model.graph.opset_imports.items():
        proto.opset_import.append(helper.make_opsetid(domain, version))
    proto.functions.extend(ir.serde.serialize_function(function) for function in model.functions.values())
    graph = proto.graph
    graph.name = "piece"
    graph.node.extend(ir.serde.serialize_node(node) for node in nodes)
    piece = Piece(proto, [], [str(value.name) for value in wanted])
    for value in used:
        if value.is_initializer():
            _add_initializer(piece, value)
        else:
            piece.inputs.append(str(value.name))
            graph.input.append(_input(value))
    graph.output.extend(
        onnx.ValueInfoProto(name=value.name) for value in wanted
    )  # types follow from what computes them
    return piece


def captured(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads: its inputs, and what its subgraphs take from outside."""
    yield from (value for value in node.inputs if value is not None)
    for graph in bodies(node):
        for inner in graph:
            yield from (value for value in captured(inner) if not _inside(value, graph))


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """Values that a node reads, and those that the float node it stands for reads: constants of that one left out."""
    yield from captured(node)
    twin = node_state(node).twin
    if twin is not None:
        yield from twin.activations


def _inside(value: ir.Value, graph: ir.Graph) -> bool:
    producer = value.producer()
    if producer is not None:
        return producer.graph is graph
    return value in graph.inputs or graph.initializers.get(str(value.name)) is value


def _needed(given: Sequence[ir.Value], wanted: Sequence[ir.Value]) -> tuple[list[ir.Node], list[ir.Value]]:
    """Nodes in an order in which each stands behind those that it reads, and the values that none of them computes.

    The time is that of the nodes found, whatever the size of the graph.
    """
    stop, used = set(given), dict[ir.Value, None]()
    done: dict[ir.Node, bool] = {}  # False while the nodes that it reads are visited
    stack: list[ir.Value | ir.Node] = list(reversed(wanted))
    while stack:
        item = stack.pop()
        if isinstance(item, ir.Node):
            done.pop(item)
            done[item] = True  # behind all that it reads
            continue
        producer = item.producer()
        if item in stop or producer is None:
            used[item] = None
        elif producer not in done:
            done[producer] = False
            stack.append(producer)
            stack.extend(captured(producer))
    return list(done), list(used)


def _input(value: ir.Value) -> onnx.ValueInfoProto:
    """What a piece is fed: a graph input as the model declares it, an inner value by type and rank.

    Raises ValueError for an inner value of unknown type, which `split` carries nowhere.
    """
    if value.is_graph_input():
        return ir.serde.serialize_value(value)
    if value.dtype is None:
        raise ValueError(f"the type of {value.name} is not known")
    sizes = None if value.shape is None or value.is_graph_output() else [None] * len(value.shape)
    return helper.make_tensor_value_info(str(value.name), int(value.dtype), sizes)


def _folder(tensor: ir.ExternalTensor) -> Path:
    return Path(tensor.path).absolute().parent


def _declared(name: str, data_type: int, shape: Iterable[int]) -> TensorProto:
    tensor = TensorProto(name=name, data_type=data_type, data_location=TensorProto.EXTERNAL)
    tensor.dims.extend(int(size) for size in shape)
    tensor.external_data.add(key="location", value=_HANDED)
    return tensor


def _add_initializer(piece: Piece, value: ir.Value) -> None:
    tensor, name = value.const_value, str(value.name)
    assert tensor is not None
    if tensor.nbytes >= _INLINE and tensor.dtype in _IN_MEMORY:
        piece.proto.graph.initializer.append(_declared(name, int(tensor.dtype), tensor.shape.numpy()))
        piece.weights[name] = np.asarray(read(tensor))
        if isinstance(tensor, ir.ExternalTensor):
            piece.stored[name] = tensor
        return
    inline = TensorProto(name=name, data_type=int(tensor.dtype))
    if isinstance(tensor, ir.StringTensor):
        inline.string_data.extend(tensor.string_data())
    else:
        inline.raw_data = b"".join(chunks(tensor))
    inline.dims.extend(int(size) for size in tensor.shape.numpy())
    piece.proto.graph.initializer.append(inline)
