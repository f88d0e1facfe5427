"""Scales of float32 weights as float16 in the file, each behind a Cast that ONNX Runtime folds when it loads.

In memory a model has them as float32 always: `widen` takes the Casts out of a file that was read, and marks the model;
`halve` puts them into a marked one before it is written, so that what is compiled again or packaged keeps them.
"""

import numpy as np
import onnx_ir as ir

from qcompile.passes.formats import by_operator
from qcompile.passes.formats.base import DOMAIN, drop_unused
from qcompile.passes.graph import MICROSOFT, Names, add_initializer, insert_before
from qcompile.passes.linears import constant

# Key of `ir.Model.meta`: its scales are to be float16 in the file, wherever they are float16 numbers.
HALF_SCALES = "qcompile.half_scales"
# Where com.microsoft's operators and ONNX's DequantizeLinear read scales; those of the domain at _OWN.
_SLOTS = {(MICROSOFT, name): 2 for name in ("MatMulNBits", "GatherBlockQuantized", "MatMulBnb4")}
_SLOTS[("", "DequantizeLinear")] = 1
_OWN = 2
# Elements from which two bytes each are worth a node.
_LEAST = 512


def halve(model: ir.Model) -> int:
    """Store the scales of a marked model as float16, in place, where that changes no number; returns how many tensors.

    Only what the main graph's nodes read as scales and nothing else does: ONNX Runtime loads no constant of a body from
    outside.
    """
    if not model.meta.get(HALF_SCALES):
        return 0
    names, done = Names(model), 0
    for value in list(model.graph.initializers.values()):
        outer = value.is_graph_input() or value.is_graph_output()
        if value.const_value is None or outer or not _only_scales(model, value) or not are_half(value):
            continue
        half = np.asarray(constant(value).numpy()).astype(np.float16)
        stored = add_initializer(model.graph, names.fresh(f"{value.name}.half"), ir.tensor(half))
        name = names.fresh(f"{value.name}.widened")
        cast = insert_before(model.graph[0], "Cast", [stored], {"to": int(ir.DataType.FLOAT)}, name=name, output=name)
        cast.type, cast.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(half.shape)
        ir.convenience.replace_all_uses_with(value, cast)
        drop_unused(model, value)
        done += 1
    return done


def widen(model: ir.Model) -> None:
    """Turn Casts of constant float16 scales into float32 constants, in place; they are read when they are asked for."""
    names = Names(model)
    for node in list(model.graph):
        stored = node.inputs[0] if node.op_type == "Cast" and node.domain == "" else None
        if stored is None or not stored.is_initializer() or stored.is_graph_input() or stored.const_value is None:
            continue
        value = node.outputs[0]
        if constant(stored).dtype != ir.DataType.FLOAT16 or value.is_graph_output() or not _only_scales(model, value):
            continue
        if node.attributes.get_int("to", 0) != ir.DataType.FLOAT:
            continue
        name = names.fresh(f"{value.name}.scale")
        made = add_initializer(model.graph, name, _Widened(constant(stored), name))
        ir.convenience.replace_all_uses_with(value, made)
        model.graph.remove(node, safe=True)
        drop_unused(model, stored)
        model.meta[HALF_SCALES] = True


def are_half(scale: ir.Value) -> bool:
    """Whether `halve` will store a float32 initializer as float16."""
    tensor = constant(scale)
    if tensor.dtype != ir.DataType.FLOAT or tensor.size < _LEAST:
        return False
    numbers = np.asarray(tensor.numpy())
    with np.errstate(over="ignore"):
        return np.array_equal(numbers.astype(np.float16).astype(np.float32), numbers)


class _Widened(ir.LazyTensor):
    """float32 numbers of a float16 tensor, which the file holds."""

    def __init__(self, stored: ir.TensorProtocol, name: str) -> None:
        self.stored, shape = stored, ir.Shape(stored.shape.numpy())
        super().__init__(self._read, dtype=ir.DataType.FLOAT, shape=shape, name=name)

    def _read(self) -> ir.TensorProtocol:
        return ir.tensor(np.asarray(self.stored.numpy()).astype(np.float32))


def stored_as(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor as the file that it was read from holds it."""
    return tensor.stored if isinstance(tensor, _Widened) else tensor


def _only_scales(model: ir.Model, value: ir.Value) -> bool:
    """Whether nodes of the main graph read a value, all of them as scales."""
    uses = list(value.uses())
    return any(_reads_scales(*use) for use in uses) and all(
        use.node.graph is model.graph and (_reads_scales(*use) or use.node.op_type == "Shape") for use in uses
    )


def _reads_scales(node: ir.Node, position: int) -> bool:
    """Whether an input of a node is scales; also of a lookup that a DequantizeLinear takes its scales from."""
    if node.domain == DOMAIN:
        return position == _OWN and by_operator(node.op_type) is not None
    if (node.op_type, node.domain, position) == ("Gather", "", 0):
        readers = list(node.outputs[0].uses())
        return bool(readers) and all(_SLOTS.get((use.node.domain, use.node.op_type)) == use.idx for use in readers)
    return _SLOTS.get((node.domain, node.op_type)) == position
