"""bias_correction: mean errors leave the outputs, int32 and float biases alike, and what has no bias says so."""

import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from preparing import parse
from preparing import run as run_model

from qcompile.compiler.api.calibrate import calibrate_model
from qcompile.compiler.files.load import load_model
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.models.tiny import tiny_decoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.base import Region
from qcompile.passes.bias_correction import BiasCorrection, _own_bias, levels
from qcompile.passes.held import NOT_CONFIRMED
from qcompile.passes.observers.mean import PARTS
from qcompile.passes.state import remember
from qcompile.runtime.sessions import run, session

K, N, IMAGE = 32, 24, 12
# Inputs above zero and few bits of range for them: what rounding shifts does not cancel.
PASSES = "qdq(weights=tensor)"


def _linear(bias: str | None, shape: tuple, *, dtype: str = "fp32") -> ir.Model:
    """x (…, 32) → product (24) → bias → y."""
    random = np.random.default_rng(0)
    b = Builder(opset=21, dtype=dtype)
    x = b.input("x", b.dtype, list(shape))
    w = b.weight("w", (random.standard_normal((K, N)) * np.geomspace(0.01, 1, N)).astype(np.float32))
    y = b.MatMul(x, w, name="product")
    if bias is not None:
        y = b.Add(y, b.weight("bias", random.standard_normal(N).astype(np.float32)), name="add")
    return b.model({"y": y})


def _convolution(*, bias: bool) -> ir.Model:
    """x (…, 3, 12, 12) → Conv 8 → Relu → Conv 8 → y."""
    random = np.random.default_rng(0)
    b = Builder(opset=21)
    value = b.input("x", b.dtype, ["b", 3, IMAGE, IMAGE])
    for i, channels in enumerate((3, 8)):
        w = (random.standard_normal((8, channels, 3, 3)) * np.geomspace(0.05, 1, 8).reshape(-1, 1, 1, 1)).astype("f")
        given = [b.weight(f"b{i}", random.standard_normal(8).astype("f"))] if bias else []
        value = b.Conv(value, b.weight(f"w{i}", w), *given, name=f"conv{i}")
        value = b.Relu(value, name="relu") if i == 0 else value
    return b.model({"y": value})


def _data(folder: Path, *shape: int, dtype: str = "float32") -> tuple[list[str], np.ndarray]:
    x = np.random.default_rng(1).gamma(1.0, 1.0, shape).astype(dtype)
    np.savez(folder / "data.npz", x=x)
    return [str(folder / "data.npz")], x


def _shift(bench, file: str, x: np.ndarray) -> float:
    """‖mean error of each channel‖ of a compiled model's y on x, against the float model."""
    found, wanted = (
        run(session(path, threads=1, kernels="portable"), ["y"], {"x": x})[0].astype(np.float64)
        for path in (bench.folder / "out" / file, bench.folder / "in" / "model.onnx")
    )
    axes = (0, 2, 3) if found.ndim == 4 else tuple(range(found.ndim - 1))
    return float(np.linalg.norm((found - wanted).mean(axis=axes)))


def _both(bench, model: ir.Model, data: tuple[list[str], np.ndarray], options: str = ""):
    """The shifts without and with the correction, and its decisions."""
    path, files = bench.save(model, tokenizer=False), data[0]
    bench.compile(path, PASSES, calibration=files, output="out/plain.onnx")
    report = bench.compile(path, f"{PASSES},bias_correction{options}", calibration=files)
    plain, corrected = (_shift(bench, file, data[1]) for file in ("plain.onnx", "model.onnx"))
    return plain, corrected, report


@pytest.mark.parametrize(
    ("shape", "batch"), [(("b", "s", K), (60, 7, K)), ((60, 7, K), (60, 7, K)), ((60, K), (60, K))], ids=str
)
def test_the_bias_behind_a_product_takes_the_shift(bench, tmp_path, shape, batch) -> None:
    """Symbolic shapes keep a bias (N,), known ones have (1, 1, N), rank 2 a Gemm with int32 codes."""
    plain, corrected, report = _both(bench, _linear("bias", shape), _data(tmp_path, *batch))
    (decision,) = report.decisions["bias_correction"]
    assert decision.action == "corrected"
    assert re.match(r"bias_correction: the outputs on \d+ samples held aside confirm a gain: \+", *report.trials)
    assert 0 < decision.detail["shift"] < 0.1
    assert plain > 1e-3
    assert corrected < 0.05 * plain


