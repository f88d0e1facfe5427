"""What a check of a file finds, and what all checks ask of Q and DQ."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.graph import is_constant
from qcompile.passes.linears import constant

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
# Operators that compute with codes themselves, or find scales at run time.
RUN_TIME = ("DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")


@dataclass
class Findings:
    """broken: rules that nodes break, each with the node's name. remarks: what is no fault, but should be known.
    checked: how many nodes rules were held against, by what they are.
    """

    broken: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        """One more node of that kind was looked at."""
        self.checked[what] = self.checked.get(what, 0) + 1

    def fault(self, node: ir.Node, told: str) -> None:
        """A node breaks a rule."""
        self.broken.append(f"{node.op_type} {node.name!r} {told}")


def grids(model: ir.Model) -> Iterator[ir.Node]:
    """Every Q and DQ, in bodies too."""
    return (node for node in model.graph.all_nodes() if node.op_type in (QUANTIZE, DEQUANTIZE))


def operand(node: ir.Node, position: int) -> ir.Value | None:
    """An input of a node; None where it is left out."""
    return node.inputs[position] if position < len(node.inputs) else None


def numbers(value: ir.Value | None) -> npt.NDArray[np.float64] | None:
    """A constant's numbers; None where it is none, or computed."""
    if value is None or not is_constant(value):
        return None
    return np.asarray(constant(value).numpy()).astype(np.float64)


def codes_type(node: ir.Node) -> ir.DataType | None:
    """The element type of the codes of a Q or a DQ."""
    known = operand(node, 2) if node.op_type == QUANTIZE else node.inputs[0]
    if known is not None and is_constant(known):
        return constant(known).dtype
    producer = known.producer() if known is not None and node.op_type == DEQUANTIZE else None
    if producer is not None and producer.op_type == QUANTIZE:
        return codes_type(producer)
    if known is not None:
        return known.dtype
    stated = node.attributes.get_int("output_dtype", 0)
    return ir.DataType(stated) if stated else ir.DataType.UINT8


def check_scales(node: ir.Node, found: Findings) -> npt.NDArray[np.float64] | None:
    """The constant scales of a Q or a DQ; a fault, and None, where they are computed, or not positive and finite."""
    scales = numbers(operand(node, 1))
    if scales is None:
        found.fault(node, "has scales that are no constant")
    elif not (np.isfinite(scales).all() and (scales > 0).all()):
        found.fault(node, "has scales that are not positive and finite")
        return None
    return scales


def has_zero_points(node: ir.Node) -> bool:
    """Whether the zero points of a Q or a DQ are other numbers than 0, or may be: computed ones."""
    zero = operand(node, 2)
    return zero is not None and ((given := numbers(zero)) is None or bool(given.any()))


def rows_of(node: ir.Node) -> tuple[int, ...] | None:
    """The shape of the constant codes of a DQ; None for anything else."""
    codes = node.inputs[0]
    if codes is None or not is_constant(codes):
        return None
    return tuple(int(size) for size in constant(codes).shape.numpy())
