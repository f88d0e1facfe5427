"""outlier: which channels are chosen, what the operator computes and becomes, and what planted outliers cost less."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opened import opened
from qdq_graphs import STEP, Tiny, optimized

from qcompile.compiler.files.load import load_model
from qcompile.compiler.recipe import Step
from qcompile.compiler.report.stored_weights import find_weights
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.formats import FORMATS
from qcompile.passes.formats.columns import Columns, coded
from qcompile.passes.formats.functions import body
from qcompile.passes.linears import as_linear
from qcompile.passes.observers.extremes import MinMax
from qcompile.passes.observers.kept_channels import Rest
from qcompile.passes.outlier import Outlier
from qcompile.passes.policy import Policy
from qcompile.passes.proxies import guessed
from qcompile.passes.qdq.columns import split_weight
from qcompile.passes.qdq.outliers import WeightsAlone, choose
from qcompile.passes.qdq.weights import SPEC, WeightGrid
from qcompile.passes.rounding import round_to_nearest, round_with_clip
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.state import Outliers, set_node
from qcompile.passes.statistics import Statistics

POLICY = Policy(SPEC, None, None)
K, LOUD = 96, (7, 50)
GROUP, DTYPES = {name: {"group": 32} for name in ("int4", "int8", "nf4", "fp4")}, {"fp32": "float32", "fp16": "float16"}
Q, DQ = "QuantizeLinear", "DequantizeLinear"
OUTLIER = "MatMulInt8Outlier"
SPLIT = "outlier(most=0.05,threshold=0.3)"


def _model(*, loud: float = 60.0, shared: bool = False, dtype: str = "fp32", shape: tuple = ("b", "s", K)) -> ir.Model:
    """x (…, 96) times gamma, which is `loud` in two channels, into three linears; `shared`: an Add reads it, too."""
    random, gamma = np.random.default_rng(0), np.ones(K, np.float32)
    gamma[list(LOUD)] = loud
    b = Builder(opset=21, dtype=dtype)
    v = b.Mul(b.input("x", b.dtype, list(shape)), b.weight("gamma", gamma), name="norm")
    weights = {f"w{i}": random.standard_normal((K, 24 + 8 * i)).astype(np.float32) for i in range(3)}
    made = {f"y{i}": b.MatMul(v, b.weight(f"w{i}", weights[f"w{i}"]), name=f"linear{i}") for i in range(3)}
    if shared:
        made["z"] = b.Sigmoid(v, name="gate")
    return b.model(made)


def _data(folder: Path, dtype: str = "float32") -> list[str]:
    x = np.random.default_rng(1).standard_normal((40, 16, K)).astype(dtype)
    np.savez(folder / "data.npz", x=x)
    return [str(folder / "data.npz")]


def _errors(report) -> dict[str, float]:
    return {node.node: node.error for node in report.nodes}


# --- the choice


def _weights(seed: int = 0, n: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((K, n)).astype(np.float32)


def _choose(reach: np.ndarray, weights: list[np.ndarray] | None = None, most: int = 8, threshold: float = 0.1):
    return choose(reach, (reach / 4) ** 2, weights or [_weights()], most=most, threshold=threshold)


def test_the_loud_channels_are_chosen_and_no_other() -> None:
    reach = np.ones(K, np.float32)
    reach[[3, 17, 40]] = 30, 25, 40
    choice = _choose(reach)
    assert choice.channels.tolist() == [3, 17, 40]
    assert choice.noise < 0.01


def test_noise_follows_the_formula() -> None:
    """Step and weights, written out for the chosen channels."""
    reach, weights = np.linspace(1, 2, K).astype(np.float32), [_weights(1), _weights(2, 16)]
    reach[[5, 9]] = 50
    power = (reach / 3) ** 2
    choice = choose(reach, power, weights, most=6, threshold=0.1)
    assert choice.channels.tolist() == [5, 9]

    def noise(left: np.ndarray) -> float:
        steps = (2 * reach[left].max() / 255) ** 2 * sum((w[left] ** 2).sum() for w in weights)
        spread = sum(((np.abs(w[left]).max(axis=0) / 127) ** 2).sum() for w in weights)
        return float(steps + power[left].sum() * spread) / 12

    every = np.arange(K)
    assert choice.noise == pytest.approx(noise(np.delete(every, [5, 9])) / noise(every), rel=1e-4)


def test_more_channels_than_allowed_are_not_worth_a_float_part() -> None:
    """Nine equally loud channels: the step only falls when all of them are out."""
    reach = np.ones(K, np.float32)
    reach[:9] = 40
    assert _choose(reach, most=8).channels.size == 0
    assert _choose(reach, most=9).channels.tolist() == list(range(9))


def test_a_high_threshold_asks_more_of_each_channel() -> None:
    reach = np.linspace(2, 1, K).astype(np.float32)
    reach[0] = 20
    assert _choose(reach, threshold=0.3).channels.tolist() == [0]
    assert _choose(reach, threshold=0.9).channels.size == 0


def test_even_channels_and_silent_ones_are_left_alone() -> None:
    assert _choose(np.ones(K, np.float32)).channels.size == 0
    silent = _choose(np.zeros(K, np.float32))
    assert (silent.channels.size, silent.noise) == (0, 1.0)


@pytest.mark.parametrize(("most", "channels"), [(0.001, 0), (0.01, 0), (0.0104, 0), (0.011, 2), (0.05, 2), (0.25, 2)])
def test_no_more_than_that_share_of_the_channels_stays(most, channels) -> None:
    """Of 96 channels two are loud: one of them alone (1 %, rounded up) makes no step smaller."""
    model, x = _model(), np.random.default_rng(1).standard_normal((640, K)).astype(np.float32)
    value = model.graph.node("norm").outputs[0]
    rows = x * model.graph.initializers["gamma"].const_value.numpy()
    region = Region.whole(model)
    region.statistics[value] = Statistics(len(rows), rows.T @ rows, np.abs(rows).max(axis=0), rows, np.zeros(K, "f4"))
    outlier = Outlier(POLICY, ActivationSpec(), most=most, threshold=0.3)
    outlier.call(region)
    assert [d.detail.get("channels", 0) for d in outlier.decisions] == [channels] * 3
    assert {d.reason for d in outlier.decisions if not channels} <= {"no channel is worth keeping in float"}


@pytest.mark.parametrize("given", [{"most": 0}, {"most": 0.5}, {"threshold": 0}, {"threshold": 1}])
def test_bad_parameters(given) -> None:
    with pytest.raises(UserError, match=f"outlier: {next(iter(given))} must"):
        Outlier(POLICY, **given)


def test_the_rest_is_observed_alone() -> None:
    tiny = Tiny()
    x = tiny.input(4, 6)
    model = onnx.load_from_string(tiny.output(tiny.one("Identity", x)).model())
    rest = Rest(x, MinMax(f"{x}.rest"), np.array([0, 2, 5]))
    rest.append(model.graph)
    assert rest.state() == {}
    session = opened(model.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    data = np.array([[1, 90, -2, 90, 90, 3]] * 4, np.float32)
    rest.update(dict(zip(names, session.run(None, {x: data}), strict=True)))
    assert [float(end) for end in rest.range(ActivationSpec())] == [-2, 3]
    again = Rest(x, MinMax(f"{x}.rest"), rest.kept)
    again.restore(rest.state())
    assert again.range(ActivationSpec()) == rest.range(ActivationSpec())


# --- the operator


def _operator(tiny: Tiny, x: str, shared: list[str], outliers: tuple[int, ...] = (1, 7, 9)) -> str:
    codes = tiny.random.integers(-127, 128, (32, 16)).astype(np.int8)
    codes[list(outliers)] = 0
    inputs = [tiny.constant(codes), tiny.constant(tiny.scales((32, 16), 1)), *shared, tiny.floats(len(outliers), 16)]
    return tiny.one(OUTLIER, x, *inputs, domain="qcompile")


def _with_operator() -> Tiny:
    tiny = Tiny()
    tiny.functions.append(ir.to_proto(body(OUTLIER)))
    return tiny


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("bias", [None, (16,)])
@pytest.mark.parametrize("shape", [("b", "s", 32), (2, 4, 32), (4, 32), ("b", 32)], ids=str)
def test_onnx_runtime_fuses_the_body(tmp_path, shape, bias, nodes) -> None:
    """x is rounded once, gathered once; each node has an integer product and a small float one."""
    tiny = _with_operator()
    x = tiny.input(*shape)
    shared = [tiny.constant(np.float32(STEP)), tiny.constant(np.uint8(128)), tiny.constant(np.array([1, 7, 9]))]
    made = [_operator(tiny, x, shared) for _ in range(nodes)]
    if bias is not None:
        made = [tiny.one("Add", y, tiny.floats(*bias)) for y in made]
    found = optimized(tiny.output(*made), tmp_path)
    assert (found.pop("MatMulIntegerToFloat"), found.pop(Q), found.pop("Gather")) == (nodes, 1, 1)
    sums, added = ({"Gemm": nodes}, 0) if len(shape) == 2 else ({"MatMul": nodes}, nodes)
    assert found == {**sums, **({"Add": added + (nodes if bias else 0)} if added or bias else {})}


def test_saturated_outliers_add_nothing(tmp_path) -> None:
    """Whatever stands in the outliers' channels, the int8 part is that of the others: the sum is exact there."""
    tiny = _with_operator()
    x = tiny.input(2, 32)
    shared = [tiny.constant(np.float32(STEP)), tiny.constant(np.uint8(128)), tiny.constant(np.array([1, 7, 9]))]
    model = tiny.output(_operator(tiny, x, shared)).model()
    rows = np.zeros((2, 32), np.float32)
    rows[0, [1, 7, 9]] = 1e6, -3e5, 2e4
    rows[1, [1, 7, 9]] = np.inf, 0, 0
    found = opened(model).run(None, {x: rows})[0]
    float_rows = onnx.numpy_helper.to_array(onnx.load_from_string(model).graph.initializer[-1])
    np.testing.assert_allclose(found[0], rows[0, [1, 7, 9]] @ float_rows, rtol=1e-6)
    assert np.isinf(found[1]).any()


