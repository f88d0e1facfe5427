"""Finding what a weight quantizer works on: MatMuls with a constant 2-D weight, and embedding lookups."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import Array
from qcompile.passes.native import widened
from qcompile.passes.state import node_state
from qcompile.passes.tensors import read

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
# Operators with a kernel (rows, columns / groups, …) or its transpose.
CONVOLUTIONS = ("Conv", "ConvTranspose")
# What takes scales and zero points to what decodes with them, beside lookups of them.
_TAKEN_APART = {
    "Gather", "Expand", "Cast", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Flatten",
    "BitShift", "BitwiseAnd", "BitwiseOr", "Concat",
}  # fmt: skip
# What may stand between the last MatMul of a decoder and its logits.
_HEAD_TAIL = {"Add", "Cast", "Identity", "Mul", "Div", "Tanh", "Reshape", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True, eq=False)
class Linear:
    """A MatMul whose second operand is a constant: activation (…, K) times weight (K, N).

    `weight` is the initializer; `transposed` says that it is stored as (N, K) behind a Transpose (a tied embedding).
    """

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    transposed: bool

    @property
    def name(self) -> str:
        """The node's name, which include and exclude patterns and reports use."""
        return self.node.name or ""

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        a, b = dimensions(self.weight)
        return (b, a) if self.transposed else (a, b)

    def read(self) -> Array:
        """The weight as float32 (K, N); a copy or a read-only view. Nothing of it stays in memory with the model."""
        return widened(self.mapped())

    def mapped(self) -> npt.NDArray[np.floating]:
        """The weight (K, N) in the type that it is stored in: a read-only view of its file, where it lies in one."""
        stored = read(constant(self.weight))
        return stored.T if self.transposed else stored


@dataclass(frozen=True, eq=False)
class Embedding:
    """A Gather along axis 0 of a constant table (V, K)."""

    node: ir.Node
    indices: ir.Value
    table: ir.Value

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name or ""

    @property
    def shape(self) -> tuple[int, int]:
        """(V, K): vocabulary, width."""
        rows, columns = dimensions(self.table)
        return rows, columns


def constant(value: ir.Value) -> ir.TensorProtocol:
    """The tensor of an initializer."""
    if value.const_value is None:
        raise TypeError(f"{value.name} is no constant")
    return value.const_value


def stored(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node."""
    if value.const_value is not None:
        return value.const_value
    producer = value.producer()
    if producer is None or producer.op_type != "Constant" or "value" not in producer.attributes:
        return None
    return producer.attributes["value"].as_tensor()


def dimensions(value: ir.Value) -> tuple[int, ...]:
    """The shape of an initializer."""
    return tuple(constant(value).shape.numpy())


def is_float_constant(value: ir.Value | None) -> bool:
    """Whether the value is an initializer of float type that holds a number at all."""
    sizes = _float_sizes(value)
    return sizes is not None and 0 not in sizes


def is_weight(value: ir.Value | None) -> bool:
    """Whether the value is an initializer of float type and rank 2 that holds a number at all."""
    sizes = _float_sizes(value)
    return sizes is not None and len(sizes) == 2 and 0 not in sizes


def _float_sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of an initializer of float type, None for what is none; onnx_ir makes it anew when it is asked."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return None
    return dimensions(value) if value.const_value.dtype in _FLOATS else None


def turns(node: ir.Node) -> bool:
    """Whether the node is the Transpose of a matrix."""
    if node.op_type != "Transpose" or node.domain != "":
        return False
    permutation = node.attributes.get("perm")
    return permutation is None or list(permutation.as_ints()) == [1, 0]


def as_linear(node: ir.Node) -> Linear | str:
    """The node as a Linear, or the reason why it is none. Only for MatMul nodes."""
    left, right = node.inputs[0], node.inputs[1]
    if left is None or right is None:
        return "an operand is missing"
    transposed, weight = False, right
    producer = right.producer()
    if producer is not None and turns(producer) and producer.inputs[0] is not None:
        transposed, weight = True, producer.inputs[0]
    if is_weight(weight):
        return Linear(node, left, weight, transposed)
    if told := node_state(node).left:
        return told
    if left.const_value is not None and right.const_value is None:
        return "the constant is the left operand"
    if right.const_value is None:
        return "no constant weight (a product of two activations)"
    if right.is_graph_input():
        return "its weight is an input with a default: an adapter's"
    rank = len(right.const_value.shape)
    if 0 in dimensions(right):
        return "the weight has no elements"
    return f"the weight has rank {rank}, not 2" if rank != 2 else f"the weight is {right.const_value.dtype}"


def find_linears(nodes: Iterable[ir.Node]) -> list[Linear]:
    """All Linears among the nodes, in order."""
    found = (as_linear(node) for node in nodes if node.op_type == "MatMul" and node.domain == "")
    return [linear for linear in found if isinstance(linear, Linear)]


def on_a_grid(value: ir.Value) -> bool:
    """Whether a value is nothing but scales or zero points of codes: all that it ends in, taken apart, moved or
    repeated perhaps, is a DequantizeLinear that reads it as these. A table of such is no weight of its own.
    """
    found, ends = [value], False
    for current in found:  # grows while it is walked
        if current.is_graph_output():
            return False
        for node, position in current.uses():
            if node.op_type == "DequantizeLinear" and position > 0:
                ends = True
            elif node.op_type in _TAKEN_APART and node.domain == "":
                found += [made for made in node.outputs if made not in found]
            elif node.op_type != "Shape":
                return False
    return ends


def find_embeddings(nodes: Iterable[ir.Node]) -> list[Embedding]:
    """All lookups of rows of a constant float table by computed indices, in order, but for scales (`on_a_grid`)."""
    found = []
    for node in nodes:
        if node.op_type != "Gather" or node.domain != "":
            continue
        table, indices = node.inputs[0], node.inputs[1]
        axis = node.attributes.get_int("axis", 0)
        if not is_weight(table) or table is None or indices is None or axis != 0 or indices.const_value is not None:
            continue
        if not on_a_grid(node.outputs[0]):
            found.append(Embedding(node, indices, table))
    return found


def vocabulary_size(model: ir.Model) -> int | None:
    """Rows of the largest embedding table, packed or not, or None for a model without one."""
    nodes = list(model.graph.all_nodes())
    sizes = [embedding.shape[0] for embedding in find_embeddings(nodes)]
    for node in nodes:
        if node.domain == "qcompile" and node.op_type.startswith("Embedding") and node.inputs[2] is not None:
            sizes.append(dimensions(node.inputs[2])[1])
    return max(sizes, default=None)


def is_lm_head(linear: Linear, vocabulary: int | None) -> bool:
    """Whether the linear gives a decoder's logits: as wide as the vocabulary, and nothing but elementwise
    operators between it and a graph output."""
    if vocabulary is None or linear.shape[1] != vocabulary:
        return False
    value: ir.Value = linear.node.outputs[0]
    for _ in range(16):
        if value.is_graph_output():
            return True
        nodes = {use.node for use in value.uses()}
        if len(nodes) != 1:
            return False
        node = nodes.pop()
        if node.op_type not in _HEAD_TAIL:
            return False
        value = node.outputs[0]
    return False
