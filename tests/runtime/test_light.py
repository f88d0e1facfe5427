"""Operators of the native library that pack nothing: SwiGLU and embeddings, against float64 and their bodies."""

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native_models import native_library, open_session
from onnx import helper, numpy_helper

from qcompile.passes.formats import functions
from qcompile.passes.formats.base import pack_nibbles
from qcompile.passes.rotation import Rotation
from qcompile.runtime.sessions import session

Shape = tuple[int | str | None, ...]
TABLES = {
    "Int4": (4, True),
    "Int8": (8, True),
    "NF4": (4, False),
    "IQ4NL": (4, False),
}  # (bits of a code, whether there are zero points)


@pytest.fixture(scope="module")
def library() -> Path:
    return native_library()


@pytest.fixture(params=[False, True], ids=["float", "half"])
def kind(request: pytest.FixtureRequest) -> type[np.floating]:
    return np.float16 if request.param else np.float32


def _model(
    op: str, feeds: dict[str, np.ndarray], shapes: dict[str, Any], tensors: Any = (), **attributes: Any
) -> bytes:
    """One node y = op(feeds, tensors), with its body."""
    node = helper.make_node(op, [*feeds, *(t.name for t in tensors)], ["y"], "node_0", domain="qcompile", **attributes)
    types = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    inputs = [helper.make_tensor_value_info(name, types[name], shapes[name]) for name in feeds]
    last = helper.np_dtype_to_tensor_dtype(feeds["x"].dtype) if "x" in feeds else tensors[1].data_type
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("y", last, None)], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qcompile", 1)]
    body = ir.serde.serialize_function(functions.body(op))
    return helper.make_model(graph, opset_imports=opsets, functions=[body], ir_version=10).SerializeToString()


def _silu_times(x: np.ndarray) -> np.ndarray:
    gate, up = np.split(x.astype(np.float64), 2, -1)
    return np.asarray(gate / (1 + np.exp(-gate)) * up)


def _swiglu(x: np.ndarray, shape: Shape | None = None) -> bytes:
    return _model("SwiGLU", {"x": x}, {"x": shape})


@pytest.mark.parametrize("leading", [(), (0,), (1,), (17,), (2, 0, 3), (2, 3), (3, 2, 40)])
@pytest.mark.parametrize("n", [1, 7, 64, 600])
def test_swiglu_is_its_body(library: Path, kind: type, leading: tuple[int, ...], n: int) -> None:
    x = (np.random.default_rng(n).standard_normal((*leading, 2 * n)) * 4).astype(kind)
    (y,) = open_session(_swiglu(x), library, threads=2).run(None, {"x": x})
    (plain,) = session(_swiglu(x), kernels="portable", threads=1).run(None, {"x": x})
    limit = 1e-6 if kind is np.float32 else 1e-3
    assert (y.dtype, y.shape) == (plain.dtype, plain.shape) == (x.dtype, (*leading, n))
    np.testing.assert_allclose(y, _silu_times(x), rtol=limit, atol=limit / 100)
    # ONNX Runtime's Sigmoid is a fraction of polynomials, 1e-6 from the function.
    np.testing.assert_allclose(y, plain, rtol=4 * limit, atol=4 * limit + 2e-6 * float(abs(x).max(initial=0)) ** 2)


