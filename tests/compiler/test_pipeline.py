"""compiler/pipeline.py, all of it at once on tiny models: what is written runs, is verified, and says what it is."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompile.compiler.files.load import load_model
from qcompile.compiler.results.report import Report
from qcompile.models.tiny import tiny_conv, tiny_decoder, tiny_encoder, tiny_mlp
from qcompile.passes.linears import find_linears

ALL = "smooth,awq,gptq,pack"
IDS = np.random.default_rng(5).integers(0, 256, (2, 20))
# Correlated, as activations are: rounding behind white ones has nothing to gain by compensation.
ROWS = (
    np.random.default_rng(6).standard_normal((512, 16)) @ np.random.default_rng(8).standard_normal((16, 48))
).astype("f4") / np.float32(4)
IMAGES = np.random.default_rng(7).standard_normal((8, 3, 32, 32)).astype("f4")


@dataclass(frozen=True)
class Kind:
    """A tiny model, the linears it has, and how far the compiled outputs may lie from the float ones, relatively."""

    make: Callable[[], ir.Model]
    linears: int
    tolerance: float = 0.06
    arrays: Any = None
    least: float | None = (
        None  # coverage: most weights of one model are a convolution's, which no pass of the list takes
    )


KINDS = {
    "rms": Kind(tiny_decoder, 15),
    "layer": Kind(lambda: tiny_decoder(norm="layer"), 15),
    "simplified": Kind(lambda: tiny_decoder(norm="simplified"), 15),
    "cache": Kind(lambda: tiny_decoder(kv_cache=True), 15),
    "untied": Kind(lambda: tiny_decoder(tied=False), 15),
    "fp16": Kind(lambda: tiny_decoder(dtype="fp16"), 15),
    "encoder": Kind(tiny_encoder, 12),
    "mlp": Kind(tiny_mlp, 8, 0.15, {"x": ROWS}),
    "conv": Kind(lambda: tiny_conv(opset=11), 2, 0.01, {"image": IMAGES}, least=0),
}


def _feeds(path: Path, kind: Kind) -> dict[str, Any]:
    """Inputs that no calibration saw."""
    if kind.arrays is not None:
        return {name: array[::-1] * np.float32(0.9) for name, array in kind.arrays.items()}
    feeds: dict[str, Any] = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    for given in load_model(path).graph.inputs:
        if given.name == "token_type_ids":
            feeds[given.name] = np.zeros_like(IDS)
        elif given.name == "position_ids":
            feeds[given.name] = np.broadcast_to(np.arange(20), IDS.shape)
        elif given.name not in feeds:
            feeds[str(given.name)] = np.zeros((2, 2, 0, 16), np.float32)
    return feeds


def _run(path: Path, feeds: dict[str, Any], *, level: str = "0") -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    running = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    last = {"logits", "y", "scores", "last_hidden_state"} & {output.name for output in running.get_outputs()}
    return running.run(sorted(last), feeds)[0].astype(np.float64)


def _relative(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@dataclass(frozen=True)
class Made:
    source: Path
    output: Path
    report: Report
    kind: Kind


@pytest.fixture(scope="module")
def made(make_bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Compile each kind once, by the default list."""
    known: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in known:
            bench, kind, settings = make_bench(name), KINDS[name], {}
            if kind.arrays is not None:
                path = tmp_path_factory.mktemp("arrays") / "a.npz"
                np.savez(path, **kind.arrays)
                settings["calibration"] = [str(path)]
            source = bench.save(kind.make(), tokenizer=kind.arrays is None)
            report = bench.compile(source, ALL, **settings, min_coverage=kind.least)
            known[name] = Made(source, bench.folder / "out" / "model.onnx", report, kind)
        return known[name]

    return make


@pytest.mark.parametrize("name", KINDS)
def test_the_compiled_model_gives_nearly_the_same_outputs(made: Any, name: str) -> None:
    m = made(name)
    feeds = _feeds(m.source, m.kind)
    error = _relative(_run(m.output, feeds), _run(m.source, feeds))
    assert 0 < error < m.kind.tolerance


