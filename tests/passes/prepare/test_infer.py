"""passes/prepare/infer.py: types and shapes from inputs and constants; the file's own word is taken where nothing
contradicts it.
"""

import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler.facts.value_types import told_by_runtime
from qcompile.passes.base import Decision, Region
from qcompile.passes.errors import UserError
from qcompile.passes.prepare import Prepare, inference
from qcompile.passes.prepare.infer import infer_anew

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def _info(name: str, kind: int, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _model(nodes: Sequence[onnx.NodeProto], told: Sequence[onnx.ValueInfoProto], kind: int = FLOAT) -> ir.Model:
    """x (b, 64) to y, with w (64, 64) and what the file says of inner values."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    weights = [numpy_helper.from_array(np.eye(64, dtype=dtype), "w")]
    graph = helper.make_graph(
        nodes, "g", [_info("x", kind, "b", 64)], [onnx.ValueInfoProto(name="y")], weights, value_info=told
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def _inferred(model: ir.Model, *, ask: bool = True) -> tuple[dict[str, ir.Value], list[Decision]]:
    own = Prepare()
    infer_anew(model, own.decide, told_by_runtime if ask else None)
    return {str(value.name): value for node in model.graph for value in node.outputs}, own.decisions


MATMULS = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Relu", ["a"], ["y"])]
UNKNOWN = [
    helper.make_node("FastGelu", ["x"], ["a"], domain="com.microsoft"),
    helper.make_node("MatMul", ["a", "w"], ["c"]),
    helper.make_node("Relu", ["c"], ["y"]),
]


@pytest.mark.parametrize(
    "told", [("a", FLOAT, 1, 64), ("a", HALF, "b", 64), ("a", FLOAT, "b", 3, 64), ("a", FLOAT, "b", 8)]
)
def test_what_contradicts_inputs_and_constants_is_dropped(told: tuple[str, int]) -> None:
    values, decisions = _inferred(_model(MATMULS, [_info(*told)]))
    assert (values["a"].dtype, values["a"].shape) == (ir.DataType.FLOAT, ir.Shape(["b", 64]))
    assert [decision.action for decision in decisions] == ["dropped"]
    assert "a " in decisions[0].reason


def test_one_stale_shape_makes_all_of_them_stale() -> None:
    nodes = [*MATMULS[:1], helper.make_node("Mystery", ["a"], ["m"], domain="com.microsoft"), *MATMULS[1:]]
    values, _ = _inferred(_model(nodes, [_info("a", FLOAT, 1, 64), _info("m", FLOAT, 1, 64)]))
    assert (values["m"].type, values["m"].shape) == (None, None)


def test_what_nothing_contradicts_is_kept() -> None:
    nodes = [helper.make_node("Mystery", ["x"], ["a"], domain="com.microsoft"), *UNKNOWN[1:]]
    values, decisions = _inferred(_model(nodes, [_info("a", FLOAT, "b", 64)]))
    assert (values["a"].dtype, values["a"].shape) == (ir.DataType.FLOAT, ir.Shape(["b", 64]))
    assert not decisions


@pytest.mark.parametrize("kind", [FLOAT, HALF, TensorProto.DOUBLE])
def test_onnxruntime_tells_the_types_of_its_own_operators(kind: int) -> None:
    nodes = UNKNOWN if kind != TensorProto.DOUBLE else MATMULS
    values, _ = _inferred(_model(nodes, [], kind))
    for name in values.keys() - {"y"}:
        assert (int(values[name].dtype), values[name].shape) == (kind, ir.Shape(["b", 64]))


def test_without_it_they_are_unknown_and_never_float() -> None:
    values, _ = _inferred(_model(UNKNOWN, [], HALF), ask=False)
    assert values["a"].type is None


def test_the_branches_of_an_if_may_have_values_of_one_name() -> None:
    """Data propagation goes by names: a shape of one branch was taken for that of the other."""

    def branch(width: int) -> onnx.GraphProto:
        shape = numpy_helper.from_array(np.array([-1, width]), "")
        nodes = [
            helper.make_node("Constant", [], ["shape"], value=shape),
            helper.make_node("Reshape", ["x", "shape"], ["r"]),
            helper.make_node("Identity", ["r"], ["out"]),
        ]
        return helper.make_graph(nodes, "branch", [], [onnx.ValueInfoProto(name="out")])

    node = helper.make_node("If", ["flag"], ["y"], then_branch=branch(32), else_branch=branch(16))
    flag = helper.make_tensor_value_info("flag", TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [_info("x", FLOAT, "b", 64), flag], [_info("y", FLOAT, "n", "k")])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    Prepare().call(Region.whole(model))
    bodies = [[node for node in body if node.op_type == "Reshape"] for body in list(model.graphs())[1:]]
    assert sorted(own[0].outputs[0].shape[1] for own in bodies if own) == [16, 32]


def test_an_output_without_a_type_gets_one() -> None:
    """ONNX Runtime takes such a file; qdq needs to know what the output is."""
    model = _model([helper.make_node("Relu", ["x"], ["y"])], [])
    assert model.graph.outputs[0].type is None
    found, _ = _inferred(model)
    assert found["y"].dtype == ir.DataType.FLOAT
    assert found["y"].shape == ir.Shape(["b", 64])


@pytest.fixture
def unknown() -> Iterator[None]:
    """Nothing is known of earlier models, and nothing of these is afterwards."""
    inference._known.cache_clear()
    yield
    inference._known.cache_clear()


def test_nobody_is_taken_for_asleep_of_whom_the_system_says_nothing() -> None:
    assert not inference._sleeps(os.getpid())
    assert not inference._sleeps(-1)


@pytest.mark.usefixtures("unknown")
def test_a_fork_that_stands_still_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a lock that a thread of its parent held: a test on a busy machine was refused after 100 seconds."""
    forks = []

    def waits(*_: object, **__: object) -> None:
        lock = threading.Lock()
        lock.acquire()
        lock.acquire()

    fork = inference._in_a_fork
    monkeypatch.setattr(inference, "_in_a_fork", lambda *given, **more: forks.append(1) or fork(*given, **more))
    monkeypatch.setattr(inference, "_answer", waits)
    found, _ = _inferred(_model(MATMULS, []), ask=False)
    assert found["y"].shape == ir.Shape(["b", 64])
    assert forks == [1], "what is told in one turn is not asked again"


@pytest.mark.usefixtures("unknown")
def test_a_model_that_was_seen_is_not_worked_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each caller has an answer of its own to change; a model that differs in one size, or is large, has its own."""
    forks, fork = [], inference._in_a_fork
    monkeypatch.setattr(inference, "_in_a_fork", lambda *given, **more: forks.append(1) or fork(*given, **more))

    def shown(rows: int) -> list[int]:
        node, untyped = helper.make_node("Relu", ["x"], ["y"]), onnx.ValueInfoProto(name="y")
        graph = helper.make_graph([node], "g", [_info("x", FLOAT, rows, 2)], [untyped])
        found = inference.inferred(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
        sizes = [dim.dim_value for dim in found.graph.output[0].type.tensor_type.shape.dim]
        found.Clear()
        return sizes

    assert [shown(3), shown(3), shown(4), shown(3)] == [[3, 2], [3, 2], [4, 2], [3, 2]]
    assert len(forks) == 2
    monkeypatch.setattr(inference, "_SMALL", 0)
    assert [shown(3), shown(3)] == [[3, 2], [3, 2]]
    assert len(forks) == 4


@pytest.mark.usefixtures("unknown")
def test_what_failed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was short, or a machine that was busy, may not be the next time."""
    model, answer = _model(MATMULS, []), inference._answered
    monkeypatch.setattr(inference, "_answered", lambda *given, **more: (_ for _ in ()).throw(RuntimeError("no memory")))
    assert [own.action for own in _inferred(model, ask=False)[1]] == ["skipped"]
    monkeypatch.setattr(inference, "_answered", answer)
    found, decisions = _inferred(model, ask=False)
    assert found["y"].shape == ir.Shape(["b", 64])
    assert decisions == []


def test_inference_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnx 1.23 looks for ever for what follows the dash; the fork ends, and the reason is told."""
    monkeypatch.setattr(inference, "_SECONDS", 1)
    model = _model([helper.make_node("Einsum", ["x", "w"], ["y"], equation="ab,bc-")], [])
    with pytest.raises(UserError, match=r"does not end on this model .stopped after 1 s.: look for a damaged node"):
        _inferred(model)
