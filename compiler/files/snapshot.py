"""A model on its way, with all that passes know of it, as bytes that another process continues from.

A snapshot holds the graph as an exact copy would: every value and node that can be reached from it, the order in
which readers stand in `uses()`, the counters that unnamed nodes get names from, and the metadata that passes leave.
Beside it goes any state that refers to the graph (of passes, of streams), pickled with values and nodes by number.

Tensors are not copied. Those that the model had when it was `mark`ed stand for themselves, by their number: who
restores has prepared the same model anew. Those that lie in a file are named by their place in it; so what is large
must have been put into a file before.

Invariant: `restore` of what `Saver` wrote gives a model on which every pass does, bit by bit, what it does on the
original. Pickles are only read with the signature of one's own, see `work`.
"""

import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from qcompile.compiler.files.disk_arrays import Slot, Spill
from qcompile.compiler.files.external_data import tensors_of

# Key of a tensor's `meta`: its number among those of the prepared model.
_MARK = "qcompile.prepared"
_OBJECT, _MODEL, _PREPARED, _DISK, _SPILL = range(5)
_KINDS: tuple[Any, ...] = (
    *(ir.Value, ir.Node, ir.Graph, ir.Model, Spill, ir.ExternalTensor),
    *(ir.Tensor, ir.LazyTensor, ir.PackedTensor, ir.StringTensor, ir.serde.TensorProtoTensor),
)


_SEEN: dict[Any, Any] = {}


def _kind(obj: Any) -> Any:
    """Which of `_KINDS` an object is. Classes of onnx_ir are protocols, whose isinstance looks at every attribute."""
    own: Any = type(obj)
    if own not in _SEEN:
        _SEEN[own] = next((kind for kind in _KINDS if kind in own.__mro__), None)
    return _SEEN[own]


def mark(model: ir.Model) -> list[ir.TensorProtocol]:
    """Number the tensors of a prepared model; those of the same model prepared anew get the same numbers."""
    tensors = [tensor for _, tensor in tensors_of(model)]
    for number, tensor in enumerate(tensors):
        tensor.meta[_MARK] = number
    return tensors


