"""passes/observers: what the inserted reductions give, against numpy on the same activations."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from threadpoolctl import threadpool_limits

from qcompile.passes.algebra import mirror
from qcompile.passes.errors import UserError
from qcompile.passes.observers import gram
from qcompile.passes.observers import nodes as observers
from qcompile.passes.observers.gram import Gram
from qcompile.runtime.sessions import run, session

K = 7
SHAPES = [(5, K), (2, 3, K), (2, 3, 2, K), (1, 1, K), (K,)]
TYPES = {np.float32: TensorProto.FLOAT, np.float16: TensorProto.FLOAT16}


def _graph(names: list[str], rank: int, dtype: type) -> onnx.ModelProto:
    """Each value is the negation of an input `<name>_in`, so that it is the output of a node."""
    dims = [None] * (rank - 1) + [K]
    inputs = [helper.make_tensor_value_info(f"{name}_in", TYPES[dtype], dims) for name in names]
    nodes = [helper.make_node("Neg", [f"{name}_in"], [name]) for name in names]
    graph = helper.make_graph(nodes, "g", inputs, [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _run(model: onnx.ModelProto, names: list[str], feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    made = session(model.SerializeToString(), threads=1)
    return dict(zip(names, run(made, names, feeds), strict=True))


def _activation(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * np.arange(1, K + 1)).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_statistics_are_numpy_s(shape, dtype) -> None:
    model = _graph(["x"], len(shape), dtype)
    own = Gram("x")
    own.append(model.graph)
    (wanted,) = [output.name for output in model.graph.output]
    x = _activation(shape, dtype)
    own.update(_run(model, [wanted], {"x_in": -x}))
    rows, found = x.reshape(-1, K).astype(np.float64), own.statistics
    limit = {"rtol": 1e-5, "atol": 1e-5 * np.square(rows).sum()}
    np.testing.assert_allclose(found.gram, rows.T @ rows, **limit)
    np.testing.assert_array_equal(found.absmax, np.abs(rows).max(axis=0).astype(np.float32))
    assert found.rows == len(rows)
    np.testing.assert_array_equal(found.sample, rows.astype(np.float32))
    assert not found.rest.any()
    assert {found.gram.dtype, found.absmax.dtype, found.sample.dtype} == {np.dtype(np.float32)}


def test_half_precision_activations_are_summed_in_single() -> None:
    """600 · 200² is far beyond float16."""
    model = _graph(["x"], 2, np.float16)
    own = Gram("x")
    own.append(model.graph)
    own.update(_run(model, ["x.seen"], {"x_in": np.full((600, K), 200, np.float16)}))
    np.testing.assert_allclose(own.gram, 600 * 200.0**2, rtol=1e-6)


def test_rows_without_a_finite_number_count_as_zeros_and_others_are_refused() -> None:
    x = _activation((6, K), np.float32)
    own, wanted = Gram("x"), np.where(np.arange(6)[:, None] == 2, np.float32(0), x)
    lost = np.where(np.arange(6)[:, None] == 2, np.float32(np.nan), x)
    lost[2, 1] = -np.inf
    own.update({"x.seen": lost})
    np.testing.assert_allclose(own.gram, wanted.T @ wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(own.statistics.sample, wanted)
    lost[2, 1] = 1
    with pytest.raises(UserError, match="NaN or infinite"):
        Gram("x").update({"x.seen": lost})


def test_several_values_of_one_graph() -> None:
    model = _graph(["x", "y"], 3, np.float32)
    watched = [Gram(value) for value in ("x", "y")]
    for own in watched:
        own.append(model.graph)
    names = [output.name for output in model.graph.output]
    x, y = _activation((2, 4, K), np.float32), _activation((2, 4, K), np.float32, 1)
    found = _run(model, names, {"x_in": -x, "y_in": -y})
    for own, rows in zip(watched, (x.reshape(-1, K), y.reshape(-1, K)), strict=True):
        own.update(found)
        product = rows.T @ rows
        np.testing.assert_allclose(own.gram, product, rtol=0, atol=1e-4 * np.abs(product).max())


def test_the_observed_graph_still_gives_its_outputs() -> None:
    model = _graph(["x"], 2, np.float32)
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, K]))
    Gram("x").append(model.graph)
    x = _activation((4, K), np.float32)
    np.testing.assert_array_equal(_run(model, ["x"], {"x_in": -x})["x"], x)


@pytest.mark.parametrize("dtype", TYPES)
def test_compare(dtype) -> None:
    rng = np.random.default_rng(0)
    model = _graph(["x"], 3, dtype)
    x = _activation((2, 3, K), dtype)
    y = (x + 0.1 * rng.standard_normal(x.shape)).astype(dtype)
    model.graph.input.append(helper.make_tensor_value_info("y", TYPES[dtype], [None, None, K]))
    names = observers.compare(model.graph, "y", "x", ".fc")
    assert names == [observers.difference("y", ".fc"), observers.reference("y", ".fc")]
    found = _run(model, names, {"x_in": -x, "y": y})
    assert found[names[0]] == pytest.approx(np.square(y.astype(np.float64) - x).sum(), rel=1e-4)
    assert found[names[1]] == pytest.approx(np.square(x, dtype=np.float64).sum(), rel=1e-5)


class _Counted(list):
    """A list that counts what slices of it give."""

    looked = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        self.looked += len(found) if isinstance(index, slice) else 1
        return found


def test_names_are_found_in_the_time_of_what_was_appended() -> None:
    graph = SimpleNamespace(node=_Counted(), initializer=_Counted())
    for i in range(100):
        observers.by_channel(graph, f"x{i}", None)
        observers.by_channel(graph, f"x{i}", None)
        assert observers.has(graph, f"x{i}.flat")
    assert graph.node.looked == len(graph.node)
    assert graph.initializer.looked == len(graph.initializer) == 3


def test_names_are_those_of_the_graph_that_is_asked() -> None:
    first, second = _graph(["a"], 2, np.float32).graph, _graph(["b"], 2, np.float32).graph
    assert observers.has(first, "a")
    assert not observers.has(second, "a")
    second.node.append(helper.make_node("Neg", ["b"], ["a"]))
    assert observers.has(second, "a")
    del second.node[:]
    assert not observers.has(second, "a")


@pytest.mark.parametrize("batches", [3, 4, 7])
def test_blas_s_threads_change_no_bit_of_what_is_held(batches: int) -> None:
    """Rows that no whole unit has are multiplied when the matrix is read, wherever that is."""
    rng, made = np.random.default_rng(0), []
    data = [rng.standard_normal((1, 201, 700), np.float32) for _ in range(batches)]
    for most in (1, 2, 4):
        own = Gram("x")
        with threadpool_limits(most, "blas"):
            for rows in data:
                own.update({"x.seen": rows})
            made.append(own.state()["gram"])
    assert all(np.array_equal(made[0], own) for own in made)


def test_a_matrix_is_made_once_for_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that is not at its end is added to the total for each who reads it."""
    own, made = Gram("x"), list[int]()
    for _ in range(6):
        own.update({"x.seen": np.ones((5, 3), np.float32)})
    monkeypatch.setattr(gram, "mirror", lambda matrix: made.append(len(matrix)) or mirror(matrix))
    assert own.statistics is not None
    np.testing.assert_array_equal(own.statistics.gram, np.full((3, 3), 30))
    assert made == [3] * 2, "one for each time"
