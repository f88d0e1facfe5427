"""Convolutions that take over what follows them: a factor and an offset for each channel."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, add_initializer, is_constant, take_over
from qcompile.passes.linears import CONVOLUTIONS
from qcompile.passes.prepare.channels import Affine, Array, affine, candidates, wide
from qcompile.passes.tensors import lazy, read

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
_FLOAT16_NORMAL = 2.0**-14  # below it float16 loses bits that matter; the other types go down to 1e-38


@dataclass(frozen=True, eq=False)
class _Convolution:
    """A Conv (weight (C, M / groups, …)) or ConvTranspose (weight (M, C / groups, …)) with C output channels.

    split: a shape (4 axes) of the weight with the channels on axes 0 and 2. largest: (C,), |w| at most. bias: (C,).
    """

    node: ir.Node
    weight: ir.TensorProtocol
    split: tuple[int, int, int, int]
    largest: Array
    bias: Array


def fold_convolutions(model: ir.Model, decide: Decide) -> None:
    """Fold what is linear by channel into the weight and bias of the Conv or ConvTranspose before it.

    Case 1: BatchNormalization with constant parameters, not in training.
    Case 2: Add, Sub, Mul and Div with a constant of one value, or of one a channel.
    Case 3: several of them in a row, as many as have a result that the element type can hold.
    What others read stays, and constants that others use keep their value: the convolution gets its own.
    All is computed in float64 and rounded once.
    """
    names = Names(model)
    folded: Counter[str] = Counter()
    convolutions = 0
    for node in list(model.graph):
        if node.op_type not in CONVOLUTIONS or node.domain != "":
            continue
        with np.errstate(all="ignore"):  # what is not finite is refused
            operators, kept = _absorb(node, names)
        folded.update(operators)
        convolutions += bool(operators)
        if kept is not None:
            decide(kept[0].name or "", "kept", f"not folded into {node.name}: {kept[1]}")
    if folded:
        kinds = ", ".join(f"{count} {op_type}" for op_type, count in sorted(folded.items()))
        reason = f"{folded.total()} nodes into the weights of {convolutions} convolutions before them: {kinds}"
        decide("", "folded", reason, nodes=folded.total())


def _absorb(node: ir.Node, names: Names) -> tuple[list[str], tuple[ir.Node, str] | None]:
    """Fold what can be: the operators that went; the node behind that looks like one but stays, and why."""
    readers = candidates(node.outputs[0])
    if not readers:
        return [], None
    convolution = _open(node)
    if isinstance(convolution, str):
        return [], (readers[0], convolution)
    steps, kept = _steps(convolution)
    if steps:
        _fold(convolution, [step.node for step in steps], steps[-1], names)
    return [step.node.op_type for step in steps], kept


def _open(node: ir.Node) -> _Convolution | str:
    """The convolution with its constants, or why they cannot be changed."""
    operands = node.inputs[1:]
    tensors = [value.const_value for value in operands if value is not None and is_constant(value)]
    if len(tensors) < len(operands) or tensors[0] is None:
        return "its weight or bias is no constant"
    weight = tensors[0]
    if weight.dtype not in _FLOATS:
        return f"its weight is of type {weight.dtype.name}"
    if not weight.size:
        return "its weight has no elements"
    rows, columns = weight.shape.numpy()[:2]
    groups = node.attributes.get_int("group", 1)
    split = (rows, 1, 1, -1) if node.op_type == "Conv" else (groups, rows // groups, columns, -1)
    largest = np.abs(read(weight).reshape(split)).max(axis=(1, 3), initial=0).astype(np.float64).reshape(-1)
    bias = tensors[1] if len(tensors) > 1 else None
    if bias is not None and tuple(bias.shape.numpy()) != largest.shape:
        return "its bias is not one number a channel"
    return _Convolution(node, weight, split, largest, np.zeros(largest.size) if bias is None else wide(bias))


def _steps(convolution: _Convolution) -> tuple[list[Affine], tuple[ir.Node, str] | None]:
    """What can be folded, each together with all before it; the node behind that must stay, and why."""
    steps: list[Affine] = []
    kept, value = None, convolution.node.outputs[0]
    channels, rank = convolution.bias.size, len(convolution.weight.shape)
    while readers := candidates(value):
        step = _obstacle(value, convolution.node) or affine(readers[0], value, channels=channels, rank=rank)
        if isinstance(step, str):
            kept = readers[0], step
            break
        steps.append(steps[-1].then(step) if steps else step)
        value = readers[0].outputs[0]
    while steps and (misfit := _misfit(convolution, steps[-1])):  # Case 3
        kept = steps.pop().node, misfit
    return steps, kept


def _obstacle(value: ir.Value, convolution: ir.Node) -> str:
    """Why the value must stay as it is, or an empty string."""
    if value.is_graph_output():
        return f"{value.name} is a graph output"
    elsewhere = len(value.uses()) > 1 or any(reader.graph is not convolution.graph for reader, _ in value.uses())
    return f"{value.name} is read elsewhere too" if elsewhere else ""


def _misfit(convolution: _Convolution, total: Affine) -> str:
    """Why the element type cannot hold the weight and bias behind the fold, or an empty string."""
    dtype, before = convolution.weight.dtype, convolution.largest
    after = before * np.abs(total.gain)
    for array in (after, convolution.bias * total.gain + total.offset):
        if not np.isfinite(array.astype(dtype.numpy()).astype(np.float64)).all():
            return f"the result is not finite in {dtype.name}"
    if dtype == ir.DataType.FLOAT16 and ((after > 0) & (after < np.minimum(before, _FLOAT16_NORMAL))).any():
        return "the weight would be too small for FLOAT16"
    return ""


def _fold(convolution: _Convolution, nodes: list[ir.Node], total: Affine, names: Names) -> None:
    """Give the convolution weight and bias of its own, and the last node's output."""
    node, tensor, split = convolution.node, convolution.weight, convolution.split
    graph, weight, dtype, shape = node.graph, node.inputs[1], tensor.dtype.numpy(), tuple(tensor.shape.numpy())
    assert graph is not None
    assert weight is not None
    gain = total.gain.reshape(split[0], 1, split[2], 1)
    if (gain != 1).any():
        scaled = lazy(tensor, lambda array: (array.reshape(split) * gain).astype(dtype).reshape(shape), shape=shape)
        node.replace_input_with(1, add_initializer(graph, names.fresh(f"{weight.name}_folded"), scaled))
    bias = convolution.bias * total.gain + total.offset
    if len(node.inputs) > 2 or bias.any():
        node.resize_inputs(3)
        value = ir.tensor(bias.astype(dtype), dtype=tensor.dtype)
        node.replace_input_with(2, add_initializer(graph, names.fresh(f"{node.name}_bias"), value))
    take_over(nodes[-1].outputs[0], node.outputs[0], names)
    graph.remove(nodes, safe=True)
