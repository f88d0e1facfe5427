"""Columns: a linear of which a few input channels, rows of its weight (K, N), stay in float (LLM.int8(), OWQ).

    x W = x Ŵ + x[..., channels] W[channels]

It wraps a base: any form of codes, in whose operator the first product is computed.
Invariant: Ŵ are codes of W with zeros in the rows `channels`, so whatever the base makes of these channels of x adds
nothing; and both products read the x that the float one read.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import Array, Quantized
from qcompile.passes.formats.base import become
from qcompile.passes.graph import add_initializer, insert_before
from qcompile.passes.linears import Linear, constant
from qcompile.passes.state import node_state


@dataclass(frozen=True, eq=False)
class Columns:
    """Of a linear. base: the form of the codes, as decisions say it. channels: int64 (C,), ascending."""

    base: str
    channels: npt.NDArray[np.int64]

    @classmethod
    def of(cls, linear: Linear, base: str) -> "Columns | None":
        """Those that a pass marked; None of a linear without."""
        own = node_state(linear.node).outliers
        return None if own is None else cls(base, own.channels)

    def __str__(self) -> str:
        return f"{self.base}, outliers in float"

    def rest(self, linear: Linear) -> Array:
        """The weight (K, N) that the base has codes of: zeros where channels stay in float."""
        w = np.array(linear.read())
        w[self.channels] = 0
        return w

    def outlying(self, model: ir.Model, linear: Linear, quantized: Quantized | None = None) -> ir.Value:
        """The rows (C, N) that stay, of the weight's own type, less what a code shared with another stands for."""
        rows = np.ascontiguousarray(linear.read()[self.channels])
        if quantized is not None and quantized.spec.rows_per_code > 1:
            rows = rows - quantized.dequantize()[self.channels]
        rows = rows.astype(constant(linear.weight).dtype.numpy())
        return add_initializer(model.graph, f"{linear.weight.name}.outliers", ir.tensor(rows))

    def extra_bits(self, linear: Linear) -> float:
        """What the float rows add to each weight."""
        return len(self.channels) / linear.shape[0] * constant(linear.weight).dtype.bitwidth

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

        Returns the nodes before it, in order: the base's product, and the two that are new.
        """
        node, base, inputs, attributes = (
            linear.node,
            linear.name,
            list(linear.node.inputs),
            dict(linear.node.attributes),
        )
        name = f"{base}.product"
        product = insert_before(node, node.op_type, inputs, attributes, name=name, output=name, domain=node.domain)
        taken = [linear.activation, self.listed(model, linear)]
        gathered = insert_before(node, "Gather", taken, {"axis": -1}, name=f"{base}.taken", output=f"{base}.taken")
        added = insert_before(node, "MatMul", [gathered, outlying], name=f"{base}.added", output=f"{base}.added")
        for value in (product, gathered, added):
            value.type = linear.activation.type
        product.shape = added.shape = node.outputs[0].shape
        become(node, "Add", [product, added], {}, domain="")
        return [made for value in (product, gathered, added) if (made := value.producer()) is not None]


def coded(linear: Linear) -> npt.NDArray[np.floating]:
    """The weight (K, N) that codes are chosen for, mapped from its file where it lies there so: zeros where channels
    stay in float.
    """
    columns = Columns.of(linear, "")
    return linear.mapped() if columns is None else columns.rest(linear)


def once(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """The initializer of that name, made where there is none."""
    known = model.graph.initializers.get(name)
    return known if known is not None else add_initializer(model.graph, name, ir.tensor(array))
