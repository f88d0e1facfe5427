"""What is known of constant operands, and of what a node makes of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
INTEGERS = {ir.DataType.INT64, ir.DataType.INT32}
HALVES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}


@dataclass(frozen=True, eq=False)
class Operand:
    """A constant operand: its shape and element type, and the content of a small one."""

    shape: Shape
    dtype: ir.DataType
    content: Array | None = None

    @property
    def nbytes(self) -> int:
        """As a file holds it."""
        bits = 64 if self.dtype == ir.DataType.STRING else self.dtype.bitwidth  # strings: at least so many
        return (prod(self.shape) * bits + 7) // 8


@dataclass(frozen=True, eq=False)
class Made:
    """What a node makes of constant operands.

    shapes: of each output. dtype: of all. function: the outputs, from the operands' arrays. same_bytes: only the shape
    changes. work: numbers touched, multiplications of a product counted by eight. by_shape: the operands' shapes say it
    all, and none of their arrays is asked for.
    """

    shapes: tuple[Shape, ...]
    dtype: ir.DataType
    function: Callable[[Sequence[Array]], Sequence[Array]]
    same_bytes: bool = False
    work: int = 0
    by_shape: bool = False


# Attributes and operands to what becomes of them; None where the rule does not cover them.
Rule = Callable[[ir.Node, Sequence[Operand | None]], Made | None]


def axis_of(axis: int, rank: int) -> int:
    """The axis, counted from the first; ValueError where there is none."""
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of rank {rank}")
    return axis % rank