# --- around any format


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(2, 80),
    st.integers(1, 9),
    st.integers(-8, 8),
    st.integers(0, 99),
)
def test_whatever_the_base_nothing_is_counted_twice(own, k, n, size, seed) -> None:
    """By every rounding both products add up to the weight: the base's codes of the rows that stay are zero, but for
    what a code that they share with another row stands for.
    """
    random = np.random.default_rng(seed)
    channels = np.sort(random.choice(k, random.integers(1, k), replace=False))
    b = Builder(opset=21)
    w = (random.standard_normal((k, n)) * 2.0**size).astype(np.float32)
    model = b.model({"y": b.MatMul(b.input("x", b.dtype, ["b", k]), b.weight("w", w), name="linear")})
    linear = as_linear(model.graph.node("linear"))
    set_node(linear.node, outliers=Outliers(channels))
    columns, rows = Columns.of(linear, own.name), random.standard_normal((200, k)).astype(np.float32)
    known = Statistics(len(rows), rows.T @ rows, np.abs(rows).max(axis=0), rows, np.zeros(k, "f4"))
    spec = own.grid("qcompile")
    for rounding in (round_to_nearest, round_with_clip):
        quantized = rounding(coded(linear), spec, known)
        whole = quantized.dequantize()
        assert spec.rows_per_code > 1 or not whole[channels].any()
        most = np.abs(w[channels]).max() if spec.rows_per_code > 1 else 0
        whole[columns.channels] += columns.outlying(model, linear, quantized).const_value.numpy()
        np.testing.assert_allclose(whole[channels], w[channels], rtol=0, atol=1e-6 * most)


