"""The operators of domain `qcompile`, as ONNX functions of standard operators.

The body is the specification, the oracle of the tests, and what runs where no kernel library is registered.

| operator | inputs | output |
|---|---|---|
| MatMulInt4, MatMulInt8 | x (…, K); w (K, N); scale (G, N); zero_point (G, N), optional | (…, N) |
| MatMulAddInt4, MatMulAddInt8 | x; w; scale; bias (N,); zero_point, optional | (…, N) |
| MatMulInt8Outlier | x; w int8; scale (N,); x_scale (); x_zero_point (); channels (C,); w_outlier (C, N) | (…, N) |
| EmbeddingInt4 | indices (…) int; w (K, C) uint8; scale (G, V); zero_point (G, C) uint8 | (…, K) |
| EmbeddingInt8 | indices (…) int; w (K, V); scale (G, V); zero_point (G, V) | (…, K) |
| GatherInt4 | indices (…) int; w (E, …, K / 2) uint8; scale (E, …, G); zero_point (E, …, G) uint8 | (…, …, K) |
| GatherInt8 | indices (…) int; w (E, …, K); scale (E, …, G); zero_point (E, …, G) | (…, …, K) |

The outliers' rows of w are zero, so what rounding makes of these channels of x adds nothing; see docs/formats.md.
G = ceil(K / block_size); C = ceil(V / 2) bytes of two codes each, the even column's in the low nibble.
The code of element (k, n) decodes to (w - zero_point) * scale, both of group k // block_size.
The attribute `activation_bits` of the products, 16 where it is absent, is for kernels: what they may round x to. The
bodies compute in the type of x and do not read it.
GatherInt… look up whole matrices, those of experts, along axis 0; blocks lie along the last axis.
An embedding reads columns of the very tensor that a tied lm_head multiplies with, so both can share one copy; 4-bit
tables are read as bytes because ONNX Runtime gathers no 4-bit types.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,valid-type,misc,untyped-decorator"

from dataclasses import dataclass
from functools import cache

import onnx
import onnx_ir as ir
import onnxscript
from onnxscript import INT64
from onnxscript import opset21 as op

DOMAIN = "qcompile"
VERSION = 1
# Attribute of the products: bits that a kernel gives each activation, 16 or 8.
ACTIVATION_BITS = "activation_bits"
# The product whose scale is that of whole columns, not of blocks.
OUTLIER = "MatMulInt8Outlier"
_DOMAIN_OPSET = onnxscript.values.Opset(DOMAIN, VERSION)


@onnxscript.script(_DOMAIN_OPSET, default_opset=op)
def MatMulInt4(x, w, scale, zero_point, block_size: int, activation_bits: int = 16):
    return op.MatMul(x, op.DequantizeLinear(w, scale, zero_point, axis=0, block_size=block_size))


@onnxscript.script(_DOMAIN_OPSET, default_opset=op)
def MatMulInt8(x, w, scale, zero_point, block_size: int, activation_bits: int = 16):
    return op.MatMul(x, op.DequantizeLinear(w, scale, zero_point, axis=0, block_size=block_size))


@onnxscript.script(_DOMAIN_OPSET, default_opset=op)
def MatMulAddInt4(x, w, scale, bias, zero_point, block_size: int, activation_bits: int = 16):
    return op.Add(op.MatMul(x, op.DequantizeLinear(w, scale, zero_point, axis=0, block_size=block_size)), bias)


@onnxscript.script(_DOMAIN_OPSET, default_opset=op)
def MatMulAddInt8(x, w, scale, bias, zero_point, block_size: int, activation_bits: int = 16):
    return op.Add(op.MatMul(x, op.DequantizeLinear(w, scale, zero_point, axis=0, block_size=block_size)), bias)


@onnxscript.script(_DOMAIN_OPSET, default_opset=op)
def MatMulInt8Outlier(x, w, scale, x_scale, x_zero_point, channels: INT64, w_outlier):
    rest = op.DequantizeLinear(op.QuantizeLinear(x, x_scale, x_zero_point), x_scale, x_zero_point)
    product = op.MatMul(rest, op.DequantizeLinear(w, scale, axis=1))
    return op.Add(product, op.MatMul(op.Gather(x, channels, axis=-1), w_outlier))


@onnxscript.script(_DOMAIN_OPSET, default_opset=op)
def EmbeddingInt8(indices: INT64, w, scale, zero_point, block_size: int):
    flat = op.Reshape(indices, op.Constant(value_ints=[-1]))
    codes = op.Gather(w, flat, axis=1)
    scales = op.Gather(scale, flat, axis=1)
    zero_points = op.Gather(zero_point, flat, axis=1)
    columns = op.DequantizeLinear(codes, scales, zero_points, axis=0, block_size=block_size)
    shape = op.Concat(op.Shape(indices), op.Shape(w, start=0, end=1), axis=0)
    return op.Reshape(op.Transpose(columns, perm=[1, 0]), shape, allowzero=1)


@onnxscript.script(_DOMAIN_OPSET, default_opset=op)
def EmbeddingInt4(indices: INT64, w, scale, zero_point, block_size: int):
    flat = op.Cast(op.Reshape(indices, op.Constant(value_ints=[-1])), to=7)
    two = op.Constant(value_int=2)
    # Negative indices count from V, not from the end of the bytes. The scales, gathered by `flat`, check the bounds.
    column = op.Where(op.Less(flat, op.Constant(value_int=0)), op.Add(flat, op.Shape(scale, start=1, end=2)), flat)
    # Element 2j of a row is the low nibble of byte j, element 2j + 1 the high one.
    odd = op.Mod(column, two)
    byte = op.Div(op.Sub(column, odd), two)
    shift = op.Cast(op.Mul(odd, op.Constant(value_int=4)), to=2)
    mask = op.Cast(op.Constant(value_int=15), to=2)
    codes = op.BitwiseAnd(op.BitShift(op.Gather(w, byte, axis=1), shift, direction="RIGHT"), mask)
    zero_points = op.BitwiseAnd(op.BitShift(op.Gather(zero_point, byte, axis=1), shift, direction="RIGHT"), mask)
    scales = op.Gather(scale, flat, axis=1)
    columns = op.DequantizeLinear(codes, scales, zero_points, axis=0, block_size=block_size)
    shape = op.Concat(op.Shape(indices), op.Shape(w, start=0, end=1), axis=0)
    return op.Reshape(op.Transpose(columns, perm=[1, 0]), shape, allowzero=1)


@onnxscript.script(_DOMAIN_OPSET, default_opset=op)
def GatherInt8(indices: INT64, w, scale, zero_point, block_size: int):
    codes, zero_points = op.Gather(w, indices, axis=0), op.Gather(zero_point, indices, axis=0)
    return op.DequantizeLinear(codes, op.Gather(scale, indices, axis=0), zero_points, axis=-1, block_size=block_size)


@onnxscript.script(_DOMAIN_OPSET, default_opset=op)
def GatherInt4(indices: INT64, w, scale, zero_point, block_size: int):
    pairs = op.Gather(w, indices, axis=0)
    low = op.BitwiseAnd(pairs, op.Cast(op.Constant(value_int=15), to=2))
    high = op.BitShift(pairs, op.Cast(op.Constant(value_int=4), to=2), direction="RIGHT")
    last = op.Constant(value_ints=[-1])
    both = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
    columns = op.Mul(op.Shape(pairs, start=-1), op.Constant(value_ints=[2]))
    codes = op.Reshape(both, op.Concat(op.Shape(pairs, end=-1), columns, axis=0), allowzero=1)
    zero_points = op.Gather(zero_point, indices, axis=0)
    return op.DequantizeLinear(codes, op.Gather(scale, indices, axis=0), zero_points, axis=-1, block_size=block_size)


@cache
def _protos() -> dict[str, bytes]:
    products = (MatMulInt4, MatMulInt8, MatMulAddInt4, MatMulAddInt8, MatMulInt8Outlier)
    functions = (*products, EmbeddingInt8, EmbeddingInt4, GatherInt8, GatherInt4)
    return {function.name: function.to_function_proto().SerializeToString() for function in functions}


def body(name: str, *, zero_points: bool = True) -> ir.Function:
    """A fresh copy of the operator's ONNX function.

    zero_points: False leaves that input out. ONNX Runtime fuses a DequantizeLinear of two inputs, and one of three, but
    none whose third is absent, which is what inlining makes of an optional input that a node does not give.
    """
    proto = onnx.FunctionProto.FromString(_protos()[name])
    if not zero_points:
        proto.input.remove("zero_point")
        for node in proto.node:
            if "zero_point" in node.input:
                node.input.remove("zero_point")
    return ir.serde.deserialize_function(proto)


@dataclass(frozen=True, eq=False)
class Operands:
    """The constants of a packed product, as functions.py's table has them; None where the node gives none."""

    codes: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    zero_point: ir.Value | None

    def values(self) -> list[ir.Value]:
        """Those that are there, in the operator's order."""
        return [value for value in (self.codes, self.scale, self.bias, self.zero_point) if value is not None]


