"""What int8 activations cost: the rounding that runtimes do, as standard nodes beside a product.

Each rounds a row of x within each of its parts to -127 … 127, the largest magnitude of the part at the end of the grid;
they differ in the parts, and in the products that they do it for (`INT8`, by target).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from qcompile.passes.formats.functions import is_native, product_bits, takes_level
from qcompile.passes.observers import nodes

# Rows of a packed group at most, and what their number is a multiple of, of all rows at once and of blocks of them:
# kMaxDepth and the blocks of layout.h.
_MOST, _STEP, _BLOCK_STEP = 128, 64, 8
# Rows of a part at most in ONNX Runtime's MatMulNBits (1.32, bit for bit with 4 and 8 bits, blocks of 16 to 1024 rows).
_NBITS_MOST = 256
_LEVELS = np.float32(127)
# Where a group is smaller than this it is rounded to zeros; no division by zero.
_TINY = np.float32(2.0**-100)


def packed_rows(k: int, block_size: int) -> npt.NDArray[np.int64]:
    """Rows of a (k, N) weight by packed group, (groups, depth); k, one behind the last, where a group lacks rows.

    Packed groups are those of runtime/kernels/layout.h: a group of the weight, cut into parts of at most 128 rows,
    equal but for the last.
    """
    size = min(block_size, k)
    splits = math.ceil(size / _MOST)
    step = _STEP if size == k else _BLOCK_STEP
    depth = step * math.ceil(size / splits / step)
    starts = np.arange(0, k, block_size)[:, None] + depth * np.arange(splits)[None, :]
    ends = np.minimum(np.arange(block_size, k + block_size, block_size)[: len(starts)], k)
    rows = starts.reshape(-1, 1) + np.arange(depth)
    return np.where(rows < np.repeat(ends, splits)[:, None], rows, k)


def nbits_rows(k: int, block_size: int) -> npt.NDArray[np.int64]:
    """The same as MatMulNBits at accuracy level 4 cuts them: a block of the weight, every 256 rows of a larger one."""
    depth = min(block_size, _NBITS_MOST)
    rows = np.arange(math.ceil(k / depth) * depth).reshape(-1, depth)
    return np.where(rows < k, rows, k)


@dataclass(frozen=True)
class Int8:
    """Int8 activations of a target.

    takes: whether a packed product may have them. rows: the parts, as `packed_rows`. alone: whether nothing else is
    fast: with float activations the runtime decodes the whole weight of such a product in every run.
    """

    takes: Callable[[ir.Node], bool]
    rows: Callable[[int, int], npt.NDArray[np.int64]]
    alone: Callable[[ir.Node], bool]


INT8: Mapping[str, Int8] = {
    # Kernels, by the attribute `activation_bits`.
    "qcompile": Int8(is_native, packed_rows, lambda _: False),
    # MatMulNBits, by its accuracy_level. 1.32 on a CPU has no float kernel for codes of 8 bits.
    "matmulnbits": Int8(takes_level, nbits_rows, lambda node: takes_level(node) and product_bits(node) == 8),
}


def change_name(x: str, block_size: int) -> str:
    """The name of Q8(x) - x that `int8_change` adds."""
    return f"{x}.int8.g{block_size}.delta"


def int8_change(graph: onnx.GraphProto, x: str, k: int, block_size: int, rounding: Int8) -> str:
    """Append Q8(x) - x for an activation x (…, k), a float32 matrix (rows, k), to a graph; returns its name.

    It is made once for all products of x with this group size; all roundings in a graph are of one target.
    """
    base = f"{x}.int8.g{block_size}"
    delta = change_name(x, block_size)
    if nodes.has(graph, delta):
        return delta
    index = rounding.rows(k, block_size)
    where = np.empty(k + 1, np.int64)
    where[index.reshape(-1)] = np.arange(index.size)
    constants = {
        "pads": np.array([0, 0, 0, 1], np.int64),
        "rows": index.reshape(-1),
        "back": where[:k],
        "shape": np.array([-1, *index.shape], np.int64),
        "flat": np.array([-1, index.size], np.int64),
        "axis": np.array([2], np.int64),
        "levels": _LEVELS,
        "tiny": _TINY,
    }
    for name, array in constants.items():
        graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"{base}.{name}"))

    def step(operator: str, output: str, *inputs: str, **attributes: int) -> None:
        names = [name if name == rows else f"{base}.{name}" for name in inputs]
        graph.node.append(helper.make_node(operator, names, [f"{base}.{output}"], **attributes))

    rows = nodes.matrix(graph, x)
    step("Pad", "padded", rows, "pads")
    step("Gather", "taken", "padded", "rows", axis=1)
    step("Reshape", "groups", "taken", "shape")
    step("Abs", "magnitude", "groups")
    step("ReduceMax", "largest", "magnitude", "axis", keepdims=1)
    step("Div", "scale", "largest", "levels")
    step("Max", "divisor", "scale", "tiny")
    step("Div", "codes", "groups", "divisor")
    step("Round", "rounded", "codes")
    step("Mul", "decoded", "rounded", "scale")
    step("Sub", "change", "decoded", "groups")
    step("Reshape", "flat_change", "change", "flat")
    step("Gather", "delta", "flat_change", "back", axis=1)
    return delta