def test_every_instruction_set_gates_alike(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ctypes.CDLL(str(library))
    own.qcompile_kernels.restype = ctypes.c_char_p
    x = np.random.default_rng(0).standard_normal((40, 2 * 333)).astype(np.float32) * 5
    for name in own.qcompile_kernels().decode().split(","):
        monkeypatch.setenv("QCOMPILE_KERNEL", name)
        run = open_session(_swiglu(x), library, threads=2)
        (y,) = run.run(None, {"x": x})
        np.testing.assert_allclose(y, _silu_times(x), rtol=1e-6, atol=1e-8)
        for row in (0, 7, 39):  # the same bits in every batch
            np.testing.assert_array_equal(run.run(None, {"x": x[row : row + 1]})[0], y[row : row + 1])


def test_shapes_of_swiglu(library: Path) -> None:
    x = np.zeros((2, 3, 8), np.float32)

    def shape(*given: int | str | None) -> list[int | str]:
        return list(open_session(_swiglu(x, given), library).get_outputs()[0].shape)

    assert shape("a", "b", 8) == ["a", "b", 4]
    assert shape(4, 8) == [4, 4]
    first, second, last = shape(None, None, 8)
    assert (last, first != second) == (4, True)
    with pytest.raises(Exception, match=r"SwiGLU: x has shape \(2, 7\), its last dimension must be even"):
        open_session(_swiglu(x, ("a", "b")), library).run(None, {"x": np.zeros((2, 7), np.float32)})


def _hadamard(x: np.ndarray, matrix: np.ndarray, shape: Shape | None = None) -> bytes:
    return _model("Hadamard", {"x": x}, {"x": shape}, [numpy_helper.from_array(matrix, "matrix")])


def _matrix(block: int, kind: type = np.float32) -> np.ndarray:
    own = Rotation.of(block, seed=1)
    assert own is not None
    return own.matrix.astype(kind)


@pytest.mark.parametrize("leading", [(), (0,), (1,), (17,), (2, 0, 3), (2, 3), (300,)])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_hadamard_is_its_body(library: Path, kind: type, leading: tuple[int, ...], block: int) -> None:
    x = (np.random.default_rng(block).standard_normal((*leading, 3 * block)) * 4).astype(kind)
    model = _hadamard(x, _matrix(block, kind))
    (y,) = open_session(model, library, threads=2).run(None, {"x": x})
    (plain,) = session(model, kernels="portable", threads=1).run(None, {"x": x})
    assert (y.dtype, y.shape) == (plain.dtype, plain.shape) == (x.dtype, x.shape)
    wanted = x.reshape(-1, block).astype(np.float64) @ _matrix(block, kind).astype(np.float64)
    limit = 3e-6 if kind is np.float32 else 2e-2
    np.testing.assert_allclose(y, wanted.reshape(x.shape), rtol=0, atol=limit)
    np.testing.assert_allclose(plain, wanted.reshape(x.shape), rtol=0, atol=4 * limit)  # sums of 64, one after another


def test_every_instruction_set_turns_alike(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = ctypes.CDLL(str(library))
    own.qcompile_kernels.restype = ctypes.c_char_p
    x, found = np.random.default_rng(0).standard_normal((40, 576)).astype(np.float32), []
    for name in own.qcompile_kernels().decode().split(","):
        monkeypatch.setenv("QCOMPILE_KERNEL", name)
        run = open_session(_hadamard(x, _matrix(64)), library, threads=2)
        found.append(run.run(None, {"x": x})[0])
        for row in (0, 7, 39):  # the same bits in every batch
            np.testing.assert_array_equal(run.run(None, {"x": x[row : row + 1]})[0], found[-1][row : row + 1])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-5)


def test_what_hadamard_refuses(library: Path) -> None:
    x, matrix = np.zeros((2, 64), np.float32), _matrix(64)
    assert list(open_session(_hadamard(x, matrix, ("a", 64)), library).get_outputs()[0].shape) == ["a", 64]
    with pytest.raises(Exception, match=r"Hadamard: matrix has shape \(8, 8\), it must be \(B, B\)"):
        open_session(_hadamard(x, matrix[:8, :8]), library)
    matrix[3, 4] *= -1
    with pytest.raises(Exception, match="Hadamard: matrix is no Hadamard matrix with signs"):
        open_session(_hadamard(x, matrix), library)
    odd = _hadamard(x, _matrix(64), ("a", "b"))
    with pytest.raises(Exception, match=r"x has shape \(2, 32\), its last dimension must be a multiple of 64"):
        open_session(odd, library).run(None, {"x": x[:, :32]})


def _table(word: str, k: int, v: int, block_size: int, kind: type, seed: int = 0) -> list[onnx.TensorProto]:
    """What an embedding reads behind its indices."""
    bits, zeros = TABLES[word]
    rng, groups = np.random.default_rng(seed), -(-k // block_size)
    scale = rng.uniform(0.5, 2, (groups, v)).astype(kind)
    codes = {"w": (k, v)} | ({"zero_point": (groups, v)} if zeros else {})
    made = {name: _bytes(rng.integers(0, 1 << bits, shape).astype(np.uint8), bits) for name, shape in codes.items()}
    arrays = {"w": made["w"], "scale": scale} | ({"zero_point": made["zero_point"]} if zeros else {})
    return [numpy_helper.from_array(array, name) for name, array in arrays.items()]


def _bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return codes
    wide = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return pack_nibbles(wide).reshape(len(codes), -1)


def _signed(tensors: list[onnx.TensorProto]) -> list[onnx.TensorProto]:
    """The same bits as int8 codes and zero points, which qdq and dynamic write; the scales as they are."""
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    return [
        numpy_helper.from_array(array.view(np.int8) if array.dtype == np.uint8 else array, name)
        for name, array in arrays.items()
    ]


def _lookup(word: str, indices: np.ndarray, tensors: Any, block_size: int, shape: Shape | None = None) -> bytes:
    return _model(f"Embedding{word}", {"i": indices}, {"i": shape}, tensors, block_size=block_size)


@given(st.data())
def test_embeddings_are_their_bodies_bit_for_bit(library: Path, data: st.DataObject) -> None:
    word, kind = data.draw(st.sampled_from(list(TABLES))), data.draw(st.sampled_from([np.float32, np.float16]))
    k, v, block_size = (data.draw(st.integers(1, most)) for most in (70, 40, 80))
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    integers = data.draw(st.sampled_from([np.int32, np.int64]))
    indices = np.random.default_rng(data.draw(st.integers(0, 9))).integers(-v, v, shape).astype(integers)
    table = _table(word, k, v, block_size, kind)
    if word == "Int8" and data.draw(st.booleans()):
        table = _signed(table)
    model = _lookup(word, indices, table, block_size, shape)
    (y,) = open_session(model, library).run(None, {"i": indices})
    (plain,) = session(model, kernels="portable", threads=1).run(None, {"i": indices})
    assert y.dtype == kind
    np.testing.assert_array_equal(y, plain, strict=True)


@pytest.mark.parametrize("word", TABLES)
def test_many_indices_on_several_threads(library: Path, word: str) -> None:
    indices = np.random.default_rng(0).integers(-300, 300, (3, 200))
    model = _lookup(word, indices, _table(word, 200, 300, 64, np.float32), 64)
    (y,) = open_session(model, library, threads=2).run(None, {"i": indices})
    np.testing.assert_array_equal(y, session(model, kernels="portable").run(None, {"i": indices})[0])


def _damaged() -> Iterator[tuple[str, list[onnx.TensorProto], str]]:
    w, scale, zero_point = _table("Int8", 70, 12, 32, np.float32)
    short = numpy_helper.from_array(numpy_helper.to_array(scale)[:2], "scale")
    flat = numpy_helper.from_array(numpy_helper.to_array(w).reshape(-1), "w")
    narrow = numpy_helper.from_array(numpy_helper.to_array(zero_point)[:, :11], "zero_point")
    yield "scale", [w, short, zero_point], r"w \(70, 12\), scale \(2, 12\) and zero_point .* do not fit"
    yield "w", [flat, scale, zero_point], "must have 2 dimensions"
    yield "zero_point", [w, scale, narrow], r"zero_point \(3, 11\) with block_size 32 do not fit"


@pytest.mark.parametrize(("name", "tensors", "message"), _damaged())
def test_malformed_tables_are_refused(library: Path, name: str, tensors: Any, message: str) -> None:
    indices = np.zeros(2, np.int64)
    with pytest.raises(Exception, match=message):
        open_session(_lookup("Int8", indices, tensors, 32), library).run(None, {"i": indices})


@pytest.mark.parametrize("index", [12, -13, 2**40, -(2**63)])
def test_an_index_out_of_bounds_is_refused(library: Path, index: int) -> None:
    indices = np.array([0, index])
    run = open_session(_lookup("Int8", indices, _table("Int8", 70, 12, 32, np.float32), 32), library)
    with pytest.raises(Exception, match=f"index {index} is out of bounds, the table has 12 entries"):
        run.run(None, {"i": indices})


def test_shapes_of_embeddings(library: Path, kind: type) -> None:
    indices, tensors = np.zeros((1, 1), np.int64), _table("Int4", 70, 13, 32, kind)
    run = open_session(_lookup("Int4", indices, tensors, 32, ("a", "b")), library)
    assert run.get_outputs()[0].shape == ["a", "b", 70]
    assert run.get_outputs()[0].type == ("tensor(float16)" if kind is np.float16 else "tensor(float)")


@pytest.mark.parametrize("op", ["SwiGLU", "EmbeddingInt8"])
def test_nodes_of_later_versions_are_refused(library: Path, op: str) -> None:
    feeds = {"x": np.zeros((1, 4), np.float32)} if op == "SwiGLU" else {"i": np.zeros(1, np.int64)}
    tensors = () if op == "SwiGLU" else _table("Int8", 70, 12, 32, np.float32)
    given = {} if op == "SwiGLU" else {"block_size": 32}
    proto = onnx.load_from_string(_model(op, feeds, dict.fromkeys(feeds), tensors, **given))
    proto.graph.node[0].attribute.append(helper.make_attribute("version", 2))
    del proto.functions[:]
    with pytest.raises(Exception, match=f"{op}: the model needs operators version 2 of domain qcompile, this library"):
        open_session(proto.SerializeToString(), library)
