"""Formats whose codes are looked up in a table of 16 levels: the grid, the storage and the bodies that they share.

A body ends in an integer constant, codes looked up in a table of int8 and a DequantizeLinear behind it: ONNX Runtime
folds the lookup at load and fuses the rest with the MatMul, which it does not do with a table of floats.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.passes.affine import Array, Codes, LookedUp, QParams, Quantized
from qcompile.passes.formats.base import (
    ACTIVATION_BITS,
    BIASED,
    DOMAIN,
    EMBEDDING,
    PRODUCT,
    Format,
    Stored,
    add_codes,
    alias,
    as_bytes,
    grouped_by,
    measured,
)
from qcompile.passes.graph import add_initializer
from qcompile.passes.native import LoopedGrid
from qcompile.passes.spec import Granularity, QuantSpec
from qcompile.passes.state import Tensors

# Twice the numbers of a sign, two bits of exponent and one of mantissa, in the order of their codes.
E2M1_TWICE = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)

# Codes of the columns that an embedding looks up: element 2j of a row is the low nibble of byte j, element 2j + 1 the
# high one. Negative indices count from V, not from the end of the bytes. The scales, by `flat`, check the bounds.
_LOOKED_UP = """
  all = Constant <value_ints: ints = [-1]> ()
  given = Reshape (indices, all)
  flat = Cast <to: int = 7> (given)
  columns = Shape <start: int = 1, end: int = 2> (scale)
  none = Constant <value_int: int = 0> ()
  negative = Less (flat, none)
  moved = Add (flat, columns)
  column = Where (negative, moved, flat)
  two = Constant <value_int: int = 2> ()
  odd = Mod (column, two)
  even = Sub (column, odd)
  byte = Div (even, two)
  four = Constant <value_int: int = 4> ()
  wide = Mul (odd, four)
  shift = Cast <to: int = 2> (wide)
  fifteen = Constant <value_int: int = 15> ()
  mask = Cast <to: int = 2> (fifteen)
  pairs = Gather <axis: int = 1> (w, byte)
  shifted = BitShift <direction: string = "RIGHT"> (pairs, shift)
  codes = BitwiseAnd (shifted, mask)
  stored = Gather <axis: int = 1> (scale, flat)
"""

_DECODED = """  decoded = DequantizeLinear <axis: int = 0, block_size: int = @block_size> (levels, {factor})
"""
# No DequantizeLinear takes floats: one of ones repeats the scale for every row of its group.
_DECODED_FLOATS = """  size = Shape (index)
  ones = ConstantOfShape <value: tensor = int8[1] {{1}}> (size)
  repeated = DequantizeLinear <axis: int = 0, block_size: int = @block_size> (ones, {factor})
  precise = Cast <to: int = 1> (repeated)
  product = Mul (levels, precise)
  decoded = CastLike (product, repeated)
"""
_ENDS = {
    PRODUCT: "  y = MatMul (x, decoded)\n",
    BIASED: "  product_y = MatMul (x, decoded)\n  y = Add (product_y, bias)\n",
    EMBEDDING: """  turned = Transpose <perm: ints = [1, 0]> (decoded)
  leading = Shape (indices)
  width = Shape <start: int = 0, end: int = 1> (w)
  shape = Concat <axis: int = 0> (leading, width)
  y = Reshape <allowzero: int = 1> (turned, shape)
