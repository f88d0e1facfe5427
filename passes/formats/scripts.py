"""Bodies of operators of the domain that are written as onnxscript functions.

Nothing imports this at the top: onnxscript takes longer to load than a decoder (`base.scripted`).
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,valid-type,misc,untyped-decorator"

import onnxscript
from onnxscript import INT64
from onnxscript import opset21 as op

from qcompile.passes.formats.base import DOMAIN, VERSION

OPSET = onnxscript.values.Opset(DOMAIN, VERSION)


@onnxscript.script(OPSET, default_opset=op)
def MatMulInt4(x, w, scale, zero_point, block_size: int, activation_bits: int = 16):
    return op.MatMul(x, op.DequantizeLinear(w, scale, zero_point, axis=0, block_size=block_size))


@onnxscript.script(OPSET, default_opset=op)
def MatMulInt8(x, w, scale, zero_point, block_size: int, activation_bits: int = 16):
    return op.MatMul(x, op.DequantizeLinear(w, scale, zero_point, axis=0, block_size=block_size))


@onnxscript.script(OPSET, default_opset=op)
def MatMulAddInt4(x, w, scale, bias, zero_point, block_size: int, activation_bits: int = 16):
    return op.Add(op.MatMul(x, op.DequantizeLinear(w, scale, zero_point, axis=0, block_size=block_size)), bias)


@onnxscript.script(OPSET, default_opset=op)
def MatMulAddInt8(x, w, scale, bias, zero_point, block_size: int, activation_bits: int = 16):
    return op.Add(op.MatMul(x, op.DequantizeLinear(w, scale, zero_point, axis=0, block_size=block_size)), bias)


@onnxscript.script(OPSET, default_opset=op)
def EmbeddingInt8(indices: INT64, w, scale, zero_point, block_size: int):
    flat = op.Reshape(indices, op.Constant(value_ints=[-1]))
    codes = op.Gather(w, flat, axis=1)
    scales = op.Gather(scale, flat, axis=1)
    zero_points = op.Gather(zero_point, flat, axis=1)
    columns = op.DequantizeLinear(codes, scales, zero_points, axis=0, block_size=block_size)
    shape = op.Concat(op.Shape(indices), op.Shape(w, start=0, end=1), axis=0)
    return op.Reshape(op.Transpose(columns, perm=[1, 0]), shape, allowzero=1)


@onnxscript.script(OPSET, default_opset=op)
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


@onnxscript.script(OPSET, default_opset=op)
def GatherInt8(indices: INT64, w, scale, zero_point, block_size: int):
    codes, zero_points = op.Gather(w, indices, axis=0), op.Gather(zero_point, indices, axis=0)
    return op.DequantizeLinear(codes, op.Gather(scale, indices, axis=0), zero_points, axis=-1, block_size=block_size)


@onnxscript.script(OPSET, default_opset=op)
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


@onnxscript.script(OPSET, default_opset=op)
def MatMulInt8Outlier(x, w, scale, x_scale, x_zero_point, channels: INT64, w_outlier):
    rest = op.DequantizeLinear(op.QuantizeLinear(x, x_scale, x_zero_point), x_scale, x_zero_point)
    product = op.MatMul(rest, op.DequantizeLinear(w, scale, axis=1))
    return op.Add(product, op.MatMul(op.Gather(x, channels, axis=-1), w_outlier))


@onnxscript.script(OPSET, default_opset=op)
def SwiGLU(x):
    gate, up = op.Split(x, num_outputs=2, axis=-1)
    return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)


@onnxscript.script(OPSET, default_opset=op)
def Hadamard(x, matrix):
    blocks = op.Reshape(x, op.Concat(op.Constant(value_ints=[-1]), op.Shape(matrix, start=0, end=1), axis=0))
    return op.Reshape(op.MatMul(blocks, matrix), op.Shape(x), allowzero=1)
