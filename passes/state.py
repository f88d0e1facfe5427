"""What is known of a weight on its way from float to codes: a record of it, and one of a node that reads it.

Invariant: both are frozen and replaced as a whole, and this module alone reads and writes them in the graph's metadata.
A copy of a model shares them with the original, so what is changed on one of the two does not show on the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.passes.affine import Array, Grid, Quantized
from qcompile.passes.observers.base import Observer

_WEIGHT, _NODE = "qcompile.weight", "qcompile.node"


@dataclass(frozen=True)
class Tensors:
    """The initializers of one quantized weight (K, N).

    codes: (K, N) of the grid's type. scale: (G, N). zero_point: (G, N) of the codes' type, None when symmetric.
    block_size: rows that share a scale.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    block_size: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of them together."""
        return sum(value.const_value.nbytes for value in self.values() if value.const_value is not None)

    def values(self) -> list[ir.Value]:
        """Those that are there, in the order of the operators."""
        return [value for value in (self.codes, self.scale, self.zero_point) if value is not None]


@dataclass(frozen=True)
class WeightState:
    """Of an initializer.

    clip: whether ranges may be clipped where it is rounded; None where no pass said.
    codes: those that were chosen for it and are not stored yet, by whether the weight is read transposed.
    packed: those that are stored, by their grid and the same, for every later node that reads the weight.
    """

    clip: bool | None = None
    codes: Mapping[bool, Quantized] = field(default_factory=dict)
    packed: Mapping[tuple[Grid, bool], tuple[Quantized, Tensors]] = field(default_factory=dict)


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
        assert value.const_value is not None
        array = np.asarray(value.const_value.numpy())
        return np.ascontiguousarray(array.T) if self.transposed and value is self.inputs[1] else array


@dataclass(frozen=True, eq=False)
class Outliers:
    """Channels of an activation that stay in float. channels: int64 (k,), ascending.

    rest: observer of the others; None where activations are not rounded.
    """

    channels: npt.NDArray[np.int64]
    rest: Observer | None = None


@dataclass(frozen=True)
class Decoded:
    """What a DequantizeLinear stands for. reader: a node that reads it. wanted: the float weight, as it is read."""

    reader: str
    wanted: Callable[[], Array]
    dequantize: Callable[[], Array]


@dataclass(frozen=True)
class NodeState:
    """Of a node.

    left: why it keeps a constant, or computes one, that `prepare` would have brought into a known form; "" where it
    does not. outliers: what is marked for the pass that quantizes. grid: of its weight, a part of one that was split by
    bits (`group_bits`), whatever the policy says; None of any other. The others are there until they are verified.
    reference: the float weight (K, N) that a packed node stands for, and its codes. twin: the float node that an
    integer one stands for. decoded: the float weight that a DequantizeLinear stands for.
    """

    left: str = ""
    outliers: Outliers | None = None
    grid: Grid | None = None
    reference: tuple[npt.NDArray[np.floating], Quantized] | None = None
    twin: Twin | None = None
    decoded: Decoded | None = None


def weight_state(weight: ir.Value) -> WeightState:
    """What is known of an initializer."""
    known = weight.meta.get(_WEIGHT, _NEW_WEIGHT)
    assert isinstance(known, WeightState)
    return known


def set_weight(weight: ir.Value, **changes: Any) -> None:
    """Change fields of an initializer's state."""
    weight.meta[_WEIGHT] = replace(weight_state(weight), **changes)


def node_state(node: ir.Node) -> NodeState:
    """What is known of a node."""
    known = node.meta.get(_NODE, _NEW_NODE)
    assert isinstance(known, NodeState)
    return known


def set_node(node: ir.Node, **changes: Any) -> None:
    """Change fields of a node's state."""
    node.meta[_NODE] = replace(node_state(node), **changes)


def remember(node: ir.Node, *, weights_only: bool = False) -> None:
    """Keep the float form of a node that is about to be quantized."""
    proto = ir.serde.serialize_node(node)
    inputs, transposed = list(node.inputs), False
    producer = inputs[1].producer() if len(inputs) > 1 and inputs[1] is not None else None
    turned = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else None
    if node.op_type == "MatMul" and turned is not None and turned.const_value is not None:
        inputs[1], transposed = turned, True
    set_node(node, twin=Twin(proto, tuple(inputs), transposed, weights_only))


_NEW_WEIGHT, _NEW_NODE = WeightState(), NodeState()
