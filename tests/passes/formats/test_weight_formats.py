"""Every weight format of the table: body against decode, targets, sizes, ties, roundings, and what tells of it."""

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from native_models import native_library
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler import cli
from qcompile.compiler.files.load import load_model, save_model
from qcompile.compiler.plan import build, grid, make_policy
from qcompile.compiler.recipe import Recipe, Step, parse_step
from qcompile.compiler.report.inspection import inspect
from qcompile.compiler.report.stored_weights import find_weights
from qcompile.models.tiny import tiny_branch, tiny_decoder
from qcompile.passes import lists
from qcompile.passes.affine import Grid, Quantized
from qcompile.passes.base import Region
from qcompile.passes.bit_fields import byte_rows
from qcompile.passes.errors import UserError
from qcompile.passes.extensions import parameters
from qcompile.passes.formats import FORMATS, Format, format_of, named
from qcompile.passes.formats.base import ACTIVATION_BITS, unpacked
from qcompile.passes.formats.bits import BitFields
from qcompile.passes.formats.codebook import CodebookPairs
from qcompile.passes.formats.lower import lower
from qcompile.passes.gptq import ErrorCompensated
from qcompile.passes.linears import constant
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy, typed
from qcompile.passes.rounding import column_errors, round_to_nearest, round_with_clip
from qcompile.passes.spec import QuantSpec, granularity
from qcompile.passes.statistics import Statistics
from qcompile.runtime.sessions import run, session

TARGETS = ("qcompile", "qdq", "matmulnbits")
NAMES = [own.name for own in FORMATS]
IN_FIELDS = [own.name for own in FORMATS if isinstance(own, BitFields)]
PAIRS = [own.name for own in FORMATS if isinstance(own, CodebookPairs)]
# Relative error of plain rounding on normal weights in groups of 32 rows, by bits.
BUDGET = {2: 0.6, 3: 0.27, 4: 0.13, 5: 0.06, 6: 0.03, 8: 0.009}
EXACT = 1e-5
ROOT = Path(__file__).resolve().parents[3]


def _sized(own: Format, group: int, target: str = "qcompile") -> Grid:
    """The grid with groups of so many rows, where the format lets one choose."""
    return grid(Step(own.name, {"group": group} if "group" in parameters(own.grid) else {}), target)


def _weight(k: int, n: int, *, seed: int = 0) -> np.ndarray:
    """Normal numbers; the first rows of column 0, and all of the last column, are zeros."""
    w = np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)
    w[:32, 0] = w[:, -1] = 0
    return w


def _product(spec: Grid, w: np.ndarray, target: str = "qcompile", *, table: bool = False) -> tuple[ir.Model, Quantized]:
    """x (rows, K) through a packed MatMul, or rows of a packed table (V, K); what its codes stand for."""
    dtype = TensorProto.FLOAT16 if np.dtype(spec.scale_dtype) == np.float16 else TensorProto.FLOAT
    k, n = w.shape
    stored = np.ascontiguousarray(w.T if table else w).astype(spec.scale_dtype)
    x = helper.make_tensor_value_info("x", TensorProto.INT64 if table else dtype, ["rows"] if table else ["rows", k])
    y = helper.make_tensor_value_info("y", dtype, ["rows", k if table else n])
    node = helper.make_node("Gather" if table else "MatMul", ["w", "x"] if table else ["x", "w"], ["y"], name="node")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(stored, "w")])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = ir.from_proto(proto)
    made = typed(spec, model.graph.initializers["w"])
    assert isinstance(made, Grid)
    Pack(Policy(spec, spec, spec), ranges="nearest").call(Region.whole(model))
    lower(model, target)
    onnx.checker.check_model(ir.to_proto(model))
    return model, round_to_nearest(w.astype(spec.scale_dtype).astype(np.float32), made, None)


def _run(model: ir.Model, x: np.ndarray, **options: Any) -> np.ndarray:
    made = session(ir.to_proto(model).SerializeToString(), threads=1, kernels="portable", **options)
    return run(made, None, {"x": x})[0]


def _relative(found: np.ndarray, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max(initial=0) / max(np.abs(wanted).max(initial=0), 1e-30))


