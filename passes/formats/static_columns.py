"""MatMulInt8Outlier: the operator that `Columns` are around int8 codes whose activations have a fixed grid."""

import onnx
import onnx_ir as ir

from qcompile.passes.formats.base import PRODUCT, Cache, Operators, Stored, scripted
from qcompile.passes.linears import stored


class StaticColumns(Operators):
    """Around int8 (or float8) codes with one scale a column, or for all.

    One operator: ONNX Runtime finds the integer product in its body. x is rounded once for all that share the grid.
    """

    name, kinds, words = "int8", (PRODUCT,), ("Int8Outlier",)

    def body(self, kind: str, word: str) -> onnx.FunctionProto:
        return scripted("MatMulInt8Outlier")

    def lower(self, model: ir.Model, node: ir.Node, cache: Cache) -> None:
        """Nothing: its body is inlined."""

    def read(self, node: ir.Node) -> Stored | None:
        given = [value for value in node.inputs[1:3] if value is not None]
        codes = stored(given[0]) if given else None
        if codes is None or len(codes.shape) != 2:
            return None
        k, n = (int(size) for size in codes.shape.numpy())
        return Stored((k, n), f"{codes.dtype.name.lower()} per-column sym", given)