def is_product(node: ir.Node) -> bool:
    """Whether the node is a packed matrix product with a block size, MatMulInt… or MatMulAddInt…"""
    return node.domain == DOMAIN and node.op_type.startswith("MatMul") and node.op_type != OUTLIER


def operands(node: ir.Node) -> Operands:
    """The operands of a packed product behind its activation."""
    codes, scale, *rest = node.inputs[1:]
    if codes is None or scale is None:
        raise TypeError(f"node {node.name}: {node.op_type} without codes or scales")
    bias = rest.pop(0) if node.op_type.startswith("MatMulAdd") else None
    return Operands(codes, scale, bias, rest[0] if rest else None)


def register(model: ir.Model, name: str, *, zero_points: bool = True) -> None:
    """Make sure that the model carries a body of the operator that takes zero points where they are given."""
    model.graph.opset_imports.setdefault(DOMAIN, VERSION)
    function = body(name, zero_points=zero_points)
    known = model.functions.get(function.identifier())
    if known is not None and len(known.inputs) >= len(function.inputs):
        return
    # The body's operators mean the same from opset 21 on, and ONNX Runtime inlines them under the model's version.
    function.opset_imports[""] = max(function.opset_imports[""], model.graph.opset_imports.get("", 21))
    model.functions[function.identifier()] = function
