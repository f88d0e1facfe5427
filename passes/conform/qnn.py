"""The rules of ONNX Runtime's QNN provider for MatMulNBits, Q and DQ, as its documents and sources state them
(docs/providers.md). Read, not run. What it does not take, it leaves to the CPU provider: that is no fault, but told.
"""

import numpy as np
import onnx_ir as ir

from qcompile.passes.conform.findings import (
    DEQUANTIZE,
    QUANTIZE,
    RUN_TIME,
    Findings,
    check_scales,
    codes_type,
    grids,
    has_zero_points,
    numbers,
    operand,
    rows_of,
)
from qcompile.passes.graph import producer_of
from qcompile.passes.targets import TARGETS

_ACTIVATIONS = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT16, ir.DataType.INT16)
_WEIGHTS = (ir.DataType.INT8, ir.DataType.INT32)
# Operators whose weight may have one scale for each index of an axis.
_CHANNELS = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1, "Gemm": 1}
# Inputs of MatMulNBits that it has no use for, by their positions.
_OPEN = {3: "zero points", 4: "an order of groups", 5: "a bias"}
# The 16-bit grid that the output of these must have: (scale, zero point), unsigned and signed.
_FIXED = {"Sigmoid": ((2.0**-16, 0), (2.0**-15, 0)), "Tanh": ((2.0**-15, 2**15), (2.0**-15, 0))}


def check(model: ir.Model) -> Findings:
    """What breaks the rules.

    Rule 1: no operator that finds scales at run time.
    Rule 2: MatMulNBits: 2, 4 or 8 bits, blocks of 32 or 64 that divide K, positive constant scales, no zero points, no
            order of groups, no bias.
    Rule 3: an activation has uint8, int8, uint16 or int16 codes and one constant scale.
    Rule 4: a weight beside an activation in codes, of an operator of ONNX, is int8 without zero point, one scale, or
            one for each channel of its output; a bias int32. MoE and its like the CPU provider runs.
    Rule 5: what a Sigmoid or a Tanh gives in 16 bits has the grid of its whole range.
    Remarks: sizes that are not fixed; what runs on the CPU provider.
    """
    found = Findings()
    for node in model.graph.all_nodes():
        if node.op_type in RUN_TIME:
            found.fault(node, "is an operator that the QNN provider does not have")  # Rule 1
        elif node.op_type == "MatMulNBits":
            _check_product(node, found)
    decoded = [node for node in grids(model) if not _check_grid(node, found)]
    if decoded:
        found.remarks.append(f"{len(decoded)} DequantizeLinear of weights alone are for the CPU provider")
    lookups = sum(node.op_type == "GatherBlockQuantized" for node in model.graph.all_nodes())
    if lookups:
        found.remarks.append(f"{lookups} lookups in codes are for the CPU provider (QNN's GPU has those of 4 bits)")
    loose = [str(value.name) for value in model.graph.inputs if value.shape is None or not value.shape.is_static()]
    if loose:
        told = f"inputs without fixed sizes, which QNN wants: {', '.join(loose[:4])}{', …' if len(loose) > 4 else ''}"
        found.remarks.append(f"{told}; python -m onnxruntime.tools.make_dynamic_shape_fixed fixes them")
    return found


def _check_product(node: ir.Node, found: Findings) -> None:
    """Rule 2."""
    found.count("MatMulNBits")
    k, bits, block = (node.attributes.get_int(name, 0) for name in ("K", "bits", "block_size"))
    groups = TARGETS["qnn"].groups
    if bits not in (2, 4, 8):
        found.fault(node, f"has {bits} bits: 2, 4 or 8")
    if block not in groups:
        found.fault(node, f"has blocks of {block}: {' or '.join(map(str, sorted(groups)))}")
    elif k % block:
        found.fault(node, f"has {k} rows, no multiple of its blocks of {block}")
    for position, what in _OPEN.items():
        if operand(node, position) is not None:
            found.fault(node, f"has {what}")
    scales = numbers(operand(node, 2))
    if scales is None or not (np.isfinite(scales).all() and (scales > 0).all()):
        found.fault(node, "has scales that are no positive constants")
    x = node.inputs[0]
    if x is not None and x.shape is not None and len(x.shape) != 3:
        told = "MatMulNBits of an activation that has not three axes are for QNN's GPU or the CPU provider"
        if told not in found.remarks:
            found.remarks.append(told)


def _check_grid(node: ir.Node, found: Findings) -> bool:
    """Rules 3 to 5; False for a DequantizeLinear of a weight that no activation in codes is beside."""
    if node.op_type == QUANTIZE or _behind_q(node):
        found.count("Q and DQ")
        scales = check_scales(node, found)
        if codes_type(node) not in _ACTIVATIONS:
            found.fault(node, "has codes of an activation that are not of 8 or 16 bits")
        if scales is not None and scales.size != 1:
            found.fault(node, "has several scales for an activation")
        if node.op_type == QUANTIZE and scales is not None and scales.size == 1:
            _check_fixed(node, float(scales.reshape(())), found)
        return True
    readers = [use.node for use in node.outputs[0].uses() if use.node.domain == ""]
    beside = [reader for reader in readers if any(map(_is_activation, reader.inputs))]
    if rows_of(node) is None or not beside:
        return False
    found.count("Q and DQ")
    _check_weight(node, beside, found)
    return True


def _check_weight(node: ir.Node, readers: list[ir.Node], found: Findings) -> None:
    """Rule 4."""
    scales, shape = check_scales(node, found), rows_of(node) or ()
    if codes_type(node) not in _WEIGHTS:
        found.fault(node, "has codes of a weight that are neither int8 nor, of a bias, int32")
    if has_zero_points(node):
        found.fault(node, "has zero points of a weight other than 0")
    if "block_size" in node.attributes:
        found.fault(node, "has blocks beside an activation in codes")
    elif scales is not None and scales.size > 1 and len(shape) > 1:
        axis = node.attributes.get_int("axis", 1) % len(shape)
        for reader in readers:
            turned = reader.op_type == "Gemm" and reader.attributes.get_int("transB", 0) == 1
            if (0 if turned else _CHANNELS.get(reader.op_type)) != axis:
                found.fault(node, f"has a scale for each index of axis {axis} of a weight of {reader.op_type}")


def _check_fixed(node: ir.Node, scale: float, found: Findings) -> None:
    """Rule 5."""
    producer = producer_of(node.inputs[0])
    dtype = codes_type(node)
    if producer is None or producer.op_type not in _FIXED or dtype not in (ir.DataType.UINT16, ir.DataType.INT16):
        return
    given = numbers(operand(node, 2))
    zero = 0.0 if given is None else float(given.reshape(()))
    wanted = _FIXED[producer.op_type][dtype == ir.DataType.INT16]
    if (scale, zero) != wanted:
        found.fault(node, f"has scale {scale:.3g} and zero point {zero:.0f} behind {producer.op_type}: {wanted}")


def _behind_q(node: ir.Node) -> bool:
    producer = producer_of(node.inputs[0])
    return producer is not None and producer.op_type == QUANTIZE


def _is_activation(value: ir.Value | None) -> bool:
    """Whether a value is an activation that went through codes."""
    producer = producer_of(value)
    return producer is not None and producer.op_type == DEQUANTIZE and _behind_q(producer)