def test_the_table_and_its_operators_are_told_apart() -> None:
    assert NAMES[:2] == ["int4", "int8"]
    assert tuple(NAMES) == lists.FORMATS
    assert len({name for own in FORMATS for name in own.operators}) == sum(len(own.operators) for own in FORMATS)
    for own in FORMATS:
        assert named(own.name) is own
        assert own.grid("qcompile").format == own.name
        assert own.grid("qcompile").bits == own.bits
    with pytest.raises(UserError, match=rf"unknown weight format 'int7'; the formats are {', '.join(NAMES)}"):
        named("int7")


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("int")])
def test_no_other_module_names_a_format(name) -> None:
    files = [path for layer in ("compiler", "passes") for path in (ROOT / layer).rglob("*.py")]
    word = re.compile(rf"\b{re.escape(name)}\b", re.IGNORECASE)
    naming = {path.relative_to(ROOT).as_posix() for path in files if word.search(path.read_text())}
    own = type(named(name)).__module__.rpartition(".")[2]
    assert naming - {"passes/formats/__init__.py"} == {f"passes/formats/{own}.py", "passes/lists.py"}


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(k=st.integers(1, 100), n=st.integers(1, 12), group=st.sampled_from([16, 32, 0]), half=st.booleans())
@example(k=70, n=7, group=32, half=False)
@example(k=32, n=1, group=32, half=False)
@example(k=1, n=3, group=16, half=True)
def test_a_body_computes_with_what_its_codes_stand_for(name, k, n, group, half) -> None:
    """Plain, and as ONNX Runtime fuses it; odd widths, partial groups and groups of zeros."""
    spec = _sized(named(name), group).typed(np.float16 if half else np.float32)
    w = _weight(k, n, seed=k)
    model, quantized = _product(spec, w)
    x = np.random.default_rng(1).standard_normal((5, k)).astype(spec.scale_dtype)
    decoded = quantized.dequantize()
    assert (decoded[w == 0] == 0).all()
    wanted = x.astype(np.float64) @ decoded
    for options in ({"optimize": False}, {"accuracy_level": 0}):
        assert _relative(_run(model, x, **options), wanted) < (5e-3 if half else EXACT)


@pytest.mark.parametrize("name", IN_FIELDS)
@settings(max_examples=12, deadline=None)
@given(k=st.integers(1, 100), n=st.integers(1, 12), group=st.sampled_from([16, 32, 0]), half=st.booleans())
def test_symmetric_fields_have_no_zero_points(name, k, n, group, half) -> None:
    """In a product and in a table, inlined or not: the middle of the codes stands for 0."""
    dtype = np.float16 if half else np.float32
    x, indices = np.random.default_rng(1).standard_normal((3, k)).astype(dtype), np.arange(-n, n)
    for target in ("qcompile", "qdq"):
        spec = grid(Step(name, {"group": group, "symmetric": True}), target).typed(dtype)
        model, quantized = _product(spec, _weight(k, n, seed=k), target)
        sizes = {value.name: constant(value).size for value in model.graph.initializers.values()}
        assert sorted(sizes.values()) == sorted([sum(byte_rows(k, spec.bits)) * n, spec.groups(k) * n])
        assert quantized.codes.min(initial=0) >= spec.qmin
        assert _relative(_run(model, x), x.astype(np.float64) @ quantized.dequantize()) < (5e-3 if half else EXACT)
        model, _ = _product(spec, _weight(k, n, seed=k), target, table=True)
        assert _relative(_run(model, indices), quantized.dequantize().T[indices]) < (2e-3 if half else 1e-6)


