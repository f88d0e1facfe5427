"""Grids of activations: from what was observed, and one for all values that must share theirs."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import Array, QParams, range_qparams
from qcompile.passes.graph import small_array
from qcompile.passes.qdq.providers import Rule
from qcompile.passes.qdq.selection import inputs_of, quantized_output
from qcompile.passes.spec import ActivationSpec

# (low, high) that a grid is to span: float32, ().
Range = tuple[Array, Array]
# So many times as wide as an input's range may that of a Concat be, of which others read the input: two bits.
_WIDER = 4.0


def shared(
    nodes: Mapping[ir.Node, Rule], ranges: Mapping[ir.Value, Range], *, sums: bool = False
) -> list[list[ir.Value]]:
    """The values, by their own ranges, in groups that share a scale.

    Case 1: an operator that only moves codes: its input and its output.
    Case 2: Concat: all inputs and the output, so that codes are copied. Not an input far narrower than the output that
            others read as well, itself or what shares its scale: on the common grid nothing would be left for them.
    Case 3: with `sums`, both inputs of an Add: integer adders of some devices want that.
    """
    leader = {value: value for value in ranges}

    def find(value: ir.Value) -> ir.Value:
        while leader[value] is not value:
            value = leader[value]
        return value

    def join(values: Iterable[ir.Value | None]) -> None:
        known = [find(value) for value in values if value in leader]
        for value in known[1:]:
            leader[value] = known[0]

    read = {node: [node.inputs[i] for i in inputs_of(node, rule)] for node, rule in nodes.items()}
    for node in (node for node, rule in nodes.items() if rule.output == "same"):  # Case 1
        join([*read[node], quantized_output(node)])
    moved = Counter(map(find, leader))
    for node, inputs in read.items():
        output = quantized_output(node)
        if node.op_type == "Concat":  # Case 2
            alone = {value for value in inputs if value in leader and moved[find(value)] == 1}
            join([*(v for v in inputs if not _lost_in(v, output, node, ranges, alone)), output])
        elif sums and node.op_type == "Add":  # Case 3
            join(inputs)
    groups: dict[ir.Value, list[ir.Value]] = {}
    for value in leader:
        groups.setdefault(find(value), []).append(value)
    return list(groups.values())


def _lost_in(
    value: ir.Value | None,
    output: ir.Value,
    node: ir.Node,
    ranges: Mapping[ir.Value, Range],
    alone: Collection[ir.Value | None],
) -> bool:
    """Whether nodes other than a Concat read an input of it, of which the Concat's grid would leave them little.

    alone: inputs that share their scale with no other value.
    """
    if value is None or value not in ranges or output not in ranges:
        return False
    if value in alone and not value.is_graph_output() and all(use.node is node for use in value.uses()):
        return False
    own, joint = (float(ranges[known][1]) - float(ranges[known][0]) for known in (value, output))
    return own * _WIDER < joint


# Operators whose outputs lie between two numbers, whatever goes in.
_BOUNDED = {"Softmax": (0.0, 1.0), "Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}


def bounds_of(value: ir.Value) -> tuple[float, float]:
    """What no number of a value lies beyond, by the operator that gives it; infinite where that says nothing."""
    node = value.producer()
    if node is None or node.domain != "":
        return -np.inf, np.inf
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type == "Clip":
        return _end(node, 1, -np.inf), _end(node, 2, np.inf)
    return _BOUNDED.get(node.op_type, (-np.inf, np.inf))


def _end(node: ir.Node, position: int, endless: float) -> float:
    """The number that a Clip has at a position; `endless` where that is none."""
    array = small_array(node.inputs[position], limit=1) if position < len(node.inputs) else None
    return endless if array is None or not array.size else float(array.reshape(-1)[0])


def fixed_for_qnn(value: ir.Value, spec: ActivationSpec) -> QParams | None:
    """The one grid of 16 bits that QNN takes for what a Sigmoid or a Tanh gives; None for all else."""
    node = value.producer()
    sigmoid, tanh = (node is not None and (node.op_type, node.domain) == (kind, "") for kind in ("Sigmoid", "Tanh"))
    if spec.is_float or spec.dtype.bitwidth != 16 or not (sigmoid or tanh):
        return None
    signed = spec.dtype == ir.DataType.INT16
    scale = 2.0**-15 if signed or tanh else 2.0**-16
    return QParams(np.asarray(scale, np.float32), np.asarray(0 if signed or sigmoid else 2**15, np.float32))


def grid_of(ranges: Iterable[Range], spec: ActivationSpec, *, scale_dtype: npt.DTypeLike = np.float32) -> QParams:
    """Scale and zero point, both (), that span all the ranges; `scale_dtype`: what the file stores."""
    ranges = list(ranges)
    low, high = min(float(low) for low, _ in ranges), max(float(high) for _, high in ranges)
    return range_qparams(np.asarray(low, np.float32), np.asarray(high, np.float32), spec, scale_dtype=scale_dtype)
