"""The operators of domain `qcompile`, as ONNX functions of standard operators.

The body is the specification, the oracle of the tests, and what runs where no kernel library is registered.

| operator | inputs | output |
|---|---|---|
| MatMulF | x (…, K); w (K, N); scale (G, N); zero_point (G, N), optional | (…, N) |
| MatMulAddF | x; w; scale; bias (N,); zero_point, optional | (…, N) |
| EmbeddingF | indices (…) int; w (K, V), or bytes (K, C); scale (G, V); zero_point as w, if any | (…, K) |
| MatMulInt8Outlier | x; w int8; scale (N,); x_scale (); x_zero_point (); channels (C,); w_outlier (C, N) | (…, N) |
| GatherInt4 | indices (…) int; w (E, …, K / 2) uint8; scale (E, …, G); zero_point (E, …, G) uint8 | (…, …, K) |
| GatherInt8 | indices (…) int; w (E, …, K); scale (E, …, G); zero_point (E, …, G) | (…, …, K) |
| SwiGLU | x (…, 2 n) | (…, n) |
| Hadamard | x (…, K); matrix (B, B), B a divisor of K | (…, K) |
| BlockScalesB | half (S, N) float16; w, codes of G rows of B bits | (G, N) |
| AddOffsetsB | x (…, N); sums (…, G); scale (G, N); half; w (`block_scales`) | (…, N) |
| AddRowOffsetsB | x (…, K); indices (…) int; scale (G, N); half; w | (…, K) |
| GroupQueryAttention, GroupQueryAttentionF16 | com.microsoft's (`attention`) | its three |

F is the word of a format (Int4, Int8, …); its bodies lie in the format's file.
The outliers' rows of w are zero, so what rounding makes of these channels of x adds nothing; see docs/formats.md.
G = ceil(K / block_size); C = ceil(V / 2) bytes of two codes each, the even column's in the low nibble.
The attribute `activation_bits` of products with native kernels, 16 where it is absent, is for these: what they may
round x to. The bodies compute in the type of x and do not read it, nor `columns_at_8`: ranges of columns (begin, end,
begin, end, …) that take 8 bits among others at 16, as a product that was joined of some at 8 and some at 16 has them.
SwiGLU is silu of the first half of x times the second.
Hadamard multiplies each block of B channels of x by the matrix, diag(signs) H / √B (`rotation`).
GatherInt… look up whole matrices, those of experts, along axis 0; blocks lie along the last axis.
An embedding reads columns of the very tensor that a tied lm_head multiplies with, so both can share one copy; 4-bit
tables are read as bytes because ONNX Runtime gathers no 4-bit types.
"""

from functools import cache

import onnx
import onnx_ir as ir

from qcompile.passes.caches import ATTENTION, HALF_ATTENTION
from qcompile.passes.formats import by_operator, format_of
from qcompile.passes.formats.attention import attention_body
from qcompile.passes.formats.base import COLUMNS_AT_8, DOMAIN, PRODUCT, VERSION, Format, scripted
from qcompile.passes.formats.block_scales import BLOCK_OPERATORS
from qcompile.passes.formats.block_scales import body as block_body
from qcompile.passes.formats.gated import SWIGLU
from qcompile.passes.formats.hadamard import HADAMARD

# Says of a body that it is for K that are multiples of this number (`Operators.body_of_whole`).
WHOLE_ROWS = "qcompile.whole_rows"


@cache
def _proto(name: str, zero_points: bool, whole: bool) -> bytes:
    if name in (SWIGLU, HADAMARD):
        return bytes(scripted(name).SerializeToString())
    if name in BLOCK_OPERATORS:
        return bytes(block_body(name).SerializeToString())
    if name in (ATTENTION[1], HALF_ATTENTION[1]):
        return bytes(attention_body(name).SerializeToString())
    own = by_operator(name)
    if own is None:
        raise KeyError(name)
    kind, word = own.operators[name]
    if whole:
        proto = own.body_of_whole(kind, word, zero_points=zero_points)
        proto.metadata_props.add(key=WHOLE_ROWS, value=str(own.whole_rows))
    else:
        proto = (own.body if zero_points else own.without_zero_points)(kind, word)
    return bytes(proto.SerializeToString())


def body(name: str, *, zero_points: bool = True, whole: bool = False) -> ir.Function:
    """A fresh copy of the operator's ONNX function. whole: that for K of whole blocks, of a product that has one.

    zero_points: False leaves that input out. ONNX Runtime fuses a DequantizeLinear of two inputs, and one of three, but
    none whose third is absent, which is what inlining makes of an optional input that a node does not give.
    """
    return ir.serde.deserialize_function(onnx.FunctionProto.FromString(_proto(name, zero_points, whole)))


def is_product(node: ir.Node) -> bool:
    """Whether the node is a packed matrix product of a format, with or without a bias."""
    return format_of(node) is not None and node.op_type.startswith(PRODUCT)


def is_native(node: ir.Node) -> bool:
    """Whether the kernel library computes the product; it takes `ACTIVATION_BITS` then."""
    own = format_of(node)
    return own is not None and is_product(node) and own.operators[node.op_type][1] in own.native


def takes_level(node: ir.Node) -> bool:
    """Whether target matmulnbits makes a MatMulNBits of the product, which has an accuracy level."""
    own = format_of(node)
    return own is not None and is_product(node) and own.leveled


def product_bits(node: ir.Node) -> int:
    """Bits of a code of a packed product; 0 for any other node."""
    own = format_of(node)
    return own.bits if isinstance(own, Format) and is_product(node) else 0


def register(model: ir.Model, name: str, *, zero_points: bool = True, columns: bool = False, k: int = 1) -> None:
    """Make sure that the model carries a body of the operator that takes zero points where they are given.

    columns: and declares COLUMNS_AT_8, without which no node may have it. k: and serves a weight of so many rows.
    """
    model.graph.opset_imports.setdefault(DOMAIN, VERSION)
    own, known = by_operator(name), model.functions.get((DOMAIN, name, ""))
    whole = own is not None and own.whole_rows > 0 and name.startswith(PRODUCT) and k % own.whole_rows == 0
    if known is not None:
        whole &= WHOLE_ROWS in known.metadata_props
        zero_points |= "zero_point" in [value.name for value in known.inputs]
    function = body(name, zero_points=zero_points, whole=whole)
    lacks = known is None or len(known.inputs) < len(function.inputs) or (WHOLE_ROWS in known.metadata_props) != whole
    if lacks:
        # The body's operators mean the same from opset 21 on, and ONNX Runtime inlines them under the model's version.
        function.opset_imports[""] = max(function.opset_imports[""], model.graph.opset_imports.get("", 21))
        columns |= known is not None and COLUMNS_AT_8 in known.attributes
        model.functions[function.identifier()] = known = function
    assert known is not None
    if columns:
        known.attributes.setdefault(COLUMNS_AT_8, ir.AttrInt64s(COLUMNS_AT_8, []))