def is_marked(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor is one of the prepared model."""
    return _MARK in tensor.meta


@dataclass
class _Structure:
    """Of all objects, by their numbers, what needs no other object to be there.

    values: name, shape, type, documentation. nodes: domain, operator, overload, version, name, documentation, inputs,
    outputs. graphs: inputs, outputs, initializers, nodes, name, documentation, opsets, counters of names.
    uses: readers (node, position) of values whose order is another one than the nodes'. functions: domain, name,
    overload, graph. spills: by number, the slots of each.
    """

    values: list[tuple[Any, ...]] = field(default_factory=list)
    nodes: list[tuple[Any, ...]] = field(default_factory=list)
    graphs: list[tuple[Any, ...]] = field(default_factory=list)
    uses: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    functions: list[tuple[str, str, str, int]] = field(default_factory=list)
    main: int = 0
    spills: list[list[Slot]] = field(default_factory=list)


class Saver:
    """Takes a model and state that refers to it apart. spilled: a file that arrays of `Spill`s go to.

    where: the file of tensors that goes with the snapshot; it may be called otherwise when that is read.
    """

    def __init__(self, model: ir.Model, spilled: BinaryIO, where: Path) -> None:
        self._model, self._spilled, self._where = model, spilled, str(where)
        self._numbers: dict[Any, int] = {}
        self._every: list[Any] = []
        self._spills: dict[int, tuple[int, Spill]] = {}  # with the Spill, whose id is no other's meanwhile
        self._structure = _Structure()

    def saved(self, state: Any) -> bytes:
        """The model and the state; PicklingError, TypeError or AttributeError where the state cannot be pickled."""
        content = io.BytesIO()
        pickler = _Pickler(content, self)
        model = self._model
        self._structure.main = self._number(model.graph)
        functions = list(model.functions.values())
        self._structure.functions = [(f.domain, f.name, f.overload, self._number(f.graph)) for f in functions]
        attributes = [list(function.attributes.values()) for function in functions]
        pickler.dump((state, attributes, dict(model.metadata_props), model.meta, model.device_configurations))
        done = 0
        while done < len(self._every):  # which grows
            pickler.dump(_content(self._every[done]))
            done += 1
        return pickle.dumps((self._described(), content.getvalue()), pickle.HIGHEST_PROTOCOL)

    def reference(self, obj: Any) -> Any:
        """What stands for an object of the model, or for arrays in a file; None for all else."""
        kind = _kind(obj)
        if kind is None:
            return None
        if kind in (ir.Value, ir.Node, ir.Graph):
            return _OBJECT, self._number(obj)
        if kind is ir.Model:
            return (_MODEL,) if obj is self._model else None
        if kind is Spill:
            number, _ = self._spills.setdefault(id(obj), (len(self._spills), obj))
            return _SPILL, number
        if is_marked(obj):
            return _PREPARED, obj.meta[_MARK]
        if kind is ir.ExternalTensor:
            here = str(obj.path) == self._where
            place = ("" if here else str(obj.path), obj.offset, obj.length, obj.dtype)
            return _DISK, *place, tuple(obj.shape.numpy()), obj.name
        return None

    def _number(self, obj: Any) -> int:
        """The object's number; all that can be reached from it gets one in its turn."""
        if obj not in self._numbers:
            self._numbers[obj] = len(self._every)
            self._every.append(obj)
        return self._numbers[obj]

    def _described(self) -> _Structure:
        made, numbers = self._structure, self._numbers
        for obj in self._every:
            if _kind(obj) is ir.Value:
                made.values.append((numbers[obj], obj.name, obj.shape, obj.type, obj.doc_string))
            elif _kind(obj) is ir.Node:
                inputs = [None if value is None else numbers[value] for value in obj.inputs]
                outputs = [numbers[value] for value in obj.outputs]
                told = (obj.domain, obj.op_type, obj.overload, obj.version, obj.name, obj.doc_string)
                made.nodes.append((numbers[obj], *told, inputs, outputs))
            else:
                parts = (obj.inputs, obj.outputs, obj.initializers.values(), obj)
                named = (obj.name, obj.doc_string, dict(obj.opset_imports), vars(_names_of(obj)))
                made.graphs.append((numbers[obj], *([numbers[own] for own in part] for part in parts), *named))
        nodes, values = ([own for own in self._every if _kind(own) is kind] for kind in (ir.Node, ir.Value))
        places = {id(node): place for place, node in enumerate(nodes)}
        for value in values:
            uses = list(value.uses())
            if uses != sorted(uses, key=lambda use: (places[id(use.node)], use.idx)):
                made.uses[numbers[value]] = [(numbers[use.node], use.idx) for use in uses]
        made.spills = [spill.dump(self._spilled) for _, spill in self._spills.values()]
        return made


def _names_of(graph: ir.Graph) -> Any:
    """What gives names to values and nodes without: they come into the file, and must be the same."""
    return graph._name_authority


def _content(obj: Any) -> tuple[Any, ...]:
    """What an object has beside its structure, and its neighbours, so that they get numbers."""
    props, meta = dict(obj.metadata_props), obj.meta if obj.meta else None
    near: tuple[Any, ...]
    if _kind(obj) is ir.Value:
        near = (obj.producer(), *(use.node for use in obj.uses()), obj.graph)
        return near, props, meta, obj.const_value
    if _kind(obj) is ir.Node:
        near = (*obj.inputs, *obj.outputs, obj.graph)
        return near, props, meta, list(obj.attributes.values()), obj.device_configurations
    return (*obj.inputs, *obj.outputs, *obj.initializers.values(), *obj), props, meta


class _Pickler(pickle.Pickler):
    def __init__(self, file: BinaryIO, saver: Saver) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._saver = saver

    def persistent_id(self, obj: Any) -> Any:
        return self._saver.reference(obj)

    def reducer_override(self, obj: Any) -> Any:
        if _kind(obj) is ir.LazyTensor:  # a small one, see `Work.settle`
            return _evaluated, (np.asarray(obj.numpy()), obj.dtype, obj.name)
        if isinstance(obj, np.ndarray) and obj.ndim and obj.size and not any(obj.strides):  # a cache nobody will read
            return _spread, (obj.reshape(-1)[:1].copy(), obj.shape)
        return NotImplemented


def _evaluated(array: Any, dtype: ir.DataType, name: str | None) -> ir.TensorProtocol:
    return ir.Tensor(array, dtype, name=name)


def _spread(one: Any, shape: tuple[int, ...]) -> Any:
    return np.broadcast_to(one.reshape(()), shape)


def restore(
    model: ir.Model, saved: bytes, prepared: Sequence[ir.TensorProtocol], spilled: BinaryIO, where: Path
) -> Any:
    """Make a prepared model the one that was saved; returns the state. Where that raises, the model is untouched.

    prepared: what `mark` gave for it. spilled, where: the files that went with the snapshot.
    """
    structure, content = pickle.loads(saved)
    objects = _built(structure)
    spills = [Spill.stored(spilled, slots) for slots in structure.spills]
    makers: Mapping[int, Callable[..., Any]] = {
        _OBJECT: objects.__getitem__,
        _MODEL: lambda: model,
        _PREPARED: prepared.__getitem__,
        _SPILL: spills.__getitem__,
        _DISK: lambda *told: _on_disk(where, *told),
    }
    unpickler = _Unpickler(io.BytesIO(content), makers)
    state, attributes, props, meta, devices = unpickler.load()
    for number in range(len(objects)):
        _fill(objects[number], unpickler.load())
    _order_uses(structure, objects)
    functions = [
        ir.Function(domain, name, overload, graph=objects[graph], attributes=own)
        for (domain, name, overload, graph), own in zip(structure.functions, attributes, strict=True)
    ]
    model.graph = objects[structure.main]
    model.functions.clear()
    model.functions.update({function.identifier(): function for function in functions})
    _replace(model.metadata_props, props)
    _replace(model.meta, meta)
    model.device_configurations = devices
    return state


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, makers: Mapping[int, Callable[..., Any]]) -> None:
        super().__init__(file)
        self._makers = makers

    def persistent_load(self, reference: Any) -> Any:
        kind, *told = reference
        return self._makers[kind](*told)


