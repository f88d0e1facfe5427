"""Tensors as a file stores them: type, dimensions and data must say the same."""

import math
from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir

from qcompile.passes.errors import UserError

# More elements than any address space holds; products of dimensions stay within int64.
_MOST_ELEMENTS, _MOST_AXES = 2**48, 64  # and of axes what numpy takes
_AGAIN = "export the model again"
# The field that holds the elements of a type, where they do not stand in raw_data (onnx.proto, TensorProto).
_TYPES = {
    "int32_data": "INT32 INT16 INT8 INT4 INT2 UINT16 UINT8 UINT4 UINT2 BOOL FLOAT16 BFLOAT16 FLOAT8E4M3FN "
    "FLOAT8E4M3FNUZ FLOAT8E5M2 FLOAT8E5M2FNUZ FLOAT8E8M0 FLOAT4E2M1",
    "float_data": "FLOAT COMPLEX64",
    "double_data": "DOUBLE COMPLEX128",
    "int64_data": "INT64",
    "uint64_data": "UINT32 UINT64",
    "string_data": "STRING",
}
_FIELD = {name: where for where, names in _TYPES.items() for name in names.split()}


def external_locations(proto: onnx.ModelProto) -> Iterator[str]:
    """The files that tensors of the model say they lie in, as the model names them; in any graph, or a function."""
    yield from _graph_locations(proto.graph)
    for function in proto.functions:
        yield from _node_locations(function.node)


def _graph_locations(graph: onnx.GraphProto) -> Iterator[str]:
    yield from _locations(graph.initializer)
    yield from _node_locations(graph.node)


def _node_locations(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        for attribute in node.attribute:
            yield from _locations([attribute.t, *attribute.tensors])
            for graph in (attribute.g, *attribute.graphs):
                yield from _graph_locations(graph)


def _locations(tensors: Iterable[onnx.TensorProto]) -> Iterator[str]:
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def check_tensor(tensor: onnx.TensorProto, where: str) -> None:
    """Raise UserError unless the tensor has a known type, possible dimensions, and data of just that size.

    Data in a file of its own is checked against that file when the tensor is loaded (`external_data.check_external`).
    """
    dtype = element_type(tensor.data_type, where)
    dims = list(tensor.dims)
    if (
        len(dims) > _MOST_AXES
        or any(size < 0 for size in dims)
        or math.prod(size for size in dims if size) > _MOST_ELEMENTS
    ):
        raise UserError(f"{where} has impossible dimensions {_listed(dims)}; {_AGAIN}")
    if tensor.HasField("segment"):
        raise UserError(f"{where} is stored in segments, which no ONNX tool reads; {_AGAIN}")
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        _check_location(tensor, dtype, where)
    elif tensor.data_location != onnx.TensorProto.DEFAULT:
        raise UserError(f"{where} lies in an unknown place ({tensor.data_location}); {_AGAIN}")
    else:
        _check_data(tensor, dtype, math.prod(dims), where)


def element_type(number: int, where: str) -> ir.DataType:
    """The type with this number in onnx.proto; UserError for none, and for one that this program does not know."""
    try:
        dtype = ir.DataType(number)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED or dtype.name not in _FIELD:
        raise UserError(f"{where} has no known element type (number {number}); {_AGAIN}")
    return dtype


def _check_location(tensor: onnx.TensorProto, dtype: ir.DataType, where: str) -> None:
    given = {entry.key: entry.value for entry in tensor.external_data}
    location = given.get("location", "")
    if "\0" in location:
        raise UserError(f"{where}: its data lies in a file of an impossible name; {_AGAIN}")
    if dtype == ir.DataType.STRING:
        raise UserError(f"{where}: strings cannot lie in a file of their own; {_AGAIN}")
    for key in ("offset", "length"):
        if not given.get(key, "0").isdecimal() or not given.get(key, "0").isascii() or len(given.get(key, "")) > 18:
            raise UserError(f"{where}: the {key} of its data in {location!r} is no number: {given[key]!r}; {_AGAIN}")


def _check_data(tensor: onnx.TensorProto, dtype: ir.DataType, size: int, where: str) -> None:
    raw = len(tensor.raw_data)
    counts = {field: len(getattr(tensor, field)) for field in _TYPES if len(getattr(tensor, field))}
    own = _FIELD[dtype.name]
    if len(counts) + bool(raw) > 1 or set(counts) - {own} or (raw and dtype == ir.DataType.STRING):
        stored = ", ".join([*counts, *["raw_data"] * bool(raw)])
        raise UserError(f"{where} is {dtype.name} and holds {stored}; {_AGAIN}")
    if counts:
        found, wanted, unit = counts[own], _entries(dtype, size), "entries"
    elif dtype == ir.DataType.STRING:
        found, wanted, unit = 0, size, "entries"
    else:
        found, wanted, unit = raw, math.ceil(size * dtype.bitwidth / 8), "bytes"
    if found != wanted:
        raise UserError(
            f"{where} is {dtype.name} {_listed(list(tensor.dims))}, which takes {wanted} {unit}, and holds {found}; "
            f"{_AGAIN}"
        )


def _entries(dtype: ir.DataType, size: int) -> int:
    """Entries of the field for so many elements: complex numbers take two, types below a byte share one."""
    if dtype.name.startswith("COMPLEX"):
        return 2 * size
    shared = dtype != ir.DataType.STRING and dtype.bitwidth < 8
    return math.ceil(size * dtype.bitwidth / 8) if shared else size


def _listed(dims: list[int]) -> str:
    return str(dims) if len(dims) <= 8 else f"[{', '.join(map(str, dims[:8]))}, … {len(dims)} of them]"
