"""Passes that no list names give way to the data: what a model is calibrated on is what it will meet."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.results.report import Report
from qcompile.compiler.walk.walk import Job
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import UserError


def _compiled(folder: Path, passes: str, batch: int, rows: int, past: int, hole: int | None = None) -> Report:
    """A decoder with caches, calibrated on so many rows behind so many cached ones of so many sequences.

    hole: where the first sequence has a token of padding.
    """
    ir.save(tiny_decoder(kv_cache=True, outliers=False), folder / "model.onnx")
    random = np.random.default_rng(0)
    feeds = {
        "input_ids": random.integers(0, 256, (batch, rows)),
        "attention_mask": np.ones((batch, past + rows), np.int64),
        "position_ids": np.tile(np.arange(past, past + rows), (batch, 1)),
    }
    if hole is not None:
        feeds["attention_mask"][0, hole] = 0
        feeds["position_ids"] = np.cumsum(feeds["attention_mask"], 1)[:, past:] - 1
    for i in range(2):
        for part in ("key", "value"):
            cache = random.standard_normal((batch, 2, past, 16)).astype(np.float32)
            feeds[f"past_key_values.{i}.{part}"] = cache
    recipe = Recipe(passes=parse_passes(passes), group_size=32)
    return compile_model(folder / "model.onnx", recipe, output=folder / "out.onnx", calibration=[feeds] * 4)


def _operators(folder: Path) -> set[str]:
    return {node.op_type for node in ir.load(folder / "out.onnx").graph}


@pytest.mark.parametrize("passes", ["pack", "smooth,awq,pack"])
def test_rows_behind_caches_of_several_sequences_keep_attention_plain(tmp_path: Path, passes: str) -> None:
    """GroupQueryAttention takes them for one sequence only; the compile was refused behind all its work."""
    report = _compiled(tmp_path, passes, 2, 4, 3)
    assert "GroupQueryAttention" not in _operators(tmp_path)
    (decision,) = report.decisions["fuse_attention"]
    assert decision.action == "kept"
    assert "4 rows behind 3 cached ones for 2 sequences" in decision.reason


@pytest.mark.parametrize(("batch", "hole"), [(1, 0), (1, 2), (1, 5), (2, 0), (2, 2), (2, 5)])
def test_padding_keeps_attention_plain(tmp_path: Path, batch: int, hole: int) -> None:
    """What padding gives would differ, though no score of a token does; the compile was refused for it."""
    report = _compiled(tmp_path, "pack", batch, 6, 0, hole)
    assert "GroupQueryAttention" not in _operators(tmp_path)
    assert "the data has padding" in report.decisions["fuse_attention"][0].reason


@pytest.mark.parametrize(("batch", "rows", "past"), [(1, 4, 3), (2, 1, 3), (2, 4, 0)])
def test_all_else_is_fused(tmp_path: Path, batch: int, rows: int, past: int) -> None:
    _compiled(tmp_path, "pack", batch, rows, past)
    assert "GroupQueryAttention" in _operators(tmp_path)


@pytest.mark.parametrize("passes", ["pack,fuse_attention", "pack,kv"])
def test_a_pass_that_is_listed_or_needed_is_refused_instead(
    tmp_path: Path, passes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the walk, which may take hours."""
    monkeypatch.setattr(Job, "walk", lambda *given: pytest.fail("it was walked"))
    with pytest.raises(UserError, match="pass fuse_attention: the data has 4 rows behind 3 cached ones"):
        _compiled(tmp_path, passes, 2, 4, 3)
    assert not (tmp_path / "out.onnx").exists()
