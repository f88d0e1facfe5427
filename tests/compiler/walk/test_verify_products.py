"""compiler/walk/verify_products.py: errors of packed products, whatever the blocks and however rows are collected."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.compiler.results.errors import NodeError
from qcompile.compiler.walk import verify_products
from qcompile.compiler.walk.verify_products import compared
from qcompile.models.tiny import tiny_decoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.affine import Quantized
from qcompile.passes.errors import UserError
from qcompile.passes.formats import integers
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.spec import PerGroup, QuantSpec

# Blocks that divide none of the widths 32, 48, 64, 160, 256 evenly, of rows 64 and 160.
ELEMENTS = 27 * 64


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 9), k=st.integers(1, 70), n=st.integers(1, 40))
def test_sums_are_those_of_whole_products(dtype: Any, seed: int, m: int, k: int, n: int) -> None:
    """Against float64 products of the whole matrices, for any shapes and blocks, with a wrong number among y's."""
    rng = np.random.default_rng(seed)
    x, change = (rng.standard_normal((m, k)).astype(np.float32) for _ in range(2))
    weight = rng.standard_normal((k, n)).astype(dtype)
    quantized = round_to_nearest(weight.astype(np.float32), QuantSpec(4, PerGroup(32)), None)
    decoded = quantized.dequantize().astype(np.float64)
    y = (x @ decoded).astype(np.float32)
    y[rng.integers(m), rng.integers(n)] += 5
    wanted = x.astype(np.float64) @ weight.astype(np.float64)
    parts = (y - wanted, wanted, y - x @ decoded, x @ decoded, change @ decoded)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_products, "ELEMENTS", int(rng.integers(1, k * n + 1)))
        found = compared(x, y, weight, quantized, change)
        without = compared(x, y, weight, quantized)
    np.testing.assert_allclose(found, [np.square(part).sum() for part in parts], rtol=1e-4, atol=1e-8)
    np.testing.assert_allclose(without, [*found[:4], 0], rtol=1e-6, atol=1e-8)


def _nodes(bench: Any, source: Any, **settings: Any) -> list[NodeError]:
    found: list[NodeError] = bench.compile(source, **settings).nodes
    return found


@pytest.mark.parametrize("settings", [{}, {"bits": 8}, {"symmetric": True, "activations": 16}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_errors_do_not_depend_on_blocks(bench: Any, monkeypatch: pytest.MonkeyPatch, dtype: Any, settings: Any) -> None:
    """The tied head's weight is a transposed view; q, k and v share the rows of x, and their int8 change."""
    source = bench.save(tiny_decoder(layers=1, dtype=dtype))
    whole = _nodes(bench, source, **settings)
    monkeypatch.setattr(verify_products, "ELEMENTS", ELEMENTS)
    monkeypatch.setattr(verify_products, "ROWS", 1)  # compared behind each batch
    blocks = _nodes(bench, source, **settings)
    assert [node.node for node in blocks] == [node.node for node in whole]
    for a, b in zip(whole, blocks, strict=True):
        assert b.error == pytest.approx(a.error, rel=1e-4), a.node
        assert (b.int8_error or 0) == pytest.approx(a.int8_error or 0, rel=1e-4), a.node
        assert b.operator_error == pytest.approx(a.operator_error, rel=0.5, abs=1e-6), a.node
    assert all((node.int8_error is None) == ("activations" in settings) for node in (*whole, *blocks))


def test_no_weight_is_decoded_as_a_whole(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The point of it: neither here nor in the graph is there a second or third copy of the weight."""
    b = Builder(opset=21)
    w = np.random.default_rng(0).standard_normal((40, 100)).astype(np.float32)
    source = bench.save(b.model({"y": b.MatMul(b.input("x", b.dtype, ["b", 40]), b.weight("w", w))}), tokenizer=False)
    copies: list[tuple[int, ...]] = []
    own = Quantized.dequantize

    def counted(quantized: Quantized) -> Any:
        copies.append(quantized.codes.shape)
        return own(quantized)

    monkeypatch.setattr(Quantized, "dequantize", counted)
    monkeypatch.setattr(verify_products, "ELEMENTS", 27 * 40)
    _nodes(bench, source, calibration=[])
    assert sorted(copies) == [(40, 19), (40, 27), (40, 27), (40, 27)]


@pytest.mark.parametrize("elements", [ELEMENTS, 1 << 20])
def test_one_wrong_code_in_the_last_columns_is_found(
    bench: Any, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    original = integers.add_codes

    def broken(model: ir.Model, name: str, codes: Any, dtype: ir.DataType) -> ir.Value:
        codes = codes.copy()
        codes[0, -1] ^= 1 << (dtype.bitwidth - 1)
        return original(model, name, codes, dtype)

    source = bench.save(tiny_decoder(layers=1))
    monkeypatch.setattr(integers, "add_codes", broken)
    monkeypatch.setattr(verify_products, "ELEMENTS", elements)
    with pytest.raises(UserError, match="the packed operator differs from its own weights"):
        _nodes(bench, source)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_ratio_never_hides_a_nan(bad: float) -> None:
    ratio = verify_products.ratio
    assert ratio(2e-9, 2.0) == pytest.approx(1e-9**0.5)
    assert ratio(bad, 1.0) == ratio(1.0, bad) == np.inf
    assert (ratio(0.0, 0.0), ratio(1e-9, 0.0)) == (0, 1)
