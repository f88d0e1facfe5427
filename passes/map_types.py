"""Values that are maps (ZipMap of scikit-learn's classifiers gives one): onnx_ir reads no type of theirs.

Such types are taken out of a model before it is read, and told again in the outputs of what is written.
"""

from collections.abc import Iterable

import onnx
import onnx_ir as ir

# Model meta: the types of outputs that hold maps, serialized, by name.
MAPS = "qcompile.map_types"


def set_maps_aside(proto: onnx.ModelProto) -> dict[str, bytes]:
    """Take the types with a map in them from all values but inputs of the main graph; those of its outputs."""
    found: dict[str, bytes] = {}
    _take(proto.graph, found)
    for function in proto.functions:
        _clear(function.value_info, {})
        _take_bodies(function.node)
    return found


def tell_maps(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Give the outputs the types that were set aside when the model was read."""
    for output in proto.graph.output:
        if output.name in model.meta.get(MAPS, {}):
            output.type.ParseFromString(model.meta[MAPS][output.name])


def holds_map(given: onnx.TypeProto) -> bool:
    """Whether a type is that of a map, or of a sequence or option of one."""
    kind = given.WhichOneof("value")
    if kind in ("sequence_type", "optional_type"):
        return holds_map((given.sequence_type if kind == "sequence_type" else given.optional_type).elem_type)
    return bool(kind == "map_type")


def _take(graph: onnx.GraphProto, outputs: dict[str, bytes]) -> None:
    _clear(graph.output, outputs)
    _clear(graph.value_info, {})
    _take_bodies(graph.node)


def _take_bodies(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for attribute in node.attribute:
            for body in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _take(body, {})
                _clear(body.input, {})


def _clear(values: Iterable[onnx.ValueInfoProto], found: dict[str, bytes]) -> None:
    for value in values:
        if holds_map(value.type):
            found[value.name] = value.type.SerializeToString()
            value.ClearField("type")
