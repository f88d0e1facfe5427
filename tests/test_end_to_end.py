"""Real models, by the way a user goes: export, compile, evaluate, generate. Exports are kept in qcompile's cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.compiler import cli
from qcompile.compiler.commands.export import open_model
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.files.load import load_model
from qcompile.compiler.measure.evaluate import DecoderScores, evaluate_many
from qcompile.compiler.measure.loaded import text_windows
from qcompile.compiler.pipeline import compile_model
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.results.report import Report
from qcompile.compiler.stages import Calibration
from qcompile.models import cache, zoo
from qcompile.models.export import export_model

NOVEL = Path(__file__).parent.parent / "benchmarks" / "text" / "eval-novel.txt"
ALL = "smooth,awq,gptq,pack"


def _exported(name: str, **options: Any) -> Path:
    """model.onnx of a zoo model, exported once for all test runs."""

    def fill(folder: Path) -> None:
        export_model(name, folder / "export", open_model=open_model, **options)

    label = "-".join([name, zoo.find(name).version, *(f"{key}-{value}" for key, value in options.items())])
    return cache.entry(f"tests/{label}", fill, complete=["export/model.onnx"]) / "export" / "model.onnx"


def _compiled(source: Path, output: Path, passes: str, calibration: list[str] | None = None, **settings: Any) -> Report:
    recipe = Recipe(passes=parse_passes(passes), group_size=64, **settings)
    return compile_model(source, recipe, output=output, calibration=Calibration(calibration or []))


def _scores(source: Path, outputs: list[Path], *, tokens: int, context: int) -> list[DecoderScores]:
    windows = text_windows(NOVEL, load_tokenizer(source), input_plan(load_model(source)), context, tokens)
    return evaluate_many(source, outputs, windows)[1:]


def _divergence(score: DecoderScores) -> float:
    assert score.kl is not None
    return score.kl


def _generated(model: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    words = ["generate", str(model), "--prompt", "The capital of France is", "--tokenizer", str(tokenizer)]
    assert cli.main([*words, "--raw", "--max-tokens", "6"]) == 0
    return capsys.readouterr().out


def test_two_layers_of_smollm2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default list diverges less from the float model, on text that calibration never saw, than rounding does."""
    source = _exported("smollm2-135m", max_layers=2)
    outputs = [tmp_path / name / "model.onnx" for name in ("pack", "all")]
    for output, passes in zip(outputs, ("pack", ALL), strict=True):
        report = _compiled(source, output, passes, samples=24, context=256)
        assert (report.coverage, len(report.packed("MatMul")), len(report.packed("Gather"))) == (1.0, 15, 1)
        assert report.compiled_bytes < 0.26 * report.source_bytes
        assert max(node.operator_error for node in report.nodes) < 1e-4
    rounded, best = _scores(source, outputs, tokens=1024, context=256)
    assert 0 < _divergence(best) < 0.9 * _divergence(rounded)
    assert best.agreement is not None
    assert rounded.agreement is not None
    assert best.agreement > rounded.agreement
    assert len(_generated(outputs[1], source.parent, capsys).split()) > 5


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache", [False, True], ids=["plain", "cache"])
def test_smollm2(tmp_path: Path, capsys: pytest.CaptureFixture[str], kv_cache: bool) -> None:
    source = _exported("smollm2-135m", kv_cache=kv_cache)
    outputs = [tmp_path / str(i) / "model.onnx" for i in range(3)]
    for output, passes in zip(outputs, ("pack", "smooth,awq,pack", ALL), strict=True):
        report = _compiled(source, output, passes, samples=16)
        assert (report.coverage, len(report.packed("MatMul")), len(report.packed("Gather"))) == (1.0, 211, 1)
        assert report.compiled_bytes < 95e6
    rounded, scaled, best = (_divergence(s) for s in _scores(source, outputs, tokens=2048, context=512))
    assert best < scaled < rounded
    assert best < 0.6 * rounded
    assert "Paris" in _generated(outputs[2], source.parent, capsys)


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    """Six linears in each of six layers, and the pooler; each longer list comes closer to the float outputs."""
    source, cosines = _exported("minilm-l6"), []
    for passes in ("prepare,pack", "smooth,awq,pack", ALL):
        report = _compiled(source, tmp_path / "model.onnx", passes, samples=16, context=128)
        assert (report.coverage, len(report.packed("MatMul"))) == (1.0, 37)
        assert [d for d in report.decisions["pack"] if d.action == "skipped"] == []
        cosines.append(min(output.cosine for output in report.outputs))
    assert 0.95 < cosines[0] < cosines[1] < cosines[2]
    assert cosines[2] > 0.98


def _images(path: Path, shape: tuple[int, ...], seed: int = 0) -> str:
    """Dark strokes on light paper, in the range that PP-OCR expects (-1 to 1)."""
    rng = np.random.default_rng(seed)
    pages = np.full(shape, 0.8, np.float32)
    for page in pages:
        for _ in range(40):
            y, x = rng.integers(0, shape[2] - 4), rng.integers(0, shape[3] - 12)
            page[:, y : y + rng.integers(1, 4), x : x + rng.integers(2, 12)] = -0.9
    np.savez(path, x=pages + 0.02 * rng.standard_normal(shape).astype(np.float32))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["prepare,pack", "smooth,awq,pack"])
@pytest.mark.parametrize(
    ("name", "shape"), [("det", (2, 3, 160, 224)), ("rec", (4, 3, 48, 320)), ("cls", (4, 3, 48, 192))]
)
def test_rapidocr(tmp_path: Path, name: str, shape: tuple[int, ...], passes: str) -> None:
    """Convolutions stay in float and say so; every MatMul weight is packed."""
    source, images = zoo.fetch(f"rapidocr-{name}"), _images(tmp_path / "x.npz", shape)
    report = _compiled(source, tmp_path / "out" / "model.onnx", passes, [images])
    operators = [node.op_type for node in load_model(source).graph]
    skipped = [d for d in report.decisions["pack"] if d.action == "skipped"]
    assert all(d.node and d.reason for d in skipped)
    assert sum(d.detail["kind"] == "Conv" for d in skipped) == operators.count("Conv")
    assert report.coverage == 1.0
    assert bool(report.packed("MatMul")) == (name != "det")
    assert all(output.cosine > 0.99 for output in report.outputs)


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["qdq", "qdq,bias_correction", "qdq(provider=tensorrt)", "dynamic"])
@pytest.mark.parametrize(
    ("name", "shape"), [("det", (2, 3, 160, 224)), ("rec", (4, 3, 48, 320)), ("cls", (4, 3, 48, 192))]
)
def test_rapidocr_in_8_bits(tmp_path: Path, name: str, shape: tuple[int, ...], passes: str) -> None:
    """Deep networks whose two roundings differ by as much as each from float: no file of them is refused."""
    for seed in range(3):
        images = _images(tmp_path / f"{seed}.npz", shape, seed)
        source = zoo.fetch(f"rapidocr-{name}")
        report = _compiled(source, tmp_path / str(seed) / "model.onnx", passes, [images], min_coverage=0)
        assert report.reload_error is not None
        if passes == "qdq(provider=tensorrt)":
            assert report.reload_error == 0, "without optimizations both round alike"
