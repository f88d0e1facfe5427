"""int2, int3, int5 and int6: the grid of int4 with other numbers of bits, stored in that many (passes/bit_fields.py).

A body unpacks the bytes to uint4 (2 and 3 bits) or uint8 (5 and 6), by a shift and a mask for all rows of a field. ONNX
Runtime folds that when it loads, and fuses the DequantizeLinear behind it with the MatMul.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.passes.affine import Codes, Grid, Quantized
from qcompile.passes.bit_fields import ALL_FIELDS, pack_fields, shifts, unpack_fields
from qcompile.passes.formats.base import (
    ACTIVATION_BITS,
    BIASED,
    DOMAIN,
    EMBEDDING,
    Cache,
    Format,
    Stored,
    alias,
    grouped_by,
    weight_operands,
)
from qcompile.passes.formats.integers import affine, checked
from qcompile.passes.graph import add_initializer
from qcompile.passes.linears import constant, dimensions, stored
from qcompile.passes.spec import QuantSpec, granularity
from qcompile.passes.state import Tensors
from qcompile.passes.targets import TARGETS

# One field of bytes: all rows that its bytes hold, one after another, and of these the first `rows`.
_FIELD = """
  {p}_shifts = Constant <value: tensor = uint8[{count},1,1] {{{shifts}}}> ()
  {p}_shifted = BitShift <direction: string = "RIGHT"> ({stored}, {p}_shifts)
  {p}_mask = Constant <value: tensor = uint8[1] {{{mask}}}> ()
  {p}_masked = BitwiseAnd ({p}_shifted, {p}_mask)
  {p}_flat = Flatten <axis: int = 2> ({p}_masked)
  {p}_begin = Constant <value_ints: ints = [0]> ()
  {p}_rows = Slice ({p}_flat, {p}_begin, {rows})
"""
# Where the bytes of the first field end: behind ceil(rows / count).
_CUT = """
  {p}_count = Constant <value_ints: ints = [{count}]> ()
  {p}_over = Constant <value_ints: ints = [{over}]> ()
  {p}_filled = Add ({rows}, {p}_over)
  {p}_cut = Div ({p}_filled, {p}_count)
  {p}_none = Constant <value_ints: ints = [0]> ()
  {p}_all = Constant <value_ints: ints = [9223372036854775807]> ()
  {p}_first = Slice ({stored}, {p}_none, {p}_cut)
  {p}_second = Slice ({stored}, {p}_cut, {p}_all)
"""
_JOINED = """
  {p}_low = Constant <value: tensor = uint8[1] {{{low}}}> ()
  {p}_high = BitShift <direction: string = "LEFT"> ({p}b_rows, {p}_low)
  {p} = BitwiseOr ({p}a_rows, {p}_high)
"""
_SIZES = """
  given = Constant <value_int: int = @K> ()
  one = Constant <value_ints: ints = [1]> ()
  rows = Reshape (given, one)
"""
_GROUPS = """
  groups = Shape <start: int = 0, end: int = 1> (scale)
"""
_LOOKED_UP = """
  any = Constant <value_ints: ints = [-1]> ()
  flat = Reshape (indices, any)
  w_taken = Gather <axis: int = 1> (w, flat)
  scale_taken = Gather <axis: int = 1> (scale, flat)
  columns = Shape (flat)
  grid = Concat <axis: int = 0> (groups, columns)
"""
_ZEROS_TAKEN = "  zero_point_taken = Gather <axis: int = 1> (zero_point, flat)\n"
_MIDDLE = """
  middle = Constant <value: tensor = uint8[1] {{{middle}}}> ()
  zeros = Expand (middle, {grid})
"""
_NARROW = """
  levels = Cast <to: int = 21> (codes)
  zero_levels = Cast <to: int = 21> (zeros)
"""
_WIDE = "  levels = Identity (codes)\n  zero_levels = Identity (zeros)\n"
_DECODED = (
    "  decoded = DequantizeLinear <axis: int = 0, block_size: int = @block_size> (levels, {scale}, zero_levels)\n"
)
_ROWS = """
  turned = Transpose <perm: ints = [1, 0]> (decoded)
  leading = Shape (indices)
  shape = Concat <axis: int = 0> (leading, rows)
  y = Reshape <allowzero: int = 1> (turned, shape)