@pytest.mark.parametrize("bias", [True, False])
def test_convolutions(bench, tmp_path, bias) -> None:
    """int32 codes, requantized; and a bias where there was none."""
    plain, corrected, report = _both(bench, _convolution(bias=bias), _data(tmp_path, 20, 3, IMAGE, IMAGE))
    assert [d.action for d in report.decisions["bias_correction"]] == ["corrected"] * 2
    assert corrected < 0.4 * plain
    model = load_model(bench.folder / "out" / "model.onnx")
    biases = [node.inputs[2] for node in model.graph if node.op_type == "Conv"]
    kinds = {value.producer().op_type if value.producer() is not None else "initializer" for value in biases}
    assert kinds == ({"DequantizeLinear"} if bias else {"initializer"})
    if bias:
        assert {value.producer().inputs[0].const_value.dtype for value in biases} == {ir.DataType.INT32}


def test_a_product_without_a_bias(bench, tmp_path) -> None:
    """Skipped with its reason, or given an Add; the output keeps its name."""
    data = _data(tmp_path, 60, 7, K)
    plain, corrected, report = _both(bench, _linear(None, ("b", "s", K)), data)
    assert [d.reason for d in report.decisions["bias_correction"]] == ["it has no bias, insert=true would add one"]
    assert corrected == plain
    plain, corrected, report = _both(bench, _linear(None, ("b", "s", K)), data, "(insert=true)")
    assert [d.action for d in report.decisions["bias_correction"]] == ["corrected"]
    assert corrected < 0.05 * plain
    assert [node.node for node in report.nodes] == ["product"]
    refused = _both(bench, _linear(None, (60, K)), _data(tmp_path, 60, K), "(insert=true)")[2]
    reason = "a product of rank 2 with a float bias would be computed in float"
    assert [d.reason for d in refused.decisions["bias_correction"]] == [reason]


def test_half_precision(bench, tmp_path) -> None:
    model = _linear("bias", ("b", "s", K), dtype="fp16")
    plain, corrected, _ = _both(bench, model, _data(tmp_path, 60, 7, K, dtype="float16"))
    assert corrected < 0.2 * plain
    stored = load_model(bench.folder / "out" / "model.onnx").graph.initializers["bias.row.corrected"]
    assert stored.const_value.dtype == ir.DataType.FLOAT16


def test_outlier_nodes_are_corrected_too(bench, tmp_path) -> None:
    files, x = _data(tmp_path, 60, 7, K)
    x[..., 5] *= 40
    np.savez(tmp_path / "data.npz", x=x)
    path = bench.save(_linear("bias", ("b", "s", K)), tokenizer=False)
    passes = f"outlier(most=0.1),{PASSES}"
    bench.compile(path, passes, calibration=files, output="out/plain.onnx")
    report = bench.compile(path, f"{passes},bias_correction", calibration=files)
    assert report.decisions["outlier"][0].action == "marked"
    assert _shift(bench, "model.onnx", x) < 0.05 * _shift(bench, "plain.onnx", x)


def test_ranges_from_a_file_of_statistics(bench, tmp_path) -> None:
    """The means come from the data all the same: the same model as without the file."""
    files, x = _data(tmp_path, 60, 7, K)
    path = bench.save(_linear("bias", ("b", "s", K)), tokenizer=False)
    passes, learnt = "qdq(observer=mse),bias_correction", bench.folder / "model.statistics"
    calibrate_model(path, Recipe(passes=parse_passes(passes)), output=learnt, calibration=files)
    plain = bench.compile(path, passes, calibration=files, output="out/plain.onnx")
    report = bench.compile(path, passes, calibration=files, statistics=learnt)
    assert report.decisions == plain.decisions
    assert _shift(bench, "model.onnx", x) == _shift(bench, "plain.onnx", x)


def test_a_decoder_in_segments(bench) -> None:
    """No biases there: with insert every product gets one, and the compile's own checks pass. Half of 32 windows, not
    half of 8, tell that the outputs are better for it.
    """
    report = bench.compile(bench.save(tiny_decoder()), "qdq,bias_correction(insert=true)", samples=32)
    actions = [d.action for d in report.decisions["bias_correction"]]
    assert actions.count("corrected") > len(actions) / 2
    assert {d.reason for d in report.decisions["bias_correction"] if d.action == "skipped"} <= {NOT_CONFIRMED}
    assert len(report.nodes) == len(report.decisions["bias_correction"])


def test_a_shared_bias_is_not_changed_for_others() -> None:
    b = Builder(opset=21)
    x, bias = b.input("x", b.dtype, ["b", "s", K]), b.weight("bias", np.zeros(N, np.float32))
    w = np.ones((K, N), np.float32)
    made = [b.Add(b.MatMul(x, b.weight(f"w{i}", w), name=f"m{i}"), bias, name=f"a{i}") for i in range(2)]
    model = b.model({"y": made[0], "z": made[1]})
    remember(model.graph.node("m0"))
    correction = BiasCorrection()
    for value, number in ((1.0, "observed_in"), (1.5, "walk_again")):
        found = getattr(correction, number)(Region.whole(model))
        for observers in (found,) if isinstance(found, dict) else found:
            for observer in observers.values():
                totals, counts = np.full((PARTS, PARTS, N), value), np.ones((PARTS, PARTS), np.int64)
                observer.restore({"totals": totals, "counts": counts, "batches": np.array(PARTS)})
    assert [float(model.graph.node(f"a{i}").inputs[1].const_value.numpy()[0]) for i in range(2)] == [-0.5, 0.0]
    told = [decision.detail["shift"] for decision in correction.decisions if decision.action == "corrected"]
    assert told == [pytest.approx(0.5)], "as a share of the mean in float, 1.0"