@pytest.mark.parametrize("target", ["qcompile", "qdq"])
def test_symmetric_and_other_fields_share_a_model(bench: Any, target: str) -> None:
    source = bench.save(tiny_decoder(layers=1, tied=False))
    weights, head = parse_step("int3(group=16, symmetric=true)"), parse_step("int3(group=16)")
    bench.compile(source, weights=weights, lm_head=head, embedding=weights, target=target)
    forms = {weight.form for weight in find_weights(load_model(bench.folder / "out" / "model.onnx").graph)}
    assert {"int3 g16 sym", "int3 g16 asym"} <= forms


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("v", [1, 9, 10])
def test_an_embedding_gives_rows_by_both_of_their_indices(name, v, half) -> None:
    own = named(name)
    spec = _sized(own, 16).typed(np.float16 if half else np.float32)
    for target in TARGETS:
        spec = _sized(own, 16, target).typed(spec.scale_dtype)
        if own.refusal(target, spec, 40):
            continue
        model, quantized = _product(spec, _weight(40, v + 1)[:, :v], target, table=True)
        indices, wanted = np.arange(-v, v), quantized.dequantize().T
        found = _run(model, indices)
        assert found.dtype == spec.scale_dtype
        assert _relative(found.astype(np.float64), wanted[indices]) < (2e-3 if half else 1e-6)
        if target != "matmulnbits":  # GatherBlockQuantized checks nothing
            with pytest.raises(ValueError, match="failed on inputs"):
                _run(model, np.array([v]))


@pytest.mark.parametrize("name", NAMES)
def test_plain_rounding_stays_within_the_error_of_its_bits(name) -> None:
    w = np.random.default_rng(0).standard_normal((256, 64)).astype(np.float32)
    spec = _sized(named(name), 32)
    assert np.linalg.norm(round_to_nearest(w, spec, None).dequantize() - w) < BUDGET[spec.bits] * np.linalg.norm(w)


@pytest.mark.parametrize("name", NAMES)
def test_codes_of_decoded_weights_are_the_same(name) -> None:
    spec = _sized(named(name), 32)
    q = round_to_nearest(_weight(80, 9), spec, None)
    np.testing.assert_array_equal(spec.project(q.dequantize(), q.qparams), q.codes)
    assert q.codes.max() < 1 << spec.code_bits or spec.code_dtype is np.int8


def _problem(k: int = 96, n: int = 24) -> tuple[np.ndarray, Statistics]:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((800, k)) @ (np.eye(k) + 0.5 * rng.standard_normal((k, k))) * rng.lognormal(0, 0.7, k)
    x = x.astype(np.float32)
    return rng.standard_t(5, (k, n)).astype(np.float32), Statistics(len(x), x.T @ x, np.abs(x).max(axis=0))


@pytest.mark.parametrize("name", NAMES)
def test_every_rounding_works_on_its_grid(name) -> None:
    """Clipping never does worse than plain rounding; error compensation does better; codes stay what is stored."""
    (w, statistics), spec = _problem(), _sized(named(name), 32)
    found = [rounding(w, spec, statistics) for rounding in (round_to_nearest, round_with_clip, ErrorCompensated(0.01))]
    plain, clipped, compensated = (column_errors(q.dequantize() - w, statistics.gram) for q in found)
    assert (clipped <= plain * (1 + 1e-5)).all()
    assert compensated.sum() < 0.8 * plain.sum()
    for q in found:
        np.testing.assert_array_equal(spec.storable(q.qparams.scale), q.qparams.scale)
        assert (q.qparams.scale > 0).all() or not spec.positive
        stored = named(name).store(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), "w", q)
        in_bytes = name in IN_FIELDS + PAIRS
        codes = named(name).codes(stored.codes, len(w)) if in_bytes else unpacked(stored.codes, w.shape[1])
        np.testing.assert_array_equal(codes, q.codes)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_target_computes_the_same_or_says_why_not(name, target) -> None:
    own = named(name)
    for k in (96, 70):
        spec = _sized(own, 32, target)
        reason = own.refusal(target, spec, k)
        if reason:
            assert reason.startswith(f"target {target} ")
            continue
        model, quantized = _product(spec, _weight(k, 7), target)
        x = np.random.default_rng(0).standard_normal((5, k)).astype(np.float32)
        for options in ({"optimize": False}, {"accuracy_level": 0}):
            assert _relative(_run(model, x, **options), x.astype(np.float64) @ quantized.dequantize()) < EXACT
        assert bool(model.functions) == (target == "qcompile")


