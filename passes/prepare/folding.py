"""Folding what stands between a weight and its user into the weight, lazily."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.prepare.edit import Decide, add_initializer, is_constant, small_array
from qcompile.passes.tensors import lazy

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
# A second copy of less than this may be made; above, a weight exists once.
_SMALL = 1 << 16
_MATMULS = {"MatMul", "Gemm", "Gather"}


@dataclass(frozen=True)
class _Folded:
    """What a node makes of its constant input: same_bytes says that only the shape changes."""

    function: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]
    shape: tuple[int, ...]
    dtype: ir.DataType
    same_bytes: bool


def fold_weights(model: ir.Model, decide: Decide) -> None:
    """Fold Transpose, Cast, Reshape, Squeeze and Unsqueeze of initializers, in bodies of If, Loop and Scan too.

    A weight that others use as it is keeps its one copy: its Transpose or Cast stays (a tied embedding; `linears` sees
    through the Transpose), while a changed shape costs nothing on disk, where equal bytes are stored once.
    """
    done: dict[tuple[ir.Value, str], ir.Value] = {}
    for node in list(model.graph.all_nodes()):
        source = node.inputs[0] if node.inputs else None
        if node.domain != "" or source is None or not is_constant(source):
            continue
        if node.op_type == "DequantizeLinear":
            decide(node.name or "", "skipped", "the weight is already quantized")
            continue
        folded = _fold(node, source)
        output = node.outputs[0]
        if folded is None or output.is_graph_output():
            continue
        key = (source, _signature(node))
        reason = None if key in done else _keep(node, source, folded)
        if reason is not None:
            decide(node.name or "", "kept", reason)
            continue
        if key not in done:
            assert source.const_value is not None
            assert output.name is not None
            tensor = lazy(source.const_value, folded.function, shape=folded.shape, dtype=folded.dtype)
            done[key] = add_initializer(model.graph, output.name, tensor)
        ir.convenience.replace_all_uses_with(output, done[key])
        assert node.graph is not None
        node.graph.remove(node, safe=True)
        decide(node.name or "", "folded", f"{node.op_type} of the constant {source.name}")


def _signature(node: ir.Node) -> str:
    """Equal for nodes that do the same to their first input."""
    operands = [None if (array := small_array(value)) is None else array.tolist() for value in node.inputs[1:]]
    return f"{node.op_type} {sorted((name, str(a.value)) for name, a in node.attributes.items())} {operands}"


def _keep(node: ir.Node, source: ir.Value, folded: _Folded) -> str | None:
    """Why the node stays, or None."""
    tensor = source.const_value
    assert tensor is not None
    if folded.same_bytes or tensor.nbytes < _SMALL:
        return None
    same = all(_signature(use.node) == _signature(node) for use in source.uses())
    if not same or source.is_graph_output():
        return f"{source.name} is also used without this {node.op_type}; one copy of it is kept"
    grows = folded.dtype.bitwidth > tensor.dtype.bitwidth
    if grows and not any(use.node.op_type in _MATMULS for use in node.outputs[0].uses()):
        return f"as {folded.dtype.name} {source.name} would take {folded.dtype.bitwidth} bits instead of " + str(
            tensor.dtype.bitwidth
        )
    return None


def _fold(node: ir.Node, source: ir.Value) -> _Folded | None:
    tensor = source.const_value
    assert tensor is not None
    shape, dtype = tuple(int(size) for size in tensor.shape.numpy()), tensor.dtype
    if dtype == ir.DataType.STRING:
        return None
    if node.op_type == "Transpose":
        permutation = node.attributes.get("perm")
        order = tuple(reversed(range(len(shape)))) if permutation is None else tuple(permutation.as_ints())
        return _Folded(lambda a: a.transpose(order), tuple(shape[axis] for axis in order), dtype, same_bytes=False)
    if node.op_type == "Cast":
        target = ir.DataType(node.attributes["to"].as_int())
        if dtype not in _FLOATS or target not in _FLOATS:
            return None
        return _Folded(lambda a: a.astype(target.numpy()), shape, target, same_bytes=target == dtype)
    reshaped = _reshaped(node, shape)
    if reshaped is None:
        return None
    return _Folded(lambda a: a.reshape(reshaped), reshaped, dtype, same_bytes=True)


def _reshaped(node: ir.Node, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a Reshape, Squeeze or Unsqueeze gives; None when it is not known, or the node is none of them."""
    has_operand = len(node.inputs) > 1 and node.inputs[1] is not None
    operand = small_array(node.inputs[1]) if has_operand else None
    if has_operand and operand is None:
        return None
    if node.op_type == "Squeeze":
        axes = {i for i, size in enumerate(shape) if size == 1} if operand is None else _axes(operand, len(shape))
        return tuple(size for i, size in enumerate(shape) if i not in axes)
    if operand is None:
        return None
    if node.op_type == "Unsqueeze":
        rank = len(shape) + operand.size
        left, axes = iter(shape), _axes(operand, rank)
        return tuple(1 if i in axes else next(left) for i in range(rank))
    if node.op_type == "Reshape":
        copies = not node.attributes.get_int("allowzero", 0)
        wanted = [shape[i] if size == 0 and copies else int(size) for i, size in enumerate(operand.tolist())]
        return np.empty(shape, np.bool_).reshape(wanted).shape if np.prod(shape) < 1 else _resolved(shape, wanted)
    return None


def _axes(operand: npt.NDArray[Any], rank: int) -> set[int]:
    return {int(axis) % rank for axis in operand.reshape(-1)}


def _resolved(shape: tuple[int, ...], wanted: list[int]) -> tuple[int, ...]:
    known = int(np.prod([size for size in wanted if size != -1], dtype=np.int64))
    return tuple(int(np.prod(shape, dtype=np.int64)) // known if size == -1 else size for size in wanted)