@pytest.mark.parametrize("name", KINDS)
def test_everything_is_verified_and_accounted_for(made: Any, name: str) -> None:
    m = made(name)
    report, half = m.report, name == "fp16"
    assert report.share("MatMul") == 1.0
    assert report.share("Conv") == (0.0 if name == "conv" else None)
    assert len(report.packed("MatMul")) == len(report.nodes) == m.kind.linears
    assert max(node.operator_error for node in report.nodes) < (2e-2 if half else 1e-4)
    assert all(0 < node.error < 0.15 for node in report.nodes)
    assert report.reload_error is not None
    assert report.reload_error < (2e-2 if half else 1e-4)
    assert {output.name for output in report.outputs} == {v.name for v in load_model(m.source).graph.outputs}
    assert all(output.cosine > 0.99 for output in report.outputs)
    skipped = {d.node: d.reason for d in report.decisions["pack"] if d.action == "skipped"}
    left = {
        "conv": {f"conv_{i}": "no packed format for Conv weights" for i in range(2)},
        "encoder": {"position": "a small table of Gather that belongs to no segment of the calibration run"},
    }
    assert skipped == left.get(name, {})
    assert report.compiled_bytes < report.source_bytes
    assert report.compiled_bytes == sum((m.output.parent / file).stat().st_size for file in report.files[:-2])


@pytest.mark.parametrize("name", ["rms", "conv"])
def test_what_lies_in_the_folder_and_in_the_file(made: Any, name: str) -> None:
    m = made(name)
    names = sorted(path.name for path in m.output.parent.iterdir())
    data = [n for n in names if n.endswith(".data")]
    assert len(data) == 1
    assert names == sorted(["model.onnx", "model.report.html", "model.report.json", *data])
    onnx.checker.check_model(m.output, full_check=True)
    written = json.loads((m.output.parent / "model.report.json").read_text())
    assert written["shares"] == {"MatMul": 1.0, "Conv": 0.0 if name == "conv" else None}
    assert written["coverage"] == m.report.coverage
    assert written["recipe"]["passes"] == ["smooth", "awq", "gptq", "pack"]
    assert written["source_hash"] == m.report.source_hash
    assert set(written["versions"]) >= {"onnxruntime", "onnx", "onnx-ir", "numpy", "qcompile-onnx"}
    assert written["files"] == [m.output.name, data[0], *(f"{m.output.stem}.report.{end}" for end in ("json", "html"))]
    assert {d["node"] for d in written["decisions"]["pack"]} == {d.node for d in m.report.decisions["pack"]}
    packed = [d["detail"] for d in written["decisions"]["pack"] if d["detail"]["kind"] == "MatMul"]
    assert all(isinstance(detail["bits_per_weight"], float) for detail in packed), "a number, not its repr"
    told = load_model(m.output).metadata_props
    assert told["qcompile.source"] == m.report.source_hash
    assert "samples: 8" in told["qcompile.recipe"]
    assert not find_linears(load_model(m.output).graph)


def test_a_tied_table_is_stored_once_and_stays_exact_behind_smoothed_norms(made: Any) -> None:
    """The head shares the table's codes: a factor folded into the norm before it would be missing from them."""
    tied, untied = made("rms").report, made("untied").report
    assert untied.compiled_bytes - tied.compiled_bytes > 256 * 64
    for report in (tied, untied):
        (head,) = [node for node in report.nodes if node.node == "lm_head"]
        assert head.error < 0.01


def test_two_runs_give_identical_bytes(bench: Any) -> None:
    source = bench.save(tiny_decoder())
    for folder in ("one", "two"):
        bench.compile(source, ALL, output=f"{folder}/model.onnx", seed=3)
    first, second = (sorted((bench.folder / folder).iterdir()) for folder in ("one", "two"))
    assert [path.name for path in first] == [path.name for path in second]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes() or a.name.endswith(("report.json", "report.html"))


@pytest.mark.parametrize("options", [{}, {"norm": "layer"}, {"norm": "skip"}, {"tied": False}], ids=str)
def test_smoothing_alone_changes_nothing_but_rounding(bench: Any, options: dict[str, Any]) -> None:
    source = bench.save(tiny_decoder(**options))
    report = bench.compile(source, "prepare,smooth(alpha=0.5)")
    assert [d.action for d in report.decisions["smooth"]].count("folded") >= 4
    feeds = _feeds(source, KINDS["rms"])
    assert _relative(_run(bench.folder / "out" / "model.onnx", feeds), _run(source, feeds)) < 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_each_refinement_beats_plain_rounding(bench: Any, seed: int) -> None:
    source, feeds = bench.save(tiny_decoder(seed=seed)), _feeds(bench.folder / "in" / "model.onnx", KINDS["rms"])
    errors = {}
    for passes in ("pack", "smooth,awq,pack", "gptq,pack", ALL):
        bench.compile(source, passes)
        errors[passes] = _relative(_run(bench.folder / "out" / "model.onnx", feeds), _run(source, feeds))
    assert errors["smooth,awq,pack"] < errors["pack"]
    assert errors["gptq,pack"] < 0.5 * errors["pack"]
    assert errors[ALL] < 0.5 * errors["pack"]
    assert errors[ALL] < errors["smooth,awq,pack"]
