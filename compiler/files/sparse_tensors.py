"""Sparse tensors of a file: held to what others are, and made dense, as ONNX Runtime makes them when it loads them."""

import math
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qcompile.compiler.facts.memory import available
from qcompile.compiler.files.tensor_protos import check_tensor, element_type
from qcompile.passes.errors import UserError

_MOST_ELEMENTS = 2**48
_AGAIN = "export the model again, with dense weights"


def check_sparse(sparse: onnx.SparseTensorProto, where: str) -> None:
    """Raise UserError unless values (n), places (n) or (n, rank) and dimensions fit, and dense it fits into memory."""
    values, places, dims = sparse.values, sparse.indices, list(sparse.dims)
    check_tensor(values, f"{where}: its values")
    check_tensor(places, f"{where}: its indices")
    if onnx.TensorProto.EXTERNAL in (values.data_location, places.data_location):
        raise UserError(f"{where} is sparse and lies in a file of its own, which is not supported; {_AGAIN}")
    impossible = len(dims) > 64 or any(size < 0 for size in dims) or math.prod(n for n in dims if n) > _MOST_ELEMENTS
    if impossible or len(values.dims) != 1 or places.data_type != onnx.TensorProto.INT64:
        raise UserError(
            f"{where} is no sparse tensor: dimensions {dims[:8]}, values of rank {len(values.dims)}; {_AGAIN}"
        )
    dtype, size = element_type(values.data_type, where), math.prod(dims)
    if dtype.bitwidth < 8 or not (dtype.is_floating_point() or dtype.is_integer()):
        raise UserError(f"{where} is a sparse tensor of {dtype.name}, which is not supported; {_AGAIN}")
    free = available()
    if free is not None and size * dtype.bitwidth // 8 > free // 2:
        raise UserError(
            f"{where} takes {size * dtype.bitwidth / 8e9:.1f} GB when it is dense, more than there is"
        ) from MemoryError()
    if list(places.dims) not in ([values.dims[0]], [values.dims[0], len(dims)]):
        raise UserError(f"{where} has indices {list(places.dims)[:8]} for {values.dims[0]} values; {_AGAIN}")
    limits = np.array([size] if len(places.dims) == 1 else dims, np.int64)
    found = numpy_helper.to_array(places)
    if ((found < 0) | (found >= limits)).any():
        raise UserError(f"{where} has an index outside of its dimensions {dims[:8]}; {_AGAIN}")


def make_dense(graphs: Iterable[onnx.GraphProto], nodes: Iterable[onnx.NodeProto]) -> None:
    """Sparse initializers and values of Constants, all of them checked, as dense tensors of the same names."""
    for graph in graphs:
        graph.initializer.extend(_dense(sparse) for sparse in graph.sparse_initializer)
        del graph.sparse_initializer[:]
    for node in nodes:
        for attribute in node.attribute if node.op_type == "Constant" else ():
            if attribute.type == onnx.AttributeProto.SPARSE_TENSOR and not attribute.ref_attr_name:
                attribute.CopyFrom(helper.make_attribute("value", _dense(attribute.sparse_tensor)))


def _dense(sparse: onnx.SparseTensorProto) -> onnx.TensorProto:
    values, places = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    array = np.zeros(tuple(sparse.dims), values.dtype)
    if places.ndim == 1:
        array.reshape(-1)[places] = values
    else:
        array[tuple(places.T)] = values
    return onnx.TensorProto(
        name=sparse.values.name, data_type=sparse.values.data_type, dims=sparse.dims, raw_data=array.tobytes()
    )
