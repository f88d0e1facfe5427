"""INT8 by whole compiles of tiny models: only attention's own products are left in float; the report is true."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from qdq_runs import redundant_pairs

from qcompile.models.tiny import tiny_conv, tiny_decoder, tiny_encoder, tiny_mlp

ROWS = np.random.default_rng(6).standard_normal((64, 48)).astype("f4")
IMAGES = np.random.default_rng(7).standard_normal((8, 3, 32, 32)).astype("f4")
# Model, arrays for calibration (text where there are none), the largest relative error of an output.
MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any], float]] = {
    "decoder": (tiny_decoder, {}, 0.1),
    "cache": (lambda: tiny_decoder(kv_cache=True), {}, 0.1),
    "untied": (lambda: tiny_decoder(tied=False), {}, 0.1),
    "encoder": (tiny_encoder, {}, 0.1),
    "mlp": (tiny_mlp, {"x": ROWS}, 0.1),
    "conv": (lambda: tiny_conv(opset=11), {"image": IMAGES}, 0.1),
}


def _compile(bench: Any, name: str, passes: str, **settings: Any) -> Any:
    make, arrays, _ = MODELS[name]
    source = bench.save(make(), tokenizer=not arrays)
    if arrays:
        np.savez(bench.folder / "data.npz", **arrays)
        settings["calibration"] = [str(bench.folder / "data.npz")]
    return bench.compile(source, passes, **settings)


def _optimized(path: Path) -> Counter[str]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(path.with_name("optimized.onnx"), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("passes", ["qdq", "smooth,qdq", "dynamic"])
@pytest.mark.parametrize("name", MODELS)
def test_products_become_integer(bench: Any, name: str, passes: str) -> None:
    report = _compile(bench, name, passes)
    assert report.coverage == 1
    assert 0 < max(output.relative for output in report.outputs) < MODELS[name][2]
    assert all(node.error < 0.15 for node in report.nodes)
    found = _optimized(bench.folder / "out" / "model.onnx")
    attention = 2 * 2 if name in ("decoder", "cache", "untied", "encoder") else 0  # two products in each of two layers
    assert found["MatMul"] + found["FusedMatMul"] <= attention
    assert found["Gemm"] == found["FusedGemm"] == 0
    assert passes == "dynamic" or found["Conv"] == found["FusedConv"] == 0  # there is no fast dynamic kernel of them
    proto = onnx.load(bench.folder / "out" / "model.onnx", load_external_data=False)
    assert redundant_pairs(proto) == []
    assert next(o.version for o in proto.opset_import if not o.domain) >= 21


@pytest.mark.parametrize(
    "options", ["provider=tensorrt", "activations=int8", "activations=uint16", "activations=float8"]
)
def test_other_grids(bench: Any, options: str) -> None:
    report = _compile(bench, "decoder", f"smooth,qdq({options})")
    assert report.coverage == 1
    assert max(output.relative for output in report.outputs) < 0.25


@pytest.mark.parametrize("operators", ["weights", "all"])
@pytest.mark.parametrize("name", ["decoder", "conv"])
def test_other_choices_of_operators(bench: Any, name: str, operators: str) -> None:
    report = _compile(bench, name, f"qdq(operators={operators})")
    assert max(output.relative for output in report.outputs) < 0.15
    assert redundant_pairs(onnx.load(bench.folder / "out" / "model.onnx", load_external_data=False)) == []


def test_half_precision(bench: Any) -> None:
    """Static: Q and DQ around float products. Dynamic: integer ones between Casts."""
    source = bench.save(tiny_decoder(dtype="fp16"))
    for passes in ("smooth,qdq", "dynamic"):
        report = bench.compile(source, passes)
        assert report.coverage == 1
        assert max(output.relative for output in report.outputs) < 0.1


def test_ranges_are_in_the_report(bench: Any) -> None:
    report = _compile(bench, "mlp", "qdq")
    assert len(report.ranges) == len({range.value for range in report.ranges}) > 0
    for range in report.ranges:
        assert range.low <= 0 <= range.high
        assert range.observed_low <= range.observed_high
        assert sum(range.counts) > 0


def test_tied_tables_are_on_disk_once(bench: Any) -> None:
    _compile(bench, "decoder", "smooth,qdq")
    tied = sum(path.stat().st_size for path in (bench.folder / "out").glob("*.data"))
    _compile(bench, "untied", "smooth,qdq", output="untied/model.onnx")
    untied = sum(path.stat().st_size for path in (bench.folder / "untied").glob("*.data"))
    assert untied - tied >= 256 * 64


@pytest.mark.parametrize("passes", ["smooth,qdq", "dynamic"])
def test_two_runs_give_the_same_bytes(bench: Any, passes: str) -> None:
    for folder in ("one", "two"):
        _compile(bench, "decoder", passes, output=f"{folder}/model.onnx")
    first, second = (sorted((bench.folder / folder).glob("model*")) for folder in ("one", "two"))
    kept = [path.name for path in first if ".report." not in path.name]
    assert kept == [path.name for path in second if ".report." not in path.name]
    for name in kept:
        assert (bench.folder / "one" / name).read_bytes() == (bench.folder / "two" / name).read_bytes()
