"""Nodes written in place of one that goes: each before it, named after it, and of its type."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.graph import Names, add_initializer, take_over


class Writer:
    """Writes what takes the place of a node. A value is given back as the one it was where nothing is to be done.

    home: the main graph, whose initializers every body can read.
    """

    def __init__(self, node: ir.Node, names: Names, home: ir.Graph) -> None:
        self.node, self.names, self.home, self.name = node, names, home, str(node.name or "")
        node.name = f"{self.name}_replaced"  # so that one of the new nodes can have its name

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        what: str = "",
        attributes: dict[str, Any] | None = None,
        *,
        like: ir.Value | None = None,
        kind: ir.DataType | None = None,
    ) -> ir.Value:
        """The output of a new node `<name>_<what>`, or of the name itself; of the type of `like`, or of the node, or
        of the element type `kind`.
        """
        (value,) = self.ops(op_type, inputs, what, attributes)
        value.type = ir.TensorType(kind) if kind is not None else (like or self.node.outputs[0]).type
        return value

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        what: str = "",
        attributes: dict[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> list[ir.Value]:
        """The outputs of a new node, all of the type of the old node's first."""
        name = f"{self.name}_{what}" if what else self.name
        made = ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(made.outputs):
            value.name = self.names.fresh(f"{name}_output{i or ''}")
            value.type = self.node.outputs[0].type
        assert self.node.graph is not None
        self.node.graph.insert_before(self.node, made)
        return list(made.outputs)

    def constant(self, array: npt.ArrayLike, what: str, dtype: npt.DTypeLike = np.int64) -> ir.Value:
        """A small constant."""
        return add_initializer(self.home, self.names.fresh(f"{self.name}_{what}"), ir.tensor(np.array(array, dtype)))

    def parts(self, value: ir.Value, sizes: Sequence[int], axis: int, what: str) -> list[ir.Value]:
        """Parts of these sizes along an axis."""
        told = self.constant(list(sizes), f"{what}_sizes")
        return self.ops("Split", [value, told], what, {"axis": axis}, outputs=len(sizes))

    def transpose(self, value: ir.Value, order: Sequence[int], what: str) -> ir.Value:
        """The axes in another order."""
        if list(order) == sorted(order):
            return value
        turned = self.op("Transpose", [value], what, {"perm": list(order)}, like=value)
        turned.shape = None if value.shape is None else ir.Shape([value.shape[axis] for axis in order])
        return turned

    def reshape(self, value: ir.Value, shape: Sequence[int], what: str) -> ir.Value:
        """Another shape; 0 stands for the size as it is."""
        if value.shape is not None and tuple(value.shape) == tuple(shape):
            return value
        made = self.op("Reshape", [value, self.constant(shape, f"{what}_shape")], what, like=value)
        made.shape = ir.Shape([size or None for size in shape])
        return made

    def unsqueeze(self, value: ir.Value, axes: Sequence[int], what: str) -> ir.Value:
        """New axes of size 1."""
        return self.op("Unsqueeze", [value, self.constant(axes, f"{what}_axes")], what, like=value) if axes else value

    def squeeze(self, value: ir.Value, axes: Sequence[int], what: str) -> ir.Value:
        """Axes of size 1 gone."""
        return self.op("Squeeze", [value, self.constant(axes, f"{what}_axes")], what, like=value) if axes else value

    def end(self, *results: ir.Value | None) -> None:
        """Put the results where the outputs of the node were, and remove it."""
        for output, result in zip(self.node.outputs, results, strict=False):
            if result is not None:
                take_over(output, result, self.names)
        assert self.node.graph is not None
        self.node.graph.remove(self.node, safe=True)
