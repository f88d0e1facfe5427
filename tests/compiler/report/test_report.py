"""compiler/report/terminal.py: what is counted, and what JSON and the terminal show of it."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from qcompile.compiler.report.terminal import print_report
from qcompile.compiler.results.errors import NodeError, OutputError
from qcompile.compiler.results.report import Report
from qcompile.models.tiny import tiny_branch, tiny_conv, tiny_decoder
from qcompile.passes.base import Decision


def _decision(
    node: str, action: str, weights: int, *, kind: str = "MatMul", weight: str = "", **detail: Any
) -> Decision:
    reason = "int4 g32 asym" if action == "quantized" else f"{action} for a reason"
    return Decision(node, action, reason, {"kind": kind, "weights": weights, "weight": weight or node, **detail})


def _packed(node: str, weights: int, **options: Any) -> Decision:
    return _decision(node, "quantized", weights, **{"bytes": weights // 2, "bits_per_weight": 5.0, **options})


def _report(*decisions: Decision) -> Report:
    return Report("a.onnx", "hash", {}, {}, decisions={"pack": list(decisions)}, quantizers=("pack",))


@pytest.mark.parametrize(
    ("decisions", "coverage"),
    [
        ([], 1.0),
        ([_packed("a", 300), _decision("b", "skipped", 100)], 0.75),
        ([_packed("a", 300), _decision("b", "kept", 100)], 1.0),
        ([_packed("a", 300, weight="w"), _packed("b", 300, weight="w"), _decision("c", "skipped", 100)], 0.75),
        ([_packed("a", 300), _packed("e", 900, kind="Gather"), _decision("b", "skipped", 100)], 0.75),
        ([_packed("a", 300), Decision("conv", "skipped", "no format", {"kind": "Conv"})], 1.0),
    ],
    ids=["nothing", "skipped counts", "kept is the user's wish", "shared once", "lookups apart", "only MatMul"],
)
def test_coverage(decisions: list[Decision], coverage: float) -> None:
    assert _report(*decisions).coverage == coverage


def test_bits_per_weight_is_an_average_over_weights() -> None:
    report = _report(
        _packed("a", 300), _packed("b", 100, bits_per_weight=9.0), _packed("b2", 100, weight="b", bits_per_weight=9.0)
    )
    assert report.bits_per_weight == 6.0
    assert _report(_decision("a", "skipped", 10)).bits_per_weight is None


def test_json_has_null_for_what_is_no_number() -> None:
    """NaN and Infinity are no JSON: a strict reader refuses the whole file."""
    report = _report(
        _packed("a", 300, predicted_error=np.float32("inf"), shape=np.array([2, 3]), share=np.float64(0.5))
    )
    report.nodes = [NodeError("a", float("inf"), float("nan"))]
    report.recipe = {"limit": float("-inf"), "path": Path("a")}

    def refuse(word: str) -> None:
        raise AssertionError(word)

    plain = json.loads(report.to_json(), parse_constant=refuse)
    assert (plain["nodes"][0]["error"], plain["nodes"][0]["operator_error"]) == (None, None)
    assert plain["recipe"] == {"limit": None, "path": "a"}
    detail = plain["decisions"]["pack"][0]["detail"]
    assert (detail["predicted_error"], detail["shape"], detail["share"]) == (None, [2, 3], 0.5)


def test_json_holds_everything() -> None:
    report = _report(_packed("a", 300, predicted_error=0.25))
    report.nodes = [NodeError("a", 0.1, 1e-7)]
    report.outputs = [OutputError("y", 0.02, 0.999)]
    plain = json.loads(report.to_json())
    assert plain["nodes"] == [
        {"node": "a", "error": 0.1, "operator_error": 1e-7, "int8_error": None, "activation_bits": 16, "weights": 0}
    ]
    assert plain["outputs"] == [{"name": "y", "relative": 0.02, "cosine": 0.999, "error": None}]
    assert plain["decisions"]["pack"][0]["detail"]["predicted_error"] == 0.25
    assert (plain["coverage"], plain["bits_per_weight"]) == (1.0, 5.0)


def _shown(report: Report) -> str:
    console = Console(width=160, file=io.StringIO())
    print_report(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_model_without_float_weights_says_so() -> None:
    assert "coverage  there was no weight of a product to quantize" in _shown(_report())
    kept = _report(_decision("a", "kept", 100))
    assert "coverage  there was no weight of a product but those kept in float" in _shown(kept)


@pytest.mark.parametrize(("form", "column"), [("int4 g32 asym", "shared"), ("int8 g32 sym", "3.0")])
def test_a_tied_head_in_another_form_has_bytes_of_its_own(form: str, column: str) -> None:
    table = _packed("e", 2_000_000, kind="Gather", weight="w", bytes=1_000_000)
    head = Decision(
        "head", "quantized", form, {"kind": "MatMul", "weights": 2_000_000, "weight": "w", "bytes": 3_000_000}
    )
    row = next(line for line in _shown(_report(table, head)).splitlines() if "MatMul" in line and form in line)
    assert (column in row, "shared" in row) == (True, column == "shared")


def test_the_table_of_a_decoder(bench: Any) -> None:
    shown = _shown(bench.compile(bench.save(tiny_decoder()), "smooth,gptq,pack"))
    assert "coverage  100.0% of the MatMul weights quantized" in shown
    rows = {tuple(line.replace("│", " ").split()[:5]) for line in shown.splitlines()}
    assert ("14", "MatMul", "int4", "g32", "asym") in rows
    assert ("1", "MatMul", "int8", "g32", "asym") in rows
    assert ("1", "Gather", "int8", "g32", "asym") in rows
    assert "smooth    " in shown
    assert "gptq      " in shown
    assert "8 windows of 32 tokens from text.txt" in shown
    assert "output    logits: relative error" in shown
    assert "peak memory" in shown
    assert "the saved file reproduces the verified outputs" in shown


def test_activation_bits_are_counted_in_a_line() -> None:
    report = _report()
    report.nodes = [NodeError("a", 0.1, 0.0, 0.005, 8), NodeError("b", 0.1, 0.0, 0.09, 16)]
    assert "activations  1 nodes int8, 1 nodes 16 bit (int8 adds 0.12% of the squared weight error; at most 0.0050" in (
        _shown(report)
    )
    report.recipe["target"] = "matmulnbits"
    assert "activations  1 nodes level 4 (int8), 1 nodes level 0 (float) (int8 adds 0.12%" in _shown(report)
    report.nodes = [NodeError("a", 0.1, 0.0)]
    assert "activations" not in _shown(report)


def test_every_skipped_node_has_its_reason(bench: Any) -> None:
    for model, reasons in (
        (tiny_conv(), {"conv_0": "no packed format for Conv", "conv_1": "no packed format for Conv"}),
        (tiny_branch(), {}),
    ):
        report = bench.compile(bench.save(model, tokenizer=False), calibration=[], min_coverage=0)
        skipped = {d.node: d.reason for d in report.decisions["pack"] if d.action == "skipped"}
        assert skipped.keys() == reasons.keys()
        assert all(skipped[node].startswith(reason) for node, reason in reasons.items())
        assert all(reason in _shown(report) for reason in skipped.values())
