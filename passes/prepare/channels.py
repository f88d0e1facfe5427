"""What a node does to each channel of a value: a factor and an offset."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.graph import is_constant
from qcompile.passes.tensors import read

_ARITHMETIC = ("Add", "Sub", "Mul", "Div")

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Affine:
    """gain · y + offset of a value y (N, C, …), both (C,); `node` is the last that computes it."""

    node: ir.Node
    gain: Array
    offset: Array

    def then(self, other: "Affine") -> "Affine":
        """This one first, then the other."""
        return Affine(other.node, self.gain * other.gain, self.offset * other.gain + other.offset)


def candidates(value: ir.Value) -> list[ir.Node]:
    """The readers that may be linear by channel."""
    return [
        node
        for node, position in value.uses()
        if node.domain == ""
        and (
            (node.op_type == "BatchNormalization" and position == 0)
            or (node.op_type in _ARITHMETIC and is_constant(node.inputs[1 - position]))
        )
    ]


def affine(node: ir.Node, value: ir.Value, *, channels: int, rank: int) -> Affine | str:
    """What a candidate does with the value, of so many channels and axes; or why that is not linear by channel.

    BatchNormalization out of training (Ioffe and Szegedy, arXiv:1502.03167): gain = scale / sqrt(var + epsilon),
    offset = B - gain · mean.
    """
    if node.op_type == "BatchNormalization":
        return _normalization(node, channels)
    first = node.inputs[0] is value
    constant = _by_channel(node.inputs[int(first)], channels, rank)
    if constant is None:
        return "its constant is not of one value, or of one a channel"
    if node.op_type == "Div" and not first:
        return "it divides by the value"
    if node.op_type in ("Mul", "Div"):
        return Affine(node, constant if node.op_type == "Mul" else 1 / constant, np.zeros(channels))
    if node.op_type == "Sub":
        return Affine(node, np.full(channels, 1.0 if first else -1.0), -constant if first else constant)
    return Affine(node, np.ones(channels), constant)


def _normalization(node: ir.Node, channels: int) -> Affine | str:
    if node.attributes.get_int("training_mode", 0) or any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        return "it is in training mode"
    tensors = [value.const_value for value in node.inputs[1:] if value is not None and is_constant(value)]
    if len(tensors) != 4:
        return "its parameters are no constants"
    if any(tensor is None or tuple(tensor.shape.numpy()) != (channels,) for tensor in tensors):
        return "its parameters are not one a channel"
    scale, shift, mean, variance = (wide(tensor) for tensor in tensors if tensor is not None)
    gain = scale / np.sqrt(variance + (node.attributes.get_float("epsilon", 1e-5) or 0.0))
    return Affine(node, gain, shift - gain * mean)


def _by_channel(value: ir.Value | None, channels: int, rank: int) -> Array | None:
    """A constant that is spread along all axes but the second, as (C,)."""
    tensor = value.const_value if value is not None else None
    if tensor is None:
        return None
    shape = [int(size) for size in tensor.shape.numpy()]
    batch, size, *places = [1] * (rank - len(shape)) + shape
    if len(shape) > rank or size not in (1, channels) or {batch, *places} != {1}:
        return None
    return np.broadcast_to(wide(tensor).reshape(-1), (channels,))


def wide(tensor: ir.TensorProtocol) -> Array:
    """The tensor in float64."""
    return read(tensor).astype(np.float64)
