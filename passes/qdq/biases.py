"""Biases of integer products, such that ONNX Runtime fuses them."""

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.passes.affine import Array
from qcompile.passes.formats.base import drop_unused
from qcompile.passes.graph import add_initializer, insert_before, is_constant, producer_of, stem
from qcompile.passes.linears import CONVOLUTIONS, constant
from qcompile.passes.masks import FILL
from qcompile.passes.qdq.providers import Rule
from qcompile.passes.state import Twin, node_state, set_node

Floats = npt.NDArray[np.float64]
_LIMIT = 2**31 - 1
# Codes of a bias where the scale is chosen for it: half of 32 bits' are left for the sums.
_ROOM = 2**30
# Sums of floats from here on, over the numbers of a batch, may be infinite.
_ENDLESS = 1e30


def channel_bias(node: ir.Node, position: int | None, channels: int) -> Floats | None:
    """The constant that stands at `position`, one number for each output channel: (channels,), float64.

    One number alone, of any rank, is that of every channel. None where there is no constant, or one that differs from
    row to row.
    """
    value = node.inputs[position] if position is not None and len(node.inputs) > position else None
    if value is None or not is_constant(value):
        return None
    bias = np.asarray(constant(value).numpy(), np.float64)
    if bias.size == 1:
        return np.full(channels, bias.reshape(()))
    return bias.reshape(-1) if bias.size == channels == bias.shape[-1] else None


def quantize_bias(model: ir.Model, node: ir.Node, position: int, scale: Array, channels: int) -> bool:
    """Put int32 codes (channels,) behind a DequantizeLinear where the node reads its constant bias.

    scale: () or (channels,). False, and nothing done, where the codes would not fit 32 bits, or the scale float16: the
    sums' scales are tiny, and no such product is computed in integers.
    """
    bias = channel_bias(node, position, channels)
    value = node.inputs[position] if bias is not None else None
    if bias is None or value is None or constant(value).dtype != ir.DataType.FLOAT:
        return False
    scales = np.broadcast_to(scale.astype(np.float32), bias.shape)
    codes = np.rint(bias / scales)
    if np.abs(codes).max(initial=0) > _LIMIT:
        return False
    name = f"{stem(value.name)}.{stem(node.name)}.int32"
    dtype = constant(value).dtype
    stored = add_initializer(model.graph, name, ir.tensor(codes.astype(np.int32)))
    scale_value = add_initializer(model.graph, f"{name}.scale", ir.tensor(scales.astype(dtype.numpy())))
    read = insert_before(
        node, "DequantizeLinear", [stored, scale_value], {"axis": 0}, name=f"{name}.dequantized", output=f"{name}.float"
    )
    read.dtype, read.shape = dtype, ir.Shape(bias.shape)
    node.replace_input_with(position, read)
    drop_unused(model, value)
    return True


def least_scales(node: ir.Node, rule: Rule, scale: Array, channels: int) -> Array | None:
    """The scales (channels,) of a product's weight from which on its bias fits 32 bits; None without a constant bias.

    Weights that are nearly zero beside their bias, as those of dead channels, have smaller ones: ONNX Runtime would
    make the bias int32 all the same, and clip it. 0 where the bias is 0. scale: (), of the activation.
    None for float16 as well, of which no bias becomes int32.
    """
    behind = bias_behind(node)
    holder, position = behind if behind is not None else (node, rule.bias)
    bias = channel_bias(holder, position, channels)
    value = holder.inputs[position] if bias is not None and position is not None else None
    if bias is None or value is None or constant(value).dtype != ir.DataType.FLOAT:
        return None
    return np.asarray(np.abs(bias) / (float(scale) * _ROOM), np.float32)


def has_endless_bias(node: ir.Node) -> bool:
    """Whether a constant adds a number to a product's output that leaves its codes no room for others.

    -inf and the lowest float take tokens out of the running. No code of 32 bits is infinite, and ONNX Runtime makes
    such codes of a float bias too: only a product whose weight alone is quantized gives what the float one gives. The
    output of a convolution has a grid of 8 bits, which a bias like the fill of a mask takes for itself.
    """
    most = FILL if node.op_type in CONVOLUTIONS else _ENDLESS
    given = [node.inputs[2]] if len(node.inputs) > 2 else []
    given += [value for use in node.outputs[0].uses() if use.node.op_type == "Add" for value in use.node.inputs]
    return any(value is not None and is_constant(value) and not _is_below(value, most) for value in given)


