"""What int8 activations cost: the rounding that the kernels do, as standard nodes beside a product.

A kernel with `activation_bits` 8 rounds each row of x within each packed group to -127 … 127, the largest magnitude of
the group at the end of the grid. Packed groups are those of runtime/kernels/layout.h: a group of the weight, cut into
equal parts of at most 128 rows.
"""

import math

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from qcompile.passes.observers import nodes

# Rows of a packed group at most, and what their number is a multiple of: kMaxDepth and the blocks of layout.h.
_MOST, _STEP = 128, 8
_LEVELS = np.float32(127)
# Where a group is smaller than this it is rounded to zeros; no division by zero.
_TINY = np.float32(2.0**-100)


def packed_rows(k: int, block_size: int) -> npt.NDArray[np.int64]:
    """Rows of a (k, N) weight by packed group, (groups, depth); k, one behind the last, where a group lacks rows."""
    size = min(block_size, k)
    splits = math.ceil(size / _MOST)
    depth = _STEP * math.ceil(size / splits / _STEP)
    starts = np.arange(0, k, block_size)[:, None] + depth * np.arange(splits)[None, :]
    ends = np.minimum(np.arange(block_size, k + block_size, block_size)[: len(starts)], k)
    rows = starts.reshape(-1, 1) + np.arange(depth)
    return np.where(rows < np.repeat(ends, splits)[:, None], rows, k)


def change_name(x: str, block_size: int) -> str:
    """The name of Q8(x) - x that `int8_change` adds."""
    return f"{x}.int8.g{block_size}.delta"


def int8_change(graph: onnx.GraphProto, x: str, k: int, block_size: int) -> str:
    """Append Q8(x) - x for an activation x (…, k), a float32 matrix (rows, k), to a graph; returns its name.

    It is made once for all products of x with this group size.
    """
    base = f"{x}.int8.g{block_size}"
    delta = change_name(x, block_size)
    if nodes.has(graph, delta):
        return delta
    index = packed_rows(k, block_size)
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
