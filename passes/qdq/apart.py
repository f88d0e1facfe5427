"""What keeps products that stay in float from being quantized by ONNX Runtime.

Its `WeightBiasQuantization` makes int8 codes, one scale for the tensor, of the float32 weight of every Conv,
ConvTranspose and Gemm (MatMul and Add become one) that reads a DequantizeLinear of one scale: also of what a user
excludes, or mixed precision keeps in float. It moves such a DequantizeLinear over operators that only move numbers, so
that what stands between is no help. With ONNX Runtime 1.32 an excluded product behind a quantized one lost 0.4 to 2 dB
against its own int8 codes on small graphs, and 11 dB in silero-vad; a bias that holds -inf became arbitrary codes.

So such a product reads a DequantizeLinear of its own, which says the same scale once for each index of an axis: equal
numbers, no more time, and nothing that the runtime takes for an integer product. Or it reads the float value, where no
axis is known to be longer than 1, and on TensorRT, which has one scale for an activation only.
"""

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import QParams
from qcompile.passes.graph import add_initializer, is_constant
from qcompile.passes.linears import constant
from qcompile.passes.qdq.biases import has_endless_bias
from qcompile.passes.qdq.providers import RULES
from qcompile.passes.qdq.selection import PRODUCTS

Use = tuple[ir.Node, int]
# Operators over which a DequantizeLinear is moved.
_MOVES = {name for name, rule in RULES.items() if rule.output == "same"} | {"Identity"}


def stays_float(node: ir.Node, position: int) -> bool:
    """Whether an input of a node goes, moved perhaps, into a product that has a float32 weight still when those of
    others are codes, or a bias that no codes can hold.
    """
    open_, seen = [(node, position)], set[ir.Node]()
    while open_:
        reader, index = open_.pop()
        if reader in seen or reader.domain != "" or index != 0:
            continue
        seen.add(reader)
        if reader.op_type in PRODUCTS:
            weight = reader.inputs[1] if len(reader.inputs) > 1 else None
            if weight is not None and is_constant(weight) and constant(weight).dtype == ir.DataType.FLOAT:
                return True
            if has_endless_bias(reader):
                return True
        elif reader.op_type in _MOVES:
            open_ += [(use.node, use.idx) for out in reader.outputs for use in out.uses()]
    return False


def by_axis(model: ir.Model, value: ir.Value, dequantize: ir.Node, grid: QParams) -> ir.Value | None:
    """The output of a second DequantizeLinear of the codes that `dequantize` reads, with the grid (), of `value`, for
    each index of an axis; None where no axis is known to be longer than 1.
    """
    shape = [] if value.shape is None else list(value.shape)
    long = [i for i, size in enumerate(shape) if isinstance(size, int) and size > 1]
    if not long:
        return None
    axis = 1 if 1 in long else long[-1]
    count, (codes, *known) = shape[axis], list(dequantize.inputs)
    parts = []
    for old, number in zip(known, (grid.scale, grid.zero_point), strict=False):
        assert old is not None
        array = np.full(int(count), number).astype(constant(old).dtype.numpy())  # type: ignore[arg-type]
        parts.append(add_initializer(model.graph, f"{old.name}.by_axis", ir.tensor(array)))
    made = ir.node("DequantizeLinear", [codes, *parts], {"axis": axis}, name=f"{dequantize.name}.by_axis")
    made.outputs[0].name = f"{dequantize.outputs[0].name}.by_axis"
    made.outputs[0].type, made.outputs[0].shape = value.type, value.shape
    model.graph.insert_after(dequantize, made)
    return made.outputs[0]
