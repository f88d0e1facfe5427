"""Scales and offsets of GGUF's blocks as such files hold them: float16 numbers, and small integers times these.

BlockScales is a weight's scale where a group has an integer factor of its block's scale (Q2_K to Q6_K); ONNX Runtime
folds it at load. AddOffsets and AddRowOffsets add what codes have no zero point for: an offset of each group of rows.
All are bodies of standard operators; the library has none of them.
"""

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from qcompile.passes.bit_fields import byte_rows
from qcompile.passes.formats.base import DOMAIN
from qcompile.passes.formats.bits import unpacking

_SCALES, _OFFSETS, _ROWS = "BlockScales", "AddOffsets", "AddRowOffsets"
# Bits of factors, by kind of operator; 0: there are none.
_BITS = {_SCALES: (4, 6, 8), _OFFSETS: (0, 4, 6), _ROWS: (0, 4, 6)}
# (kind, bits of factors) by operator.
BLOCK_OPERATORS: Mapping[str, tuple[str, int]] = {
    f"{kind}{bits or ''}": (kind, bits) for kind, all_bits in _BITS.items() for bits in all_bits
}

_SIZES = """
  given = Constant <value_int: int = @groups> ()
  one = Constant <value_ints: ints = [1]> ()
  rows = Reshape (given, one)
  middle_of = Constant <value_int: int = @middle> ()
  middle = Cast <to: int = 1> (middle_of)
"""
_FLAT = """
  any = Constant <value_ints: ints = [-1]> ()
  flat = Reshape (indices, any)
"""
# Of float16 numbers (S, N) and codes of factors (G, N), the product, float32 (G, N).
_TWO_LEVELS = """
  {p}_floats = Cast <to: int = 1> ({p}_codes)
  {p}_factors = {centred}
  {p}_blocks = Shape <start: int = 0, end: int = 1> ({scale})
  {p}_columns = Shape <start: int = 1, end: int = 2> ({scale})
  {p}_each = Div (rows, {p}_blocks)
  {p}_cut = Concat <axis: int = 0> ({p}_blocks, {p}_each, {p}_columns)
  {p}_apart = Reshape <allowzero: int = 1> ({p}_factors, {p}_cut)
  {p}_wide = Cast <to: int = 1> ({scale})
  {p}_spread = Unsqueeze ({p}_wide, one)
  {p}_product = Mul ({p}_apart, {p}_spread)
  {p}_grid = Concat <axis: int = 0> (rows, {p}_columns)
  {p} = Reshape <allowzero: int = 1> ({p}_product, {p}_grid)
"""
_TAKEN = "  {value}_taken = Gather <axis: int = 1> ({value}, flat)\n"
_ADDED = """
  moved = Mul ({scale}, middle)
  offsets = Sub (moved, minima)
"""
_PRODUCT = """
  product = MatMul (sums, offsets)
  y = Add (x, product)
"""
# Rows (…, K) as (tokens, G, K / G), with one offset for each group.
_SPREAD = """
  turned = Transpose <perm: ints = [1, 0]> (offsets)
  last = Constant <value_ints: ints = [2]> ()
  spread = Unsqueeze (turned, last)
  tokens = Shape (flat)
  width = Shape <start: int = -1> (x)
  size = Div (width, rows)
  cut = Concat <axis: int = 0> (tokens, rows, size)
  blocks = Reshape <allowzero: int = 1> (x, cut)
  added = Add (blocks, spread)
  shape = Shape (x)
  y = Reshape <allowzero: int = 1> (added, shape)
"""


def block_scales(bits: int) -> str:
    """The operator of scales whose groups have factors of so many bits."""
    return f"{_SCALES}{bits}"


def is_block_scales(node: ir.Node) -> bool:
    """Whether a node is one of these."""
    return node.domain == DOMAIN and BLOCK_OPERATORS.get(node.op_type, ("", 0))[0] == _SCALES


def adds_offsets(node: ir.Node) -> bool:
    """Whether a node adds offsets to what the weight before it gives."""
    return node.domain == DOMAIN and BLOCK_OPERATORS.get(node.op_type, (_SCALES, 0))[0] != _SCALES


