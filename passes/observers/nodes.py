"""Nodes that observers and checks append to a graph: reductions computed inside ONNX Runtime."""

import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper


class _Seen(threading.local):
    """The values of the graph that this thread asked for last: of its first `nodes` nodes and `constants` initializers.

    given: by name, the number of the node that gives a value; None for a constant.
    A message cannot be the key of a dictionary, nor be referred to weakly.
    """

    def __init__(self) -> None:
        self.look_at(onnx.GraphProto())

    def look_at(self, graph: onnx.GraphProto) -> None:
        self.graph, self.nodes, self.constants, self.given = graph, 0, 0, dict[str, int | None]()


_seen = _Seen()


def has(graph: onnx.GraphProto, name: str) -> bool:
    """Whether a node or an initializer of the graph gives the value; each is looked at once while the graph grows."""
    return name in _given(graph)


def producer(graph: onnx.GraphProto, name: str) -> onnx.NodeProto | None:
    """The node of the graph that gives the value; None of a constant, or of an input. Takes as long as `has`."""
    number = _given(graph).get(name)
    return None if number is None else graph.node[number]


def _given(graph: onnx.GraphProto) -> Mapping[str, int | None]:
    if graph is not _seen.graph or len(graph.node) < _seen.nodes or len(graph.initializer) < _seen.constants:
        _seen.look_at(graph)
    for number in range(_seen.nodes, len(graph.node)):
        _seen.given.update(dict.fromkeys(graph.node[number].output, number))
    for number in range(_seen.constants, len(graph.initializer)):
        _seen.given[graph.initializer[number].name] = None
    _seen.nodes, _seen.constants = len(graph.node), len(graph.initializer)
    return _seen.given


def difference(value: str, end: str) -> str:
    """The name of ‖value - reference‖² that `compare` adds."""
    return f"{value}{end}.difference2"


def reference(value: str, end: str) -> str:
    """The name of ‖reference‖² that `compare` adds."""
    return f"{value}{end}.reference2"


def rows(value: str) -> str:
    """The name of the value as a matrix that `matrix` adds."""
    return f"{value}.rows"


def compare(graph: onnx.GraphProto, y: str, wanted: str, end: str) -> list[str]:
    """Append ‖y - wanted‖² and ‖wanted‖² of values of one shape, float64 scalars, as outputs; returns their names."""
    delta, exact = f"{y}{end}.delta", floats(graph, wanted)
    graph.node.append(helper.make_node("Sub", [floats(graph, y), exact], [delta]))
    names = {delta: difference(y, end), exact: reference(y, end)}
    return _sums(graph, names)


def _sums(graph: onnx.GraphProto, names: Mapping[str, str]) -> list[str]:
    """Append ‖source‖², float64 scalars, under the names of the outputs: squares of floats may be none in float32."""
    for source, name in names.items():
        graph.node.append(helper.make_node("Cast", [source], [f"{name}.double"], to=TensorProto.DOUBLE))
        graph.node.append(helper.make_node("ReduceSumSquare", [f"{name}.double"], [name], keepdims=0))
    add_outputs(graph, names.values(), TensorProto.DOUBLE)
    return list(names.values())


def add_outputs(graph: onnx.GraphProto, names: Iterable[str], element_type: int = TensorProto.FLOAT) -> None:
    """Declare values as graph outputs, of unknown shape."""
    graph.output.extend(helper.make_tensor_value_info(name, element_type, None) for name in names)


def lost(value: str) -> str:
    """The name of a float32 scalar that `by_channel` and `matrix` append: 1 where no row is finite, else 0."""
    return f"{value}.lost"