"""


def unpacking(made: str, packed: str, rows: str, bits: int) -> str:
    """Lines of a body: codes `made` (rows, N) of uint8, from bytes `packed` as `unpack_fields` reads them."""

    def field(name: str, source: str, width: int) -> str:
        told = ",".join(map(str, range(0, 8, width)))
        mask = (1 << width) - 1
        return _FIELD.format(p=name, count=8 // width, shifts=told, mask=mask, stored=source, rows=rows)

    first, *rest = ALL_FIELDS[bits]
    if not rest:
        return field(made, packed, first).replace(f"{made}_rows =", f"{made} =")
    cut = _CUT.format(p=made, count=8 // first, over=8 // first - 1, rows=rows, stored=packed)
    second = f"{made}_second"
    above = (
        field(f"{made}b", second, *rest) if len(rest) == 1 else unpacking(f"{made}b_rows", second, rows, bits - first)
    )
    return cut + field(f"{made}a", f"{made}_first", first) + above + _JOINED.format(p=made, low=first)


def unpacking_whole(made: str, packed: str, bits: int, *, clean: bool) -> str:
    """Lines of a body: what `unpacking` gives, of rows that are a multiple of 8, by way of fewer bytes.

    ONNX Runtime folds node by node, and keeps what each gives until all weights are folded. An eighth of the rows is a
    block: a field of w bits has w, of which block i has block i, i + w, … of the codes, lowest bits first. So blocks
    are put together apart, and joined last. Unless codes must be clean, whoever reads them drops all but the lowest 4
    bits, as a Cast to uint4 does: then blocks q and q + 4 are made at once, in the two halves of a byte.
    """
    lanes, twice = (8, 1) if clean else (4, 0x11)
    blocks = ", ".join(f"{made}_in{i}" for i in range(bits))
    lines = [f"{blocks} = Split <axis: int = 0, num_outputs: int = {bits}> ({packed})"]

    def step(name: str, operator: str, source: str, number: int) -> str:
        constant = f"{made}_is{number} = Constant <value: tensor = uint8[1] {{{number}}}> ()"
        lines.extend([] if constant in lines else [constant])
        lines.append(f"{name} = {operator} ({source}, {made}_is{number})")
        return name

    def piece(name: str, lane: int, first: int, width: int) -> str:
        """Bits `first` … of the lane's codes, in place."""
        source, taken = f"{made}_in{first + lane % width}", lane // width * width
        if taken != first:
            way = "LEFT" if taken < first else "RIGHT"
            source = step(f"{name}s", f'BitShift <direction: string = "{way}">', source, abs(taken - first))
        mask = ((1 << width) - 1 << first) * twice
        alone = (taken == 0 or first == 0) and 8 in (taken + width, first + width)
        return source if alone or mask == 0xFF else step(f"{name}m", "BitwiseAnd", source, mask)

    parts = []
    for lane in range(lanes):
        name, joined, first = f"{made}_{lane}", "", 0
        for width in ALL_FIELDS[bits]:
            own = piece(f"{name}f{first}", lane, first, width)
            if joined:
                lines.append(f"{name}j{first} = BitwiseOr ({joined}, {own})")
                own = f"{name}j{first}"
            joined, first = own, first + width
        parts.append(joined)
    if not clean:
        shift = 'BitShift <direction: string = "RIGHT">'
        parts += [step(f"{made}_{lane + 4}", shift, own, 4) for lane, own in enumerate(parts)]
    return "\n".join([*lines, f"{made} = Concat <axis: int = 0> ({', '.join(parts)})", ""])


class Fields(Format):
    """What formats with codes in fields of bytes have in common: K, the rows of the weight, is an attribute."""

    def attributes(self, spec: Grid, block_size: int, k: int) -> dict[str, int]:
        """K: rows of the weight, which its bytes do not tell."""
        return super().attributes(spec, block_size, k) | {"K": k}

    def function(self, kind: str, word: str, lines: str, rows: str, more: Sequence[str] = ()) -> onnx.FunctionProto:
        """An operator that ends in a product by what `lines` give as `decoded`, or in `rows` of a lookup.

        more: inputs behind those that all have.
        """
        lookup = kind == EMBEDDING
        given = ["indices" if lookup else "x", "w", "scale", *(["bias"] if kind == BIASED else []), *more]
        if lookup:
            lines += rows
        elif kind == BIASED:
            lines += "  product = MatMul (x, decoded)\n  y = Add (product, bias)\n"
        else:
            lines += "  y = MatMul (x, decoded)\n"
        standard = [f"{ACTIVATION_BITS}: int = 16"] if word in self.native and not lookup else []
        attributes = ", ".join(["block_size", "K", *standard])
        header = (
            f'<opset_import: ["" : 21], domain: "{DOMAIN}">\n{kind}{word} <{attributes}> ({", ".join(given)}) => (y)'
        )
        return onnx.parser.parse_function(f"{header} {{{lines}}}")

    def lookup(self, model: ir.Model, tensors: Tensors) -> list[ir.Value]:
        return [alias(model, value) for value in tensors.values()]

    def refusal(self, target: str, spec: Grid, k: int) -> str:
        if TARGETS[target].operators != "matmulnbits":
            return ""
        return f"target {target} has no operator for {self.name}: choose target qcompile or qdq, or other weights"

    def lower(self, model: ir.Model, node: ir.Node, cache: Cache) -> None:
        """Nothing: its bodies are inlined."""