""",
}


@dataclass(frozen=True)
class TableGrid(LoopedGrid):
    """Levels of a table, at most 16, times a positive scale for each group of rows.

    name: of the format. table: the level of each code, in the order of the codes. scale_bits: stored for each group; 0:
    those of the scale's type.
    """

    name: str
    table: tuple[float, ...]
    granularity: Granularity
    scale_dtype: npt.DTypeLike = np.float32
    scale_bits: int = 0
    bits: int = 4

    @property
    def format(self) -> str:
        return self.name

    def typed(self, scale_dtype: npt.DTypeLike) -> "TableGrid":
        return replace(self, scale_dtype=scale_dtype)

    def group_size(self, k: int) -> int:
        return self.granularity.size(k)

    def bits_per_weight(self, k: int) -> float:
        scale_bits = self.scale_bits or 8 * np.dtype(self.scale_dtype).itemsize
        return self.bits + scale_bits * self.groups(k) / max(k, 1)

    @property
    def looked_up(self) -> LookedUp | None:
        """None of a subclass, which may have other spans, nearest codes or storable scales and says its own; nor where
        several codes stand for one level that is not 0.
        """
        _, _, levels = _ordered(self.table)
        once = len(np.unique(levels[levels != 0])) == np.count_nonzero(levels)
        return self._own_table if once and type(self) is TableGrid else None

    @property
    def _own_table(self) -> LookedUp:
        codes, middles, levels = _ordered(self.table)
        rising = levels[codes.astype(np.uint8)]
        return LookedUp(tuple(rising.tolist()), tuple(codes.tolist()), tuple(middles.tolist()), self._largest)

    @property
    def _largest(self) -> float:
        return max(map(abs, self.table))

    def eight(self) -> QuantSpec:
        return QuantSpec(8, self.granularity, scale_dtype=self.scale_dtype)

    def span(self, blocks: Array, shrink: np.float32) -> QParams:
        """The largest magnitude of the group, times shrink, meets that of the table."""
        scale = self.storable(np.abs(blocks).max(axis=1) * shrink / np.float32(self._largest))
        return QParams(scale, np.zeros_like(scale))

    def nearest(self, blocks: Array, qparams: QParams) -> Array:
        """Ties go to the lower level."""
        codes, middles, _ = _ordered(self.table)
        return codes[np.searchsorted(middles, blocks / qparams.scale[:, None])]

    def levels(self, codes: Array | Codes, zero_point: Array) -> Array:
        _, _, levels = _ordered(self.table)
        return levels[np.asarray(codes).astype(np.uint8)]

    def __str__(self) -> str:
        return f"{self.format} {self.granularity}"


@cache
def _ordered(table: tuple[float, ...]) -> tuple[Array, Array, Array]:
    """(codes by rising level, each level once; the middles between those; the levels by code), float32."""
    levels = np.array(table, np.float32)
    rising, codes = np.unique(levels, return_index=True)  # of equal levels (0 and -0) the first code
    middles = ((rising[1:] + rising[:-1]) / 2).astype(np.float32)
    return codes.astype(np.float32), middles, levels


class Tables(Format):
    """What formats with a table have in common. Bodies read codes (K, N) of uint4 and scales (G, N).

    extra: attributes of the operators beside block_size.
    """

    bits = 4
    extra: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def table(self, word: str) -> Sequence[float]:
        """The 16 levels of the operators that end in a word: integers of 8 bits, or floats for other runtimes' sake."""

    def factor(self, stored: str) -> tuple[str, str]:
        """(lines of a body, the name of what they give): scales, of the type of its output, from stored ones."""
        return "", stored

    def body(self, kind: str, word: str) -> onnx.FunctionProto:
        levels = self.table(word)
        whole = all(float(level).is_integer() for level in levels)
        if whole:
            told, decoded = f"int8[{len(levels)}] {{{', '.join(map(str, map(int, levels)))}}}", _DECODED
        else:
            told, decoded = f"float[{len(levels)}] {{{', '.join(map(repr, map(float, levels)))}}}", _DECODED_FLOATS
        bias = ", bias" if kind == BIASED else ""
        given = "indices, w, scale" if kind == EMBEDDING else f"x, w, scale{bias}"
        standard = (f"{ACTIVATION_BITS}: int = 16",) if word in self.native and kind != EMBEDDING else ()
        attributes = ", ".join(("block_size", *self.extra, *standard))
        taken, codes, stored = (_LOOKED_UP, "codes", "stored") if kind == EMBEDDING else ("", "w", "scale")
        made, factor = self.factor(stored)
        lines = (
            f"{taken}  table = Constant <value: tensor = {told}> ()\n  index = Cast <to: int = 6> ({codes})\n"
            f"  levels = Gather (table, index)\n{made}{decoded.format(factor=factor)}{_ENDS[kind]}"
        )
        header = f'<opset_import: ["" : 21], domain: "{DOMAIN}">\n{kind}{word} <{attributes}> ({given}) => (y)'
        return onnx.parser.parse_function(f"{header} {{{lines}}}")

    def store(self, model: ir.Model, name: str, quantized: Quantized) -> Tensors:
        codes = add_codes(model, f"{name}.{self.name}", quantized.codes, ir.DataType.UINT4)
        stored = ir.tensor(self.scales(quantized))
        scale = add_initializer(model.graph, f"{name}.{self.name}.scale", stored)
        return Tensors(codes, scale, None, quantized.spec.group_size(len(quantized.codes)))

    def scales(self, quantized: Quantized) -> npt.NDArray[Any]:
        """The scales (G, N) as they are stored."""
        return quantized.qparams.scale.astype(quantized.spec.scale_dtype)

    def lookup(self, model: ir.Model, tensors: Tensors) -> list[ir.Value]:
        return [as_bytes(model, tensors.codes), alias(model, tensors.scale)]

    def read(self, node: ir.Node) -> Stored | None:
        codes, scale = node.inputs[1], node.inputs[2]
        shape = None if codes is None or scale is None else measured(codes, scale)
        if codes is None or scale is None or shape is None:
            return None
        form = f"{self.name} {grouped_by(node.attributes.get_int('block_size', 0), shape[0])}"
        return Stored(shape, form, [codes, scale])

    def looks_up(self, levels: npt.NDArray[Any]) -> bool:
        tables = (np.array(self.table(word), np.float32) for word in self.words)
        return any(np.array_equal(own, levels.astype(np.float32)) for own in tables)
