"""compiler/walk/verify.py: what is kept was run; and the file runs where nothing of qcompile is installed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from adapted import scale_at_run_time

from qcompile.compiler.results.errors import NodeError, OutputError
from qcompile.compiler.walk import verify
from qcompile.compiler.walk.verify import (
    check_outputs,
    check_reloaded,
    compare_outputs,
    probabilities,
    silent,
)
from qcompile.models.tiny import tiny_decoder, tiny_mlp
from qcompile.passes.errors import UserError
from qcompile.passes.formats import integers
from qcompile.runtime.sessions import run, session

IDS = np.random.default_rng(5).integers(0, 256, (2, 20))
FEEDS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
TARGETS = ("qcompile", "matmulnbits", "qdq")

# A session as any application makes it; `level` "" leaves ONNX Runtime's own choice.
_PLAIN = """
import sys, numpy as np, onnxruntime as ort
path, feeds, level, out = sys.argv[1:]
options = ort.SessionOptions()
if level:
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
np.save(out, session.run(["logits"], dict(np.load(feeds)))[0])
assert not any(name.split(".")[0] in ("qcompile", "onnx", "onnx_ir", "onnxscript") for name in sys.modules)
"""


def _elsewhere(path: Path, folder: Path, level: str) -> Any:
    """Logits from a process that knows onnxruntime and numpy only."""
    np.savez(folder / "feeds.npz", **FEEDS)
    out = folder / "logits.npy"
    command = [sys.executable, "-I", "-c", _PLAIN, str(path), str(folder / "feeds.npz"), level, str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return np.load(out).astype(np.float64)


def _relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.fixture(scope="module")
def compiled(make_bench: Any) -> dict[str, Path]:
    """One decoder for each target, and the float one."""
    bench = make_bench("targets")
    paths = {"float": bench.save(tiny_decoder())}
    for target in TARGETS:
        level = {"accuracy_level": 0} if target == "matmulnbits" else {}
        bench.compile(paths["float"], target=target, output=f"{target}/model.onnx", group_size=64, **level)
        paths[target] = bench.folder / target / "model.onnx"
    return paths


def _bodies(path: Path) -> Any:
    """The outputs with every optimization off: each operator runs as its ONNX function is written."""
    (logits,) = run(session(path, optimize=False, kernels="portable"), ["logits"], FEEDS)
    return logits.astype(np.float64)


@pytest.mark.parametrize("target", TARGETS)
def test_plain_onnxruntime_runs_every_target(compiled: dict[str, Path], tmp_path: Path, target: str) -> None:
    reference = _bodies(compiled["qcompile"])
    assert _relative(reference, _bodies(compiled["float"])) > 0.01, "there is something to agree on"
    assert _relative(_elsewhere(compiled[target], tmp_path, "0"), reference) < 1e-4
    # ONNX Runtime's own choice is int8 activations; matmulnbits nodes say themselves what they want.
    assert _relative(_elsewhere(compiled[target], tmp_path, ""), reference) < (
        1e-4 if target == "matmulnbits" else 0.05
    )


def test_a_packed_file_needs_its_data(compiled: dict[str, Path]) -> None:
    (data,) = compiled["qdq"].parent.glob("*.data")
    hidden = data.rename(data.with_suffix(".away"))
    with pytest.raises(UserError, match="cannot load it"):
        session(compiled["qdq"], kernels="portable")
    hidden.rename(data)


def _flip(monkeypatch: pytest.MonkeyPatch, *, when: Any = lambda name: True) -> None:
    """Have the format write one wrong code in each weight of a fitting name: what a broken packer would do."""
    original = integers.add_codes

    def broken(model: ir.Model, name: str, codes: Any, dtype: ir.DataType) -> ir.Value:
        if when(name):
            codes = codes.copy()
            codes[3, 2] ^= 1 << (dtype.bitwidth - 1)
        return original(model, name, codes, dtype)

    monkeypatch.setattr(integers, "add_codes", broken)


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight.int4", "lm_head.weight.int8"])
def test_one_wrong_code_is_found_and_nothing_is_written(bench: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    source = bench.save(tiny_decoder(tied=False))
    _flip(monkeypatch, when=name.__eq__)
    before = bench.snapshot()
    with pytest.raises(UserError, match=rf"node {name.split('.weight')[0]}: the packed operator differs from its own"):
        bench.compile(source)
    assert bench.snapshot() == before


def test_a_saved_file_that_differs_is_found_and_removed(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bench.save(tiny_decoder())
    bench.compile(source)
    original = verify.run_file

    def damaged(path: Path, *rest: Any, **named: Any) -> Any:
        (data,) = path.parent.glob("*.data")
        content = bytearray(data.read_bytes())
        content[: len(content) // 2] = bytes(len(content) // 2)
        data.write_bytes(content)
        return original(path, *rest, **named)

    monkeypatch.setattr("qcompile.compiler.walk.saved_run.run_file", damaged)
    before = bench.snapshot()
    with pytest.raises(UserError, match=r"saved file differs from the verified graph by .*nothing was kept"):
        bench.compile(source, "gptq,pack")
    assert bench.snapshot() == before


def test_coverage_below_the_minimum_writes_nothing(bench: Any) -> None:
    """A weight that is scaled when the model runs has no format; at 99 % it must not be missing."""
    model, name = tiny_decoder(), "model.layers.0.mlp.up_proj"
    scale_at_run_time(model, name)
    source = bench.save(model)
    before = bench.snapshot()
    with pytest.raises(
        UserError, match=r"only 90\.0% of the MatMul weights .*\(10\.0% of all\); .*no output was written"
    ):
        bench.compile(source, min_coverage=0.99)
    assert bench.snapshot() == before
    report = bench.compile(source, min_coverage=0.8)
    (skipped,) = report.skipped("MatMul")
    assert (skipped.node, skipped.detail["weight"], skipped.detail["weights"]) == (name, f"{name}.weight", 64 * 160)


def test_outputs_are_compared_over_all_batches() -> None:
    a = [{"y": np.array([1.0, 2.0])}, {"y": np.array([2.0])}]
    b = [{"y": np.array([1.0, 2.0])}, {"y": np.array([1.0])}]
    (error,) = compare_outputs(a, b)
    assert error.relative == pytest.approx(1 / np.sqrt(6))
    assert error.cosine == pytest.approx(7 / np.sqrt(9 * 6))
    assert check_reloaded(a, a, ir.DataType.FLOAT) == 0
    with pytest.raises(UserError, match=r"differs from the verified graph by 4.1e-01 \(limit 1e-04\)"):
        check_reloaded(a, b, ir.DataType.FLOAT)


def test_new_nans_are_an_error_and_old_ones_are_not() -> None:
    good, bad = [{"y": np.array([1.0, 2.0])}], [{"y": np.array([1.0, np.nan])}]
    with pytest.raises(UserError, match="output y of the compiled model is NaN or infinite"):
        compare_outputs(bad, good)
    assert compare_outputs(bad, bad)[0].relative == 0


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_errors_of_numbers_whose_squares_are_none(size: float) -> None:
    (error,) = compare_outputs([{"y": size * np.array([1.0, 2.0])}], [{"y": size * np.array([1.0, 1.0])}])
    assert error.relative == pytest.approx(1 / np.sqrt(2))
    assert error.cosine == pytest.approx(3 / np.sqrt(10))


def test_a_nan_beside_one_of_the_float_model_is_noticed() -> None:
    """What is NaN in the float model may be anything; a number that was one may not."""
    padded, worse = np.array([np.nan, 1.0, 2.0]), np.array([np.nan, np.inf, 2.0])
    assert compare_outputs([{"y": np.array([7, 1.0, 2.0])}], [{"y": padded}])[0].relative == 0
    with pytest.raises(UserError, match=r"output y .* is not \(1 of 3 numbers\)"):
        compare_outputs([{"y": worse}], [{"y": padded}])


def test_a_pole_may_move_to_a_neighbour_and_no_more() -> None:
    """log(relu(x)) and 1 / relu(x): which of two small numbers is 0 is rounding; more of them than before is not."""
    pole = np.array([-np.inf, -2.0, 3.0, 4.0])
    moved = np.array([-9.0, -np.inf, 3.0, 4.0])
    assert compare_outputs([{"y": moved}], [{"y": pole}])[0].relative == 0
    with pytest.raises(UserError, match=r"is not \(2 of 4 numbers\)"):
        compare_outputs([{"y": np.array([-np.inf, -np.inf, -np.inf, 4.0])}], [{"y": pole}])
    with pytest.raises(UserError, match=r"is not \(1 of 4 numbers\)"):
        compare_outputs([{"y": np.array([-np.inf, np.nan, 3.0, 4.0])}], [{"y": pole}])


def test_outputs_of_another_shape_are_left_out_and_none_at_all_is_an_error() -> None:
    boxes, kept = {"boxes": np.zeros((3, 4)), "y": np.ones(2)}, {"boxes": np.zeros((2, 4)), "y": np.ones(2)}
    assert [error.name for error in compare_outputs([boxes], [kept])] == ["y"]
    empty = [{"y": np.zeros((0, 3)), "n": np.zeros(0, np.int64)}]
    with pytest.raises(UserError, match="nothing could be verified; give calibration data with rows"):
        compare_outputs(empty, empty)
    with pytest.raises(UserError, match="NaN throughout"):
        compare_outputs([{"y": np.ones(2)}], [{"y": np.full(2, np.nan)}])


def test_a_destroyed_output_is_named_with_the_worst_node() -> None:
    errors = [OutputError("a", 0.1, 0.99), OutputError("b", 3.0, 0.31)]
    nodes = [NodeError("n1", 0.1, 0.0), NodeError("n2", 2.5, 0.0)]
    check_outputs(errors, nodes, 0.3)
    check_outputs(errors, nodes, 0)
    check_outputs([], nodes, 1)
    with pytest.raises(UserError, match=r"output b is destroyed: .* 0\.310, below --min-cosine 0\.5 .*by itself is n2"):
        check_outputs(errors, nodes, 0.5)


def test_outputs_without_a_direction_are_not_judged() -> None:
    original = [{"zero": np.zeros(3), "map": np.array([0.01, 0.02]), "hit": np.array([0.9, 0.1]), "y": np.ones(2)}]
    compiled = [{"zero": np.ones(3), "map": np.array([0.2, 0.0]), "hit": np.array([0.1, 0.1]), "y": np.zeros(2)}]
    assert silent(compiled, original, {"map", "hit"}) == {"zero", "map"}
    assert silent([{**compiled[0], "map": np.array([0.0, 0.8])}], original, {"map"}) == {"zero"}


def test_the_outputs_of_sigmoids_are_found() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 3] x) => (float[2, 3] a, float[3, 2] b, float[2, 3] y) {
        a = Sigmoid(x) t = HardSigmoid(x) b = Transpose(t) s = Sigmoid(x) y = Mul(s, x) }"""
    assert probabilities(ir.from_onnx_text(text)) == {"a", "b"}


