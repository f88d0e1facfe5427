"""Packed products against their weights: behind the run, the rows of all batches at once, a block of columns at a time.

Nothing but the rows of x and y leaves the session. A weight beside the packed one in its graph, once as float and once
dequantized, would be held by ONNX Runtime twice each, as it is and in the layout of its kernels, which it makes anew
for two runs.
"""

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.results.errors import NodeError
from qcompile.compiler.walk.extract import Piece
from qcompile.passes import activations
from qcompile.passes.affine import Array, Quantized
from qcompile.passes.errors import UserError
from qcompile.passes.native import widened
from qcompile.passes.observers import nodes as observers
from qcompile.passes.state import node_state, set_node
from qcompile.passes.threads import side_by_side

# Elements of a weight that are compared at once, 4 MB of float32, and bytes of rows that are collected for that.
ELEMENTS, ROWS = 1 << 20, 64 << 20
# Blocks of a weight that are compared at least, where not all are.
_SAMPLED = 8
# A packed node must compute with exactly its dequantized weights, but for the rounding of its element type.
EXACT = {ir.DataType.FLOAT: 1e-4, ir.DataType.DOUBLE: 1e-4, ir.DataType.FLOAT16: 2e-2, ir.DataType.BFLOAT16: 1e-1}


class Products:
    """The packed nodes of a segment, from what their session gives to their errors.

    int8: how products may round activations; what that would add is measured, too, of those that it takes.
    share: one of so many blocks of columns is compared, the first and the last among them.

    Invariant: the errors are those over the rows of all batches, whatever the blocks and however rows are collected.
    """

    def __init__(self, nodes: Iterable[ir.Node], int8: activations.Int8 | None = None, *, share: int = 1) -> None:
        self._nodes = [node for node in nodes if node_state(node).reference is not None]
        self._int8, self._share, self._seen = int8, share, False
        self._sums = {node: np.zeros(5) for node in self._nodes}
        self._rows: list[Arrays] = []
        self._held, self._new = 0, frozenset[str]()

    def add(self, piece: Piece) -> list[str]:
        """Have the piece give the rows of x and y of each node and, with int8, Q8(x) - x; the names that are new."""
        graph = piece.proto.graph
        names = [name for node in self._nodes for name in self._watched(graph, node)]
        known = {output.name for output in graph.output}
        new = [name for name in dict.fromkeys(names) if name not in known]
        observers.add_outputs(graph, new)
        self._new = frozenset(new)
        return new

    def take(self, found: Arrays) -> None:
        """Take what was added out of the outputs of a batch."""
        own, self._seen = {name: found.pop(name) for name in self._new}, True
        self._rows.append(own)
        self._held += sum(array.nbytes for array in own.values())
        if self._held > ROWS:
            self._compare()

    def errors(self) -> list[NodeError]:
        """Of every node; UserError where an operator does not compute what it should. References are let go of.

        None where no batch was run.
        """
        self._compare()
        found = []
        for node in self._nodes:
            weight, quantized = _reference(node)
            set_node(node, reference=None)
            if self._seen:
                found.append(_judged(node, quantized, self._sums[node], weight.size, rounded=self._rounds(node)))
        return found

    def _rounds(self, node: ir.Node) -> bool:
        return self._int8 is not None and self._int8.takes(node)

    def _watched(self, graph: onnx.GraphProto, node: ir.Node) -> list[str]:
        y, x = _ends(node)
        names = [observers.matrix(graph, x), observers.matrix(graph, y)]
        if self._int8 is not None and self._rounds(node):
            k, size = _grouping(_reference(node)[1])
            names.append(activations.int8_change(graph, x, k, size, self._int8))
        return names

    def _compare(self) -> None:
        """Add the rows held to the sums of each node, and let go of them."""
        rows, self._rows, self._held = self._rows, [], 0
        for node in self._nodes if rows else ():
            y, x = _ends(node)
            weight, quantized = _reference(node)
            given, made = (np.concatenate([own[observers.rows(name)] for own in rows]) for name in (x, y))
            change = None
            if self._rounds(node):
                name = activations.change_name(x, _grouping(quantized)[1])
                change = np.concatenate([own[name] for own in rows])
            self._sums[node] += compared(given, made, weight, quantized, change, share=self._share)


def compared(
    x: Array,
    y: Array,
    weight: npt.NDArray[np.floating],
    quantized: Quantized,
    change: Array | None = None,
    *,
    share: int = 1,
) -> npt.NDArray[np.float64]:
    """‖y - x W‖², ‖x W‖², ‖y - x Ŵ‖², ‖x Ŵ‖², ‖change Ŵ‖² of rows x (M, K), y (M, N); change (M, K), 0 without it.

    weight: the float one (K, N). Products are float32, sums float64. share: of one in so many blocks of columns.
    """
    k, n = quantized.codes.shape
    step = max(ELEMENTS // max(k, 1), 1)
    if share > 1:
        step = max(min(step, n // (_SAMPLED * share)), 1)
    starts = sorted({*range(0, n, step * share), (n - 1) // step * step}) if n else []
    both = x if change is None else np.concatenate([x, change])

    def block(start: int) -> npt.NDArray[np.float64]:
        part = slice(start, start + step)
        with np.errstate(over="ignore", invalid="ignore"):
            wanted, products = x @ widened(weight[:, part]), both @ quantized.columns(part).dequantize()
            exact, moved = products[: len(x)], products[len(x) :]
            own = (y[:, part] - wanted, wanted, y[:, part] - exact, exact, moved)
            return np.array([np.square(array, dtype=np.float64).sum() for array in own])

    return sum(side_by_side(block, starts), np.zeros(5))


def _judged(
    node: ir.Node, quantized: Quantized, sums: npt.NDArray[np.float64], weights: int, *, rounded: bool
) -> NodeError:
    error, exact = ratio(sums[0], sums[1]), ratio(sums[2], sums[3])
    measured = math.isfinite(sums[3])  # else the float product overflows
    if measured and not exact <= EXACT[_element_type(quantized)]:
        raise UserError(
            f"node {node.name}: the packed operator differs from its own weights by {exact:.1e} in this ONNX "
            "Runtime; please report it with the model"
        )
    int8 = root(sums[4], sums[3], 0.0) if rounded else None
    return NodeError(node.name or "", error, exact, int8, weights=weights)


def ratio(difference: float, reference: float) -> float:
    """‖difference‖ / ‖reference‖ of their squares: 1 where there is an error and no reference, inf where one of both
    is NaN or infinite.
    """
    return root(difference, reference, float(difference > 0))


def root(part: float, whole: float, without: float) -> float:
    """The root of part / whole; `without` where whole is 0, inf where one of both is NaN or infinite."""
    if not (math.isfinite(part) and math.isfinite(whole)):
        return math.inf
    return math.sqrt(part) / math.sqrt(whole) if whole > 0 else without


def _ends(node: ir.Node) -> tuple[str, str]:
    """The names of y and x."""
    return str(node.outputs[0].name), str(node.inputs[0].name)  # type: ignore[union-attr]


def _reference(node: ir.Node) -> tuple[npt.NDArray[np.floating], Quantized]:
    reference = node_state(node).reference
    assert reference is not None
    return reference


def _grouping(quantized: Quantized) -> tuple[int, int]:
    """(K, rows of a group)."""
    k = len(quantized.codes)
    return k, quantized.spec.group_size(k)


def _element_type(quantized: Quantized) -> ir.DataType:
    """The type that a packed node computes in: that of its decoded weight."""
    return ir.DataType.from_numpy(np.dtype(quantized.spec.scale_dtype))
