"""The bodies of EmbeddingInt4 and EmbeddingInt8: rows of the table by every kind of index, against numpy."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from qcompile.passes.formats import functions
from qcompile.passes.formats.base import DOMAIN, pack_nibbles
from qcompile.passes.formats.lower import lower
from qcompile.runtime.sessions import run, session


def _bytes(codes: np.ndarray) -> np.ndarray:
    """(R, V) as (R, ceil(V / 2)): element 2j in the low nibble of byte j, 2j + 1 in the high one."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return (even[:, ::2] | even[:, 1::2] << 4).astype(np.uint8)


def _table(
    v: int, k: int, block: int, bits: int, *, rank: int, index: type = np.int64, signed: bool = False, target: str = ""
) -> tuple[bytes, np.ndarray]:
    """(model of one lookup, lowered to a target if one is given, the decoded (V, K) table in float64)."""
    rng, groups = np.random.default_rng(v + 100 * k), -(-k // block)
    least, dtype = (-(1 << (bits - 1)), np.int8) if signed else (0, np.uint8)
    codes = rng.integers(least, least + (1 << bits), (k, v)).astype(dtype)
    zero = rng.integers(least, least + (1 << bits), (groups, v)).astype(dtype)
    scale = rng.uniform(0.01, 1, (groups, v)).astype(np.float32)
    group = np.arange(k) // block
    decoded = (codes.astype(np.float64) - zero[group]) * scale[group]
    stored = (_bytes(codes), scale, _bytes(zero)) if bits == 4 else (codes, scale, zero)
    names = ("w", "scale", "zero_point")
    values = [ir.val(name, const_value=ir.tensor(array)) for name, array in zip(names, stored, strict=True)]
    kind = ir.DataType.INT64 if index is np.int64 else ir.DataType.INT32
    indices = ir.val("indices", kind, [None] * rank)
    node = ir.node(f"EmbeddingInt{bits}", [indices, *values], {"block_size": block}, domain=DOMAIN)
    (y,) = node.outputs
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape([None] * (rank + 1))
    graph = ir.Graph([indices], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    functions.register(model, node.op_type)
    if target:
        lower(model, target)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return proto.SerializeToString(), decoded.T


def _check(model: bytes, table: np.ndarray, indices: np.ndarray) -> None:
    wanted = table[indices]
    for options in ({"optimize": False}, {}):
        (found,) = run(session(model, threads=1, kernels="portable", **options), None, {"indices": indices})
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from([16, 32, 64, None]), st.sampled_from([4, 8]))
@example(33, 70, 64, 4)
@example(2, 1, None, 4)
def test_every_row_by_both_of_its_indices(v, k, block, bits) -> None:
    """Odd and even vocabularies, partial groups; -V … -1 count from the end as Gather's do."""
    model, table = _table(v, k, block or k, bits, rank=1)
    _check(model, table, np.arange(-v, v))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.sampled_from([16, 32, 64, None]),
    st.sampled_from([(4, False), (8, False), (8, True)]),
    st.sampled_from(["qcompile", "qdq", "matmulnbits"]),
)
@example(33, 64, 64, (8, True), "matmulnbits")
@example(33, 48, None, (8, True), "matmulnbits")
def test_every_target_looks_up_the_same_rows(v, k, block, codes, target) -> None:
    """Signed codes have signed zero points, and one scale a row: `qdq` and `dynamic` write such tables. What has no
    operator there is inlined.
    """
    bits, signed = codes
    model, table = _table(v, k, block or k, bits, rank=1, signed=signed, target=target)
    _check(model, table, np.arange(v))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(), (3,), (2, 4), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_index_shapes(shape, bits) -> None:
    model, table = _table(21, 24, 16, bits, rank=len(shape))
    _check(model, table, np.random.default_rng(0).integers(-21, 21, shape))


@pytest.mark.parametrize("bits", [4, 8])
def test_indices_of_32_bits(bits) -> None:
    model, table = _table(9, 20, 16, bits, rank=2, index=np.int32)
    _check(model, table, np.array([[0, 8, -1], [3, -9, 5]], np.int32))


@pytest.mark.parametrize("bits", [4, 8])
def test_indices_beyond_the_vocabulary_fail(bits) -> None:
    """They must not wrap around into other rows; 10 would be the padding of byte 5."""
    model, _ = _table(9, 20, 16, bits, rank=1)
    made = session(model, threads=1, kernels="portable")
    for index in (9, 10, -10, -11):
        with pytest.raises(ValueError, match="failed on inputs"):
            run(made, None, {"indices": np.array([index])})


@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_reference_evaluator_agrees(bits) -> None:
    model, table = _table(11, 20, 16, bits, rank=2)
    indices = np.array([[0, 10, 5], [1, 2, 3]])
    (found,) = ReferenceEvaluator(onnx.ModelProto.FromString(model)).run(None, {"indices": indices})
    np.testing.assert_allclose(found, table[indices], rtol=1e-6, atol=1e-6)


def test_the_byte_form_is_the_nibble_form() -> None:
    """With an even vocabulary both are the same bytes, so that a tied pair is stored once."""
    codes = np.random.default_rng(0).integers(0, 16, (6, 10)).astype(np.uint8)
    np.testing.assert_array_equal(_bytes(codes).reshape(-1), pack_nibbles(codes))
