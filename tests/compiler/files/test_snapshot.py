"""A model that was taken apart and put together again is the model, down to the order in which readers stand."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs import convolutions, decoders, experts, linears  # noqa: F401  # they fill the table
from graphs.table import CASES

from qcompile.compiler.files.disk_arrays import Spill
from qcompile.compiler.files.load import load_model
from qcompile.compiler.files.snapshot import Saver, mark, objects_of, restore
from qcompile.passes.base import Region
from qcompile.passes.prepare import Prepare
from qcompile.passes.state import node_state, set_node


def _prepared(source: Path) -> ir.Model:
    model = load_model(source)
    Prepare().call(Region.whole(model))
    return model


def _restored(model: ir.Model, other: ir.Model, state: Any = None) -> Any:
    """Make the other the model, as another process does that has prepared it anew; returns the state."""
    mark(model)
    spilled = io.BytesIO()
    saved = Saver(model, spilled, Path("tensors")).saved(state)
    return restore(other, saved, mark(other), spilled, Path("tensors"))


def _described(model: ir.Model) -> Iterator[Any]:
    """All that a pass could see of a model, in order; tensors as themselves."""
    yield ir.serde.serialize_model(model).SerializeToString(deterministic=True)
    nodes = list(model.graph.all_nodes())
    places = {node: place for place, node in enumerate(nodes)}
    for graph in model.graphs():
        yield [(name, value.name) for name, value in graph.initializers.items()]
    for node in nodes:
        yield node.name, sorted(node.meta), node_state(node).left
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                yield value.name, sorted(value.meta), [(places.get(use.node), use.idx) for use in value.uses()]


def test_arrays_come_back_writable(tmp_path: Path) -> None:
    """But for those of one number that lie as one: a number without dimensions is an array of its own."""
    onnx.save(CASES[next(iter(CASES))].made().model(), tmp_path / "model.onnx")
    state = [np.array(2.0), np.ones(1), np.zeros((0, 3)), np.broadcast_to(np.float32(3), (4, 5))]
    found = _restored(_prepared(tmp_path / "model.onnx"), _prepared(tmp_path / "model.onnx"), state)
    assert [own.flags.writeable for own in found] == [own.flags.writeable for own in state]
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, state, strict=True))


# Of some graphs nothing is asked but that they are refused, some of them by `prepare`.
@pytest.mark.parametrize(
    "name", [n for n, case in CASES.items() if not all(isinstance(x, str) for x in case.lists.values())]
)
def test_the_same_model_again(name: str, tmp_path: Path) -> None:
    onnx.save(CASES[name].made().model(), tmp_path / "model.onnx")
    model, other = _prepared(tmp_path / "model.onnx"), _prepared(tmp_path / "model.onnx")
    assert list(objects_of(model)) == list(objects_of(other))
    node, constant = model.graph[-1], next(iter(model.graph.initializers.values()), None)
    for value in (value for value in node.inputs if value is not None):  # to the end of its readers
        node.replace_input_with(node.inputs.index(value), None)
        node.replace_input_with(node.inputs.index(None), value)
        break
    if constant is not None and constant.const_value is not None:
        constant.const_value = ir.tensor(np.array(constant.const_value.numpy()), name=constant.name)
    set_node(node, left="a reason")
    wanted = list(_described(model))
    found = _restored(model, other, {"node": node, "readers": {node.outputs[0]: node}})
    assert list(_described(other)) == wanted
    assert found == {"node": other.graph[-1], "readers": {other.graph[-1].outputs[0]: other.graph[-1]}}


def test_state_beside_the_graph(tmp_path: Path) -> None:
    """Arrays of a Spill go to the file, one that takes no memory stays so, and what is one object is one again."""
    onnx.save(next(iter(CASES.values())).made().model(), tmp_path / "model.onnx")
    model, spill = load_model(tmp_path / "model.onnx"), Spill(budget=0)
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.array("text", object), np.zeros((0, 2), np.int8)]
    for array in arrays:
        spill.append(array)
    zeros = np.broadcast_to(np.zeros((), np.float16), (1000, 1000))
    found = _restored(model, load_model(tmp_path / "model.onnx"), [spill, spill, zeros, model])
    assert found[0] is found[1]
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(arrays, found[0], strict=True))
    assert found[2].shape == zeros.shape
    assert not any(found[2].strides)
    found[0].append(arrays[0])
    assert np.array_equal(found[0][3], arrays[0])
    assert np.array_equal(found[0][-4], arrays[0])


def test_names_of_new_nodes_go_on(tmp_path: Path) -> None:
    """What has no name gets the one that it would have got: it comes into the file."""
    onnx.save(next(iter(CASES.values())).made().model(), tmp_path / "model.onnx")
    model, other = load_model(tmp_path / "model.onnx"), load_model(tmp_path / "model.onnx")
    for _ in range(2):
        model.graph.append(ir.node("Identity", [model.graph.inputs[0]]))
    model.graph.remove(model.graph[-1])
    _restored(model, other)
    for own in (model, other):
        own.graph.append(ir.node("Identity", [own.graph.inputs[0]]))
    assert other.graph[-1].name == model.graph[-1].name
    assert other.graph[-1].outputs[0].name == model.graph[-1].outputs[0].name
