"""compiler/walk/verify_wide.py: comparing in blocks of columns gives what comparing in the graph gives."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler.results.errors import NodeError
from qcompile.compiler.walk import verify_wide
from qcompile.models.tiny import tiny_decoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.affine import Quantized
from qcompile.passes.errors import UserError
from qcompile.passes.formats import integers

# Blocks that divide none of the widths 32, 48, 64, 160, 256 evenly, and leave none of them narrow.
COLUMNS = 27


def _nodes(bench: Any, source: Any, monkeypatch: pytest.MonkeyPatch, columns: int, **settings: Any) -> list[NodeError]:
    monkeypatch.setattr(verify_wide, "COLUMNS", columns)
    found: list[NodeError] = bench.compile(source, **settings).nodes
    return found


@pytest.mark.parametrize("settings", [{}, {"bits": 8}, {"symmetric": True, "activations": 16}], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_errors_are_those_of_the_graph(bench: Any, monkeypatch: pytest.MonkeyPatch, dtype: Any, settings: Any) -> None:
    """The tied head's weight is a transposed view; q, k and v share the rows of x, and their int8 change."""
    source = bench.save(tiny_decoder(layers=1, dtype=dtype))
    whole, blocks = (_nodes(bench, source, monkeypatch, columns, **settings) for columns in (4096, COLUMNS))
    assert [node.node for node in blocks] == [node.node for node in whole]
    for a, b in zip(whole, blocks, strict=True):
        assert b.error == pytest.approx(a.error, rel=1e-4), a.node
        assert (b.int8_error or 0) == pytest.approx(a.int8_error or 0, rel=1e-4), a.node
        assert b.operator_error == pytest.approx(a.operator_error, rel=0.5, abs=1e-6), a.node
    assert all((node.int8_error is None) == ("activations" in settings) for node in (*whole, *blocks))


def test_only_rows_leave_the_run(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The point of it: no second or third copy of the weight is built in the graph."""
    b = Builder(opset=21)
    w = np.random.default_rng(0).standard_normal((40, 100)).astype(np.float32)
    source = bench.save(b.model({"y": b.MatMul(b.input("x", b.dtype, ["b", 40]), b.weight("w", w))}), tokenizer=False)
    copies: list[tuple[int, ...]] = []
    own = Quantized.dequantize

    def counted(quantized: Quantized) -> Any:
        copies.append(quantized.codes.shape)
        return own(quantized)

    monkeypatch.setattr(Quantized, "dequantize", counted)
    _nodes(bench, source, monkeypatch, COLUMNS, calibration=[])
    assert copies == [(40, 27), (40, 27), (40, 27), (40, 19)]


def test_one_wrong_code_in_the_last_columns_is_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = integers.add_codes

    def broken(model: ir.Model, name: str, codes: Any, dtype: ir.DataType) -> ir.Value:
        codes = codes.copy()
        codes[0, -1] ^= 1 << (dtype.bitwidth - 1)
        return original(model, name, codes, dtype)

    source = bench.save(tiny_decoder(layers=1))
    monkeypatch.setattr(integers, "add_codes", broken)
    with pytest.raises(UserError, match="the packed operator differs from its own weights"):
        _nodes(bench, source, monkeypatch, COLUMNS)
