"""Hard swishes and hard sigmoids, written out as sums, limits and products, as the operators they are."""

from dataclasses import replace
from math import isclose

import onnx_ir as ir

from qcompile.passes.graph import Decide, Names, insert_before, take_over
from qcompile.passes.prepare.gates import LIMITS, Gate, Line, before, gates, lines

_OPSET = 14  # the first with HardSwish
# Exporters write 1/6 with seven digits, or rounded to the element type: numbers this close are the same.
# In other types ONNX Runtime has no HardSigmoid.
_TOLERANCE = {ir.DataType.FLOAT: 1e-6, ir.DataType.FLOAT16: 2.0**-10}
_SLOPES = (1 / 6, 0.2)  # that of MobileNetV3 (arXiv:1905.02244), that of Keras


def name_hard_swishes(model: ir.Model, decide: Decide) -> None:
    """Compute x · max(0, min(1, x / 6 + 1/2)), and the second factor where it stands alone, by one operator.

    Case 1: a product of x and a gate of x, with slope 1/6 and offset 1/2, is a HardSwish if all scales make 1.
    Case 2: a gate with slope 1/6 or 0.2 and offset 1/2 is a HardSigmoid if its scale is 1.
    Nothing else may read what is between. Sums and products are rounded otherwise than before; what overflowed in
    float16 between them (6 x) no longer does.
    """
    if model.opset_imports.get("", 0) < _OPSET:
        decide("", "skipped", f"HardSwish needs opset {_OPSET}")
        return
    names = Names(model)
    for op_type, find in (("HardSwish", _swish), ("HardSigmoid", _sigmoid)):
        found = 0
        for node in list(model.graph):
            gate = find(node) if node.graph is model.graph and node.domain == "" else None
            if gate is None:
                continue
            reason = _obstacle(gate)
            if reason:
                decide(node.name or "", "kept", f"no {op_type}: {reason}")
                continue
            _replace(gate, op_type, names)
            found += 1
        if found:
            decide("", "simplified", f"{found} {op_type} that were written out", nodes=found)


def _swish(node: ir.Node) -> Gate | None:
    """Case 1: the gate that meets its own source in this product, with the scales and nodes of both."""
    if node.op_type != "Mul":
        return None
    for position in (0, 1):
        for gate in gates(node.inputs[position]):
            for line in lines(node.inputs[1 - position]) if _is_hard(gate, (1 / 6,)) else ():
                if line.source is gate.source and line.offset == 0:
                    nodes = (node, *line.nodes, *gate.nodes)
                    return _with_scale(replace(gate, scale=gate.scale * line.gain, nodes=nodes))
    return None


def _with_scale(gate: Gate) -> Gate:
    """The gate and the one node behind it, if that makes the scale 1."""
    value = gate.nodes[0].outputs[0]
    readers = [reader for reader, _ in value.uses()]
    if len(readers) != 1 or value.is_graph_output() or readers[0].graph is not gate.nodes[0].graph:
        return gate
    line = before(Line(readers[0].outputs[0]))
    if line is None or line.source is not value or line.offset:
        return gate
    scaled = replace(gate, scale=line.gain * gate.scale, nodes=(*line.nodes, *gate.nodes))
    return scaled if _same(scaled.scale, 1, gate) else gate


def _sigmoid(node: ir.Node) -> Gate | None:
    """Case 2."""
    if node.op_type not in ("Mul", "Div", *LIMITS):
        return None
    found = (gate for gate in gates(node.outputs[0]) if _is_hard(gate, _SLOPES) and _same(gate.scale, 1, gate))
    return next(found, None)


def _is_hard(gate: Gate, slopes: tuple[float, ...]) -> bool:
    return _same(gate.offset, 0.5, gate) and any(_same(gate.slope, slope, gate) for slope in slopes)


def _same(number: float, wanted: float, gate: Gate) -> bool:
    tolerance = _TOLERANCE.get(gate.source.dtype or ir.DataType.UNDEFINED, 1e-6)
    return isclose(number, wanted, rel_tol=tolerance)


def _obstacle(gate: Gate) -> str:
    """Why the gate cannot be replaced, or an empty string."""
    if gate.source.dtype not in _TOLERANCE:
        return f"ONNX Runtime computes none of type {gate.source.dtype}"
    if not _same(gate.scale, 1, gate):
        return f"it is scaled by {gate.scale:g}"
    for node in gate.nodes[1:]:
        value = node.outputs[0]
        if value.is_graph_output() or any(reader not in gate.nodes for reader, _ in value.uses()):
            return f"{value.name} is used elsewhere too"
    return ""


def _replace(gate: Gate, op_type: str, names: Names) -> None:
    last = gate.nodes[0]
    assert last.graph is not None
    attributes = {"alpha": gate.slope, "beta": gate.offset} if op_type == "HardSigmoid" else {}
    name, output = last.name or "", names.fresh(f"{last.name}_output")
    value = insert_before(last, op_type, [gate.source], attributes, name=name, output=output)
    take_over(last.outputs[0], value, names)
    last.graph.remove(list(dict.fromkeys(gate.nodes)), safe=True)
