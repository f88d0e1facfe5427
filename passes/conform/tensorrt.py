"""The rules of TensorRT for Q and DQ, as NVIDIA's documents state them (docs/providers.md). Read, not run."""

import numpy as np
import numpy.typing as npt
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
    operand,
    rows_of,
)

_CODES = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
# Operators of ONNX Runtime alone that read codes.
_FOREIGN = ("MatMulNBits", "GatherBlockQuantized", "MatMulBnb4", "QMoE", "QAttention", "QGemm")
# Opset of blocks and of INT4.
_BLOCKS = 21


def check(model: ir.Model) -> Findings:
    """What breaks the rules.

    Rule 1: no operator that TensorRT's parser does not know: run-time quantization, QLinear…, com.microsoft's of codes.
    Rule 2: codes are INT8, INT4 or FP8 (E4M3): no unsigned ones, none of 16 or 32 bits.
    Rule 3: zero points are absent, or constants of zeros.
    Rule 4: scales are constants, positive and finite, of 16 or 32 bits.
    Rule 5: an activation has one scale; a weight one, one for each index of an axis, or blocks.
    Rule 6: blocks lie along one of the last two axes, of rank 2 at most, and divide it; opset 21.
    Rule 7: INT4 is for constant weights alone, and a product reads them.
    """
    found = Findings()
    opset = model.graph.opset_imports.get("", 0)
    for node in model.graph.all_nodes():
        if node.op_type in (*RUN_TIME, *_FOREIGN) or node.op_type.startswith("QLinear") or node.domain == "qcompile":
            found.fault(node, "is an operator that TensorRT does not have")  # Rule 1
    for node in grids(model):
        found.count("Q and DQ")
        if codes_type(node) not in _CODES:
            found.fault(node, f"has codes of type {_named(codes_type(node))}: int8, int4 or float8e4m3fn")  # Rule 2
        if has_zero_points(node):
            found.fault(node, "has zero points other than 0")  # Rule 3
        scale = operand(node, 1)
        if scale is not None and scale.dtype not in _FLOATS:
            found.fault(node, f"has scales of type {_named(scale.dtype)}")  # Rule 4
        scales = check_scales(node, found)
        if scales is not None:
            _check_shape(node, scales, opset, found)
        if codes_type(node) == ir.DataType.INT4:
            _check_int4(node, found)
    return found


def _check_shape(node: ir.Node, scales: npt.NDArray[np.float64], opset: int, found: Findings) -> None:
    """Rules 5 and 6."""
    shape, block = rows_of(node), node.attributes.get_int("block_size", 0)
    if scales.size == 1 and not block:
        return
    if node.op_type == QUANTIZE or shape is None:
        found.fault(node, "has several scales for an activation")
    elif not block:
        axis = node.attributes.get_int("axis", 1)
        if scales.ndim != 1 or not -len(shape) <= axis < len(shape) or shape[axis] != scales.size:
            found.fault(node, f"has scales of shape {scales.shape} for codes of shape {shape}")
    else:
        axis, rank = node.attributes.get_int("axis", 1) % len(shape), len(shape)
        wanted = tuple(size // block if i == axis else size for i, size in enumerate(shape))
        if opset < _BLOCKS:
            found.fault(node, f"has blocks in opset {opset}: they came with {_BLOCKS}")
        if rank > 2:
            found.fault(node, f"has blocks along axis {axis} of rank {rank}")
        elif shape[axis] % block or scales.shape != wanted:
            found.fault(node, f"has blocks of {block} that do not cut {shape} into {scales.shape}")


def _check_int4(node: ir.Node, found: Findings) -> None:
    """Rule 7."""
    if node.op_type != DEQUANTIZE or rows_of(node) is None:
        found.fault(node, "has int4 codes that are no constant weight")
    elif not all(use.node.op_type in _PRODUCTS for use in node.outputs[0].uses()):
        found.fault(node, "has int4 codes that something else than a product reads")


def _named(dtype: ir.DataType | None) -> str:
    return "unknown" if dtype is None else dtype.name.lower()
