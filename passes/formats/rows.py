"""Weights of any rank, coded along their last axis: as a DequantizeLinear reads them whole, or a lookup by matrix."""

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Array, Quantized
from qcompile.passes.formats import functions, operator
from qcompile.passes.formats.base import DOMAIN, LOOKUP, add_codes, become, drop_unused, pack_nibbles
from qcompile.passes.formats.decoded import Coded
from qcompile.passes.graph import add_initializer
from qcompile.passes.linears import constant, dimensions
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.spec import QuantSpec
from qcompile.passes.tensors import read


@dataclass(frozen=True)
class Rows:
    """A weight (…, K) as codes: `quantized` has its rows as the columns of a (K, rows) matrix."""

    shape: tuple[int, ...]
    quantized: Quantized
    spec: QuantSpec

    @classmethod
    def of(cls, weight: ir.Value, spec: QuantSpec) -> "Rows":
        """The weight of an initializer, rounded to nearest."""
        shape = dimensions(weight)
        rows = np.asarray(read(constant(weight)), np.float32).reshape(-1, shape[-1]).T
        own = own_spec(weight, spec)
        return cls(shape, round_to_nearest(np.ascontiguousarray(rows), own, None), own)

    def shaped(self, matrix: Array) -> Array:
        """A matrix (K or G, rows) in the order of the weight: (…, K or G)."""
        return np.ascontiguousarray(np.asarray(matrix).T).reshape(*self.shape[:-1], -1)

    def dequantize(self) -> Array:
        """The float32 weight that the codes stand for."""
        return self.shaped(self.quantized.dequantize())


def own_spec(weight: ir.Value, spec: QuantSpec) -> QuantSpec:
    """The spec with scales as the weight's own type wants them."""
    half = constant(weight).dtype == ir.DataType.FLOAT16
    return replace(spec, scale_dtype=np.float16 if half else np.float32)


def coded(model: ir.Model, weight: ir.Value, spec: QuantSpec) -> Coded:
    """The weight as a DequantizeLinear with blocks along the last axis reads it; initializers that are made once."""
    rows, known = Rows.of(weight, spec), model.graph.initializers
    quantized, own = rows.quantized, rows.spec
    name, dtype = f"{weight.name}.{own.format}.rows", constant(weight).dtype.numpy()
    if name not in known:
        add_codes(model, name, rows.shaped(quantized.codes), own.dtype)  # type: ignore[arg-type]
        scale = rows.shaped(quantized.qparams.scale).astype(dtype)
        add_initializer(model.graph, f"{name}.scale", ir.tensor(scale))
        if not own.symmetric:
            zeros = rows.shaped(quantized.qparams.zero_point).astype(np.uint8)
            add_codes(model, f"{name}.zero_point", zeros, own.dtype)
    parts = (known[name], known[f"{name}.scale"], known.get(f"{name}.zero_point"))
    last = len(rows.shape) - 1
    return Coded(*parts, last, own.group_size(rows.shape[-1]), rows.shape, rows.dequantize)


def replace_lookup(model: ir.Model, node: ir.Node, spec: QuantSpec) -> int:
    """Turn a Gather of matrices along axis 0 into GatherInt4 or GatherInt8, in place; the bytes of what it reads.

    Of an odd last axis, 8 bits are taken, since two codes of 4 bits share a byte.
    """
    table = node.inputs[0]
    assert table is not None
    if dimensions(table)[-1] % 2:
        spec = replace(spec, bits=8)
    rows, known = Rows.of(table, replace(spec, symmetric=spec.symmetric and spec.bits == 8)), model.graph.initializers
    quantized, own = rows.quantized, rows.spec
    name = f"{table.name}.{own.format}.lookup"
    if name not in known:
        codes = rows.shaped(quantized.codes)  # type: ignore[arg-type]
        if own.bits == 4:
            codes = pack_nibbles(codes).reshape(*rows.shape[:-1], -1)  # type: ignore[assignment, arg-type]
        add_initializer(model.graph, name, ir.tensor(codes))
        scale = rows.shaped(quantized.qparams.scale).astype(constant(table).dtype.numpy())
        add_initializer(model.graph, f"{name}.scale", ir.tensor(scale))
        zeros = rows.shaped(quantized.qparams.zero_point).astype(own.code_dtype)
        add_initializer(model.graph, f"{name}.zero_point", ir.tensor(zeros))
    functions.register(model, operator(LOOKUP, own))
    inputs = [node.inputs[1], known[name], known[f"{name}.scale"], known[f"{name}.zero_point"]]
    attributes = {"block_size": own.group_size(rows.shape[-1])}
    become(node, operator(LOOKUP, own), inputs, attributes, domain=DOMAIN)
    drop_unused(model, table)
    return sum(constant(value).nbytes for value in inputs[1:] if value is not None)
