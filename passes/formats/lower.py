"""From the operators of domain `qcompile` to what other runtimes know: plain ONNX (QDQ), or com.microsoft nodes."""

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from qcompile.passes.errors import UserError
from qcompile.passes.formats import functions
from qcompile.passes.formats.decoded import sink
from qcompile.passes.formats.emit import add_codes, drop_unused, pack_nibbles
from qcompile.passes.linears import constant, dimensions
from qcompile.passes.prepare.edit import add_initializer

_MICROSOFT = "com.microsoft"


def lower(model: ir.Model, target: str) -> None:
    """Rewrite the packed operators in place for `target`: qcompile (as they are), qdq or matmulnbits."""
    if target not in ("qcompile", "qdq", "matmulnbits"):
        raise UserError(f"unknown target {target!r}")
    for value in list(model.graph.initializers.values()):  # tables that are only looked up, under another name
        drop_unused(model, value)
    sink(model)
    if target == "matmulnbits":
        to_matmulnbits(model)
    else:
        _complete_zero_points(model)
    if target == "qcompile":
        _drop_unused_functions(model)
        return
    # For matmulnbits, only MatMulInt8Outlier is left.
    names = {
        str(node.outputs[0].name): node.name for node in model.graph.all_nodes() if node.domain == functions.DOMAIN
    }
    InlinePass(criteria=lambda function: function.domain == functions.DOMAIN)(model)
    for node in model.graph.all_nodes():
        node.name = names.get(str(node.outputs[0].name), node.name)
    for key in [key for key in model.functions if key[0] == functions.DOMAIN]:
        del model.functions[key]
    model.graph.opset_imports.pop(functions.DOMAIN, None)


def _drop_unused_functions(model: ir.Model) -> None:
    used = {node.op_identifier() for node in model.graph.all_nodes()}
    for key in [key for key in model.functions if key[0] == functions.DOMAIN and key not in used]:
        del model.functions[key]


def _complete_zero_points(model: ir.Model) -> None:
    """Give explicit zeros to symmetric nodes whose operator other nodes use with zero points.

    Both share one body; with its optional input left open ONNX Runtime would not fuse them (see `functions.body`).
    """
    for node in model.graph.all_nodes():
        function = model.functions.get(node.op_identifier())
        if node.domain != functions.DOMAIN or function is None or len(node.inputs) == len(function.inputs):
            continue
        own = functions.operands(node)
        zeros, dtype = np.zeros(dimensions(own.scale), np.int8), constant(own.codes).dtype
        node.resize_inputs(len(function.inputs))
        last = len(function.inputs) - 1
        node.replace_input_with(last, add_codes(model, f"{own.codes.name}.zero_point", zeros, dtype))


def check_block_size(block_size: int) -> None:
    """Raise UserError for a block size that MatMulNBits does not take."""
    if block_size < 16 or block_size & (block_size - 1):
        raise UserError(
            f"target matmulnbits takes group sizes 16, 32, 64, … (powers of two), got {block_size}: "
            "choose another --group-size, or target qcompile or qdq"
        )


def to_matmulnbits(model: ir.Model) -> None:
    """Turn MatMulInt… into com.microsoft MatMulNBits and Embedding… into GatherBlockQuantized plus a Slice of padding.

    Layouts (both transposed, padded to whole blocks; equal bytes are stored once, so a tied pair stays one on disk):
    MatMulNBits B (N, blocks, block_size * bits / 8), GatherBlockQuantized data (V, blocks * block_size * bits / 8).
    """
    cache: dict[tuple[ir.Value, bool], list[ir.Value]] = {}
    for node in list(model.graph.all_nodes()):
        if node.domain != functions.DOMAIN:
            continue
        if functions.is_product(node):
            _matmul(model, node, cache)
        elif node.op_type.startswith("EmbeddingInt"):
            _embedding(model, node, cache)
    model.graph.opset_imports.setdefault(_MICROSOFT, 1)


def _matmul(model: ir.Model, node: ir.Node, cache: dict[tuple[ir.Value, bool], list[ir.Value]]) -> None:
    bits, block_size = int(node.op_type[-1]), node.attributes["block_size"].as_int()
    check_block_size(block_size)
    own = functions.operands(node)
    k, n = dimensions(own.codes)
    key = (own.codes, False)
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
    _become(node, "MatMulNBits", inputs, {"K": k, "N": n, "bits": bits, "block_size": block_size})
    for value in own.values():
        drop_unused(model, value)


def _embedding(model: ir.Model, node: ir.Node, cache: dict[tuple[ir.Value, bool], list[ir.Value]]) -> None:
    bits, block_size = int(node.op_type[-1]), node.attributes["block_size"].as_int()
    check_block_size(block_size)
    indices, codes, scale, zero_point = node.inputs
    assert codes is not None
    assert scale is not None
    assert zero_point is not None
    k = dimensions(codes)[0]
    key = (codes, True)
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
    _become(node, "GatherBlockQuantized", [data, indices, scales_value, zeros_value], attributes)
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
    array = _unpacked(codes, n)
    if zero_point is None:
        array = (array.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)  # MatMulNBits's own middle
    padded = np.zeros((n, blocks * block_size), np.uint8)
    padded[:, : array.shape[0]] = array.T
    blob = padded if bits == 8 else pack_nibbles(padded).reshape(n, -1)
    zeros = None if zero_point is None else np.ascontiguousarray(_unpacked(zero_point, n).astype(np.uint8).T)
    return blob, scales, zeros


def _unpacked(value: ir.Value, n: int) -> npt.NDArray[np.generic]:
    """Codes (rows, n) of an integer tensor, or of the byte form of a 4-bit one."""
    tensor = constant(value)
    array = np.asarray(tensor.numpy())
    if tensor.dtype == ir.DataType.UINT8 and array.shape[1] != n:
        wide = np.stack([array & 15, array >> 4], axis=-1)
        return wide.reshape(array.shape[0], -1)[:, :n]
    return array.astype(np.int8 if tensor.dtype in (ir.DataType.INT4, ir.DataType.INT8) else np.uint8)


def _bit_pack(zeros: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Zero points (N, blocks) as the operators take them: each row packed into whole bytes."""
    if bits == 8:
        return zeros
    if zeros.shape[1] % 2:
        zeros = np.pad(zeros, ((0, 0), (0, 1)))
    return pack_nibbles(zeros).reshape(zeros.shape[0], -1)


def _add(model: ir.Model, source: ir.Value, end: str, array: npt.NDArray[np.generic]) -> ir.Value:
    return add_initializer(model.graph, f"{source.name}{end}.nbits", ir.Tensor(np.ascontiguousarray(array)))


def _become(node: ir.Node, operator: str, inputs: list[ir.Value | None], attributes: dict[str, int]) -> None:
    node.resize_inputs(len(inputs))
    for i, value in enumerate(inputs):
        node.replace_input_with(i, value)
    node.op_type, node.domain = operator, _MICROSOFT
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, number)


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