@pytest.mark.parametrize("target", ["qcompile", "qdq"])
@pytest.mark.parametrize("name", NAMES)
def test_onnx_runtime_fuses_its_body(tmp_path: Path, name, target) -> None:
    """One MatMulNBits, no float weight: a dense product would take eight times the memory."""
    model, _ = _product(_sized(named(name), 32), _weight(96, 32), target)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    graph = onnx.load(tmp_path / "optimized.onnx").graph
    assert [node.op_type for node in graph.node] == ["MatMulNBits"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_a_compile_inspects_as_it_was_told(bench: Any, capsys: pytest.CaptureFixture[str], name, target) -> None:
    """All passes, head and table in the format too; sizes are those that the grid says; what cannot be says why."""
    source, own = bench.save(tiny_decoder(layers=1, hidden=64, ffn=128)), named(name)
    given = f"{name}(group=32)" if "group" in parameters(own.grid) else name
    options = ["--weights", given, "--lm-head", given, "--embedding", given, "--target", target]
    spec = _sized(own, 32, target)
    if reason := own.refusal(target, spec, 64):
        bench.refuses(capsys, source, options, re.escape(reason))
        return
    passes = "smooth,awq,gptq,pack,fuse"
    assert bench.run(source, "--passes", passes, "--calibration", str(bench.text), *options) == 0
    report = json.loads((bench.folder / "out" / "model.report.json").read_text())
    quantized = [d for d in report["decisions"]["pack"] if d["action"] == "quantized"]
    assert {d["format"] for d in quantized} == {name}
    assert {d["reason"] for d in quantized} == {str(spec)}
    assert any(d["action"] == "rounded" for d in report["decisions"]["gptq"])
    assert any(d["action"] == "folded" for d in report["decisions"]["awq"])
    assert {n["activation_bits"] for n in report["nodes"]} <= ({8, 16} if own.native else {16})
    if target == "qcompile":  # what the choice is made from
        assert {n["int8_error"] is not None for n in report["nodes"]} == {bool(own.native)}
    summary = inspect(bench.folder / "out" / "model.onnx")
    weights = [group for group in summary.weights if group.kind in ("linear", "embedding")]
    assert {group.kind for group in weights} == {"linear", "embedding"}
    assert all(group.quantized and name in group.form for group in weights)
    assert summary.shares["MatMul"] == 1
    assert summary.linear_bits == pytest.approx(spec.bits_per_weight(64), rel=0.05)
    assert report["bits_per_weight"] == pytest.approx(spec.bits_per_weight(64), rel=0.05)
    page = (bench.folder / "out" / "model.report.html").read_text()
    assert f"{own.bits}-bit weights" in page
    assert str(spec) in page


@pytest.mark.parametrize("name", NAMES)
def test_a_tied_table_is_stored_once(tmp_path: Path, name) -> None:
    spec, vocab = _sized(named(name), 32), 3000
    sizes = []
    for tied in (True, False):
        model = tiny_decoder(layers=1, hidden=64, ffn=64, vocab=vocab, tied=tied)
        Pack(Policy(spec, spec, spec)).call(Region.whole(model))
        lower(model, "qcompile")
        sizes.append(save_model(model, tmp_path / f"{tied}.onnx").data_bytes)
    assert sizes[1] - sizes[0] == pytest.approx(spec.bits_per_weight(64) * 64 * vocab / 8, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_sessions_with_the_native_library_run_it(bench: Any, name) -> None:
    """Products without a kernel run by their bodies beside those that have one, and these are marked for int8."""
    source = bench.save(tiny_decoder(layers=1))
    report = bench.compile(source, weights=parse_step(name), activations=8)
    path = bench.folder / "out" / "model.onnx"
    for node in load_model(path).graph:
        if (own := format_of(node)) is not None and node.op_type.startswith("MatMul"):
            assert (node.attributes.get_int(ACTIVATION_BITS, 16) == 8) == bool(own.native)
    assert {8 if named(d.format).native else 16 for d in report.packed("MatMul")} == {
        node.activation_bits for node in report.nodes
    }
    feeds = {"input_ids": np.arange(9)[None], "attention_mask": np.ones((1, 9), np.int64)}
    native_library()
    portable, native = (run(session(path, kernels=kernels), ["logits"], feeds)[0] for kernels in ("portable", "native"))
    assert np.linalg.norm(native - portable) < 0.03 * np.linalg.norm(portable)


@pytest.mark.parametrize("name", [name for name in NAMES if named(name).bits < 8])
def test_routers_and_bodies_get_integers(name) -> None:
    """A router gets 8 bits; weights behind a DequantizeLinear alone the integers that stand in for the format."""
    spec = _sized(named(name), 16)
    size = 64 if name in PAIRS else spec.group_size(1000)  # of pairs, a scale for each column
    assert spec.eight() == QuantSpec(8, granularity(size), signed_scale=True)
    model = tiny_branch()
    step = Pack(Policy(spec, None, None))
    step.call(Region.whole(model))
    step.call_rest(model)
    inner = [d for d in step.decisions if d.reason.endswith("in a body, rounded without data")]
    assert inner
    assert {d.format for d in inner} == {spec.plain.format}
    assert {d.group for d in inner} == {str(spec.plain)}


@pytest.mark.parametrize("name", NAMES)
def test_include_and_exclude_choose_among_its_weights(bench: Any, name) -> None:
    source = bench.save(tiny_decoder(layers=1))
    report = bench.compile(source, weights=parse_step(name), exclude=("*down_proj*",), min_coverage=0)
    assert {d.format for d in report.decisions["pack"]} == {name, "int8", ""}
    assert [d.reason for d in report.decisions["pack"] if "down_proj" in d.node] == ["excluded by '*down_proj*'"]


@pytest.mark.parametrize("name", NAMES)
def test_a_dry_run_and_a_sweep_tell_of_it(bench: Any, capsys: pytest.CaptureFixture[str], name) -> None:
    source = bench.save(tiny_decoder(layers=1))
    assert bench.run(source, "--passes", "pack", "--weights", name, "--dry-run") == 0
    assert str(named(name).grid("qcompile")) in capsys.readouterr().out
    folder = bench.folder / "sweep"
    options = ["--grid", f"weights={name},int4(group=16,symmetric=true)", "passes=pack", "-o", str(folder)]
    assert cli.main(["sweep", str(source), *options, "--tokens", "128", "--context", "32"]) == 0
    told = capsys.readouterr().out
    assert name in told
    assert "int4(group=16,symmetric=true)" in told


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weights": "nothing"}, "unknown weight format 'nothing'"),
        ({"weights": "int4(groups=3)"}, "weight format 'int4' has no parameter 'groups'; it has group, symmetric"),
        ({"weights": "int4(group=true)"}, "weight format 'int4': parameter group takes int, got True"),
        ({"weights": "int4(group=5)"}, "group size 5 is not possible"),
        ({"weights": "int8(symmetric=true)"}, "has no parameter 'symmetric'; it has group"),
        ({"weights": "int4", "bits": 8}, "says all of bits and symmetric"),
        ({"weights": "int4("}, r"cannot read 'int4\(' in recipe: weights: expected name"),
        ({"lm_head": "int7"}, "unknown weight format 'int7'"),
        ({"weights": "int4", "passes": ["qdq"]}, "weights: int4 is for pack; qdq makes int8"),
        ({"weights": 4}, "weights must be str, got 4"),
    ],
)
def test_bad_settings_are_refused(settings, reason) -> None:
    with pytest.raises(UserError, match=reason):
        build(Recipe.from_dict(settings))


