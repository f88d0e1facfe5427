"""pairs2, pairs2.5, pairs3, pairs3.5 and pairs4: one code for two numbers of a column, looked up in a codebook.

Rows 2 j and 2 j + 1 of a column are one of 16, 32, 64, 128 or 256 pairs of int8 (passes/codebooks.py), times the
column's scale: vector quantization with one codebook for all weights, as VPTQ and QuIP# have it (Liu et al. 2024, Tseng
et al. 2024). It is meant for weights whose input is turned (`rotate`), which are nearly normal. Codes are stored in
fields of bytes (passes/bit_fields.py). A body unpacks them, looks them up and ends in int8 behind a DequantizeLinear,
with the scale repeated for blocks of 64 rows: ONNX Runtime folds that when it loads, and fuses the rest.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.passes.affine import Array, Codes, Grid, QParams, Quantized
from qcompile.passes.bit_fields import byte_rows, pack_fields, shifts, unpack_fields
from qcompile.passes.codebooks import CODEBOOKS, Codebook
from qcompile.passes.formats.base import (
    EMBEDDING,
    Stored,
    weight_operands,
)
from qcompile.passes.formats.bits import Fields, unpacking, unpacking_whole
from qcompile.passes.graph import add_initializer
from qcompile.passes.linears import constant, dimensions, stored
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.state import Tensors

# Rows that share a scale in a body, and in the integers that take the format's place: ONNX Runtime fuses blocks of a
# power of two only.
_BLOCK = 64
# Of the scale at which a codebook is best for normal numbers, by how much heavier or lighter tails may move it.
_SCALES = (1.0, 0.7, 0.8, 0.9, 1.1, 1.25, 1.4, 1.7, 2.0)

_SIZES = """
  given = Constant <value_int: int = @K> ()
  one = Constant <value_ints: ints = [1]> ()
  rows = Reshape (given, one)
"""
_CODED = """
  two = Constant <value_ints: ints = [2]> ()
  more = Add (rows, one)
  coded = Div (more, two)
"""
_LOOKED_UP = """
  any = Constant <value_ints: ints = [-1]> ()
  flat = Reshape (indices, any)
  w_taken = Gather <axis: int = 1> (w, flat)
  scale_taken = Gather <axis: int = 1> (scale, flat)
"""
_FOUND = """
  book = Constant <value: tensor = int8[{size},2] {{{pairs}}}> ()
  index = Cast <to: int = 6> (codes)
  found = Gather (book, index)
  beside = Transpose <perm: ints = [0, 2, 1]> (found)
  {levels} = Flatten <axis: int = 2> (beside)
"""
# The second number of the last code of an odd K is nobody's.
_CUT = """
  begin = Constant <value_ints: ints = [0]> ()
  levels = Slice (every, begin, rows)
"""
_DECODED = """
  block = Constant <value_ints: ints = [{block}]> ()
  over = Constant <value_ints: ints = [{over}]> ()
  filled = Add (rows, over)
  blocks = Div (filled, block)
  columns = Shape <start: int = 1, end: int = 2> ({scale})
  grid = Concat <axis: int = 0> (blocks, columns)
  scales = Expand ({scale}, grid)
  decoded = DequantizeLinear <axis: int = 0, block_size: int = {block}> (levels, scales)
"""
_ROWS = """
  turned = Transpose <perm: ints = [1, 0]> (decoded)
  leading = Shape (indices)
  shape = Concat <axis: int = 0> (leading, rows)
  y = Reshape <allowzero: int = 1> (turned, shape)
