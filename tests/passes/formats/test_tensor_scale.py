"""A weight rounded by several chunks of columns has one grid, whatever the format; nvfp4's has one tensor scale.

Invariant: the grid is chosen from the whole weight before any chunk is read, so nothing that a chunk decides depends on
which columns are in it.
"""

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompile.passes import rounding
from qcompile.passes.affine import Grid
from qcompile.passes.base import Region
from qcompile.passes.formats import FORMATS, named
from qcompile.passes.formats.lower import lower
from qcompile.passes.gptq import ErrorCompensated, Gptq
from qcompile.passes.linears import constant
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy, typed
from qcompile.passes.rounding import chunks, fitted, round_to_nearest
from qcompile.passes.statistics import Statistics
from qcompile.runtime.sessions import run, session

K, WIDTH = 64, 32
NAMES = [own.name for own in FORMATS]


@pytest.fixture(autouse=True, scope="module")
def _small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "_WIDEST", WIDTH)
        patch.setattr(rounding, "_LEAST", WIDTH)
        yield


def _weight(sizes: list[int], seed: int) -> np.ndarray:
    """Normal numbers, (K, N): each chunk but the last 2^size as large; the last is half a chunk."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((K, WIDTH * len(sizes) - WIDTH // 2))
    return (w * np.repeat(2.0 ** np.array(sizes), WIDTH)[: w.shape[1]]).astype(np.float32)


def _grid(name: str, w: np.ndarray) -> Grid:
    made = typed(named(name).grid("qcompile"), ir.Value(name="w", const_value=ir.tensor(w)))
    assert isinstance(made, Grid)
    return made


def _statistics(seed: int, *, sample: bool) -> Statistics:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((512, K)) @ (np.eye(K) + 0.3 * rng.standard_normal((K, K)))).astype(np.float32)
    rows = {"sample": x, "rest": np.zeros(K, np.float32)} if sample else {}
    return Statistics(len(x), x.T @ x, np.abs(x).max(axis=0), **rows)


def _product(w: np.ndarray) -> ir.Model:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", K])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", w.shape[1]])
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="node")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(w, "w")])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(-8, 8), min_size=2, max_size=4), st.integers(0, 9))
def test_chunks_round_as_the_whole_does(name: str, sizes: list[int], seed: int) -> None:
    w = _weight(sizes, seed)
    assert len(chunks(*w.shape)) == len(sizes)
    spec = _grid(name, w)
    found, qparams = round_to_nearest(w, spec, None), spec.fit(w)
    assert found.spec == spec
    np.testing.assert_array_equal(found.qparams.scale, qparams.scale)
    np.testing.assert_array_equal(found.qparams.zero_point, qparams.zero_point)
    np.testing.assert_array_equal(found.codes, spec.project(w, qparams))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("sizes", [[0, 0], [-6, 0, 7], [7, 0, -6]])
def test_fitted_chunks_are_of_the_grid_that_the_whole_has(name: str, sample: bool, sizes: list[int]) -> None:
    """Its scales, refitted ones too, are what a file with the one grid holds; and it is worth what it is fitted to."""
    w, known = _weight(sizes, 1), _statistics(1, sample=sample)
    spec = _grid(name, w)
    found = fitted(w, spec, known, ErrorCompensated(), [])
    assert found is not None
    assert found.spec == spec
    np.testing.assert_array_equal(spec.storable(found.qparams.scale), found.qparams.scale)
    plain = round_to_nearest(w, spec, None)
    lost, before = (rounding.column_errors(own.dequantize() - w, known.gram) for own in (found, plain))
    assert lost.sum() < before.sum()


@pytest.mark.parametrize("by", ["pack", "gptq"])
@pytest.mark.parametrize("sizes", [[-5, 0, 6], [6, 0, -5]])
def test_nvfp4_of_several_chunks_has_one_tensor_scale(by: str, sizes: list[int]) -> None:
    """The largest weight chooses it, wherever it is; the file decodes by it to the values that its codes stand for."""
    w = _weight(sizes, 2)
    model, policy = _product(w), Policy(named("nvfp4").grid("qcompile"), None, None)
    region = Region.whole(model)
    if by == "gptq":
        region.statistics[model.graph.inputs[0]] = _statistics(2, sample=True)
        rounds = Gptq(policy)
        rounds.call(region)
        assert [decision.action for decision in rounds.decisions] == ["rounded"]
    Pack(policy).call(region)
    lower(model, "qcompile")
    (node,) = model.graph
    codes, scale = (constant(value).numpy() for value in node.inputs[1:3] if value is not None)
    values = np.asarray(codes).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    wanted = values * np.repeat(scales, 16, axis=0) * np.float32(2.0) ** (node.attributes["exponent"].as_int() + 3)
    made = session(ir.to_proto(model).SerializeToString(), threads=1, kernels="portable")
    np.testing.assert_array_equal(run(made, None, {"x": np.eye(K, dtype=np.float32)})[0], wanted)
    assert 56 <= scales.max() < 448, "of the block with the largest weight: a quarter of the largest number"
    for own in chunks(*w.shape):
        assert np.linalg.norm(wanted[:, own] - w[:, own]) < 0.2 * np.linalg.norm(w[:, own])
