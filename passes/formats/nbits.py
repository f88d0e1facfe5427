"""com.microsoft's operators of integer weights: MatMulNBits, and GatherBlockQuantized plus a Slice of padding.

Layouts (both transposed, padded to whole blocks; equal bytes are stored once, so a tied pair stays one on disk):
MatMulNBits B (N, blocks, block_size * bits / 8), GatherBlockQuantized data (V, blocks * block_size * bits / 8).
"""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.errors import UserError
from qcompile.passes.formats.base import (
    ACTIVATION_BITS,
    Cache,
    become,
    drop_unused,
    operands,
    pack_nibbles,
    unpacked,
)
from qcompile.passes.graph import MICROSOFT, add_initializer
from qcompile.passes.linears import constant, dimensions

# Of MatMulNBits: what it may round activations to. Without it (0) it computes in floats; 4 is int8, in blocks.
ACCURACY_LEVEL, INT8_LEVEL = "accuracy_level", 4


def refusal(block_size: int) -> str:
    """Why MatMulNBits does not take a block size, and what to do; empty where it does."""
    if block_size >= 16 and not block_size & (block_size - 1):
        return ""
    return (
        f"target matmulnbits takes group sizes 16, 32, 64, … (powers of two), got {block_size}: "
        "choose another --group-size, or target qcompile or qdq"
    )


def _block_size(node: ir.Node) -> int:
    block_size = node.attributes["block_size"].as_int()
    if told := refusal(block_size):
        raise UserError(told)
    return block_size


def lower_product(model: ir.Model, node: ir.Node, bits: int, cache: Cache) -> None:
    """Make MatMulNBits of a product, at level 4 where it takes int8 activations."""
    block_size, own = _block_size(node), operands(node)
    k, n = dimensions(own.codes)
    key = (own.codes, "product")
    if key not in cache:
        blob, scales, zeros = _rows(own.codes, own.scale, own.zero_point, bits, block_size)
        made = [
            _add(model, own.codes, "", blob.reshape(n, len(scales[0]), -1)),
            _add(model, own.scale, "", scales),
        ]
        if zeros is not None:
            made.append(_add(model, own.codes, ".zero_point", _bit_pack(zeros, bits)))
        cache[key] = made
    inputs: list[ir.Value | None] = [node.inputs[0], *cache[key]]
    if own.bias is not None:  # slot 5, behind the zero points and the unused order of groups
        inputs += [None] * (5 - len(inputs)) + [own.bias]
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block_size}
    if node.attributes.get_int(ACTIVATION_BITS, 16) == 8:
        attributes[ACCURACY_LEVEL] = INT8_LEVEL
    become(node, "MatMulNBits", inputs, attributes, domain=MICROSOFT)
    for value in own.values():
        drop_unused(model, value)


def lower_embedding(model: ir.Model, node: ir.Node, bits: int, cache: Cache) -> None:
    """Make GatherBlockQuantized of a lookup."""
    block_size = _block_size(node)
    indices, codes, scale, zero_point = node.inputs
    assert codes is not None
    assert scale is not None
    assert zero_point is not None
    k = dimensions(codes)[0]
    key = (codes, "embedding")
    if key not in cache:
        blob, scales, zeros = _rows(codes, scale, zero_point, bits, block_size)
        assert zeros is not None
        if bits == 4 and zeros.shape[1] % 2:
            # ONNX Runtime before 1.27 misreads zero points that fill no whole byte a row: one more block, never read.
            blob = np.pad(blob.reshape(len(scales), -1), ((0, 0), (0, block_size // 2)))
            scales, zeros = np.pad(scales, ((0, 0), (0, 1))), np.pad(zeros, ((0, 0), (0, 1)))
        cache[key] = [
            _add(model, codes, ".rows", blob.reshape(len(scales), -1)),
            _add(model, scale, "", scales),
            _add(model, codes, ".rows.zero_point", _bit_pack(zeros, bits)),
        ]
    data, scales_value, zeros_value = cache[key]
    padded = dimensions(scales_value)[1] * block_size
    attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": block_size, "bits": bits}
    become(node, "GatherBlockQuantized", [data, indices, scales_value, zeros_value], attributes, domain=MICROSOFT)
    if k < padded:
        _slice_last(model, node, k)
    for value in (codes, scale, zero_point):
        drop_unused(model, value)


def _rows(
    codes: ir.Value, scale: ir.Value, zero_point: ir.Value | None, bits: int, block_size: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.generic], npt.NDArray[np.uint8] | None]:
    """(packed unsigned codes (N, bytes), scales (N, blocks), zero points (N, blocks) or None) of a (K, N) weight."""
    scales = np.ascontiguousarray(constant(scale).numpy().T)
    n, blocks = scales.shape
    array = _unsigned(codes, n, bits)
    padded = np.zeros((n, blocks * block_size), np.uint8)
    padded[:, : array.shape[0]] = array.T
    blob = padded if bits == 8 else pack_nibbles(padded).reshape(n, -1)
    zeros = None if zero_point is None else np.ascontiguousarray(_unsigned(zero_point, n, bits).T)
    return blob, scales, zeros


def _unsigned(value: ir.Value, n: int, bits: int) -> npt.NDArray[np.uint8]:
    """Codes or zero points (rows, n). Signed ones are moved up by half of all codes, both alike: their difference
    stays, and where there are no zero points that is the one which the operators take for granted.
    """
    array = unpacked(value, n)
    middle = 1 << (bits - 1) if array.dtype == np.int8 else 0
    return np.asarray(array.astype(np.int16) + middle, np.uint8)


def _bit_pack(zeros: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Zero points (N, blocks) as the operators take them: each row packed into whole bytes."""
    if bits == 8:
        return zeros
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return pack_nibbles(zeros).reshape(zeros.shape[0], -1)


def _add(model: ir.Model, source: ir.Value, end: str, array: npt.NDArray[np.generic]) -> ir.Value:
    return add_initializer(model.graph, f"{source.name}{end}.nbits", ir.Tensor(np.ascontiguousarray(array)))


def _slice_last(model: ir.Model, node: ir.Node, k: int) -> None:
    """Cut the padding off the last dimension of a node's output, keeping the output's name for what is cut."""
    bounds = [
        add_initializer(model.graph, f"{node.name}.{name}", ir.tensor(np.array([number], np.int64)))
        for name, number in (("start", 0), ("end", k), ("axis", -1))
    ]
    whole = node.outputs[0]
    name = str(whole.name)
    cut = ir.Node("", "Slice", [whole, *bounds], name=f"{node.name}_cut")
    ir.convenience.replace_all_uses_with(whole, cut.outputs[0], replace_graph_outputs=True)
    cut.replace_input_with(0, whole)
    whole.name, cut.outputs[0].name = f"{name}.padded", name
    cut.outputs[0].type, cut.outputs[0].shape = whole.type, whole.shape
    whole.shape = None
    node.append(cut)