@pytest.mark.parametrize(
    ("target", "dtype"), [("qcompile", "fp32"), ("qcompile", "fp16"), ("qdq", "fp32"), ("matmulnbits", "fp32")]
)
@pytest.mark.parametrize("own", FORMATS, ids=lambda own: own.name)
def test_every_format_keeps_columns(bench, tmp_path, own, target, dtype) -> None:
    """A third of the error where two channels are loud, and the file is as large as was decided; or it is refused."""
    path, data = bench.save(_model(dtype=dtype, loud=40), tokenizer=False), _data(tmp_path, DTYPES[dtype])
    recipe = {"weights": Step(own.name, GROUP.get(own.name, {})), "target": target, "calibration": data}
    if own.refusal(target, own.grid(target, **GROUP.get(own.name, {})), K):
        with pytest.raises(UserError, match="has no operator"):
            bench.compile(path, f"{SPLIT},pack", **recipe)
        return
    plain = bench.compile(path, "pack", output="out/plain.onnx", **recipe)
    split = bench.compile(path, f"{SPLIT},pack", **recipe)
    assert {d.reason for d in split.decisions["outlier"]} == {"2 of 96 channels stay in float"}
    assert {d.reason.endswith(", outliers in float") for d in split.decisions["pack"]} == {True}
    assert [node.node for node in split.nodes] == [node.node for node in plain.nodes]
    for a, b in zip(split.outputs, plain.outputs, strict=True):
        # A code of two rows rounds loud ones at the cost of those beside them, which gains less from their absence.
        assert a.relative < (0.35 if own.rows_per_code == 1 else 0.45) * b.relative
    assert split.coverage == 1.0
    bits = 32 if dtype == "fp32" else 16
    assert split.bits_per_weight == pytest.approx(plain.bits_per_weight + 2 * bits / K)
    graph = load_model(bench.folder / "out" / "model.onnx").graph
    assert sum(node.op_type == "Gather" and node.inputs[0].name == "norm.out" for node in graph) == 3
    assert (
        len({node.inputs[1] for node in graph if node.op_type == "Gather" and node.inputs[0].name == "norm.out"}) == 1
    )