def test_recipes_hold_formats_as_they_were_given() -> None:
    plain = {"weights": "int4(group=64)", "lm_head": "int8", "embedding": "keep"}
    recipe = Recipe.from_dict(plain)
    assert recipe.weights == Step("int4", {"group": 64})
    assert {key: recipe.to_dict()[key] for key in plain} == plain
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert "weights" not in Recipe().to_dict()


def test_short_forms_are_the_integer_formats() -> None:
    short = make_policy(Recipe(bits=4, group_size=64, symmetric=True, lm_head=8, embedding=4))
    long = make_policy(
        Recipe.from_dict(
            {
                "weights": "int4(group=64, symmetric=true)",
                "lm_head": "int8(group=64)",
                "embedding": "int4(group=64)",
            }
        )
    )
    assert (short.body, short.lm_head, short.embedding) == (long.body, long.lm_head, long.embedding)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_tables_on_matmulnbits_are_what_matmulbnb4_decodes_to_the_bit(name: str) -> None:
    """The identity through the node is its weight; the portable table, rounded to int8, is within half a step of it."""
    own, w = named(name), _weight(128, 6)
    for half in (False, True):
        for group in (16, 64, 128):
            spec = _sized(own, group, "matmulnbits").typed(np.float16 if half else np.float32)
            model, quantized = _product(spec, w, "matmulnbits")
            (node,) = (node for node in model.graph if node.op_type == "MatMulBnb4")
            assert constant(node.inputs[1]).nbytes == w.size / 2
            found = _run(model, np.eye(128, dtype=spec.scale_dtype))
            np.testing.assert_array_equal(found, quantized.dequantize().astype(spec.scale_dtype))
    exact, rounded = (_sized(own, 64, target) for target in ("matmulnbits", "qcompile"))
    tables = np.array(exact.table), np.array(rounded.table) / 127
    assert np.abs(tables[0] - tables[1]).max() <= 0.5 / 127
    a, b = (np.linalg.norm(round_to_nearest(w, spec, None).dequantize() - w) for spec in (exact, rounded))
    assert 0 < abs(a - b) < 0.01 * a
    sizes = np.linspace(-1, 1, 1001, dtype=np.float32).reshape(-1, 1)
    codes = np.unique(round_to_nearest(sizes, _sized(own, 0), None).codes)
    assert len(codes) == len(set(rounded.table)), "every level is used, and of equal ones one"


