"""Grids of activations: from what was observed, and one for all values that must share theirs."""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import QParams, range_qparams
from qcompile.passes.observers.base import Observer
from qcompile.passes.qdq.providers import Rule
from qcompile.passes.qdq.selection import inputs_of, quantized_output
from qcompile.passes.spec import ActivationSpec


def shared(nodes: Mapping[ir.Node, Rule], values: Iterable[ir.Value], *, sums: bool = False) -> list[list[ir.Value]]:
    """The values in groups that share a scale.

    Case 1: an operator that only moves codes: its input and its output.
    Case 2: Concat: all inputs and the output, so that codes are copied.
    Case 3: with `sums`, both inputs of an Add: integer adders of some devices want that.
    """
    leader = {value: value for value in values}

    def find(value: ir.Value) -> ir.Value:
        while leader[value] is not value:
            value = leader[value]
        return value

    def join(values: Iterable[ir.Value | None]) -> None:
        known = [find(value) for value in values if value in leader]
        for value in known[1:]:
            leader[value] = known[0]

    for node, rule in nodes.items():
        inputs = [node.inputs[i] for i in inputs_of(node, rule)]
        if rule.output == "same" or node.op_type == "Concat":  # Cases 1 and 2
            join([*inputs, quantized_output(node)])
        elif sums and node.op_type == "Add":  # Case 3
            join(inputs)
    groups: dict[ir.Value, list[ir.Value]] = {}
    for value in leader:
        groups.setdefault(find(value), []).append(value)
    return list(groups.values())


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
        ends = [node.inputs[i] if i < len(node.inputs) else None for i in (1, 2)]
        low, high = (
            float(end.const_value.numpy().item()) if end is not None and end.const_value is not None else other
            for end, other in zip(ends, (-np.inf, np.inf), strict=True)
        )
        return low, high
    return _BOUNDED.get(node.op_type, (-np.inf, np.inf))


def grid_of(observers: Iterable[Observer], spec: ActivationSpec, *, scale_dtype: npt.DTypeLike = np.float32) -> QParams:
    """Scale and zero point, both (), that span the ranges of all the observers; `scale_dtype`: what the file stores."""
    ranges = [observer.expected(spec) for observer in observers]
    low, high = min(float(low) for low, _ in ranges), max(float(high) for _, high in ranges)
    return range_qparams(np.asarray(low, np.float32), np.asarray(high, np.float32), spec, scale_dtype=scale_dtype)