def floats(graph: onnx.GraphProto, value: str) -> str:
    """The value as float32, of its shape; zeros for rows (along the last axis) in which no number is finite.

    Attention gives such rows to padding that a mask of -inf covers throughout: they mean nothing, and nobody reads
    them. A row of which some numbers are finite stays as it is: there the model overflows.
    """
    name = f"{value}.float"
    if has(graph, name):
        return name
    first, last = constant(graph, "qcompile.first", [0]), constant(graph, "qcompile.minus1", [-1])
    zero = scalar(graph, "qcompile.zero", np.float32(0))
    steps: list[tuple[str, list[str], str, dict[str, int]]] = [
        ("Cast", [value], "guard.cast", {"to": TensorProto.FLOAT}),
        ("Unsqueeze", [f"{value}.guard.cast", first], "guard.rows1", {}),  # a scalar is a row of its own
        ("Mul", [f"{value}.guard.rows1", zero], "guard.nans", {}),
        ("IsNaN", [f"{value}.guard.nans"], "guard.bad", {}),
        ("Cast", [f"{value}.guard.bad"], "guard.bad.float", {"to": TensorProto.FLOAT}),
        ("ReduceMin", [f"{value}.guard.bad.float", last], "guard.dead.float", {"keepdims": 1}),
        ("ReduceMin", [f"{value}.guard.dead.float"], "lost", {"keepdims": 0}),
        ("Cast", [f"{value}.guard.dead.float"], "guard.dead", {"to": TensorProto.BOOL}),
        ("Where", [f"{value}.guard.dead", zero, f"{value}.guard.rows1"], "guard.kept", {}),
        ("Squeeze", [f"{value}.guard.kept", first], "float", {}),
    ]
    graph.node.extend(helper.make_node(op, given, [f"{value}.{end}"], **more) for op, given, end, more in steps)
    return name


def matrix(graph: onnx.GraphProto, value: str) -> str:
    """The value as a float32 matrix (rows, K)."""
    shape, name = f"{value}.last", rows(value)
    if has(graph, name):
        return name
    minus_one = constant(graph, "qcompile.minus1", [-1])
    graph.node.extend(
        [
            helper.make_node("Shape", [value], [shape], start=-1),
            helper.make_node("Concat", [minus_one, shape], [f"{value}.shape2"], axis=0),
            helper.make_node("Reshape", [floats(graph, value), f"{value}.shape2"], [name]),
        ]
    )
    return name


def by_channel(graph: onnx.GraphProto, value: str, axis: int | None) -> str:
    """The value as float32 (channels, numbers), channels its `axis`; all its numbers (n,) for None.

    Numbers of a channel lie side by side: ONNX Runtime 1.32 reduces them 10 times as fast as a (numbers, channels).
    """
    name = f"{value}.flat" if axis is None else f"{value}.channels{axis}"
    if has(graph, name):
        return name
    if axis is None:
        shape = constant(graph, "qcompile.minus1", [-1])
        graph.node.append(helper.make_node("Reshape", [floats(graph, value), shape], [name]))
        return name
    shape, joined = _three_dimensions(graph, value, axis)
    reshape = helper.make_node("Reshape", [floats(graph, value), shape], [f"{name}.three"], allowzero=1)
    turn = helper.make_node("Transpose", [f"{name}.three"], [f"{name}.turned"], perm=[1, 0, 2])
    graph.node.extend([reshape, turn, helper.make_node("Reshape", [f"{name}.turned", joined], [name], allowzero=1)])
    return name


def _three_dimensions(graph: onnx.GraphProto, value: str, axis: int) -> tuple[str, str]:
    """The shapes (outer, channels, inner) and (channels, outer * inner) of `by_channel`, int64. Products, since -1 has
    no meaning beside a 0.
    """
    one, name = constant(graph, "qcompile.one", [1]), f"{value}.channels{axis}"
    bounds: dict[str, dict[str, int]] = {"outer": {"end": axis}, "own": {"start": axis}, "inner": {"start": axis + 1}}
    if axis == -1:
        del bounds["inner"]
    else:
        bounds["own"]["end"] = axis + 1
    for side, slices in bounds.items():
        shape, padded = f"{name}.{side}.shape", f"{name}.{side}.padded"
        graph.node.append(helper.make_node("Shape", [value], [shape], **slices))
        graph.node.append(helper.make_node("Concat", [one, shape], [padded], axis=0))
        graph.node.append(helper.make_node("ReduceProd", [padded], [f"{name}.{side}"], keepdims=1))
    inner = f"{name}.inner" if "inner" in bounds else one
    graph.node.append(helper.make_node("Mul", [f"{name}.outer", inner], [f"{name}.numbers"]))
    for sizes, end in (
        ([f"{name}.outer", f"{name}.own", inner], "shape3"),
        ([f"{name}.own", f"{name}.numbers"], "shape2"),
    ):
        graph.node.append(helper.make_node("Concat", sizes, [f"{name}.{end}"], axis=0))
    return f"{name}.shape3", f"{name}.shape2"


def constant(graph: onnx.GraphProto, name: str, values: list[int]) -> str:
    """An int64 initializer of that name, made once."""
    if not has(graph, name):
        graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return name


def scalar(graph: onnx.GraphProto, name: str, value: npt.NDArray[Any] | np.generic) -> str:
    """An initializer () of that name, made once."""
    if not has(graph, name):
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name