def test_models_of_others_with_matmulbnb4_are_read() -> None:
    """quant_type 0 is another table; a B that is computed is no weight."""
    told = {}
    for kind, constant_b in ((0, True), (1, True), (1, False)):
        scale = ir.val("s", const_value=ir.tensor(np.ones(12, np.float32)))
        packed = ir.tensor(np.zeros(3 * 128, np.uint8))
        b = ir.val("b", const_value=packed) if constant_b else ir.val("b", ir.DataType.UINT8, [3 * 128])
        x = ir.val("x", ir.DataType.FLOAT, ["rows", 256])
        attributes = {"K": 256, "N": 3, "block_size": 64, "quant_type": kind}
        node = ir.node("MatMulBnb4", [x, b, scale], attributes, domain="com.microsoft", name="node")
        initializers = [scale, *([b] if constant_b else [])]
        graph = ir.Graph([x], node.outputs, nodes=[node], initializers=initializers, opset_imports={"": 21})
        (weight,) = find_weights(graph)
        told[kind, constant_b] = (weight.kind, weight.form, weight.shape)
    assert told[0, True] == ("linear", "fp4 g64", (256, 3))
    assert told[1, True] == ("linear", "nf4 g64", (256, 3))
    assert told[1, False] == ("product", "", ())


@pytest.mark.parametrize("name", NAMES)
def test_a_group_that_is_a_whole_column_is_told_as_one(name: str) -> None:
    """However many columns there are."""
    spec = _sized(named(name), 32)
    group = spec.group_size(1000)
    several = "per-column" if name in PAIRS else f"g{group}"  # of pairs, a scale for each column
    for k, size in ((group, "per-column"), (2 * group, several)):
        model, _ = _product(spec, _weight(k, 48))
        (weight,) = find_weights(model.graph)
        assert size in weight.form.split()


@pytest.mark.parametrize("name", NAMES)
def test_computed_codes_are_no_weight(name) -> None:
    spec = _sized(named(name), 32)
    model, _ = _product(spec, _weight(64, 8))
    (node,) = model.graph
    (weight,) = find_weights(model.graph)
    assert (weight.kind, weight.quantized) == ("linear", True)
    codes = node.inputs[1]
    assert codes is not None
    node.replace_input_with(1, ir.val("computed", codes.dtype, codes.shape))
    (weight,) = find_weights(model.graph)
    assert (weight.kind, weight.quantized) == ("product", False)


