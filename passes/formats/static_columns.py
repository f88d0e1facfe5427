"""MatMulInt8Outlier: the operator that `Columns` are around int8 codes whose activations have a fixed grid."""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,valid-type,misc,untyped-decorator"

import onnx
import onnx_ir as ir
import onnxscript
from onnxscript import INT64
from onnxscript import opset21 as op

from qcompile.passes.formats.base import OPSET, PRODUCT, Cache, Operators, Stored
from qcompile.passes.linears import stored


@onnxscript.script(OPSET, default_opset=op)
def MatMulInt8Outlier(x, w, scale, x_scale, x_zero_point, channels: INT64, w_outlier):
    rest = op.DequantizeLinear(op.QuantizeLinear(x, x_scale, x_zero_point), x_scale, x_zero_point)
    product = op.MatMul(rest, op.DequantizeLinear(w, scale, axis=1))
    return op.Add(product, op.MatMul(op.Gather(x, channels, axis=-1), w_outlier))


class StaticColumns(Operators):
    """Around int8 (or float8) codes with one scale a column, or for all.

    One operator: ONNX Runtime finds the integer product in its body. x is rounded once for all that share the grid.
    """

    name, kinds, words = "int8", (PRODUCT,), ("Int8Outlier",)

    def body(self, kind: str, word: str) -> onnx.FunctionProto:
        return MatMulInt8Outlier.to_function_proto()

    def lower(self, model: ir.Model, node: ir.Node, cache: Cache) -> None:
        """Nothing: its body is inlined."""

    def read(self, node: ir.Node) -> Stored | None:
        given = [value for value in node.inputs[1:3] if value is not None]
        codes = stored(given[0]) if given else None
        if codes is None or len(codes.shape) != 2:
            return None
        k, n = (int(size) for size in codes.shape.numpy())
        return Stored((k, n), f"{codes.dtype.name.lower()} per-column sym", given)
