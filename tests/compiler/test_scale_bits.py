"""scale_bits 16: scales as float16 in the file, wherever that changes no number, and as float32 everywhere else."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile.compiler.files.load import load_model
from qcompile.compiler.plan import planned
from qcompile.compiler.recipe import Recipe, Step, parse_passes
from qcompile.compiler.report.inspection import inspect
from qcompile.models.tiny import tiny_decoder, tiny_tokenizer
from qcompile.passes.errors import UserError
from qcompile.passes.formats import BY_NAME, named
from qcompile.passes.formats.half_scales import HALF_SCALES, _Shared, halve, widen

FLOAT16 = onnx.TensorProto.FLOAT16
FEEDS = {"input_ids": np.arange(24).reshape(2, 12) % 256, "attention_mask": np.ones((2, 12), np.int64)}


def _decoder(**settings: Any) -> ir.Model:
    return tiny_decoder(hidden=128, ffn=512, **settings)


def _run(path: Path) -> tuple[np.ndarray, Counter[str]]:
    """Logits of plain ONNX Runtime, and the operators that it makes of the file."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.optimized_model_filepath = str(path.with_name("optimized.onnx"))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found = onnx.load(path.with_name("optimized.onnx"), load_external_data=False).graph.node
    return session.run(None, FEEDS)[0], Counter(node.op_type for node in found)


@pytest.mark.parametrize(
    ("target", "weights"),
    [
        ("qcompile", "int4"),
        ("qcompile", "nf4"),
        ("qcompile", "int3"),
        ("qdq", "int4"),
        ("qdq", "int5"),
        ("matmulnbits", "int4"),
        ("matmulnbits", "nf4"),
    ],
)
def test_the_same_numbers_and_kernels_in_fewer_bytes(bench: Any, target: str, weights: str) -> None:
    source, made, told = bench.save(_decoder()), {}, {}
    given: dict[str, Any] = {"target": target, "weights": Step(weights, {"group": 32}), "context": 16, "samples": 2}
    for bits in (32, 16):
        report = bench.compile(source, output=f"{bits}/model.onnx", scale_bits=bits, **given)
        made[bits], told[bits] = _run(bench.folder / str(bits) / "model.onnx"), report
    assert np.array_equal(made[16][0], made[32][0])
    assert made[16][1] == made[32][1]
    model = onnx.load(bench.folder / "16" / "model.onnx", load_external_data=False)
    half = {own.name: 2 * int(np.prod(own.dims)) for own in model.graph.initializer if own.data_type == FLOAT16}
    assert len(half) >= 11  # one of nf4 is too small for float16
    tied = sum(size for name, size in half.items() if ".lookup" in name)  # stored once
    assert told[32].compiled_bytes - told[16].compiled_bytes > 0.9 * (sum(half.values()) - tied) - 300 * len(half)
    assert told[16].bits_per_weight < told[32].bits_per_weight - 0.3  # 16 / 32, but for small ones


@pytest.mark.parametrize("scale_bits", [16, 32])
@pytest.mark.parametrize("target", ["qcompile", "qdq", "matmulnbits"])
@pytest.mark.parametrize("weights", list(BY_NAME))
def test_the_report_counts_what_the_file_has(bench: Any, weights: str, target: str, scale_bits: int) -> None:
    """Of products and lookups, whatever reads the scales: a body may look them up, or repeat them."""
    if named(weights).refusal(target, named(weights).grid(target), 128):
        return
    group = {"group": 32} if weights in ("int4", "int8") else {}
    form, source = Step(weights, group), bench.save(tiny_decoder(hidden=128, ffn=512, layers=1))
    settings: dict[str, Any] = {"weights": form, "lm_head": form, "embedding": form, "target": target}
    report = bench.compile(source, scale_bits=scale_bits, context=16, samples=2, verify="none", **settings)
    found = inspect(bench.folder / "out" / "model.onnx")
    assert report.bits_per_weight == pytest.approx(found.linear_bits, rel=1e-6)


def test_what_is_made_of_a_compiled_file_keeps_them(bench: Any) -> None:
    """Inspected, fused and compiled again, which all read float32 scales."""
    source = bench.save(_decoder())
    small, large = bench.folder / "small" / "model.onnx", bench.folder / "large" / "model.onnx"
    bench.compile(source, output="small/model.onnx", scale_bits=16, context=16, samples=2)
    bench.compile(source, output="large/model.onnx", context=16, samples=2)
    tiny_tokenizer(256, small.parent)
    model = load_model(small)
    assert model.meta[HALF_SCALES]
    assert not any(node.op_type == "Cast" and ".widened" in (node.name or "") for node in model.graph)
    assert any("uint4" in str(group) for group in inspect(small).weights)
    before = _run(small)[0]
    assert inspect(small).linear_bits < inspect(large).linear_bits - 0.3
    bench.compile(small, "fuse", output="fused/model.onnx", context=16, samples=2)
    fused = bench.folder / "fused" / "model.onnx"
    np.testing.assert_allclose(_run(fused)[0], before, rtol=0, atol=1e-3 * np.abs(before).max())
    stored = {own.data_type for own in onnx.load(fused, load_external_data=False).graph.initializer}
    assert FLOAT16 in stored


