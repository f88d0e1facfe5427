"""Putting quantized weights into a graph as inputs of the operators of domain `qcompile`."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import Array, Codes, Quantized
from qcompile.passes.formats import functions
from qcompile.passes.linears import Embedding, Linear, constant, dimensions
from qcompile.passes.prepare.edit import add_initializer
from qcompile.passes.tensors import read


@dataclass(frozen=True)
class Tensors:
    """The initializers of one quantized weight (K, N).

    codes: (K, N) of the grid's type. scale: (G, N). zero_point: (G, N) of the codes' type, None when symmetric.
    block_size: rows that share a scale.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    block_size: int

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return constant(self.codes).dtype.bitwidth

    @property
    def nbytes(self) -> int:
        """Bytes of all of them together."""
        values = (self.codes, self.scale, self.zero_point)
        return sum(constant(value).nbytes for value in values if value is not None)


def pack_nibbles(codes: Codes) -> npt.NDArray[np.uint8]:
    """Codes in ONNX's 4-bit layout: flat, two a byte, the first in the low nibble; the last byte padded with zero."""
    flat: npt.NDArray[np.uint8] = np.ascontiguousarray(codes).reshape(-1).astype(np.uint8) & np.uint8(15)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[::2] | (flat[1::2] << 4), np.uint8)


def store(model: ir.Model, name: str, quantized: Quantized) -> Tensors:
    """Add the initializers of a quantized weight to the model, named after the float weight."""
    spec, qparams = quantized.spec, quantized.qparams
    suffix = f"int{spec.bits}"
    codes = add_codes(model, f"{name}.{suffix}", quantized.codes, spec.dtype)
    scale = add_initializer(model.graph, f"{name}.{suffix}.scale", ir.tensor(qparams.scale.astype(spec.scale_dtype)))
    zero_point = None
    if not spec.symmetric:
        zero_point = add_codes(model, f"{name}.{suffix}.zero_point", qparams.zero_point.astype(np.uint8), spec.dtype)
    return Tensors(codes, scale, zero_point, spec.group_size(quantized.codes.shape[0]))


def replace_matmul(model: ir.Model, linear: Linear, tensors: Tensors) -> None:
    """Turn the MatMul node into MatMulInt4 or MatMulInt8, in place: its outputs stay the same values."""
    inputs = [linear.activation, tensors.codes, tensors.scale]
    inputs += [tensors.zero_point] if tensors.zero_point is not None else []
    read = linear.node.inputs[1]
    _become(model, linear.node, f"MatMulInt{tensors.bits}", inputs, tensors.block_size)
    drop_weight(model, linear.weight, read)


def replace_embedding(model: ir.Model, embedding: Embedding, tensors: Tensors) -> None:
    """Turn the Gather node into EmbeddingInt4 or EmbeddingInt8, in place."""
    if tensors.zero_point is None:
        raise ValueError("an embedding operator always has zero points")
    view = _as_bytes if tensors.bits == 4 else _alias
    codes, zero_point = view(model, tensors.codes), view(model, tensors.zero_point)
    inputs = [embedding.indices, codes, _alias(model, tensors.scale), zero_point]
    _become(model, embedding.node, f"EmbeddingInt{tensors.bits}", inputs, tensors.block_size)
    drop_unused(model, embedding.table)


def add_codes(model: ir.Model, name: str, codes: Codes, dtype: ir.DataType) -> ir.Value:
    """A new initializer of integers of 4 or 8 bits."""
    if dtype.bitwidth == 8:
        return add_initializer(model.graph, name, ir.Tensor(codes, dtype=dtype))
    return add_initializer(model.graph, name, ir.PackedTensor(pack_nibbles(codes), dtype, shape=ir.Shape(codes.shape)))


def drop_unused(model: ir.Model, value: ir.Value) -> None:
    """Remove an initializer that nothing reads any more."""
    name = str(value.name)
    if not value.uses() and not value.is_graph_output() and name in model.graph.initializers:
        del model.graph.initializers[name]


def drop_weight(model: ir.Model, weight: ir.Value, read: ir.Value | None) -> None:
    """Remove a float weight, and the Transpose that it was read through, where neither is read, or an output."""
    producer = read.producer() if read is not None else None
    if read is not None and producer is not None and not read.uses() and not read.is_graph_output():
        assert producer.graph is not None
        producer.graph.remove(producer, safe=True)
    drop_unused(model, weight)


def floats(value: ir.Value) -> Array:
    """A constant as float32."""
    return np.asarray(read(constant(value)), dtype=np.float32)


def _alias(model: ir.Model, value: ir.Value) -> ir.Value:
    """A second initializer of the same tensor, stored once on disk.

    ONNX Runtime fuses a tied lm_head into one product only if nothing else reads its initializers.
    """
    name = f"{value.name}.lookup"
    known = model.graph.initializers.get(name)
    return known if known is not None else add_initializer(model.graph, name, constant(value))


def _as_bytes(model: ir.Model, value: ir.Value) -> ir.Value:
    """A 4-bit tensor (R, V) as uint8 (R, ceil(V / 2)): with V even the very same bytes, which the file stores once."""
    name, tensor = f"{value.name}.bytes", constant(value)
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    rows, columns = dimensions(value)
    if columns % 2 == 0:
        packed = np.frombuffer(tensor.tobytes(), np.uint8).reshape(rows, columns // 2)
    else:
        codes = np.asarray(tensor.numpy()).astype(np.uint8)
        packed = pack_nibbles(np.pad(codes, ((0, 0), (0, 1)))).reshape(rows, -1)
    return add_initializer(model.graph, name, ir.Tensor(packed))


def _become(model: ir.Model, node: ir.Node, operator: str, inputs: list[ir.Value], block_size: int) -> None:
    functions.register(model, operator, zero_points=len(inputs) == 4)
    node.resize_inputs(len(inputs))
    for i, value in enumerate(inputs):
        node.replace_input_with(i, value)
    node.op_type, node.domain, node.overload = operator, functions.DOMAIN, ""
    node.attributes.clear()
    node.attributes["block_size"] = ir.AttrInt64("block_size", block_size)
