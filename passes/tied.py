"""Values of convolutional networks whose channels can only be rescaled together, and the convolutions around them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.affine import Array
from qcompile.passes.graph import is_constant
from qcompile.passes.linears import CONVOLUTIONS, constant, dimensions

# f(x / s) = f(x) / s for positive s of each channel, which these leave where it is.
_KEEP = {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Identity", "Add"}
_CLAMPS = ("Relu",)


@dataclass(frozen=True, eq=False)
class Tied:
    """Values (batch, channels, …) that are one but for operators which keep a factor of a channel.

    makers: the convolutions that give some of them; readers: those that take some of them, by the value that is read.
    Dividing weights and biases of the makers by s (channels,), and multiplying those of the readers by it, divides the
    values by s and changes nothing else.
    """

    values: tuple[ir.Value, ...]
    makers: tuple[ir.Node, ...]
    readers: tuple[ir.Node, ...]
    channels: int

    @property
    def name(self) -> str:
        """That of the first value."""
        return self.values[0].name or ""

    @property
    def rounded(self) -> list[ir.Value]:
        """The values that get a grid: not those that a Relu alone reads, which its convolution vanishes into."""
        return [value for value in self.values if not _only_clamped(value)]


def find_tied(nodes: Iterable[ir.Node]) -> list[Tied | tuple[str, str]]:
    """All such sets of values among the nodes that convolutions make and read, in order; (name, why) of one that cannot
    be rescaled.
    """
    inside = list(nodes)
    leaders: dict[ir.Value, ir.Value] = {}

    def find(value: ir.Value) -> ir.Value:
        while (above := leaders.setdefault(value, value)) is not value:
            value = above
        return value

    for node in inside:
        if _keeps(node):
            for value in _flowing(node):
                leaders[find(value)] = find(node.outputs[0])
        elif _is_convolution(node):
            assert node.inputs[0] is not None
            find(node.inputs[0])
            find(node.outputs[0])
    groups: dict[ir.Value, list[ir.Value]] = {}
    for value in leaders:
        groups.setdefault(find(value), []).append(value)
    known = set(inside)
    return [_tied(values, known) for values in groups.values()]


def _tied(values: list[ir.Value], inside: set[ir.Node]) -> Tied | tuple[str, str]:
    makers, readers = dict[ir.Node, None](), dict[ir.Node, None]()
    name = values[0].name or ""
    for value in values:
        producer = value.producer()
        if producer is None or producer not in inside or not (_keeps(producer) or _is_convolution(producer)):
            return name, f"{value.name} comes from {_told(producer)}"
        if _is_convolution(producer):
            makers[producer] = None
        if value.is_graph_output():
            return name, f"{value.name} is an output of the graph"
        for use in value.uses():
            if use.node not in inside or not (_keeps(use.node) or (_is_convolution(use.node) and use.idx == 0)):
                return name, f"{value.name} is also read by {_told(use.node)}"
            if _is_convolution(use.node):
                readers[use.node] = None
    if not makers or not readers:
        return name, "no convolution gives it, or none reads it"
    for node in (*makers, *readers):
        for shared in node.inputs[1:]:
            if shared is not None and (len(list(shared.uses())) > 1 or shared.is_graph_output()):
                return name, f"{shared.name}, of {node.name}, is read elsewhere, too"
    sizes = {_given(node) for node in makers} | {_taken(node) for node in readers}
    if len(sizes) > 1:
        return name, f"its convolutions have {sorted(sizes)} channels"
    return Tied(tuple(values), tuple(makers), tuple(readers), sizes.pop())


def _only_clamped(value: ir.Value) -> bool:
    uses, producer = list(value.uses()), value.producer()
    made = producer is not None and (producer.op_type == "Conv" or producer.op_type == "Add")
    return made and len(uses) == 1 and uses[0].node.op_type in _CLAMPS


def _told(node: ir.Node | None) -> str:
    return "outside" if node is None else f"{node.op_type} {node.name}"


def _flowing(node: ir.Node) -> Iterator[ir.Value]:
    """The inputs that carry channels."""
    yield from (value for value in node.inputs if value is not None and not is_constant(value))


def _keeps(node: ir.Node) -> bool:
    """Whether an operator keeps factors; a sum of values of one shape only, since a constant or a row would have to be
    divided, too.
    """
    if node.domain != "" or node.op_type not in _KEEP or len(node.outputs) != 1:
        return False
    if node.op_type != "Add":
        return True
    shapes = [value.shape for value in node.inputs if value is not None]
    ranks = {len(shape) for shape in shapes if shape is not None}
    channels = {shape[1] for shape in shapes if shape is not None and len(shape) > 1}
    known = all(shape is not None for shape in shapes) and len(ranks) == len(channels) == 1
    return known and isinstance(next(iter(channels)), int) and not any(map(is_constant, node.inputs))


def _is_convolution(node: ir.Node) -> bool:
    """With a constant float32 weight, and a constant bias if any; a ConvTranspose of one group."""
    if node.domain != "" or node.op_type not in CONVOLUTIONS or len(node.inputs) < 2:
        return False
    constants = [value for value in node.inputs[1:] if value is not None]
    floats = all(is_constant(value) and constant(value).dtype == ir.DataType.FLOAT for value in constants)
    return floats and (node.op_type == "Conv" or _groups(node) == 1) and node.inputs[1] is not None


def _groups(node: ir.Node) -> int:
    return node.attributes.get_int("group", 1)


def _shape(node: ir.Node) -> tuple[int, ...]:
    weight = node.inputs[1]
    assert weight is not None
    return dimensions(weight)


def _given(node: ir.Node) -> int:
    return _shape(node)[0 if node.op_type == "Conv" else 1]


def _taken(node: ir.Node) -> int:
    shape = _shape(node)
    return shape[1] * _groups(node) if node.op_type == "Conv" else shape[0]


def by_inputs(node: ir.Node) -> Array:
    """The weight as (groups, outputs of a group, inputs of a group, taps): the same numbers, a view where possible."""
    weight = node.inputs[1]
    assert weight is not None
    w = np.asarray(constant(weight).numpy(), np.float32)
    if node.op_type == "ConvTranspose":
        return np.swapaxes(w.reshape(*w.shape[:2], -1), 0, 1)[None]
    groups = _groups(node)
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)


def is_depthwise(node: ir.Node) -> bool:
    """Whether each channel that it gives is made of one channel, the same one."""
    return node.op_type == "Conv" and _groups(node) > 1 and _shape(node)[:2] == (_groups(node), 1)


def rescale(tied: Tied, factor: npt.NDArray[np.float64]) -> None:
    """Divide the values by a factor (channels,), by changing weights and biases alone."""
    for node in tied.readers:
        w = by_inputs(node)
        by = factor.reshape(w.shape[0], 1, -1, 1)
        _store(node, 1, w * by)
    for node in tied.makers:
        w = by_inputs(node)
        by = factor.reshape(w.shape[0], -1, 1, 1)
        _store(node, 1, w / by)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            _store(node, 2, constant(bias).numpy() / factor)


def _store(node: ir.Node, position: int, numbers: npt.NDArray[np.floating]) -> None:
    """Set a weight, in the shape of `by_inputs`, or a bias."""
    value = node.inputs[position]
    assert value is not None
    shape = dimensions(value)
    if node.op_type == "ConvTranspose" and position == 1:
        numbers = np.swapaxes(numbers[0], 0, 1)
    array = np.ascontiguousarray(numbers, np.float32).reshape(shape)
    value.const_value = ir.tensor(array, name=value.name)
