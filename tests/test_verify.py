"""compiler/verify.py: what is kept was run; and the file runs where nothing of qcompile is installed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler import verify
from qcompile.compiler.verify import check_reloaded, compare_outputs
from qcompile.models.tiny import tiny_decoder, tiny_mlp
from qcompile.passes.errors import UserError
from qcompile.passes.formats import emit
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
        bench.compile(paths["float"], target=target, output=f"{target}/model.onnx", group_size=64)
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
    """Have emit write one wrong code in each weight of a fitting name: what a broken packer would do."""
    original = emit.add_codes

    def broken(model: ir.Model, name: str, codes: Any, dtype: ir.DataType) -> ir.Value:
        if when(name):
            codes = codes.copy()
            codes[3, 2] ^= 1 << (dtype.bitwidth - 1)
        return original(model, name, codes, dtype)

    monkeypatch.setattr(emit, "add_codes", broken)


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

    def damaged(path: Path, *rest: Any) -> Any:
        (data,) = path.parent.glob("*.data")
        content = bytearray(data.read_bytes())
        content[: len(content) // 2] = bytes(len(content) // 2)
        data.write_bytes(content)
        return original(path, *rest)

    monkeypatch.setattr("qcompile.compiler.pipeline.run_file", damaged)
    before = bench.snapshot()
    with pytest.raises(UserError, match=r"saved file differs from the verified graph by .*nothing was kept"):
        bench.compile(source, "gptq,pack")
    assert bench.snapshot() == before


def test_coverage_below_the_minimum_writes_nothing(bench: Any) -> None:
    """A weight of rank 3 has no format; at 99 % it must not be missing."""
    source = bench.save(tiny_decoder())
    model = ir.load(source)
    node = next(node for node in model.graph if node.name == "model.layers.0.mlp.up_proj")
    weight = node.inputs[1]
    weight.const_value = ir.tensor(weight.const_value.numpy()[None], name=weight.name)
    weight.shape = ir.Shape([1, 64, 160])
    ir.save(model, source.with_name("odd.onnx"))
    before = bench.snapshot()
    with pytest.raises(UserError, match=r"only 90\.0% of the MatMul weights .*rank 3, not 2; nothing was written"):
        bench.compile(source.with_name("odd.onnx"), min_coverage=0.99)
    assert bench.snapshot() == before
    report = bench.compile(source.with_name("odd.onnx"), min_coverage=0.8)
    assert [d.reason for d in report.skipped("MatMul")] == ["the weight has rank 3, not 2"]


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


def test_a_model_without_matmul_weights_has_full_coverage(bench: Any) -> None:
    report = bench.compile(bench.save(tiny_mlp(), tokenizer=False), exclude=("*",), calibration=[])
    assert (report.coverage, report.nodes, report.packed("MatMul")) == (1.0, [], [])
