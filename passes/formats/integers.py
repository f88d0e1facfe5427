"""int4 and int8: integers with a scale, and mostly a zero point, for each group of rows.

The code of element (k, n) decodes to (w - zero_point) * scale, both of group k // block_size.
"""

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.passes.affine import Grid, Quantized
from qcompile.passes.errors import UserError
from qcompile.passes.formats import nbits
from qcompile.passes.formats.base import (
    BIASED,
    EMBEDDING,
    LOOKUP,
    PRODUCT,
    Cache,
    Format,
    Stored,
    add_codes,
    alias,
    as_bytes,
    grouped_by,
    measured,
    role,
    scripted,
    weight_operands,
)
from qcompile.passes.graph import add_initializer
from qcompile.passes.linears import stored
from qcompile.passes.spec import QuantSpec, granularity
from qcompile.passes.state import Tensors
from qcompile.passes.targets import TARGETS


class Integers(Format):
    """Affine grids of 4 and 8 bits: what their native kernels, com.microsoft's operators and plain ONNX compute."""

    kinds, leveled = (PRODUCT, BIASED, EMBEDDING, LOOKUP), True

    def body(self, kind: str, word: str) -> onnx.FunctionProto:
        return scripted(kind + word)

    def store(self, model: ir.Model, name: str, quantized: Quantized) -> Tensors:
        spec, qparams = affine(quantized.spec), quantized.qparams
        codes = add_codes(model, f"{name}.{self.name}", quantized.codes, spec.dtype)
        scale = ir.tensor(qparams.scale.astype(spec.scale_dtype))
        scales = add_initializer(model.graph, f"{name}.{self.name}.scale", scale)
        zero_point = None
        if not spec.symmetric:
            zeros = qparams.zero_point.astype(np.uint8)
            zero_point = add_codes(model, f"{name}.{self.name}.zero_point", zeros, spec.dtype)
        return Tensors(codes, scales, zero_point, spec.group_size(quantized.codes.shape[0]))

    def lookup(self, model: ir.Model, tensors: Tensors) -> list[ir.Value]:
        if tensors.zero_point is None:
            raise ValueError("an embedding operator always has zero points")
        view = as_bytes if self.bits == 4 else alias
        codes, zero_point = view(model, tensors.codes), view(model, tensors.zero_point)
        return [codes, alias(model, tensors.scale), zero_point]

    def refusal(self, target: str, spec: Grid, k: int) -> str:
        return nbits.refusal(spec.group_size(k)) if TARGETS[target].operators == "matmulnbits" else ""

    def lower(self, model: ir.Model, node: ir.Node, cache: Cache) -> None:
        if node.op_type.startswith("MatMul"):
            nbits.lower_product(model, node, self.bits, cache)
        elif role(node.op_type) == EMBEDDING and not nbits.refusal(node.attributes["block_size"].as_int()):
            nbits.lower_embedding(model, node, self.bits, cache)  # a table of one scale a row may have any size

    def read(self, node: ir.Node) -> Stored | None:
        given = weight_operands(node)
        shape, codes = measured(given[0], given[1]), stored(given[0])
        if shape is None or codes is None:
            return None
        signed = codes.dtype in (ir.DataType.INT4, ir.DataType.INT8)
        size = grouped_by(node.attributes.get_int("block_size", 0), shape[0])
        form = f"{'' if signed else 'u'}{self.name} {size} {'asym' if len(given) > 2 else 'sym'}"
        return Stored(shape, form, given)


class Int4(Integers):
    """4 bits: with zero points, or signed and symmetric."""

    name, words, native, bits = "int4", ("Int4",), ("Int4",), 4

    def grid(self, target: str, *, group: int = 128, symmetric: bool = False) -> QuantSpec:
        """group: rows that share a scale, 0 for all."""
        own = TARGETS[target]
        return QuantSpec(self.bits, granularity(checked(group)), symmetric or own.symmetric, own.signed_scale)


class Int8(Integers):
    """8 bits, with zero points but for targets that have none.

    MatMulNBits is made from those in more versions of ONNX Runtime, and a point more of resolution costs nothing.
    """

    name, words, native, bits = "int8", ("Int8",), ("Int8",), 8

    def grid(self, target: str, *, group: int = 128) -> QuantSpec:
        """group: rows that share a scale, 0 for all."""
        own = TARGETS[target]
        return QuantSpec(self.bits, granularity(checked(group)), own.symmetric, own.signed_scale)


def checked(group: int) -> int:
    """A group size that a recipe gives; UserError for one that makes no sense."""
    if group != 0 and not 8 <= group <= 4096:
        raise UserError(f"group size {group} is not possible; give 8 to 4096, or 0 for one scale a column")
    return group


def affine(spec: Grid) -> QuantSpec:
    """The grid of a weight that is stored as integers."""
    if not isinstance(spec, QuantSpec):
        raise TypeError(f"{spec} is no grid of integers")
    return spec