def test_the_default_says_nothing_of_it(bench: Any) -> None:
    """Metadata, and so the bytes, of what others compile stay as they are."""
    assert "scale_bits" not in Recipe().to_dict()
    assert Recipe.from_dict(Recipe(scale_bits=16).to_dict()).scale_bits == 16


@pytest.mark.parametrize(
    ("passes", "settings", "message"),
    [
        ("smooth,qdq", {}, "scale_bits 16 is for the weights of pack"),
        ("pack", {"target": "tensorrt"}, "puts Casts before scales, and TensorRT takes constant scales alone: leave"),
        ("pack", {"target": "qnn"}, "the QNN provider takes constant scales alone"),
    ],
)
def test_where_it_means_nothing_it_is_refused(passes: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        planned(Recipe(passes=parse_passes(passes), scale_bits=16, **settings))


# --- the rewrite itself -----------------------------------------------------------------------------------------------


def _graph(scale: np.ndarray, *, shared: bool = False) -> ir.Model:
    """x (…, 64) times codes with a scale for each of 32 rows; `shared`: the scales are added to the output, too."""
    k, n = 32 * len(scale), scale.shape[1]
    codes = ir.val("w", const_value=ir.tensor(np.ones((k, n), np.int8)))
    value, x = ir.val("s", const_value=ir.tensor(scale)), ir.val("x", ir.DataType.FLOAT, ["b", k])
    nodes = [ir.node("DequantizeLinear", [codes, value], {"axis": 0, "block_size": 32}, name="dq")]
    nodes.append(ir.node("MatMul", [x, nodes[0].outputs[0]], name="product"))
    if shared:
        nodes.append(ir.node("ReduceSum", [value], name="sum"))
    for node in nodes:
        node.outputs[0].name = f"{node.name}.out"
    graph = ir.Graph(
        [x], [node.outputs[0] for node in nodes[1:]], nodes=nodes, initializers=[codes, value], opset_imports={"": 21}
    )
    return ir.Model(graph, ir_version=10)


def _scales(model: ir.Model) -> np.ndarray:
    dq = next(node for node in model.graph if node.op_type == "DequantizeLinear")
    value = dq.inputs[1]
    assert value is not None
    found = value.const_value if value.producer() is None else value.producer().inputs[0].const_value
    return np.asarray(found.numpy())


@given(
    rows=st.integers(1, 40),
    exact=st.booleans(),
    shared=st.booleans(),
    marked=st.booleans(),
    exponent=st.integers(-30, 20),
    seed=st.integers(0, 99),
)
def test_halved_and_widened_scales_are_the_same_numbers(rows, exact, shared, marked, exponent, seed) -> None:
    """Whatever they are: those that float16 does not hold, small tensors, and what else is read stay float32."""
    scale = np.random.default_rng(seed).uniform(1, 2, (rows, 32)).astype(np.float32) * np.float32(2.0**exponent)
    if exact:
        with np.errstate(over="ignore"):
            scale = scale.astype(np.float16).astype(np.float32)
    model = _graph(scale, shared=shared)
    model.meta[HALF_SCALES] = marked
    with np.errstate(over="ignore"):
        fits = bool((scale.astype(np.float16).astype(np.float32) == scale).all())
    assert halve(model) == (marked and fits and not shared and scale.size >= 512)
    stored = _scales(model)
    assert stored.dtype == (np.float16 if "Cast" in [node.op_type for node in model.graph] else np.float32)
    assert np.array_equal(stored.astype(np.float32), scale)
    model.meta.clear()
    widen(model)
    assert "Cast" not in [node.op_type for node in model.graph]
    assert np.array_equal(_scales(model), scale)
    assert model.meta.get(HALF_SCALES, False) == (stored.dtype == np.float16)


def test_numbers_of_one_memory_are_shared_where_they_are_the_same() -> None:
    """Transposed ones of a square are others, at one place and of one shape."""
    shared, numbers = _Shared(), np.arange(4, dtype=np.float32).reshape(2, 2)
    half = shared.half(numbers)
    assert shared.half(numbers[:]) is half
    for other in (numbers.T, numbers[::-1], numbers.copy() + 1):
        assert np.array_equal(shared.half(other).numpy(), other)
    assert np.array_equal(half.numpy(), numbers)


@pytest.mark.parametrize("target", ["qcompile", "qdq"])
def test_a_dry_run_counts_halved_scales(tmp_path: Path, target: str) -> None:
    """Of a tied table once, too: 8 KB that a rehearsal would be too high by, and a budget could not use."""
    ir.save(tiny_decoder(layers=1, vocab=2048), tmp_path / "m.onnx")
    sizes = {}
    for bits in (16, 32):
        own: dict[str, Any] = {"group_size": 32, "scale_bits": bits, "target": target}
        plan = qcompile.dry_run(tmp_path / "m.onnx", "pack", **own)
        made = qcompile.compile(tmp_path / "m.onnx", "pack", output=tmp_path / "o.onnx", **own)
        sizes[bits] = plan.report.compiled_bytes, made.compiled_bytes
    foretold, written = (sizes[32][i] - sizes[16][i] for i in (0, 1))
    assert foretold == pytest.approx(written, abs=200)
    assert written > 7_000
