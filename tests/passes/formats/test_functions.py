"""The bodies of the qcompile operators, run by ONNX Runtime, against plain numpy in float64."""

from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from qcompile.passes.formats import functions
from qcompile.passes.formats.base import ACTIVATION_BITS, DOMAIN, pack_nibbles
from qcompile.runtime.sessions import run, session

# Relative to the largest output. Level 0 keeps float32 activations; ONNX Runtime's own choice rounds them to int8.
EXACT, INT8_ACTIVATIONS = 1e-5, 3e-2


def _operator(name: str, arrays: dict[str, tuple[np.ndarray, ir.DataType]], first: ir.Value, block: int) -> bytes:
    """A model of one qcompile node whose operands but the first are initializers, with its body."""
    values = []
    for key, (array, dtype) in arrays.items():
        if dtype.bitwidth == 4:
            tensor = ir.PackedTensor(pack_nibbles(array), dtype, shape=ir.Shape(array.shape))
        else:
            tensor = ir.Tensor(array, dtype)
        values.append(ir.val(key, const_value=tensor))
    node = ir.node(name, [first, *values], {"block_size": block}, domain=DOMAIN)
    (y,) = node.outputs
    y.name, y.dtype, y.shape = "y", values[1].dtype, ir.Shape([None, None, None])
    graph = ir.Graph([first], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    functions.register(model, name)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def _weight(k: int, n: int, block: int, *, bits: int, symmetric: bool, seed: int, dtype: type = np.float32) -> dict:
    """Random operands of a (k, n) weight; every code occurs where there is room."""
    rng, groups = np.random.default_rng(seed), -(-k // block)
    low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if symmetric else (0, 1 << bits)
    code_type = {(4, True): "INT4", (4, False): "UINT4", (8, True): "INT8", (8, False): "UINT8"}[bits, symmetric]
    small = np.int8 if symmetric else np.uint8
    codes = rng.permutation(np.resize(np.arange(low, high), k * n)).reshape(k, n).astype(small)
    scale = (rng.uniform(0.5, 2, (groups, n)) / high * rng.choice([-1, 1] if symmetric else [1], (groups, n))).astype(
        dtype
    )
    scale_type = ir.DataType.FLOAT if dtype is np.float32 else ir.DataType.FLOAT16
    operands = {"w": (codes, ir.DataType[code_type]), "scale": (scale, scale_type)}
    if not symmetric:
        operands["zero_point"] = (rng.integers(low, high, (groups, n)).astype(small), ir.DataType[code_type])
    return operands


def _decoded(operands: dict, block: int) -> np.ndarray:
    """(K, N) in float64, element by element as the table in functions.py says."""
    codes, scale = operands["w"][0], operands["scale"][0]
    zero = operands["zero_point"][0] if "zero_point" in operands else np.zeros(scale.shape)
    k, n = codes.shape
    rows = [
        [(float(codes[i, j]) - float(zero[i // block, j])) * float(scale[i // block, j]) for j in range(n)]
        for i in range(k)
    ]
    return np.array(rows).reshape(k, n)


def _matmul_model(operands: dict, block: int, bits: int) -> tuple[bytes, np.dtype]:
    kind = operands["scale"][1]
    x = ir.val("x", kind, ["batch", "sequence", operands["w"][0].shape[0]])
    return _operator(f"MatMulInt{bits}", operands, x, block), operands["scale"][0].dtype


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max(initial=0) / np.abs(wanted).max(initial=1e-30))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 80),
    st.integers(1, 33),
    st.sampled_from([16, 32, 64, 128, 256, None]),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.integers(0, 99),
)
@example(576, 33, 128, 4, False, 0)
@example(576, 32, 128, 4, True, 0)
@example(576, 7, 256, 8, False, 0)
@example(64, 48, 16, 4, False, 0)
@example(64, 48, 32, 4, True, 0)
@example(1, 1, 16, 4, False, 0)
def test_matmul_bodies(k, n, block, bits, symmetric, seed) -> None:
    """Plain (no optimization), and fused by ONNX Runtime at load, on float32 activations."""
    size = block or k
    operands = _weight(k, n, size, bits=bits, symmetric=symmetric, seed=seed)
    model, dtype = _matmul_model(operands, size, bits)
    x = np.random.default_rng(seed).standard_normal((2, 3, k)).astype(dtype)
    wanted = x.astype(np.float64) @ _decoded(operands, size)
    for options in ({"optimize": False}, {"accuracy_level": 0}):
        (found,) = run(session(model, threads=1, kernels="portable", **options), None, {"x": x})
        assert _relative(found, wanted) < EXACT, options


@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_reference_evaluator_agrees(bits) -> None:
    """A second implementation of the same body; it has no functions with inputs left out, as symmetric weights do."""
    operands = _weight(40, 5, 16, bits=bits, symmetric=False, seed=1)
    model, dtype = _matmul_model(operands, 16, bits)
    x = np.random.default_rng(0).standard_normal((2, 3, 40)).astype(dtype)
    (found,) = ReferenceEvaluator(onnx.ModelProto.FromString(model)).run(None, {"x": x})
    assert _relative(found, x.astype(np.float64) @ _decoded(operands, 16)) < EXACT


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_default_sessions_differ_by_int8_activations_only(bits, symmetric) -> None:
    import onnxruntime as ort

    operands = _weight(160, 48, 32, bits=bits, symmetric=symmetric, seed=2)
    model, dtype = _matmul_model(operands, 32, bits)
    x = np.random.default_rng(0).standard_normal((2, 3, 160)).astype(dtype)
    (found,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    assert _relative(found, x.astype(np.float64) @ _decoded(operands, 32)) < INT8_ACTIVATIONS


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision(bits, symmetric) -> None:
    operands = _weight(96, 10, 32, bits=bits, symmetric=symmetric, seed=3, dtype=np.float16)
    model, dtype = _matmul_model(operands, 32, bits)
    x = np.random.default_rng(0).standard_normal((2, 3, 96)).astype(dtype)
    (found,) = run(session(model, threads=1, kernels="portable"), None, {"x": x})
    assert found.dtype == np.float16
    assert _relative(found, x.astype(np.float64) @ _decoded(operands, 32)) < 1e-2


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_nibble_decodes_in_both_halves_of_a_byte(symmetric) -> None:
    """Identity times the weight is the weight: 16 codes in even columns, the same backwards in odd ones."""
    low = -8 if symmetric else 0
    codes = np.stack([np.arange(low, low + 16), np.arange(low, low + 16)[::-1], np.arange(low, low + 16)], axis=1)
    kind = ir.DataType.INT4 if symmetric else ir.DataType.UINT4
    operands = {"w": (codes, kind), "scale": (np.array([[1.0, 0.5, 2.0]], np.float32), ir.DataType.FLOAT)}
    if not symmetric:
        operands["zero_point"] = (np.array([[0, 7, 15]]), kind)
    model, _ = _matmul_model(operands, 16, 4)
    (found,) = run(
        session(model, threads=1, kernels="portable", optimize=False), None, {"x": np.eye(16, dtype=np.float32)[None]}
    )
    np.testing.assert_array_equal(found[0], _decoded(operands, 16))


def test_activations_keep_their_bits_where_no_node_says_how_many() -> None:
    bodies = [functions.body(f"{name}{bits}") for name in ("MatMulInt", "MatMulAddInt") for bits in (4, 8)]
    assert [own.attributes[ACTIVATION_BITS].value for own in bodies] == [16] * 4


def test_nibbles_are_low_first_and_padded_with_zero() -> None:
    np.testing.assert_array_equal(pack_nibbles(np.array([1, 15, 7], np.uint8)), [0xF1, 0x07])
    np.testing.assert_array_equal(pack_nibbles(np.array([[-1, -8], [7, 0]], np.int8)), [0x8F, 0x07])
    codes = np.random.default_rng(0).integers(0, 16, (5, 6))
    flat = [a | b << 4 for a, b in list(pairwise(codes.reshape(-1).tolist()))[::2]]
    assert pack_nibbles(codes).tolist() == flat
