"""The float node that a quantized one stands for, kept until the node is verified."""

from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.passes.affine import Array
from qcompile.passes.linears import constant

# Node meta: the Twin of a quantized node.
TWIN = "qcompile.twin"


@dataclass(frozen=True)
class Twin:
    """A node before it was quantized.

    proto: operator and attributes. inputs: what it read, with the initializers that may be gone from the graph by now.
    transposed: the second input is read turned round. weights_only: the activation stayed in float.
    """

    proto: onnx.NodeProto
    inputs: tuple[ir.Value | None, ...]
    transposed: bool = False
    weights_only: bool = False

    @property
    def weights(self) -> int:
        """Elements of the constant inputs of rank 2 and more."""
        constants = [v.const_value for v in self.inputs if v is not None and v.const_value is not None]
        return sum(tensor.size for tensor in constants if len(tensor.shape) > 1)

    @property
    def activations(self) -> list[ir.Value]:
        """The inputs that are no constants."""
        return [value for value in self.inputs if value is not None and value.const_value is None]

    def array(self, value: ir.Value) -> Array:
        """A constant input as the node reads it."""
        array = np.asarray(constant(value).numpy())
        return np.ascontiguousarray(array.T) if self.transposed and value is self.inputs[1] else array


def remember(node: ir.Node, *, weights_only: bool = False) -> None:
    """Leave a node's Twin in its meta."""
    proto = ir.serde.serialize_node(node)
    inputs, transposed = list(node.inputs), False
    producer = inputs[1].producer() if len(inputs) > 1 and inputs[1] is not None else None
    turned = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else None
    if node.op_type == "MatMul" and turned is not None and turned.const_value is not None:
        inputs[1], transposed = turned, True
    node.meta[TWIN] = Twin(proto, tuple(inputs), transposed, weights_only)
