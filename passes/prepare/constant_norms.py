"""Normalizations of constants: weights that are standardized whenever a model runs (timm's StdConv2d, NFNets)."""

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from qcompile.passes.prepare.constant_types import FLOATS, HALVES, Array, Made, Operand, axis_of


def batch_norm(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    """(N, C, …) by given means and variances, or in training by its own, which then are mixed into the given ones."""
    own, momentum = node.attributes.get_int("training_mode", 0) == 1, node.attributes.get_float("momentum", 0.9)
    known = _floats(operands, 5)
    if known is None or len(known[0].shape) < 2 or len(node.outputs) not in (1, 3 if own else 1):
        return None
    rank, channels = len(known[0].shape), (known[0].shape[1],)
    over = (0, *range(2, rank))

    def normalized(x: Array, scale: Array, bias: Array, mean: Array, variance: Array) -> list[Array]:
        found = (x.mean(over), x.var(over)) if own else (mean, variance)
        mixed = [old * momentum + new * (1 - momentum) for old, new in zip((mean, variance), found, strict=True)]
        stand = [a.reshape(-1, *[1] * (rank - 2)) for a in (*found, scale, bias)]
        return [_scaled(x, node, *stand), *mixed][: len(node.outputs)]

    return _made(node, known, (known[0].shape, channels, channels), normalized)


def instance_norm(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    """(N, C, …), each of its channels by its own mean and variance."""
    known = _floats(operands, 3)
    if known is None or len(known[0].shape) < 3:
        return None
    over = tuple(range(2, len(known[0].shape)))

    def normalized(x: Array, scale: Array, bias: Array) -> list[Array]:
        stand = [a.reshape(-1, *[1] * len(over)) for a in (scale, bias)]
        return [_scaled(x, node, x.mean(over, keepdims=True), x.var(over, keepdims=True), *stand)]

    return _made(node, known, (known[0].shape,), normalized)


def layer_norm(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    """The axes from `axis` on, by their own mean and variance; its bias may be left out."""
    known = _floats([operand for operand in operands if operand is not None], len(operands))
    if known is None or len(known) < 2:
        return None
    rank = len(known[0].shape)
    over = tuple(range(axis_of(node.attributes.get_int("axis", -1) or 0, rank), rank))

    def normalized(x: Array, scale: Array, *bias: Array) -> list[Array]:
        mean, variance = x.mean(over, keepdims=True), x.var(over, keepdims=True)
        return [_scaled(x, node, mean, variance, scale, bias[0] if bias else np.zeros((), x.dtype))]

    return _made(node, known, (known[0].shape,), normalized)


def _floats(operands: Sequence[Operand | None], count: int) -> list[Operand] | None:
    """The operands, where they are `count` of one float type."""
    known = [operand for operand in operands if operand is not None]
    same = len({operand.dtype for operand in known}) == 1 and known[0].dtype in FLOATS
    return known if len(known) == len(operands) == count and same else None


def _scaled(x: Array, node: ir.Node, mean: Array, variance: Array, scale: Array, bias: Array) -> Array:
    epsilon = np.float32(node.attributes.get_float("epsilon", 1e-5))
    return np.asarray((x - mean) / np.sqrt(variance + epsilon) * scale + bias)


def _made(
    node: ir.Node,
    operands: Sequence[Operand],
    shapes: tuple[tuple[int, ...], ...],
    function: Callable[..., list[Array]],
) -> Made | None:
    """What the function makes of the arrays, computed in float32 for halves; None where the node has more outputs."""
    dtype = operands[0].dtype
    if len(node.outputs) > len(shapes):
        return None

    def computed(arrays: Sequence[Array]) -> Sequence[Array]:
        with np.errstate(all="ignore"):
            wide = [array.astype(np.float32) if dtype in HALVES else array for array in arrays]
            return [np.asarray(array).astype(dtype.numpy(), copy=False) for array in function(*wide)]

    return Made(shapes[: len(node.outputs)], dtype, computed, work=8 * prod(operands[0].shape))