def test_products_are_measured_behind_those_they_depend_on() -> None:
    """q, k and v side by side, then what reads them."""
    model = tiny_decoder(layers=1)
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1].const_value is not None:
            remember(node)
    found = [[node.name.rsplit(".", 1)[-1] for node in group] for group in levels(list(model.graph))]
    assert found[:4] == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_without_data_nothing_is_corrected() -> None:
    model = _linear("bias", ("b", "s", K))
    remember(model.graph.node("product"))
    correction = BiasCorrection()
    correction.call(Region.whole(model))
    assert [d.reason for d in correction.decisions] == ["it was not measured: no calibration data"]


@pytest.mark.parametrize("passes", ["bias_correction", "bias_correction,qdq", "dynamic,bias_correction"])
def test_order(bench, capsys, passes) -> None:
    path = bench.save(_linear("bias", ("b", "s", K)), tokenizer=False)
    bench.refuses(capsys, path, ["--passes", passes], "pass 'bias_correction' must come after qdq")


def test_few_samples_correct_nothing(bench, tmp_path) -> None:
    """Seven rows, or one text of any length: nothing to judge on. The model is that without the pass."""
    for shape in ((7, 5, K), (1, 200, K)):
        data = _data(tmp_path, *shape)
        plain, corrected, report = _both(bench, _linear("bias", ("b", "s", K)), data)
        (decision,) = report.decisions["bias_correction"]
        assert decision.action == "skipped"
        assert "could be held aside, too few to judge a correction on (at least 4)" in decision.reason
        assert corrected == plain


def test_a_correction_that_the_other_half_refutes_is_taken_back(bench, tmp_path) -> None:
    """Every other picture is bright: what shifts the one half's means is nothing that the other half knows."""
    x = np.random.default_rng(1).gamma(1.0, 1.0, (16, 3, IMAGE, IMAGE)).astype(np.float32)
    x[1::2] *= -0.02
    files = [str(tmp_path / f"{i}.npz") for i in range(16)]
    for file, picture in zip(files, x, strict=True):
        np.savez(file, x=picture[None])
    plain, corrected, report = _both(bench, _convolution(bias=True), (files, x))
    assert {d.action for d in report.decisions["bias_correction"]} == {"skipped"}
    assert all("do not confirm a gain" in d.reason for d in report.decisions["bias_correction"])
    assert corrected == plain
    assert report.trials == [f"bias_correction: {report.decisions['bias_correction'][0].reason}"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Gemm(x, w, row)", ""),
        ("y = Gemm(x, w, flat)", ""),
        ("y = Gemm(x, w, one)", ""),
        ("y = Gemm(x, w, rows)", "its bias differs from row to row"),
        ("c = Neg(row) y = Gemm(x, w, c)", "its bias is no constant"),
        ("y = Gemm(x, w)", "a product of rank 2 with a float bias would be computed in float"),
        ("k = DequantizeLinear <axis = 0> (codes, scales) y = Gemm(x, w, k)", ""),
        (
            "k = DequantizeLinear <axis = 0> (large, scales) y = Gemm(x, w, k)",
            "the corrected bias does not fit 32 bits",
        ),
    ],
)
def test_the_bias_of_a_product_takes_the_error_or_says_why_not(body: str, reason: str) -> None:
    """Outputs move by the mean error, channel by channel, or not at all."""
    mean = np.array([1.0, -2.0, 0.5])
    arrays = {"w": np.eye(3, dtype="f"), "row": np.ones((1, 3), "f"), "flat": np.ones(3, "f"), "one": np.ones((), "f")}
    arrays |= {"rows": np.arange(6, dtype="f").reshape(2, 3), "scales": np.full(3, 0.25, "f")}
    arrays |= {"codes": np.array([4, 8, 12], np.int32), "large": np.array([-(2**31), 0, 0], np.int32)}
    read = {name: array for name, array in arrays.items() if f"{name})" in body or f"{name}," in body}
    model = parse(body, inputs="float[2,3] x", outputs="float[2,3] y", **read)
    feeds = {"x": np.ones((2, 3), np.float32)}
    before = run_model(model, feeds)[0]
    said = _own_bias(model, next(node for node in model.graph if node.op_type == "Gemm"), mean)
    assert said.startswith(reason)
    assert bool(said) is bool(reason)
    np.testing.assert_allclose(run_model(model, feeds)[0], before if reason else before - mean.astype("f"), rtol=1e-6)
