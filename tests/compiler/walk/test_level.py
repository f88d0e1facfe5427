"""compiler/walk/level.py: what `--verify` leaves out is told, and what it keeps still finds faults."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler import Recipe, compile_model
from qcompile.compiler.files.load import save_model
from qcompile.compiler.plan import HELD, planned
from qcompile.compiler.settings.steps import parse_passes
from qcompile.compiler.walk import level, verify_products
from qcompile.compiler.walk.level import LARGE, level_of
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import UserError
from qcompile.passes.formats import integers

# Blocks of a column each: a sample is one of eight columns and the last one.
_ONE_COLUMN = 1


def _passes(words: str) -> Any:
    return planned(Recipe(passes=parse_passes(words)), HELD).passes


def test_a_sample_is_the_default_of_large_models_that_are_not_calibrated() -> None:
    for words, size, wanted in (
        ("pack", LARGE, "full"),
        ("pack", 2 * LARGE, "sample"),
        ("awq,pack", 2 * LARGE, "full"),
        ("qdq", 2 * LARGE, "full"),
        ("dynamic", 2 * LARGE, "sample"),
    ):
        assert level_of("auto", int(size), _passes(words)) == wanted, words
    assert level_of("none", 0, _passes("pack")) == "none"
    with pytest.raises(UserError, match="--verify 'som' is not known; choose one of auto, full, sample, none"):
        level_of("som", 0, _passes("pack"))


@pytest.mark.parametrize("passes", ["pack", "awq,pack", "smooth,qdq", "dynamic", "pack,kv"])
def test_every_level_writes_the_same_codes_and_tells_what_it_did(bench: Any, passes: str) -> None:
    source = bench.save(tiny_decoder(kv_cache="kv" in passes))
    words, files = {}, {}
    for own in ("full", "sample", "none"):
        report = bench.compile(source, passes, verify=own, activations=16)
        words[own], (data,) = report.verified, (bench.folder / "out").glob("*.data")
        files[own] = data.read_bytes()
        assert bool(report.outputs) == bool(report.nodes) == (own != "none")
        assert all(node.error > 0 for node in report.nodes)
    assert files["full"] == files["sample"] == files["none"]
    assert (
        words["full"] == "every packed product on all its columns; the saved file byte by byte, and run in one session"
    )
    assert words["sample"].startswith("every packed product on one of 8 blocks of its columns (--verify full: on all)")
    assert words["none"].startswith("nothing was run (--verify none)")


def test_a_sample_tells_about_the_same_errors(bench: Any) -> None:
    """From 128 columns on, of which an eighth is compared and the last block."""
    source = bench.save(tiny_decoder(layers=1, hidden=256, heads=4, kv_heads=2, ffn=512))
    full, sample = (bench.compile(source, "pack", verify=own) for own in ("full", "sample"))
    for a, b in zip(full.nodes, sample.nodes, strict=True):
        assert a.node == b.node
        assert b.error == pytest.approx(a.error, rel=0.3)


def test_a_sample_has_few_random_tokens(tmp_path: Path) -> None:
    """Not where speed is measured on them."""
    save_model(tiny_decoder(layers=1, kv_cache=True), tmp_path / "m.onnx")
    recipe = Recipe(passes=parse_passes("pack"))
    for own, speed, wanted in (
        ("full", False, "4 batches of 47 rows of random"),
        ("sample", False, "2 batches of 15 rows of random"),
        ("sample", True, "4 batches of 47 rows of random"),
    ):
        report = compile_model(tmp_path / "m.onnx", recipe, output=tmp_path / "o.onnx", verify=own, bench=speed)
        assert report.measured.startswith(wanted), (own, report.measured)
        assert report.outputs


@pytest.mark.parametrize(("column", "found"), [(0, True), (8, True), (-1, True), (3, False)])
def test_a_sample_covers_what_it_says(bench: Any, monkeypatch: pytest.MonkeyPatch, column: int, found: bool) -> None:
    """A wrong code in a column that is compared is found, one in another column is not; in full all are."""
    original = integers.add_codes

    def broken(model: ir.Model, name: str, codes: Any, dtype: ir.DataType) -> ir.Value:
        if "up_proj" in name:
            codes = np.array(codes)
            codes[0, column] ^= 1 << (dtype.bitwidth - 1)
        return original(model, name, codes, dtype)

    monkeypatch.setattr(verify_products, "ELEMENTS", _ONE_COLUMN)
    monkeypatch.setattr(integers, "add_codes", broken)
    source = bench.save(tiny_decoder(layers=1))
    with pytest.raises(UserError, match="the packed operator differs from its own weights"):
        bench.compile(source, "pack", verify="full")
    if found:
        with pytest.raises(UserError, match="the packed operator differs from its own weights"):
            bench.compile(source, "pack", verify="sample")
    else:
        assert bench.compile(source, "pack", verify="sample").nodes


def test_none_is_refused_where_measures_are_asked_for(bench: Any) -> None:
    source = bench.save(tiny_decoder(layers=1))
    for asked, what in (({"bench": True}, "--bench"), ({"keep_worst": 1}, "mixed precision")):
        with pytest.raises(UserError, match=f"--verify none measures nothing, and {what} needs measures"):
            bench.compile(source, "dynamic", verify="none", **asked)
    assert level.SHARE == 8
