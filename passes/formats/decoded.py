"""Weights that are decoded before what reads them: codes behind a DequantizeLinear, for operators of floats.

While a model is walked and checked, the DequantizeLinear stands in the main graph before the node that reads it or
whose body does. `sink` brings it into the bodies at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.passes.affine import Array
from qcompile.passes.bodies import Owners
from qcompile.passes.formats.base import drop_unused, drop_weight
from qcompile.passes.graph import Names, add_initializer, insert_before
from qcompile.passes.linears import constant
from qcompile.passes.state import Decoded, set_node


@dataclass(frozen=True)
class Coded:
    """A quantized weight as initializers of the main graph, and how a DequantizeLinear reads them.

    axis: that of the scales, or that is cut into blocks of block_size (0: one scale for each index, or one for all).
    shape: that of the codes. dequantize: what they stand for, float32.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    axis: int
    block_size: int
    shape: tuple[int, ...]
    dequantize: Callable[[], Array]


class Decoder:
    """Puts codes in the place of float weights: one DequantizeLinear a weight and node of the main graph."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self._owners = model, Owners(model)
        self._made: dict[tuple[ir.Value, ir.Node], ir.Value] = {}

    def decode(self, reader: ir.Node, slot: int, coded: Coded, wanted: Callable[[], Array]) -> None:
        """Let a node read codes, decoded, in the place of its float weight; `wanted`: that weight, as it is read."""
        place, weight = self._owners.outermost(reader), reader.inputs[slot]
        assert weight is not None
        key = (coded.codes, place)
        if key not in self._made:
            self._made[key] = _decoding(reader, place, coded, wanted)
        reader.replace_input_with(slot, self._made[key])
        _drop(self.model, weight)


def _decoding(reader: ir.Node, place: ir.Node, coded: Coded, wanted: Callable[[], Array]) -> ir.Value:
    name = f"{coded.codes.name}.{place.name}.decoded"
    inputs = [v for v in (coded.codes, coded.scale, coded.zero_point) if v is not None]
    attributes = {"axis": coded.axis} if len(constant(coded.scale).shape) else {}
    attributes |= {"block_size": coded.block_size} if coded.block_size else {}
    value = insert_before(place, "DequantizeLinear", inputs, attributes, name=name, output=name)
    value.type, value.shape = ir.TensorType(constant(coded.scale).dtype), ir.Shape(coded.shape)
    node = value.producer()
    assert node is not None
    set_node(node, decoded=Decoded(reader.name or "", wanted, coded.dequantize))
    return value


def _drop(model: ir.Model, read: ir.Value) -> None:
    """Remove a float weight, and the Transpose before it, that nothing reads any more."""
    producer = read.producer()
    weight = read if producer is None else producer.inputs[0]
    if weight is not None and (producer is None or producer.op_type == "Transpose"):
        drop_weight(model, weight, read)


def sink(model: ir.Model) -> None:
    """Bring what decodes a weight into the bodies that read it, where a runtime fuses it or runs it only if needed.

    Case 1: a MatMul's weight: next to it, with initializers of the body that hold the same tensors (which the file
            stores once): ONNX Runtime 1.32 makes a MatMulNBits of the two, but fails to load constants from outside.
    Case 2: any other weight in a branch of an If: into the branch; the other one then need not decode it.
    Case 3: otherwise, in a body that runs many times, it stays outside and is decoded once.
    """
    names, owners = Names(model), Owners(model)
    made: dict[tuple[ir.Value, ir.Graph], ir.Value] = {}
    own: dict[tuple[ir.Value, ir.Graph], ir.Value] = {}
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear" or not all(v is not None and v.is_initializer() for v in node.inputs):
            continue
        value = node.outputs[0]
        for use in list(value.uses()):
            place, fused = _home(list(owners.path(use.node)), use.idx)
            graph = place.graph if place is not None else None
            if place is None or not isinstance(graph, ir.Graph):
                continue
            if (value, graph) not in made:
                made[value, graph] = _copy(node, place, names, own if fused else None)
            use.node.replace_input_with(use.idx, made[value, graph])
        if not value.uses():
            inputs = list(node.inputs)
            model.graph.remove(node, safe=True)
            for operand in inputs:
                if operand is not None:
                    drop_unused(model, operand)


def _home(path: list[ir.Node], slot: int) -> tuple[ir.Node | None, bool]:
    """(the node before which the weight of path[0] should be decoded, whether with initializers of the body's own).

    path: the reader, the node whose body holds it, … that of the main graph. None: it should stay where it is.
    """
    reader = path[0]
    if len(path) == 1:
        return None, False
    if (reader.op_type, reader.domain, slot) == ("MatMul", "", 1):  # Case 1
        return reader, True
    home: ir.Node | None = None
    for inner, holder in zip(reversed(path[:-1]), reversed(path[1:]), strict=True):  # from outside
        if holder.op_type != "If":
            break  # Case 3
        home = inner  # Case 2
    return home, False


def _copy(
    node: ir.Node, place: ir.Node, names: Names, own: dict[tuple[ir.Value, ir.Graph], ir.Value] | None
) -> ir.Value:
    """The output of the same DequantizeLinear before `place`; `own`: initializers that graphs have of their own."""
    inputs: list[ir.Value] = []
    graph = place.graph
    assert isinstance(graph, ir.Graph)
    for value in node.inputs:
        assert value is not None
        if own is not None:
            if (value, graph) not in own:
                own[value, graph] = add_initializer(graph, names.fresh(str(value.name)), constant(value))
            value = own[value, graph]
        inputs.append(value)
    name = names.fresh(str(node.outputs[0].name))
    made = insert_before(place, "DequantizeLinear", inputs, name=name, output=name)
    copy = made.producer()
    assert copy is not None
    copy.attributes.update(node.attributes)
    made.type, made.shape = node.outputs[0].type, node.outputs[0].shape
    return made