def _is_below(value: ir.Value, most: float) -> bool:
    numbers = np.asarray(constant(value).numpy(), np.float64)
    return bool((np.abs(numbers) < most).all())  # which NaN is not


def bias_behind(node: ir.Node) -> tuple[ir.Node, int] | None:
    """(Add, position of the bias) where a constant (N,) is all that is done to the output of a MatMul."""
    value = node.outputs[0]
    uses = list(value.uses())
    if node.op_type != "MatMul" or len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    position = 1 - uses[0].idx
    bias = uses[0].node.inputs[position]
    if bias is None or not is_constant(bias) or len(constant(bias).shape) != 1:
        return None
    return uses[0].node, position


def settle_bias(model: ir.Model, node: ir.Node, scale: Array) -> None:
    """Give the bias behind an integer MatMul the form that leaves the product an integer one.

    ONNX Runtime makes a Gemm of MatMul and Add (N,) first, and leaves a Gemm with a float bias in float.
    Case 1: a value of rank 3 and more: the bias becomes (1, 1, N), which is no Gemm's.
    Case 2: rank 2: a Gemm with an int32 bias, which is an integer product.
    Case 3: a Gemm: its weight states its zero point, without which ONNX Runtime 1.32 leaves it in float.
    """
    if node.op_type == "Gemm":  # Case 3
        _state_zero_point(model, node)
        return
    found, shape = bias_behind(node), node.outputs[0].shape
    if found is None or shape is None:
        return
    add, position = found
    bias = add.inputs[position]
    assert bias is not None
    if len(shape) > 2:  # Case 1
        array = np.asarray(constant(bias).numpy())
        lifted = add_initializer(model.graph, f"{bias.name}.row", ir.tensor(array.reshape(1, 1, -1)))
        add.replace_input_with(position, lifted)
    elif len(shape) == 2:  # Case 2
        _become_gemm(model, node, add, bias, scale)
    drop_unused(model, bias)


def _become_gemm(model: ir.Model, node: ir.Node, add: ir.Node, bias: ir.Value, scale: Array) -> None:
    """Case 2. The Add becomes the Gemm, so that its output stays the value it was."""
    inputs = [*node.inputs, bias]
    twin = node_state(node).twin
    assert twin is not None
    add.resize_inputs(3)
    for i, value in enumerate(inputs):
        add.replace_input_with(i, value)
    if not quantize_bias(model, add, 2, scale, _columns(node)):
        add.resize_inputs(2)
        add.replace_input_with(0, node.outputs[0])
        add.replace_input_with(1, bias)
        return
    add.op_type = "Gemm"
    _state_zero_point(model, add)
    proto = onnx.NodeProto(op_type="Gemm")
    set_node(add, twin=Twin(proto, (*twin.inputs, bias), twin.transposed))
    model.graph.remove(node, safe=True)
    add.name = node.name


def _columns(node: ir.Node) -> int:
    """N of an integer MatMul, whose codes (K, N) stand behind a DequantizeLinear."""
    weight = node.inputs[1]
    assert weight is not None
    assert weight.shape is not None
    return int(weight.shape[-1])  # type: ignore[arg-type]  # quantized weights are constants


def _state_zero_point(model: ir.Model, gemm: ir.Node) -> None:
    """Give the DequantizeLinear of a Gemm's weight its zero point, 0 for each scale."""
    read = producer_of(gemm.inputs[1])
    if read is None or read.op_type != "DequantizeLinear" or len(read.inputs) > 2:
        return
    codes, scale = read.inputs[0], read.inputs[1]
    assert codes is not None
    assert scale is not None
    name = f"{codes.name}.zero_point"
    zeros = ir.tensor(np.zeros(constant(scale).shape.numpy(), np.int8))
    read.resize_inputs(3)
    read.replace_input_with(2, model.graph.initializers.get(name) or add_initializer(model.graph, name, zeros))
