"""The pass `fuse`: operators in, operators out; the same numbers; what stays apart, and why."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.report.inspection import inspect
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.passes.base import Region
from qcompile.passes.formats import functions
from qcompile.passes.formats.base import ACTIVATION_BITS, COLUMNS_AT_8
from qcompile.passes.formats.functions import is_product
from qcompile.passes.formats.lower import lower
from qcompile.passes.fuse import Fuse
from qcompile.passes.joined_names import joined_name
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.prepare import Prepare
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.runtime.sessions import run, session

K, N = 48, 33
X = np.random.default_rng(0).standard_normal((2, 3, K)).astype(np.float32)
TARGETS = ("qcompile", "qdq", "matmulnbits")
SPECS = [QuantSpec(4, PerGroup(32)), QuantSpec(4, PerGroup(16), symmetric=True), QuantSpec(8, PerGroup(32))]


def _weights(names: str, *shape: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal(shape).astype(np.float32) for name in names.split()}


def _packed(body: str, weights: dict[str, np.ndarray], spec: QuantSpec | dict[str, QuantSpec]) -> ir.Model:
    """x (2, 3, K) through `body`, packed (node by node, or all alike); nodes are named after their outputs."""
    text = (
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[2,3,{K}] x, float[1] s) => (float[a,b,c] y) {{ {body} }}'
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in weights.items())
    for node in proto.graph.node:
        node.name = node.output[0]
    model = ir.from_proto(proto)
    for name, one in (spec if isinstance(spec, dict) else {}).items():
        Pack(Policy(one, None, None, include=[name])).call(Region.whole(model))
    Pack(Policy(SPECS[0] if isinstance(spec, dict) else spec, None, None)).call(Region.whole(model))
    return model


def _fuse(model: ir.Model, **options: Any) -> dict[str, str]:
    """Reasons by node; of the last decision on it."""
    step, before = Fuse(**options), _unused(model)
    step.call(Region.whole(model))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert _unused(model) == before, "nothing is left behind"
    return {decision.node: f"{decision.action}: {decision.reason}" for decision in step.decisions}


def _unused(model: ir.Model) -> list[str]:
    return [name for name, value in model.graph.initializers.items() if not value.uses()]


def _run(model: ir.Model, kernels: str = "portable", **options: Any) -> list[np.ndarray]:
    made = session(ir.to_proto(model).SerializeToString(), threads=1, kernels=kernels, **options)
    return run(made, None, {g.name: X if g.name == "x" else np.ones(1, np.float32) for g in made.get_inputs()})


def _operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


QKV = "q = MatMul(x, a) k = MatMul(x, b) t = Neg(q) v = MatMul(x, c) qb = Add(t, k) y = Mul(qb, v)"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_products_of_one_input_become_one(spec: QuantSpec) -> None:
    model = _packed(QKV, _weights("a b c", K, N), spec)
    before = _run(model)[0]
    reasons = _fuse(model)
    assert _operators(model) == [f"MatMulInt{spec.bits}", "Split", "Neg", "Add", "Mul"]
    assert reasons["q+k+v"] == "fused: q, k, v"
    assert [value.name for value in model.graph.node(1).outputs] == ["q", "k", "v"]
    np.testing.assert_array_equal(_run(model, optimize=False)[0], before)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("order", ["m, z", "z, m"])
def test_a_bias_joins_its_product(spec: QuantSpec, order: str) -> None:
    model = _packed(f"m = MatMul(x, w) y = Add({order})", _weights("w", K, N) | _weights("z", N), spec)
    before = _run(model)[0]
    assert _fuse(model)["m"] == "kept: no other packed product reads its input"
    assert _operators(model) == [f"MatMulAddInt{spec.bits}"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_array_equal(_run(model, optimize=False)[0], before)
    lower(model, "qcompile")
    assert list(model.functions) == [("qcompile", f"MatMulAddInt{spec.bits}", "")]


@pytest.mark.parametrize(
    ("body", "weights", "node", "reason"),
    [
        ("m = MatMul(x, w) y = Add(m, z)", {"z": (1, N)}, "m", "the constant added has shape (1, 33), not (33,)"),
        ("m = MatMul(x, w) y = Add(m, z)", {"z": (1,)}, "m", "the constant added has shape (1,), not (33,)"),
        ("m = MatMul(x, w) y = Add(m, s)", {}, "m", "what is added is no constant"),
        ("m = MatMul(x, w) y = Mul(m, z)", {"z": (N,)}, "m", "no Add follows it"),
        ("m = MatMul(x, w) n = Add(m, z) y = Mul(n, m)", {"z": (N,)}, "m", "several nodes read its output"),
        ("y = MatMul(x, w)", {}, "y", "its output is an output of the model"),
    ],
)
def test_what_is_no_bias_has_its_reason(body: str, weights: dict[str, Any], node: str, reason: str) -> None:
    arrays = {name: _weights("z", *shape)["z"] for name, shape in weights.items()}
    model = _packed(body, _weights("w", K, N) | arrays, SPECS[0])
    before = _operators(model)
    assert _fuse(model, inputs=False)[node] == f"kept: {reason}"
    assert _operators(model) == before


def test_different_kinds_stay_apart() -> None:
    """Group size, bits and zero points each make a kind; a shared weight is joined to nothing."""
    body = "".join(f"{o} = MatMul(x, {w}) " for o, w in zip(["p", "q", "r", "n", "t"], "abcde", strict=True))
    others = {"q": QuantSpec(4, PerGroup(16)), "r": SPECS[2], "n": QuantSpec(4, PerGroup(32), symmetric=True)}
    model = _packed(f"{body} u = MatMul(x, e) y = Sum(p, q, r, n, t, u)", _weights("a b c d e", K, N), others)
    before = _run(model)[0]
    reasons = _fuse(model)
    kind = "MatMulInt4 of uint4 in groups of 32, with zero points, float scales"
    assert reasons["p"].startswith(
        f"kept: it is {kind}, beside MatMulInt4 of int4 in groups of 32, without zero points"
    )
    assert all(reasons[name].startswith("kept: it is MatMulInt") for name in "pqrn")
    assert reasons["t"] == reasons["u"] == "kept: its weight is shared with another node"
    np.testing.assert_array_equal(_run(model)[0], before)


def _three(widths: Sequence[int], bits: Sequence[int | list[int] | None]) -> ir.Model:
    """Products of these widths; bits: of their activations, or the columns at 8 among others at 16."""
    weights = {name: _weights("w", K, n)["w"] for name, n in zip("abc", widths, strict=True)}
    model = _packed(
        "p = MatMul(x, a) q = MatMul(x, b) r = MatMul(x, c) y = Concat<axis=-1>(p, q, r)", weights, SPECS[0]
    )
    for node, own in zip((n for n in model.graph if is_product(n)), bits, strict=True):
        if own is not None:
            node.attributes[ACTIVATION_BITS] = ir.AttrInt64(ACTIVATION_BITS, own if isinstance(own, int) else 16)
        if isinstance(own, list):
            functions.register(model, node.op_type, columns=True)
            node.attributes[COLUMNS_AT_8] = ir.AttrInt64s(COLUMNS_AT_8, own)
    return model


@given(
    widths=st.tuples(*[st.integers(8, 40)] * 3),
    bits=st.tuples(*[st.sampled_from([None, 8, 16, [0, 3], [2, 5, 6, 8]])] * 3),
)
@settings(deadline=None, max_examples=40)
def test_columns_keep_the_bits_of_their_activations(widths: Sequence[int], bits: Sequence[Any]) -> None:
    """Those of a joined product at 8 bits are those that took 8 before, and no others."""
    model = _three(widths, bits)
    _fuse(model)
    made = next(node for node in model.graph if is_product(node))
    at_8: list[int] = []
    for start, width, own in zip(np.cumsum([0, *widths]).tolist(), widths, bits, strict=False):
        ranges = [0, width] if own == 8 else own if isinstance(own, list) else []
        for begin, end in zip(ranges[::2], ranges[1::2], strict=True):
            at_8 += range(start + begin, start + end)
    told = made.attributes.get_int(ACTIVATION_BITS, None)
    found = made.attributes.get_ints(COLUMNS_AT_8, [])
    assert list(found) == sorted(set(found)), "ranges are apart, and in order"
    assert told == (None if set(map(str, bits)) == {"None"} else 8 if bits == (8, 8, 8) else 16)
    if told != 8:
        assert [n for a, b in zip(found[::2], found[1::2], strict=True) for n in range(a, b)] == at_8


@pytest.mark.parametrize("bits", [(8, 8, 8), (8, 16, 8), (8, 8, 16), (16, 16, 8), (None, 8, 16), ([0, 64], 16, 8)])
def test_kernels_compute_a_joined_product_as_they_did_its_parts(bits: Sequence[Any]) -> None:
    """Bit for bit, for parts of whole panels of 64 columns; and the portable bodies do not mind."""
    model = _three((128, 64, 192), bits)

    native, portable = (_run(model, kernels=kernels, optimize=False)[0] for kernels in ("native", "portable"))
    _fuse(model)
    assert _operators(model) == ["MatMulInt4", "Split", "Concat"]
    np.testing.assert_array_equal(_run(model, kernels="native", optimize=False)[0], native)
    np.testing.assert_array_equal(_run(model, kernels="portable", optimize=False)[0], portable)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("make", "products"), [(tiny_decoder, 9), (tiny_encoder, 8)])
def test_every_target_fuses_and_agrees(tmp_path: Any, make: Any, products: int, target: str, symmetric: bool) -> None:
    """The same numbers as unfused, and ONNX Runtime still makes MatMulNBits of each product, bias included."""
    outputs = []
    for fused in (False, True):
        model = make()
        Prepare().call(Region.whole(model))
        eight = QuantSpec(8, PerGroup(32))
        Pack(Policy(QuantSpec(4, PerGroup(32), symmetric), eight, eight)).call(Region.whole(model))
        if fused:
            _fuse(model)
        lower(model, target)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        made = session(proto.SerializeToString(), threads=1, kernels="portable", optimize=False)
        ids = np.arange(18).reshape(2, 9)
        feeds = {given.name: ids if given.name == "input_ids" else np.ones_like(ids) for given in made.get_inputs()}
        outputs.append(run(made, None, feeds)[0])
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=0, atol=1e-5 * np.abs(outputs[0]).max())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "optimized.onnx"), 4
    onnxruntime.InferenceSession(proto.SerializeToString(), options)
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert operators["MatMulNBits"] == products, operators


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_compile_with_fuse(bench: Any, symmetric: bool) -> None:
    """Coverage, verification of the saved file and `inspect` know the joined operators."""
    report = bench.compile(bench.save(tiny_encoder(), tokenizer=True), "pack,fuse", symmetric=symmetric)
    assert report.coverage == 1.0
    assert report.reload_error is not None
    assert report.reload_error < 1e-5
    assert Counter(d.action for d in report.decisions["fuse"])["fused"] == 14
    shown = inspect(bench.folder / "out" / "model.onnx")
    assert shown.operators["qcompile.MatMulAddInt4"] == 8
    form = "int4 g32 sym" if symmetric else "uint4 g32 asym"
    assert {(group.quantized, group.form) for group in shown.weights if group.kind == "linear"} == {(True, form)}
    assert {group.shape for group in shown.weights if group.operator == "MatMulAddInt4"} >= {(48, 144)}


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["l.0.q_proj", "l.0.k_proj"], "l.0.q_proj+k_proj"),
        (["/l/q/MatMul", "/l/k/MatMul"], "/l/q/MatMul+k/MatMul"),
        (["a", "b"], "a+b"),
        (["a.b", "a.b"], "a.b+b"),
    ],
)
def test_names_say_what_was_joined(names: list[str], joined: str) -> None:
    assert joined_name(names) == joined
