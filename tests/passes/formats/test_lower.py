"""passes/formats/lower.py: the same numbers in every target, ties on disk, and what a target refuses."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qcompile.compiler.files.load import load_model, save_model
from qcompile.models.tiny import tiny_decoder, tiny_mlp
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.formats.lower import lower
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.prepare import Prepare
from qcompile.passes.spec import PerChannel, PerGroup, QuantSpec
from qcompile.runtime.sessions import run, session

TARGETS = ("qcompile", "qdq", "matmulnbits")
# What the domain qcompile becomes.
STANDARD = {"DequantizeLinear", "MatMul", "Gather", "Reshape", "Transpose"}


def _decoder(target: str, body: QuantSpec, table: QuantSpec, **options) -> ir.Model:
    """A packed decoder of odd sizes: 48 channels are one and a half groups of 32."""
    model = tiny_decoder(**{"layers": 1, "hidden": 48, "ffn": 88, "vocab": 101, **options})
    Pack(Policy(body, table, table)).call(Region.whole(model))
    lower(model, target)
    return model


def _logits(model: ir.Model, vocab: int = 101, **options) -> np.ndarray:
    ids = np.random.default_rng(0).integers(0, vocab, (2, 9))
    made = session(ir.to_proto(model).SerializeToString(), threads=1, kernels="portable", **options)
    return run(made, ["logits"], {"input_ids": ids, "attention_mask": np.ones((2, 9), np.int64)})[0]


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found.astype(np.float64) - wanted).max() / np.abs(wanted.astype(np.float64)).max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("tied", "vocab"), [(True, 101), (True, 102), (False, 101)])
def test_targets_agree(bits, symmetric, tied, vocab) -> None:
    body, table = QuantSpec(4, PerGroup(32), symmetric), QuantSpec(bits, PerGroup(32))
    logits = {}
    for target in TARGETS:
        model = _decoder(target, body, table, tied=tied, vocab=vocab)
        onnx.checker.check_model(ir.to_proto(model))
        logits[target] = _logits(model, vocab)
    plain = _logits(_decoder("qcompile", body, table, tied=tied, vocab=vocab), vocab, optimize=False)
    for target, found in logits.items():
        assert _relative(found, plain) < 1e-5, target
    assert _relative(plain, _logits(tiny_decoder(layers=1, hidden=48, ffn=88, vocab=vocab, tied=tied), vocab)) > 1e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_linears_agree(bits) -> None:
    x = np.random.default_rng(0).standard_normal((5, 48)).astype(np.float32)
    outputs = []
    for target in TARGETS:
        model = tiny_mlp()
        region = Region.whole(model)
        Prepare().call(region)
        Pack(Policy(QuantSpec(bits, PerGroup(16)), None, None)).call(region)
        lower(model, target)
        outputs.append(
            run(session(ir.to_proto(model).SerializeToString(), threads=1, kernels="portable"), ["y"], {"x": x})[0]
        )
    assert _relative(outputs[1], outputs[0]) < 1e-5
    assert _relative(outputs[2], outputs[0]) < 1e-5


def test_half_precision_models_agree() -> None:
    spec = QuantSpec(4, PerGroup(32), scale_dtype=np.float16)
    outputs = [_logits(_decoder(target, spec, spec, dtype="fp16")) for target in TARGETS]
    assert {output.dtype for output in outputs} == {np.dtype(np.float16)}
    for output in outputs[1:]:
        assert _relative(output, outputs[0]) < 2e-2


def test_what_a_target_is_made_of() -> None:
    spec = QuantSpec(4, PerGroup(32))
    models = {target: _decoder(target, spec, spec) for target in TARGETS}
    domains = {target: {node.domain for node in model.graph} for target, model in models.items()}
    assert domains == {"qcompile": {"", "qcompile"}, "qdq": {""}, "matmulnbits": {"", "com.microsoft"}}
    for target, model in models.items():
        assert set(model.opset_imports) >= domains[target]
        assert bool(model.functions) == (target == "qcompile")
        assert ("qcompile" in model.opset_imports) == (target == "qcompile")
    assert STANDARD.issubset(node.op_type for node in models["qdq"].graph)
    packed = Counter(node.op_type for node in models["matmulnbits"].graph if node.domain)
    assert packed == {"MatMulNBits": 8, "GatherBlockQuantized": 1}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_no_tensor_is_left_behind(tied, bits, target) -> None:
    """A table of its own, read as bytes, must not stay in its 4-bit form as well."""
    model = _decoder(target, QuantSpec(4, PerGroup(32)), QuantSpec(bits, PerGroup(32)), tied=tied)
    assert [name for name, value in model.graph.initializers.items() if not value.uses()] == []


def test_interfaces_stay_as_they_were() -> None:
    """The Slice that cuts an embedding's padding keeps names: here its output is the graph's own."""
    for target in TARGETS:
        graph = tiny_decoder(layers=1, hidden=48, vocab=101)
        lookup = next(node for node in graph.graph if node.op_type == "Gather")
        graph.graph.outputs.append(lookup.outputs[0])
        spec, name = QuantSpec(8, PerGroup(32)), lookup.outputs[0].name
        Pack(Policy(spec, spec, spec)).call(Region.whole(graph))
        lower(graph, target)
        onnx.checker.check_model(ir.to_proto(graph))
        assert [value.name for value in graph.graph.outputs] == ["logits", name]
        assert [value.name for value in graph.graph.inputs] == ["input_ids", "attention_mask"]


def _table_bytes(vocab: int, k: int, bits: int, *, padded: bool) -> int:
    """Codes, float32 scales and zero points of a (vocab, k) table in groups of 32; MatMulNBits pads whole groups."""
    groups = -(-k // 32)
    zero_points = -(-groups * bits // 8) if padded else groups * bits / 8
    return int(vocab * ((groups * 32 if padded else k) * bits / 8 + 4 * groups + zero_points))


@pytest.mark.parametrize("hidden", [48, 64])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("target", TARGETS)
def test_a_tied_table_is_on_disk_once(tmp_path: Path, target, bits, hidden) -> None:
    body, table, vocab = QuantSpec(4, PerGroup(32)), QuantSpec(bits, PerGroup(32)), 3000
    tied = _decoder(target, body, table, vocab=vocab, hidden=hidden)
    untied = _decoder(target, body, table, vocab=vocab, hidden=hidden, tied=False)
    small = save_model(tied, tmp_path / "tied.onnx")
    large = save_model(untied, tmp_path / "untied.onnx")
    once = _table_bytes(vocab, hidden, bits, padded=target == "matmulnbits")
    assert large.data_bytes - small.data_bytes == pytest.approx(once, rel=0.01)
    assert small.data_bytes < 1.5 * once
    reloaded = load_model(small.paths[0])
    made = session(small.paths[0], threads=1, kernels="portable")
    ids = np.random.default_rng(0).integers(0, vocab, (2, 9))
    (found,) = run(made, ["logits"], {"input_ids": ids, "attention_mask": np.ones((2, 9), np.int64)})
    assert _relative(found, _logits(tied, vocab)) < 1e-6
    assert set(reloaded.graph.initializers) == set(tied.graph.initializers)


def test_shared_weights_stay_shared() -> None:
    model = tiny_mlp()
    region = Region.whole(model)
    Prepare().call(region)
    Pack(Policy(QuantSpec(4, PerGroup(32)), None, None)).call(region)
    lower(model, "matmulnbits")
    nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert len(nodes) == 8
    assert len({id(value) for node in nodes for value in node.inputs[1:]}) == len(
        [value for value in model.graph.initializers.values() if (value.name or "").endswith(".nbits")]
    )


@pytest.mark.parametrize(
    ("granularity", "size"), [(PerGroup(48), 48), (PerGroup(8), 8), (PerGroup(24), 24), (PerChannel(1), 48)], ids=str
)
def test_matmulnbits_refuses_other_block_sizes(granularity, size) -> None:
    spec = QuantSpec(4, granularity)
    with pytest.raises(UserError, match=rf"powers of two\), got {size}: choose another --group-size"):
        _decoder("matmulnbits", spec, spec)
    assert _relative(_logits(_decoder("qdq", spec, spec)), _logits(_decoder("qcompile", spec, spec))) < 1e-5


def test_unknown_targets_are_refused() -> None:
    with pytest.raises(UserError, match="unknown target 'tflite'"):
        lower(tiny_mlp(), "tflite")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_onnx_runtime_fuses_every_packed_product(tmp_path, bits, symmetric, target) -> None:
    """MatMulNBits for all, whatever mixture of symmetric and asymmetric weights share an operator."""
    body, table = QuantSpec(4, PerGroup(32), symmetric), QuantSpec(bits, PerGroup(32))
    model = _decoder(target, body, table, tied=True, vocab=102)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    operators = [node.op_type for node in optimized.graph.node]
    assert operators.count("MatMulNBits") == 8, Counter(operators)
