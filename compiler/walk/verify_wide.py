"""Packed products of many columns against their weights: compared behind the run, a block of columns at a time."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx

from qcompile.compiler.data.npz import Arrays
from qcompile.passes import activations
from qcompile.passes.affine import Array, QParams, Quantized
from qcompile.passes.observers import nodes as observers

# Columns compared at once. A wider weight (a decoder's head) is not put into the graph beside the packed one, once as
# float and once dequantized: ONNX Runtime would hold both, and a packed copy of each.
COLUMNS = 4096


def is_wide(quantized: Quantized) -> bool:
    """Whether a weight has more columns than are compared at once."""
    return bool(quantized.codes.shape[1] > COLUMNS)


def watch(graph: onnx.GraphProto, y: str, x: str, quantized: Quantized, *, int8: activations.Int8 | None) -> list[str]:
    """Append what `compare` reads as outputs: the rows of x and y and, with int8, Q8(x) - x; the names that are new."""
    names = [observers.matrix(graph, x), observers.matrix(graph, y)]
    if int8 is not None:
        k = len(quantized.codes)
        names.append(activations.int8_change(graph, x, k, quantized.spec.group_size(k), int8))
    known = {output.name for output in graph.output}
    new = [name for name in dict.fromkeys(names) if name not in known]
    observers.add_outputs(graph, new)
    return new


def compare(y: str, x: str, wanted: Array, quantized: Quantized, outputs: Sequence[Arrays]) -> None:
    """Put the sums that `observers.compare_product` gives for both weights (K, N) into the outputs of each batch.

    wanted: the float weight. The sums are taken in float64.
    """
    change = activations.change_name(x, quantized.spec.group_size(len(quantized.codes)))
    for end in (".exact", ".wanted"):
        names = [observers.difference(y, end), observers.reference(y, end), observers.added(y, end)]
        sums = np.zeros((len(outputs), 3))
        for start in range(0, quantized.codes.shape[1], COLUMNS):
            part = slice(start, start + COLUMNS)
            weight = wanted[:, part] if end == ".wanted" else _columns(quantized, part).dequantize()
            for i, batch in enumerate(outputs):
                product = batch[observers.rows(x)] @ weight
                moved = batch[change] @ weight if change in batch and end == ".exact" else None
                sums[i] += _squares(batch[observers.rows(y)][:, part] - product), _squares(product), _squares(moved)
        for batch, own in zip(outputs, sums, strict=True):
            batch.update(zip(names if change in batch and end == ".exact" else names[:2], own, strict=False))


def _columns(quantized: Quantized, part: slice) -> Quantized:
    """Some of the columns of a weight."""
    qparams = quantized.qparams
    own = QParams(qparams.scale[:, part], qparams.zero_point[:, part])
    return Quantized(quantized.codes[:, part], own, quantized.spec)


def _squares(array: npt.NDArray[np.float32] | None) -> float:
    return 0.0 if array is None else float(np.square(array, dtype=np.float64).sum())