def test_nf4_refuses_groups_that_matmulbnb4_would_read_across_columns() -> None:
    own = named("nf4")
    for group, k in ((64, 96), (48, 96), (8, 64), (512, 1024), (0, 96)):
        assert "rows that divide K" in own.refusal("matmulnbits", _sized(own, group, "matmulnbits"), k)
        assert not own.refusal("qdq", _sized(own, group), k)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mxfp4_decodes_as_the_specification_s_types_do(dtype) -> None:
    """E2M1 and E8M0 of ml_dtypes on the very bits that are stored."""
    own = named("mxfp4")
    spec = own.grid("qcompile").typed(dtype)
    w = (_weight(96, 40) * np.float32(2.0) ** np.linspace(-10, 8, 40, dtype=np.float32)).astype(dtype)
    quantized = round_to_nearest(w.astype(np.float32), spec, None)
    tensors = own.store(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), "w", quantized)
    values = unpacked(tensors.codes, 40).astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    scales = constant(tensors.scale).numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    wanted = values.astype(np.float32) * np.repeat(scales, 32, axis=0)
    np.testing.assert_array_equal(quantized.dequantize(), wanted)
    largest = np.abs(w.astype(np.float64)).reshape(3, 32, 40).max(axis=1)
    shared = 2.0 ** (np.floor(np.log2(largest, where=largest > 0, out=np.zeros_like(largest))) - 2)
    np.testing.assert_array_equal(np.where(largest > 0, shared, 2), scales)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("size", [2.0**-12, 1.0, 2.0**8])
def test_nvfp4_decodes_as_the_types_that_it_is_named_after(dtype, size) -> None:
    """E2M1 and E4M3 of ml_dtypes on the very bits that are stored; a body agrees; no scale saturates."""
    own, w = named("nvfp4"), (_weight(96, 40) * np.float32(size)).astype(dtype)
    model, quantized = _product(own.grid("qcompile").typed(dtype), w)
    (node,) = model.graph
    codes, scale = (constant(value) for value in node.inputs[1:3] if value is not None)
    values = np.asarray(codes.numpy()).astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    scales = scale.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    tensor_scale = np.float32(2.0) ** (node.attributes["exponent"].as_int() + 3)
    wanted = values * np.repeat(scales, 16, axis=0) * tensor_scale
    np.testing.assert_array_equal(quantized.dequantize(), wanted)
    np.testing.assert_array_equal(_run(model, np.eye(96, dtype=dtype)), wanted.astype(dtype))
    assert scales.max() < 448
    assert np.linalg.norm(wanted - w.astype(np.float32)) < 0.11 * np.linalg.norm(w.astype(np.float32))


def test_products_of_other_tensor_scales_stay_apart(bench: Any) -> None:
    """Three linears of one input, one of them a thousand times as large: the other two are joined."""
    w = _weight(64, 32)
    arrays = [numpy_helper.from_array(np.ascontiguousarray(w * size), f"w{i}") for i, size in enumerate((1, -1, 1000))]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 64])
    ends = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["rows", 32]) for i in range(3)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"], name=f"node{i}") for i in range(3)]
    graph = helper.make_graph(nodes, "g", [x], ends, arrays)
    source = bench.save(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])))
    bench.compile(source, passes="pack,fuse", weights=parse_step("nvfp4"))
    made = load_model(bench.folder / "out" / "model.onnx")
    assert [node.op_type for node in made.graph if node.domain == "qcompile"] == ["MatMulNVFP4", "MatMulNVFP4"]


def test_mxfp4_scales_stay_within_what_a_file_can_hold() -> None:
    spec = named("mxfp4").grid("qcompile")
    scale = np.array([0, 1e-45, 2.0**-119, 1, 1e38], np.float32)
    np.testing.assert_array_equal(spec.storable(scale), [1, 2.0**-119, 2.0**-119, 1, 2.0**120])
    np.testing.assert_array_equal(
        spec.typed(np.float16).storable(scale), np.array([1, 2.0**-24, 2.0**-24, 1, 4096], np.float32)
    )
