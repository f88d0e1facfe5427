"""Putting quantized weights into a graph as inputs of the operators of domain `qcompile`."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Array, Grid, Quantized
from qcompile.passes.formats import functions, named, operator
from qcompile.passes.formats.base import DOMAIN, EMBEDDING, PRODUCT, become, drop_unused, drop_weight
from qcompile.passes.linears import Embedding, Linear, constant
from qcompile.passes.state import Tensors
from qcompile.passes.tensors import read


def store(model: ir.Model, name: str, quantized: Quantized) -> Tensors:
    """Add the initializers of a quantized weight to the model, named after the float weight."""
    return named(quantized.spec.format).store(model, name, quantized)


def replace_matmul(model: ir.Model, linear: Linear, spec: Grid, tensors: Tensors) -> None:
    """Turn the MatMul node into the product of the weight's format, in place: its outputs stay the same values."""
    read = linear.node.inputs[1]
    _become(model, linear.node, PRODUCT, spec, [linear.activation, *tensors.values()], tensors, linear.shape[0])
    drop_weight(model, linear.weight, read)


def replace_embedding(model: ir.Model, embedding: Embedding, spec: Grid, tensors: Tensors) -> None:
    """Turn the Gather node into the lookup of the table's format, in place."""
    inputs = [embedding.indices, *named(spec.format).lookup(model, tensors)]
    _become(model, embedding.node, EMBEDDING, spec, inputs, tensors, embedding.shape[1])
    drop_unused(model, embedding.table)


def floats(value: ir.Value) -> Array:
    """A constant as float32."""
    return np.asarray(read(constant(value)), dtype=np.float32)


def _become(
    model: ir.Model, node: ir.Node, kind: str, spec: Grid, inputs: Sequence[ir.Value], tensors: Tensors, k: int
) -> None:
    name = operator(kind, spec)
    functions.register(model, name, zero_points=tensors.zero_point is not None, k=k)
    become(node, name, inputs, named(spec.format).attributes(spec, tensors.block_size, k), domain=DOMAIN)
