"""A few lines that make writing a graph by hand bearable: operators as methods, constants by value, shapes inferred."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

Operand = ir.Value | npt.ArrayLike
_DTYPES = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


class Builder:
    """A graph under construction. `b.Add(x, 1.0, name="n")` adds a node and returns its output value.

    Operands that are no values become initializers of the graph's float type (floats) or int64 (integers).
    """

    def __init__(self, *, opset: int, dtype: str = "fp32") -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        self.opset, self.dtype = opset, _DTYPES[dtype]
        self.inputs: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self._domains = {"": opset}
        self._constants: dict[Any, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """A graph input."""
        value = ir.val(name, dtype, shape)
        self.inputs.append(value)
        return value

    def weight(self, name: str, array: npt.NDArray[Any]) -> ir.Value:
        """An initializer; floats are cast to the graph's float type."""
        value = ir.val(name, const_value=self._tensor(array, name))
        self.initializers[name] = value
        return value

    def constant(self, array: npt.ArrayLike) -> ir.Value:
        """The output of a Constant node, as older exporters store weights."""
        node = ir.node("Constant", [], {"value": self._tensor(np.asarray(array), f"constant_{len(self.nodes)}")})
        return self._append(node, f"constant_{len(self.nodes)}", 1)[0]

    def node(
        self,
        op_type: str,
        *operands: Operand | None,
        name: str | None = None,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node with any number of outputs."""
        if domain:
            self._domains[domain] = 1
        values = [None if operand is None else self._value(operand) for operand in operands]
        node = ir.node(op_type, values, attributes or None, domain=domain, num_outputs=outputs)
        return self._append(node, name or f"{op_type.lower()}_{len(self.nodes)}", outputs)

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]:
        """`b.MatMul(x, w)` is a node with one output."""
        if not op_type[0].isupper():
            raise AttributeError(op_type)
        return lambda *operands, **options: self.node(op_type, *operands, **options)[0]

    def model(self, outputs: dict[str, ir.Value], *, check: bool = True) -> ir.Model:
        """The finished model with inferred shapes, its outputs renamed to the keys of `outputs`."""
        for name, value in outputs.items():
            value.name = name
        graph = ir.Graph(
            self.inputs,
            list(outputs.values()),
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=self._domains,
            name="tiny",
        )
        proto = ir.to_proto(ir.Model(graph, ir_version=10, producer_name="qcompile.models.tiny"))
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        if check:
            onnx.checker.check_model(proto)
        model: ir.Model = ir.from_proto(proto)
        return model

    def _append(self, node: ir.Node, name: str, outputs: int) -> list[ir.Value]:
        node.name = name
        for index, value in enumerate(node.outputs):
            value.name = f"{name}.out" if outputs == 1 else f"{name}.out{index}"
        self.nodes.append(node)
        return list(node.outputs)

    def _value(self, operand: Operand) -> ir.Value:
        if isinstance(operand, ir.Value):
            return operand
        array = np.asarray(operand)
        key = (array.dtype.kind, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.weight(f"value_{len(self._constants)}", array)
        return self._constants[key]

    def _tensor(self, array: npt.NDArray[Any], name: str) -> ir.TensorProtocol:
        if array.dtype.kind == "f":
            return ir.tensor(array.astype(self.dtype.numpy()), name=name)
        return ir.tensor(array if array.dtype.kind == "b" else array.astype(np.int64), name=name)