def _spread(bench: Any) -> tuple[Path, str]:
    """y = x W where one input is 1e6 times the others and has weights of 0: no 8-bit grid serves both."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((32, 8)).astype(np.float32)
    w[7] = 0
    x = rng.standard_normal((16, 32)).astype(np.float32)
    x[:, 7] *= 1e6
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[n, 32] x) => (float[n, 8] y) { y = MatMul(x, w) }'
    model = ir.from_onnx_text(text.replace("{ y", "<float[32, 8] w> { y"), initializers=[ir.tensor(w, name="w")])
    model.graph[0].name = "product"
    np.savez(bench.folder.parent / "x.npz", x=x)
    return bench.save(model, tokenizer=False), str(bench.folder.parent / "x.npz")


def test_a_compile_that_destroys_the_output_fails(bench: Any) -> None:
    source, data = _spread(bench)
    (bench.folder / "out").mkdir()
    before = bench.snapshot()
    destroyed = r"output y is destroyed: its cosine .* below --min-cosine 0\.5 .*worst by itself is product"
    with pytest.raises(UserError, match=destroyed):
        bench.compile(source, "qdq(observer=minmax)", calibration=[data])
    assert bench.snapshot() == before
    report = bench.compile(source, "qdq(observer=minmax)", calibration=[data], min_cosine=0)
    assert report.outputs[0].cosine < 0.5
    assert bench.compile(source, "pack", calibration=[data]).outputs[0].cosine > 0.9


def test_data_without_rows_verifies_nothing(bench: Any, tmp_path: Path) -> None:
    source, _ = _spread(bench)
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 32), np.float32))
    with pytest.raises(UserError, match=r"without rows|no rows|empty"):
        bench.compile(source, "pack", calibration=[str(tmp_path / "none.npz")])


@pytest.mark.parametrize("passes", ["qdq", "dynamic", "pack", "qdq(provider=tensorrt)"])
def test_the_reported_error_is_that_of_the_file(bench: Any, passes: str) -> None:
    """As plain ONNX Runtime computes it, with its optimizations (none for TensorRT), on the check batches."""
    source = bench.save(tiny_mlp(), tokenizer=False)
    x = np.random.default_rng(3).standard_normal((8, 48)).astype(np.float32)
    np.savez(bench.folder / "x.npz", x=x)
    report = bench.compile(source, passes, calibration=[str(bench.folder / "x.npz")])
    optimize = "tensorrt" not in passes
    feeds, file = {"x": x}, bench.folder / "out" / "model.onnx"
    (wanted,) = run(session(source, kernels="portable"), None, feeds)
    (found,) = run(session(file, kernels="portable", optimize=optimize), None, feeds)
    assert report.outputs[0].relative == pytest.approx(_relative(found.astype("d"), wanted.astype("d")), rel=1e-3)


def test_a_model_without_matmul_weights_has_full_coverage(bench: Any) -> None:
    report = bench.compile(bench.save(tiny_mlp(), tokenizer=False), exclude=("*",), calibration=[])
    assert (report.coverage, report.nodes, report.packed("MatMul")) == (1.0, [], [])
