"""A graph whose integer nodes can each be switched to float while it runs: one session answers for every mixture."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from qcompile.compiler.walk.extract import Piece
from qcompile.passes.graph import float_type
from qcompile.passes.state import Twin, node_state


@dataclass(frozen=True)
class Setting:
    """What is computed in integers: nodes, and values that every reader takes from behind their Q and DQ, by name."""

    nodes: frozenset[str] = frozenset()
    values: frozenset[str] = frozenset()

    @classmethod
    def of(cls, nodes: Iterable[str], values: Iterable[str] = ()) -> "Setting":
        """The setting of any collections of names."""
        return cls(frozenset(nodes), frozenset(values))


ALL_FLOAT = Setting()
_NODE, _VALUE = "switch.node.", "switch.value."


def switched_on(name: str, setting: Setting) -> bool:
    """What the graph input `name` of a switch is fed under a setting."""
    if name.startswith(_NODE):
        return name.removeprefix(_NODE) in setting.nodes
    return name.removeprefix(_VALUE) in setting.values


def is_switch(name: str) -> bool:
    """Whether a graph input is a switch."""
    return name.startswith((_NODE, _VALUE))


def add_switches(piece: Piece, nodes: Sequence[ir.Node], whole: Mapping[str, ir.Value]) -> None:
    """Put every integer node of a piece, and every Q and DQ around a value of `whole`, into an If of its own.

    Case 1: a node with a Twin: its inputs' Q and DQ and itself, or the float node. ONNX Runtime fuses the integer
            product inside the branch and computes one branch only (docs/qdq.md has the times).
            One whose weight alone was rounded stays as it is: in a branch ONNX Runtime fails to fuse it.
    Case 2: a value of `whole` (by the name it had before the pass): Q and DQ, or nothing.
    The Ifs are chosen by boolean scalars, new inputs of the graph. `nodes`: those of the piece that may have Twins.
    """
    graph = piece.proto.graph
    made = {name: node for node in graph.node for name in node.output if name}
    rounded = _rounded(graph, {str(value.name): name for name, value in whole.items()})
    ifs = {}
    for node in nodes:  # Case 1
        twin = node_state(node).twin
        if twin is not None and not twin.weights_only and node.outputs[0].name in made:
            ifs[str(node.outputs[0].name)] = _node_switch(piece, node, twin, made, rounded)
    for value, (output, name) in rounded.items():  # Case 2
        plain = helper.make_node("Identity", [value], [f"{output}.plain"])
        dtype = _dtype(graph, output)
        ifs[output] = _choice(_VALUE + name, {output: dtype}, _slice(made, output, {value}), [plain])
    kept = [ifs.get(node.output[0], node) for node in graph.node]
    del graph.node[:]
    graph.node.extend(_needed(kept, {output.name for output in graph.output}))
    chosen = dict.fromkeys(node.input[0] for node in graph.node if node.op_type == "If" and is_switch(node.input[0]))
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in chosen)


def _rounded(graph: onnx.GraphProto, whole: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """By the value before a Q: (the value behind its DQ, the name of the switch), for the values of `whole`."""
    codes = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    back = [node for node in graph.node if node.op_type == "DequantizeLinear" and codes.get(node.input[0]) in whole]
    return {codes[node.input[0]]: (node.output[0], whole[codes[node.input[0]]]) for node in back}


def _node_switch(
    piece: Piece,
    node: ir.Node,
    twin: Twin,
    made: Mapping[str, onnx.NodeProto],
    rounded: Mapping[str, tuple[str, str]],
) -> onnx.NodeProto:
    """Case 1. The float node reads what is behind the If of a rounded value, as every other float node does."""
    kinds = {str(v.name): int(v.dtype or float_type(node)) for v in node.outputs if v.name}
    y, float_node = str(node.outputs[0].name), onnx.NodeProto()
    float_node.CopyFrom(twin.proto)
    del float_node.input[:], float_node.output[:]
    for value in twin.inputs:
        name = _constant(piece, twin, value) if value is not None and value.const_value is not None else _name(value)
        float_node.input.append(rounded[name][0] if name in rounded else name)
    own = [value.name for value in node.outputs]
    float_node.name, float_node.output[:] = f"{y}.plain", [f"{name}.plain" if name else "" for name in own]
    given = {_name(value) for value in twin.activations}
    return _choice(_NODE + str(node.name), kinds, _slice(made, y, given), [float_node])


def _constant(piece: Piece, twin: Twin, value: ir.Value) -> str:
    """The name of a constant input of a float node: the graph's own where it still has it."""
    turned = twin.transposed and value is twin.inputs[1]
    if not turned and any(own.name == value.name for own in piece.proto.graph.initializer):
        return _name(value)
    name = f"{value.name}.{'turned' if turned else 'plain'}"
    return name if name in piece.weights else piece.add_weight(name, twin.array(value))


def _choice(
    switch: str, kinds: Mapping[str, int], integer: Sequence[onnx.NodeProto], plain: Sequence[onnx.NodeProto]
) -> onnx.NodeProto:
    """The If of a switch that gives the values of `kinds` (name and element type), all outputs of one node.

    The nodes of `integer` get names of their own, since others have copies; `plain` ends in names + ".plain".
    """
    outputs = list(kinds)
    y = outputs[0]
    renamed = {name: f"{y}.integer.{name}" for node in integer for name in node.output}
    own = []
    for node in integer:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.name = f"{y}.integer.{node.name}"
        copied.input[:] = [renamed.get(name, name) for name in node.input]
        copied.output[:] = [renamed[name] for name in node.output]
        own.append(copied)

    def branch(nodes: Sequence[onnx.NodeProto], names: Sequence[str]) -> onnx.GraphProto:
        given = [helper.make_tensor_value_info(name, kinds[own], None) for name, own in zip(names, kinds, strict=True)]
        return helper.make_graph(nodes, f"{y}.branch", [], given)

    chosen = branch(own, [renamed[name] for name in outputs])
    otherwise = branch(plain, [f"{name}.plain" for name in outputs])
    return helper.make_node("If", [switch], outputs, name=f"{y}.switch", then_branch=chosen, else_branch=otherwise)


def _slice(made: Mapping[str, onnx.NodeProto], output: str, given: Collection[str]) -> list[onnx.NodeProto]:
    """The nodes that compute `output` from the values `given` and from constants, in order."""
    found: dict[str, onnx.NodeProto] = {}

    def visit(name: str) -> None:
        if name in given or name not in made or made[name].output[0] in found:
            return
        for before in made[name].input:
            visit(before)
        found[made[name].output[0]] = made[name]

    visit(output)
    return list(found.values())


def _needed(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """Those nodes that the wanted values depend on, in their order."""
    wanted, kept = set(wanted), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            kept.append(node)
            wanted.update(_reads(node))
    return kept[::-1]


def _reads(node: onnx.NodeProto) -> set[str]:
    """Values that a node and its subgraphs read."""
    graphs = [graph for a in node.attribute for graph in ([a.g] if a.HasField("g") else []) + list(a.graphs)]
    return set(node.input).union(*(_reads(inner) for graph in graphs for inner in graph.node))


def _dtype(graph: onnx.GraphProto, dequantized: str) -> int:
    """The element type of a DequantizeLinear's output: that of its scale."""
    scale = next(node.input[1] for node in graph.node if node.output[0] == dequantized)
    return next((int(tensor.data_type) for tensor in graph.initializer if tensor.name == scale), TensorProto.FLOAT)


def _name(value: ir.Value | None) -> str:
    return "" if value is None else str(value.name)
