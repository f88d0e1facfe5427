"""What a few nodes compute, told by running them on small inputs.

Exporters write masks and rotations in dozens of ways. Their numbers on small inputs say what they are, whatever way.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from qcompile.passes.graph import is_constant
from qcompile.passes.prepare.sizes import named_sizes

Array = npt.NDArray[Any]
_NODES = 400  # behind one value: an exporter's mask has forty
_ELEMENTS = 1 << 20  # of a constant among them


@dataclass(frozen=True)
class Given:
    """What is known of the inputs of some nodes.

    arrays: what values hold. sizes: by name, those of their dimensions, which other shapes are told by.
    """

    arrays: Mapping[ir.Value, Array]
    sizes: Mapping[str, int]

    @classmethod
    def of(cls, arrays: Mapping[ir.Value, Array]) -> "Given":
        """The sizes are those of the arrays; of a name that has two, none."""
        found: dict[str, set[int]] = {}
        for value, array in arrays.items():
            for name, size in zip(named_sizes(value), array.shape, strict=True):
                if isinstance(name, str):
                    found.setdefault(name, set()).add(size)
        return cls(arrays, {name: own.pop() for name, own in found.items() if len(own) == 1})

    def shape(self, node: ir.Node) -> Array | None:
        """What a node Shape gives, where the sizes tell it; dimensions may be sums of named ones."""
        value = node.inputs[0] if (node.op_type, node.domain) == ("Shape", "") else None
        if value is None or value.shape is None:
            return None
        known = [self._size(size) for size in named_sizes(value)]
        picked = known[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)]
        return None if None in picked else np.array(picked, np.int64)

    def _size(self, size: int | str | None) -> int | None:
        if not isinstance(size, str):
            return size
        parts = [self.sizes.get(part) for part in size.split(" + ")]
        return None if None in parts else sum(part for part in parts if part is not None)


def ancestors(value: ir.Value, stop: Collection[ir.Value] = frozenset()) -> list[ir.Node] | None:
    """The nodes that a value comes from, in order, none behind those of `stop`; None where they are too many."""
    found: dict[ir.Node, None] = {}
    stack: list[tuple[ir.Value | None, bool]] = [(value, False)]
    seen: set[ir.Node] = set()
    while stack:
        own, done = stack.pop()
        node = own.producer() if own is not None and own not in stop else None
        if node is None or node in found or (node in seen and not done):
            continue
        if done:
            found[node] = None
            continue
        seen.add(node)
        if len(seen) > _NODES:
            return None
        stack.append((own, True))
        stack.extend((operand, False) for operand in node.inputs)
    return list(found)


def evaluate(values: Sequence[ir.Value], given: Given) -> list[Array] | None:
    """The arrays that values hold; None where that cannot be told.

    By onnx's reference evaluator: standard operators without bodies, and constants of no great size, alone.
    """
    known, nodes = dict(given.arrays), dict[ir.Node, None]()
    for value in values:
        shapes = _shapes(value, given)
        own = ancestors(value, known.keys() | shapes.keys())
        if own is None or not all(_plain(node) for node in own):
            return None
        known |= shapes
        nodes |= dict.fromkeys(own)
    read = dict.fromkeys(own for node in nodes for own in node.inputs if own is not None)
    constants = [own for own in read if own not in known and is_constant(own)]
    made = {own for node in nodes for own in node.outputs}
    if any(own not in known and own not in made and not is_constant(own) for own in read):
        return None
    tensors = [(own, own.const_value) for own in constants if own.const_value is not None]
    if any(tensor.size > _ELEMENTS for _, tensor in tensors):
        return None
    feeds = {str(own.name): array for own, array in known.items() if own in read or own in values}
    try:
        with np.errstate(all="ignore"):
            return _run(list(nodes), feeds, tensors, [str(value.name) for value in values], _opset(values[0]))
    except Exception:  # whatever the evaluator does not know
        return None


def _shapes(value: ir.Value, given: Given) -> dict[ir.Value, Array]:
    """What the Shapes before a value give that the sizes tell, the nearest of each way."""
    found: dict[ir.Value, Array] = {}
    waiting, seen = [value], {value}
    for own in waiting:  # it grows
        node = own.producer() if own not in given.arrays else None
        if node is None or len(seen) > _NODES * 4:
            continue
        shape = given.shape(node)
        if shape is not None:
            found[own] = shape
            continue
        onward = [operand for operand in node.inputs if operand is not None and operand not in seen]
        seen.update(onward)
        waiting += onward
    return found


def _plain(node: ir.Node) -> bool:
    return node.domain == "" and all(a.type != ir.AttributeType.GRAPH for a in node.attributes.values())


def _run(
    nodes: Sequence[ir.Node],
    feeds: Mapping[str, Array],
    constants: Sequence[tuple[ir.Value, ir.TensorProtocol]],
    names: Sequence[str],
    opset: int,
) -> list[Array]:
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "probe",
        [onnx.helper.make_tensor_value_info(name, kinds[name], array.shape) for name, array in feeds.items()],
        [onnx.helper.make_empty_tensor_value_info(name) for name in names],
        [onnx.numpy_helper.from_array(np.asarray(tensor.numpy()), str(value.name)) for value, tensor in constants],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    return [np.asarray(array) for array in ReferenceEvaluator(model).run(None, dict(feeds))]


def _opset(value: ir.Value) -> int:
    node = value.producer()
    graph = node.graph if node is not None else None
    return int((graph.opset_imports if graph is not None else {}).get("", 21))
