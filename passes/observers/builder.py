"""Appending nodes whose outputs share a prefix."""

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from qcompile.passes.observers.nodes import constant, scalar


class Builder:
    """A graph under construction; every method gives the name of a value."""

    def __init__(self, graph: onnx.GraphProto, prefix: str) -> None:
        self.graph, self.prefix = graph, prefix

    def node(self, operator: str, inputs: list[str], end: str, /, **attributes: object) -> str:
        """A node with one output, `prefix`.`end`."""
        output = f"{self.prefix}.{end}"
        self.graph.node.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def float(self, number: float | np.float32) -> str:
        """A float32 ()."""
        return scalar(self.graph, f"qcompile.float{float(number)}", np.float32(number))

    def integer(self, number: int) -> str:
        """An int32 ()."""
        return scalar(self.graph, f"qcompile.int{number}", np.int32(number))

    def long(self, number: int) -> str:
        """An int64 (1,)."""
        return constant(self.graph, f"qcompile.long{number}", [number])

    def integers(self, numbers: npt.NDArray[np.int64], end: str) -> str:
        """A constant int32 array."""
        name = f"{self.prefix}.{end}"
        self.graph.initializer.append(numpy_helper.from_array(numbers.astype(np.int32), name))
        return name

    def filled(self, shape: str, number: int, end: str) -> str:
        """An int32 of that shape, all the same number."""
        value = numpy_helper.from_array(np.array([number], np.int32))
        return self.node("ConstantOfShape", [shape], end, value=value)