@pytest.mark.parametrize("passes", ["gptq,pack", "smooth,gptq,pack,fuse"])
def test_other_passes_around_columns(bench, tmp_path, passes) -> None:
    path, data = bench.save(_model(), tokenizer=False), _data(tmp_path)
    plain = bench.compile(path, passes, calibration=data, output="out/plain.onnx")
    split = bench.compile(path, f"{SPLIT},{passes}", calibration=data)
    assert {d.action for d in split.decisions["outlier"]} == {"marked"}
    for a, b in zip(split.outputs, plain.outputs, strict=True):
        assert a.relative < b.relative


def test_weights_alone_keep_what_adds_most_noise() -> None:
    """Loud channels whose rows have no rounding errors are not among them, nor faint ones with large errors."""
    errors, power = np.ones(K), np.ones(K, np.float32)
    power[[3, 17, 40]], errors[[17, 60]] = 900, (0, 9)
    judge = WeightsAlone(errors)
    found = judge.choose(np.sqrt(power), power, most=8, threshold=0.1)
    assert found.channels.tolist() == [3, 40]
    assert found.noise == pytest.approx(judge.noise(found.channels, power, power))
    assert found.noise == pytest.approx((K - 3 - 1 + 9) / (K - 3 - 1 + 9 + 1800))
    assert not WeightsAlone(np.zeros(K)).choose(power, power, most=8, threshold=0.1).channels.size