def _on_disk(
    where: Path, file: str, offset: int, length: int, dtype: ir.DataType, shape: tuple[int, ...], name: str
) -> ir.ExternalTensor:
    return ir.ExternalTensor(file or str(where), offset, length, dtype, shape=ir.Shape(shape), name=name)


def _built(structure: _Structure) -> dict[int, Any]:
    """All objects with their connections."""
    objects: dict[int, Any] = {}
    for number, name, shape, kind, text in structure.values:
        objects[number] = ir.Value(name=name, shape=shape, type=kind, doc_string=text)
    for number, domain, operator, overload, version, name, text, inputs, outputs in structure.nodes:
        objects[number] = ir.Node(
            domain,
            operator,
            [None if value is None else objects[value] for value in inputs],
            outputs=[objects[value] for value in outputs],
            overload=overload,
            version=version,
            name=name,
            doc_string=text,
        )
    for number, inputs, outputs, initializers, nodes, name, text, opsets, names in structure.graphs:
        parts = ([objects[own] for own in part] for part in (inputs, outputs, nodes, initializers))
        graph_inputs, graph_outputs, own, constants = parts
        graph = ir.Graph(
            graph_inputs,
            graph_outputs,
            nodes=own,
            initializers=constants,
            name=name,
            doc_string=text,
            opset_imports=opsets,
        )
        vars(_names_of(graph)).update(names)
        objects[number] = graph
    return objects


def _fill(obj: Any, content: tuple[Any, ...]) -> None:
    _, props, meta, *rest = content
    obj.metadata_props.update(props)
    if meta is not None:
        _replace(obj.meta, meta)
    if _kind(obj) is ir.Value:
        (obj.const_value,) = rest
    elif _kind(obj) is ir.Node:
        attributes, obj.device_configurations = rest
        for attribute in attributes:
            obj.attributes[attribute.name] = attribute


def _replace(there: Any, new: Mapping[str, Any]) -> None:
    there.clear()
    there.update(new)


def _order_uses(structure: _Structure, objects: Mapping[int, Any]) -> None:
    for number, uses in structure.uses.items():
        value, readers = objects[number], [(objects[node], position) for node, position in uses]
        for node, position in readers:
            node.replace_input_with(position, None)
        for node, position in readers:
            node.replace_input_with(position, value)


def objects_of(model: ir.Model) -> Iterator[str]:
    """A prepared model in words, the same for the same one prepared anew: names, types and shapes of its tensors."""
    for name, tensor in tensors_of(model):
        yield f"{name} {tensor.dtype} {tuple(tensor.shape.numpy())}"
    for node in model.graph.all_nodes():
        yield f"{node.name} {node.domain} {node.op_type}"