class BitFields(Fields):
    """Affine grids of 2, 3, 5 and 6 bits: operators read w (bytes, N) of uint8, and zero points likewise.

    Symmetric codes are stored with half of all codes added, and no zero points.
    """

    def grid(self, target: str, *, group: int = 64, symmetric: bool = False) -> QuantSpec:
        """group: rows that share a scale, 0 for all."""
        own = TARGETS[target]
        return QuantSpec(self.bits, granularity(checked(group)), symmetric or own.symmetric, own.signed_scale)

    def body(self, kind: str, word: str) -> onnx.FunctionProto:
        return self._body(kind, word, zero_points=True)

    def without_zero_points(self, kind: str, word: str) -> onnx.FunctionProto:
        return self._body(kind, word, zero_points=False)

    @property
    def whole_rows(self) -> int:
        return 8

    def body_of_whole(self, kind: str, word: str, *, zero_points: bool) -> onnx.FunctionProto:
        return self._body(kind, word, zero_points=zero_points, whole=True)

    def _body(self, kind: str, word: str, *, zero_points: bool, whole: bool = False) -> onnx.FunctionProto:
        lookup, taken = kind == EMBEDDING, "_taken" if kind == EMBEDDING else ""
        lines = _GROUPS + (_SIZES + _LOOKED_UP if lookup else "  grid = Shape (scale)\n")
        if whole:
            lines += unpacking_whole("codes", f"w{taken}", self.bits, clean=self.bits > 4)
        else:
            lines += ("" if lookup else _SIZES) + unpacking("codes", f"w{taken}", "rows", self.bits)
        if zero_points:
            lines += _ZEROS_TAKEN if lookup else ""
            lines += unpacking("zeros", f"zero_point{taken}", "groups", self.bits)
        else:
            lines += _MIDDLE.format(middle=self._middle, grid="grid")
        lines += (_NARROW if self.bits <= 4 else _WIDE) + _DECODED.format(scale=f"scale{taken}")
        return self.function(kind, word, lines, _ROWS, ["zero_point"] if zero_points else [])

    @property
    def _middle(self) -> int:
        return 1 << (self.bits - 1)

    def store(self, model: ir.Model, name: str, quantized: Quantized) -> Tensors:
        spec, qparams = affine(quantized.spec), quantized.qparams
        name = f"{name}.{self.name}"
        codes = add_initializer(model.graph, name, ir.tensor(self._packed(quantized.codes)))
        scale = add_initializer(model.graph, f"{name}.scale", ir.tensor(qparams.scale.astype(spec.scale_dtype)))
        zero_point = None
        if not spec.symmetric:
            zeros = pack_fields(np.asarray(qparams.zero_point).astype(np.uint8), self.bits)
            zero_point = add_initializer(model.graph, f"{name}.zero_point", ir.tensor(zeros))
        return Tensors(codes, scale, zero_point, spec.group_size(quantized.codes.shape[0]))

    def _packed(self, codes: Codes) -> npt.NDArray[np.uint8]:
        blank = codes.size and not any(codes.strides)
        return pack_fields(codes if codes.dtype == np.uint8 or blank else codes + self._middle, self.bits)

    def codes(self, value: ir.Value, k: int) -> npt.NDArray[Any]:
        return unpack_fields(np.asarray(constant(value).numpy()), self.bits, k)

    def middle_points(self, codes: ir.Value, scale: ir.Value) -> ir.TensorProtocol:
        return ir.tensor(pack_fields(np.full(dimensions(scale), self._middle, np.uint8), self.bits))

    def read(self, node: ir.Node) -> Stored | None:
        given = weight_operands(node)
        if stored(given[0]) is None or stored(given[1]) is None:
            return None
        k, n = node.attributes.get_int("K", 0), dimensions(given[1])[1]
        size = grouped_by(node.attributes.get_int("block_size", 0), k)
        return Stored((k, n), f"{self.name} {size} {'asym' if len(given) > 2 else 'sym'}", given)

    def shifts(self) -> list[list[int]]:
        return shifts(self.bits)


class Int2(BitFields):
    """2 bits: four levels."""

    name, words, native, bits = "int2", ("Int2",), ("Int2",), 2


class Int3(BitFields):
    """3 bits: eight levels."""

    name, words, native, bits = "int3", ("Int3",), ("Int3",), 3


class Int5(BitFields):
    """5 bits: a quarter of the error of int4, at a bit more."""

    name, words, native, bits = "int5", ("Int5",), ("Int5",), 5


class Int6(BitFields):
    """6 bits: nearly that of int8."""

    name, words, native, bits = "int6", ("Int6",), ("Int6",), 6