def test_a_weight_of_several_nodes_keeps_no_columns_before_pack(bench, tmp_path) -> None:
    """Its codes are stored once, and channels are chosen for each activation."""
    random, gamma = np.random.default_rng(0), np.ones(K, np.float32)
    gamma[list(LOUD)] = 60
    b = Builder(opset=21)
    x, w = b.input("x", b.dtype, ["b", "s", K]), b.weight("w", random.standard_normal((K, 40)).astype(np.float32))
    made = {f"y{i}": b.MatMul(b.Mul(x, b.weight(f"gamma{i}", gamma + i)), w, name=f"linear{i}") for i in range(2)}
    path = bench.save(b.model(made), tokenizer=False)
    report = bench.compile(path, f"{SPLIT},pack", calibration=_data(tmp_path))
    assert {d.reason for d in report.decisions["outlier"]} == {"another node reads its weight, too"}


# --- the passes together


def _optimized(path: Path, folder: Path) -> Counter:
    """Operators of a model file as ONNX Runtime optimizes it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level, options.optimized_model_filepath = 4, str(folder / "optimized.onnx")
    ort.InferenceSession(path, options)
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node)


def test_errors_fall_where_outliers_are_planted(bench, tmp_path) -> None:
    path, data = bench.save(_model(), tokenizer=False), _data(tmp_path)
    plain = bench.compile(path, "qdq", calibration=data, output="out/plain.onnx")
    split = bench.compile(path, f"{SPLIT},qdq", calibration=data)
    assert [d.detail["channels"] for d in split.decisions["outlier"]] == [2, 2, 2]
    for name, error in _errors(split).items():
        assert error < 0.35 * _errors(plain)[name], name
        assert error < 0.02, name
    assert split.outputs[0].relative < 0.35 * plain.outputs[0].relative
    assert split.coverage == 1.0
    assert split.bits_per_weight == pytest.approx(8 + 32 / K + 2 * 32 / K)


def test_the_written_model(bench, tmp_path) -> None:
    """Three nodes share the list of channels and the grid; ONNX Runtime rounds x once. x itself has no pair."""
    bench.compile(bench.save(_model(), tokenizer=False), f"{SPLIT},qdq", calibration=_data(tmp_path))
    model = load_model(bench.folder / "out" / "model.onnx")
    nodes = [node for node in model.graph if node.op_type == OUTLIER]
    assert [node.op_type for node in model.graph] == ["Mul", OUTLIER, OUTLIER, OUTLIER]
    assert nodes[0].inputs[5].const_value.numpy().tolist() == list(LOUD)
    for node in nodes:
        assert [node.inputs[i] for i in (3, 4, 5)] == [nodes[0].inputs[i] for i in (3, 4, 5)]
        assert not node.inputs[1].const_value.numpy()[list(LOUD)].any()
        assert node.inputs[1].const_value.numpy().any(axis=0).all()
    found = _optimized(bench.folder / "out" / "model.onnx", tmp_path)
    assert (found["MatMulIntegerToFloat"], found[Q], found["Gather"]) == (3, 1, 1)
    told = next(weight for weight in find_weights(model.graph) if weight.operator == OUTLIER)
    assert (told.shape, told.form) == ((K, 24), "int8 per-column sym")


def test_dynamic_products(bench, tmp_path) -> None:
    """Outliers are zeros before the range of the batch is taken, and add their float product."""
    path, data = bench.save(_model(), tokenizer=False), _data(tmp_path)
    plain = bench.compile(path, "dynamic", calibration=data, output="out/plain.onnx")
    split = bench.compile(path, f"{SPLIT},dynamic", calibration=data)
    assert split.coverage == 1.0
    for name, error in _errors(split).items():
        assert error < 0.35 * _errors(plain)[name], name
    found = _optimized(bench.folder / "out" / "model.onnx", tmp_path)
    assert (found["MatMulIntegerToFloat"], found["DynamicQuantizeLinear"], found["Gather"]) == (3, 1, 1)
    assert (found["Mul"], found["MatMul"], found["Add"]) == (2, 3, 3)


def test_without_data_the_norm_tells(bench, tmp_path) -> None:
    """gamma of the product before the linears is loud where x is; no calibration data is read."""
    path = bench.save(_model(), tokenizer=False)
    split = bench.compile(path, "outlier(most=0.05,source=norms),dynamic", calibration=())
    assert {d.reason for d in split.decisions["outlier"]} == {"2 of 96 channels stay in float"}
    plain = bench.compile(path, "dynamic", calibration=(), output="out/plain.onnx")
    for name, error in _errors(split).items():
        assert error < 0.35 * _errors(plain)[name], name


def test_guesses_follow_the_constants() -> None:
    """Through the gate of an MLP the columns of up_proj count; a graph input says nothing."""
    model = _model()
    value = model.graph.node("norm").outputs[0]
    reach, power = guessed(value, K)
    np.testing.assert_allclose(power, np.where(np.isin(np.arange(K), LOUD), 3600, 1))
    np.testing.assert_allclose(reach, 6 * np.sqrt(power))
    decoder = tiny_decoder(layers=1)
    down = next(node for node in decoder.graph if (node.name or "").endswith("down_proj"))
    up = next(node for node in decoder.graph if (node.name or "").endswith("up_proj"))
    weight = up.inputs[1].const_value.numpy().astype(np.float64)
    np.testing.assert_allclose(guessed(down.inputs[0], weight.shape[1])[1], (weight**2).sum(axis=0), rtol=1e-5)
    assert guessed(model.graph.inputs[0], K) == "no norm or linear before it: x has no producer"


@pytest.mark.parametrize("target", ["qdq", "matmulnbits"])
def test_other_targets_have_the_body_inlined(bench, tmp_path, target) -> None:
    path, data = bench.save(_model(), tokenizer=False), _data(tmp_path)
    bench.compile(path, f"{SPLIT},qdq", calibration=data)
    bench.compile(path, f"{SPLIT},qdq", calibration=data, target=target, output="out/plain.onnx")
    plain = onnx.load(bench.folder / "out" / "plain.onnx")
    assert not plain.functions
    assert {node.domain for node in plain.graph.node} == {""}
    onnx.checker.check_model(plain)
    x = np.random.default_rng(2).standard_normal((1, 5, K)).astype(np.float32)
    files = [bench.folder / "out" / name for name in ("model.onnx", "plain.onnx")]
    whole, inlined = (ort.InferenceSession(file).run(None, {"x": x}) for file in files)
    for a, b in zip(whole, inlined, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


def test_another_reader_of_the_activation_gets_its_own_grid(bench, tmp_path) -> None:
    """One of three linears stays in float, an operator in int8 needs the whole range: neither sees the split."""
    passes = f"{SPLIT},qdq(operators=all)"
    model = bench.save(_model(shared=True), tokenizer=False)
    report = bench.compile(model, passes, calibration=_data(tmp_path), exclude=("linear1",))
    reasons = {d.node: d.reason for d in report.decisions["outlier"]}
    assert reasons == {
        "linear0": "2 of 96 channels stay in float",
        "linear1": "excluded by 'linear1'",
        "linear2": "2 of 96 channels stay in float",
    }
    assert all(error < 0.02 for name, error in _errors(report).items() if name != "gate")
    model = load_model(bench.folder / "out" / "model.onnx")
    (whole,) = [node for node in model.graph if node.op_type == Q and node.inputs[0].name == "norm.out"]
    (rest, _) = [node.inputs[3].const_value.numpy() for node in model.graph if node.op_type == OUTLIER]
    assert whole.inputs[1].const_value.numpy() > 10 * rest


def test_half_precision(bench, tmp_path) -> None:
    path = bench.save(_model(dtype="fp16", loud=40), tokenizer=False)
    report = bench.compile(path, f"{SPLIT},qdq", calibration=_data(tmp_path, "float16"))
    assert all(error < 0.02 for error in _errors(report).values())
    assert {d.action for d in report.decisions["outlier"]} == {"marked"}


@pytest.mark.parametrize("size", [1.25 * 2**-14, 2**-21])
def test_scales_of_small_halves_are_rounded_up(bench, tmp_path, size) -> None:
    """Scales of 2.5e-6 and 2e-8: float16 has few numbers there, or none but 0. The range must stay within the grid."""
    np.savez(tmp_path / "data.npz", x=np.load(_data(tmp_path, "float16")[0])["x"] * np.float16(size))
    path = bench.save(_model(dtype="fp16", loud=40), tokenizer=False)
    passes = "outlier(most=0.05,threshold=0.3,observer=minmax),qdq"
    bench.compile(path, passes, calibration=[str(tmp_path / "data.npz")])
    graph = load_model(bench.folder / "out" / "model.onnx").graph
    node = next(node for node in graph if node.op_type == OUTLIER)
    scale, zero_point = (node.inputs[i].const_value.numpy().astype(np.float64) for i in (3, 4))
    rest = np.delete(np.load(tmp_path / "data.npz")["x"], LOUD, axis=-1).astype(np.float64)
    assert scale > 0
    assert 255 * scale >= np.ptp(rest)
    assert scale * (0 - zero_point) < rest.min() + 0.51 * scale
    assert scale * (255 - zero_point) > rest.max() - 0.51 * scale


@pytest.mark.parametrize("size", [2**-14, 2**-20])
def test_codes_are_for_the_scales_that_are_stored(size) -> None:
    """Columns of a float16 weight whose scales are subnormal, or would be 0: nearest codes for the scale as it is."""
    w = (np.random.default_rng(3).standard_normal((K, 24)) * size).astype(np.float16).astype(np.float32)
    b = Builder(opset=21, dtype="fp16")
    model = b.model({"y": b.MatMul(b.input("x", b.dtype, ["b", K]), b.weight("w", w), name="linear")})
    linear = as_linear(model.graph.node("linear"))
    stored, _ = split_weight(model, linear, Columns("int8", np.array(LOUD)), WeightGrid())
    scale = stored.scale.const_value.numpy().astype(np.float32)
    assert (scale > 0).all()
    w[list(LOUD)] = 0
    np.testing.assert_array_equal(stored.codes.const_value.numpy(), np.clip(np.rint(w / scale), -128, 127))


def test_a_decoder_with_all_passes(bench) -> None:
    path = bench.save(tiny_decoder())
    report = bench.compile(path, "smooth,outlier(threshold=0.01),qdq")
    decisions = {d.node: d for d in report.decisions["outlier"]}
    assert "weight is tied to the embedding" in {d.reason for d in decisions.values()}
    assert {d.action for d in decisions.values()} == {"marked", "skipped"}
    assert report.coverage == 1.0
    saved = json.loads((bench.folder / "out" / "model.report.json").read_text())
    assert saved["decisions"]["outlier"][0]["detail"].keys() >= {"channels", "relative_noise"}


def test_an_even_model_is_left_alone(bench, tmp_path) -> None:
    path = bench.save(_model(loud=1), tokenizer=False)
    report = bench.compile(path, "outlier,qdq", calibration=_data(tmp_path))
    assert {d.reason for d in report.decisions["outlier"]} == {"no channel is worth keeping in float"}


def test_the_encoder_loses_nothing(bench) -> None:
    path = bench.save(tiny_encoder())
    plain = bench.compile(path, "qdq", output="out/plain.onnx")
    split = bench.compile(path, "outlier,qdq")
    assert split.coverage == plain.coverage
    assert split.outputs[0].relative < 1.2 * plain.outputs[0].relative


@pytest.mark.parametrize("passes", ["outlier", "qdq,outlier"])
def test_order(bench, capsys, passes) -> None:
    path = bench.save(_model(), tokenizer=False)
    bench.refuses(capsys, path, ["--passes", passes], "must be followed by pack or qdq or dynamic")
