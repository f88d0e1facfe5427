"""Columns: a linear of which a few input channels, rows of its weight (K, N), stay in float (LLM.int8(), OWQ).

    x W = x Ŵ + x[..., channels] W[channels]

It wraps a base: any form of codes, in whose operator the first product is computed.
Invariant: Ŵ are codes of W with zeros in the rows `channels`, so whatever the base makes of these channels of x adds
nothing; and both products read the x that the float one read.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,valid-type,misc,untyped-decorator"

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxscript
from onnxscript import INT64
from onnxscript import opset21 as op

from qcompile.passes.affine import Array
from qcompile.passes.formats.base import OPSET, PRODUCT, Cache, Operators, Stored
from qcompile.passes.graph import add_initializer, insert_before
from qcompile.passes.linears import Linear, constant, stored


@dataclass(frozen=True, eq=False)
class Columns:
    """Of a linear. base: the form of the codes, as decisions say it. channels: int64 (C,), ascending."""

    base: str
    channels: npt.NDArray[np.int64]

    def __str__(self) -> str:
        return f"{self.base}, outliers in float"

    def rest(self, linear: Linear) -> Array:
        """The weight (K, N) that the base has codes of: zeros where channels stay in float."""
        w = np.array(linear.read())
        w[self.channels] = 0
        return w

    def outlying(self, model: ir.Model, linear: Linear) -> ir.Value:
        """The rows (C, N) that stay, of the weight's own type."""
        rows = np.ascontiguousarray(linear.read()[self.channels]).astype(constant(linear.weight).dtype.numpy())
        return add_initializer(model.graph, f"{linear.weight.name}.outliers", ir.tensor(rows))

    def listed(self, model: ir.Model, linear: Linear) -> ir.Value:
        """The list of channels, int64 (C,); one for all linears that read the activation."""
        return once(model, f"{linear.activation.name}.outliers", self.channels)

    def masked(self, model: ir.Model, linear: Linear) -> ir.Value:
        """The activation with zeros in these channels, for a base whose grid follows from x; one for all linears."""
        x, name = linear.activation, f"{linear.activation.name}.rest"
        known = [use.node.outputs[0] for use in x.uses() if use.node.name == name]
        if known:
            return known[0]
        row = np.ones(linear.shape[0], constant(linear.weight).dtype.numpy())
        row[self.channels] = 0
        mask = once(model, f"{name}.mask", row)
        value = insert_before(linear.node, "Mul", [x, mask], name=name, output=name)
        value.type, value.shape = x.type, x.shape
        return value

    def add(self, model: ir.Model, linear: Linear, outlying: ir.Value) -> list[ir.Node]:
        """Turn the node that ends the base's product into its sum with the float product, in place.

        Returns the nodes before it, in order: that product, and the two that are new.
        """
        node, base, domain = linear.node, linear.name, linear.node.domain
        inputs, attributes = list(node.inputs), dict(node.attributes)
        name = f"{base}.product"
        product = insert_before(node, node.op_type, inputs, attributes, name=name, output=name, domain=domain)
        taken = [linear.activation, self.listed(model, linear)]
        gathered = insert_before(node, "Gather", taken, {"axis": -1}, name=f"{base}.taken", output=f"{base}.taken")
        added = insert_before(node, "MatMul", [gathered, outlying], name=f"{base}.added", output=f"{base}.added")
        for value in (product, gathered, added):
            value.type = linear.activation.type
        product.shape = added.shape = node.outputs[0].shape
        node.op_type, node.domain, node.overload = "Add", "", ""
        node.attributes.clear()
        node.resize_inputs(2)
        node.replace_input_with(0, product)
        node.replace_input_with(1, added)
        return [made for value in (product, gathered, added) if (made := value.producer()) is not None]


def once(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The initializer of that name, made where there is none."""
    known = model.graph.initializers.get(name)
    return known if known is not None else add_initializer(model.graph, name, ir.tensor(array))


@onnxscript.script(OPSET, default_opset=op)
def MatMulInt8Outlier(x, w, scale, x_scale, x_zero_point, channels: INT64, w_outlier):
    rest = op.DequantizeLinear(op.QuantizeLinear(x, x_scale, x_zero_point), x_scale, x_zero_point)
    product = op.MatMul(rest, op.DequantizeLinear(w, scale, axis=1))
    return op.Add(product, op.MatMul(op.Gather(x, channels, axis=-1), w_outlier))


class StaticColumns(Operators):
    """Around int8 (or float8) codes with one scale a column, or for all, that meet activations on a fixed grid.

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