def add_offsets(bits: int, *, rows: bool) -> str:
    """The operator that adds offsets to a product, or to rows looked up; bits: of their factors, 0 for none."""
    return f"{_ROWS if rows else _OFFSETS}{bits or ''}"


def misfit(node: ir.Node) -> str:
    """What is wrong with an operator of `BLOCK_OPERATORS`: constants whose shapes are not those that its attributes and
    `body` say; "" for nothing. Of inputs that are computed nothing is known.
    """
    kind, bits = BLOCK_OPERATORS[node.op_type]
    for name in ("groups", "middle"):
        if name not in node.attributes or node.attributes[name].type != ir.AttributeType.INT:
            return f"it has no integer {name}"
    groups, count = node.attributes["groups"].as_int(), (1 if kind == _SCALES else 4) + bool(bits)
    if len(node.inputs) != count or None in node.inputs:
        return f"it has not {count} inputs"
    first = count - 1 - bool(bits)
    half, *factors = (_sizes(value) for value in node.inputs[first:])
    if groups < 1 or (half is not None and (len(half) != 2 or not _divides(half[0], groups, exact=not bits))):
        return f"scales {half} are not those of {groups} groups"
    columns = (half or (0, None))[1]
    expected = [(own, sum(byte_rows(groups, bits)), "factors") for own in factors]
    expected += [] if kind == _SCALES else [(_sizes(node.inputs[2]), groups, "scales")]
    for own, rows, what in expected:
        if own is not None and (len(own) != 2 or own[0] != rows or columns not in (None, own[1])):
            return f"{what} {own} are not ({rows}, {columns or 'N'}), of {groups} groups"
    return ""


def _sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a constant."""
    tensor = value.const_value if value is not None else None
    return None if tensor is None else tuple(tensor.shape.numpy())


def _divides(blocks: int, groups: int, *, exact: bool) -> bool:
    return blocks == groups if exact else blocks > 0 and groups % blocks == 0


def body(name: str) -> onnx.FunctionProto:
    """The ONNX function of an operator of `BLOCK_OPERATORS`. G groups of K rows, in S blocks; N columns.

    BlockScalesB: half (S, N) float16, w: codes of B bits (G, N) in fields of bytes → half * (w - middle), (G, N).
    AddOffsetsB: x (…, N), a product; sums (…, G): of its activations, of the rows of each group; scale (G, N), the
    product's own; half, w as above → x + sums (middle * scale - half w). AddOffsets: half (G, N) alone.
    AddRowOffsetsB: x (…, K), rows that indices (…) looked up; indices; then the same → x + the offsets of each group.
    """
    kind, bits = BLOCK_OPERATORS[name]
    parts = [*([] if kind == _SCALES else ["scale"]), "half", *(["w"] if bits else [])]
    given = {_SCALES: [], _OFFSETS: ["x", "sums"], _ROWS: ["x", "indices"]}[kind]
    lines, end = _SIZES, ""
    if kind == _ROWS:
        lines, end = lines + _FLAT + "".join(_TAKEN.format(value=value) for value in parts), "_taken"
    if kind == _SCALES:
        lines += _levels("y", "half", "w", bits, centred="Sub (y_floats, middle)")
    else:
        lines += _levels("minima", f"half{end}", f"w{end}", bits)
        lines += _ADDED.format(scale=f"scale{end}") + (_SPREAD if kind == _ROWS else _PRODUCT)
    header = (
        f'<opset_import: ["" : 21], domain: "{DOMAIN}">\n{name} <groups, middle> ({", ".join([*given, *parts])}) => (y)'
    )
    return onnx.parser.parse_function(f"{header} {{{lines}}}")


def _levels(made: str, scale: str, packed: str, bits: int, *, centred: str = "") -> str:
    """Lines of a body: float32 (G, N) `made`, of float16 scales, and of codes of factors where they have bits."""
    if not bits:
        return f"  {made} = Cast <to: int = 1> ({scale})\n"
    lines = unpacking(f"{made}_codes", packed, "rows", bits)
    return lines + _TWO_LEVELS.format(p=made, scale=scale, centred=centred or f"Identity ({made}_floats)")