"""


@dataclass(frozen=True)
class CodebookGrid(Grid):
    """Pairs of a codebook times a positive scale for each column.

    Codes are (K, N) as those of any grid: both rows of a pair have its code. Of an odd K the last row has a code whose
    second number is nobody's.
    name: of the format. size: pairs of the codebook. bits: of a weight, rounded up.
    """

    name: str
    size: int
    bits: int
    scale_dtype: npt.DTypeLike = np.float32

    @property
    def book(self) -> Codebook:
        """Its pairs."""
        return CODEBOOKS[self.code_bits]

    @property
    def format(self) -> str:
        return self.name

    @property
    def code_bits(self) -> int:
        return self.size.bit_length() - 1

    @property
    def rows_per_code(self) -> int:
        return 2

    def typed(self, scale_dtype: npt.DTypeLike) -> "CodebookGrid":
        return replace(self, scale_dtype=scale_dtype)

    def group_size(self, k: int) -> int:
        return k

    def bits_per_weight(self, k: int) -> float:
        codes = 8 * sum(byte_rows(-(-k // 2), self.code_bits))
        return (codes + 8 * np.dtype(self.scale_dtype).itemsize) / max(k, 1)

    def eight(self) -> QuantSpec:
        return QuantSpec(8, PerGroup(_BLOCK), scale_dtype=self.scale_dtype)

    @property
    def shrinks(self) -> tuple[float, ...]:
        return _SCALES

    def span(self, blocks: Array, shrink: np.float32) -> QParams:
        """The deviation of the column meets that of the numbers that the codebook is fitted to, times shrink."""
        deviation = np.sqrt(np.square(blocks).mean(axis=1))
        scale = self.storable(deviation * shrink / np.float32(self.book.deviation))
        return QParams(scale, np.zeros_like(scale))

    def fit(self, w: Array, importance: Array | None = None) -> QParams:
        """Scales are searched for without importance, too: no range says where they are."""
        return super().fit(w, np.ones(len(w), np.float32) if importance is None else importance)

    def nearest(self, blocks: Array, qparams: QParams) -> Array:
        """Of blocks (groups, rows, N) that begin with the first row of a pair: `Codebook.nearest`."""
        wanted = blocks / qparams.scale[:, None]
        codes = np.empty(blocks.shape, np.float32)
        whole = blocks.shape[1] // 2 * 2
        own = self.book.nearest(wanted[:, 0:whole:2], wanted[:, 1:whole:2])
        codes[:, 0:whole:2] = codes[:, 1:whole:2] = own
        codes[:, whole:] = self.book.nearest_first(wanted[:, whole:])
        return codes

    def project_by(self, w: Array, qparams: QParams, metric: Array) -> Codes:
        """The pair c of least (x - c)ᵀ M (x - c), which is of most xᵀ M c - cᵀ M c / 2; of an odd row, as ever."""
        if len(w) < 2:
            return self.project(w, qparams)
        x, ((a, b), (_, c)) = w / qparams.scale, metric / np.trace(metric)
        by = np.stack(np.broadcast_arrays(a * x[0] + b * x[1], b * x[0] + c * x[1], a, b, c), axis=1)
        own = (by @ self.book.products).argmax(axis=1).astype(self.code_dtype)
        return np.stack([own, own])

    def levels(self, codes: Array | Codes, zero_point: Array) -> Array:
        """Of codes (…, rows, N) that begin with the first row of a pair."""
        index, first_second = np.asarray(codes, np.uint8), self.book.pairs.astype(np.float32).T
        found = np.empty(index.shape, np.float32)
        for own, numbers in enumerate(first_second):
            found[..., own::2, :] = numbers[index[..., own::2, :]]
        return found

    def __str__(self) -> str:
        return f"{self.format} per-column"


class CodebookPairs(Fields):
    """Operators read w (bytes, N) of uint8 and scale (1, N); K, the rows of the weight, is an attribute.

    code_bits: of a code, which stands for two rows.
    """

    rows_per_code: ClassVar[int] = 2
    code_bits: ClassVar[int]

    def grid(self, target: str) -> CodebookGrid:
        """A scale for each column."""
        return CodebookGrid(self.name, 1 << self.code_bits, self.bits)

    def body(self, kind: str, word: str) -> onnx.FunctionProto:
        return self._body(kind, word)

    @property
    def whole_rows(self) -> int:
        return 8 * self.rows_per_code

    def body_of_whole(self, kind: str, word: str, *, zero_points: bool) -> onnx.FunctionProto:
        return self._body(kind, word, whole=True)

    def _body(self, kind: str, word: str, *, whole: bool = False) -> onnx.FunctionProto:
        lookup, taken = kind == EMBEDDING, "_taken" if kind == EMBEDDING else ""
        pairs = CODEBOOKS[self.code_bits].pairs
        lines = _SIZES + (_LOOKED_UP if lookup else "")
        if whole:
            lines += unpacking_whole("codes", f"w{taken}", self.code_bits, clean=True)
        else:
            lines += _CODED + unpacking("codes", f"w{taken}", "coded", self.code_bits)
        told = ", ".join(map(str, pairs.reshape(-1).tolist()))
        lines += _FOUND.format(size=len(pairs), pairs=told, levels="levels" if whole else "every")
        lines += "" if whole else _CUT
        lines += _DECODED.format(block=_BLOCK, over=_BLOCK - 1, scale=f"scale{taken}")
        return self.function(kind, word, lines, _ROWS)

    def store(self, model: ir.Model, name: str, quantized: Quantized) -> Tensors:
        spec, name = quantized.spec, f"{name}.{self.name}"
        codes = add_initializer(model.graph, name, ir.tensor(pack_fields(quantized.codes[::2], self.code_bits)))
        scale = ir.tensor(quantized.qparams.scale.astype(spec.scale_dtype))
        stored_scale = add_initializer(model.graph, f"{name}.scale", scale)
        return Tensors(codes, stored_scale, None, spec.group_size(len(quantized.codes)))

    def codes(self, value: ir.Value, k: int) -> npt.NDArray[Any]:
        own = unpack_fields(np.asarray(constant(value).numpy()), self.code_bits, -(-k // 2))
        return np.repeat(own, 2, axis=0)[:k]

    def read(self, node: ir.Node) -> Stored | None:
        given = weight_operands(node)
        if stored(given[0]) is None or stored(given[1]) is None:
            return None
        shape = node.attributes.get_int("K", 0), dimensions(given[1])[1]
        return Stored(shape, f"{self.name} per-column", given)

    def looks_up(self, levels: npt.NDArray[Any]) -> bool:
        return np.array_equal(CODEBOOKS[self.code_bits].pairs, levels)

    def shifts(self) -> list[list[int]]:
        return shifts(self.code_bits)


class Pairs2(CodebookPairs):
    """16 pairs."""

    name, words, native, bits, code_bits = "pairs2", ("Pairs16",), ("Pairs16",), 2, 4


class Pairs2Half(CodebookPairs):
    """32 pairs."""

    name, words, native, bits, code_bits = "pairs2.5", ("Pairs32",), ("Pairs32",), 3, 5


class Pairs3(CodebookPairs):
    """64 pairs: behind a rotation about the error of int4 without one."""

    name, words, native, bits, code_bits = "pairs3", ("Pairs64",), ("Pairs64",), 3, 6


class Pairs3Half(CodebookPairs):
    """128 pairs."""

    name, words, native, bits, code_bits = "pairs3.5", ("Pairs128",), ("Pairs128",), 4, 7


class Pairs4(CodebookPairs):
    """256 pairs, a byte each."""

    name, words, native, bits, code_bits = "pairs4", ("Pairs256",), ("Pairs256",), 4, 8
