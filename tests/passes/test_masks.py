"""passes/masks.py, and rows that a mask of -inf leaves without a number."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs.masks import _attention
from graphs.table import Graph
from observing import UINT8, observe

from qcompile.compiler import Calibration, Recipe, compile_model, parse_passes
from qcompile.compiler.files.load import load_model
from qcompile.passes.errors import UserError
from qcompile.passes.masks import holds_fill, mark_infinite, masked, reaches_product
from qcompile.passes.observers import OBSERVERS
from qcompile.runtime.sessions import run, session


def _names(text: str) -> set[str]:
    return {
        str(value.name) for value in masked(ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> g {text}'))
    }


@pytest.mark.parametrize("fill", ["-10000.0", "-3.4e38", "-1e9", "10000.0"])
def test_what_is_computed_from_a_fill_is_masked(fill: str) -> None:
    """Up to the Softmax; a product, a Relu or a Softmax ends it."""
    text = f"""(float[2, 3] x, bool[2, 3] k) => (float[2, 3] y) {{
        f = Constant <value_float = {fill}> () z = Constant <value_float = 0.0> ()
        m = Where(k, z, f) a = Add(x, m) u = Transpose(a) s = Softmax(u) r = Relu(u) y = Add(s, r) }}"""
    assert _names(text) == {"f", "m", "a", "u"}


def test_ordinary_numbers_are_no_masks() -> None:
    text = """(float[2, 3] x) => (float[2, 3] y) {
        f = Constant <value_float = -100.0> () a = Add(x, f) s = Softmax(a) y = Mul(s, f) }"""
    assert _names(text) == set()


def test_what_joins_scores_is_a_mask_whatever_it_holds() -> None:
    """Scores come out of a product, the mask out of none; a residual sum has no Softmax behind it."""
    text = """(float[2, 3, 3] q, float[2, 1, 3] m) => (float[2, 3, 3] y) {
        i = Identity(m) p = MatMul(q, q) c = Constant <value_float = 2.0> () d = Div(p, c) a = Add(i, d)
        s = Softmax <axis = -1> (a) o = MatMul(s, q) y = Add(o, q) }"""
    assert _names(text) == {"i", "a"}


def test_inputs_that_are_fed_infinities_are_masks_and_what_carries_them_on() -> None:
    text = "(float[2, 3] x, float[2, 3] m) => (float[2, 3] y) { i = Identity(m) n = Neg(x) a = Add(i, n) y = Relu(a) }"
    model = ir.from_onnx_text(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    mark_infinite(model, {"m"})
    assert {value.name for value in masked(model)} == {"m", "i", "a"}


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.float32([0, -1e4]), True),
        (np.float16([0, -65504]), True),
        (np.float32([0, -np.inf]), True),
        (np.float32([5000, -100]), False),
        (np.int64([-(10**9)]), False),
        (np.zeros(0, np.float32), False),
    ],
)
def test_constants(array: np.ndarray, wanted: bool) -> None:
    assert holds_fill(ir.Value(name="c", const_value=ir.tensor(array))) is wanted


@pytest.mark.parametrize(
    ("body", "reached"),
    [
        ("y = MatMul(m, x)", True),
        ("a = Add(m, x) b = Neg(a) y = MatMul(b, x)", True),
        ("a = Where(k, m, x) y = MatMul(a, x)", True),
        ("a = Add(x, m) s = Softmax(a) y = MatMul(s, x)", False),
        ("c = Cast <to = 9> (m) a = Where(c, x, x) y = MatMul(a, x)", False),
        ("i = Cast <to = 7> (m) f = Cast <to = 1> (i) y = MatMul(f, x)", False),
        ("y = Add(m, x)", False),
        ("c = Cast <to = 9> (m) y = Where(c, m, x)", False),
    ],
)
@pytest.mark.parametrize("typed", [True, False])
def test_which_infinities_meet_a_product(body: str, reached: bool, typed: bool) -> None:
    """Along floats, of known type or not; a condition, an integer and what bounds it end them."""
    text = f"(float[3, 3] x, float[3, 3] m, bool[3, 3] k) => (float[3, 3] y) {{ {body} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g {text}')
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto) if typed else proto)
    unknown = not typed and "to = 7" in body  # nobody says that it is no float
    assert reaches_product(model.graph.inputs[1]) is (reached or unknown)


def _table(tmp_path: Path, number: float) -> Path:
    table = np.ones((600, 8), np.float32)
    table[3, 4:] = number
    graph = Graph()
    rows = graph.input("b", dtype=np.int64)
    graph.output(graph.linear(graph.one("Gather", graph.constant(table), rows), 16, 8))
    onnx.save(graph.model(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("passes", ["pack", "qdq", "dynamic"])
def test_a_table_of_minus_infinity_stays_in_float_with_its_reason(tmp_path: Path, passes: str) -> None:
    source = _table(tmp_path, -np.inf)
    np.savez(tmp_path / "x.npz", x1=np.array([0, 1, 2, 5], np.int64))
    recipe = Recipe(passes=parse_passes(passes), group_size=16, min_coverage=0)
    report = compile_model(
        source, recipe, output=tmp_path / "o.onnx", calibration=Calibration([str(tmp_path / "x.npz")])
    )
    (told,) = [d for d in report.decisions[passes] if d.detail.get("kind") == "Gather"]
    assert "holds the fill of a mask" in told.reason
    assert {node.op_type for node in load_model(tmp_path / "o.onnx").graph} >= {"Gather"}


def test_a_table_of_plus_infinity_or_nan_is_damaged(tmp_path: Path) -> None:
    for number in (np.inf, np.nan):
        source = _table(tmp_path, number)
        with pytest.raises(UserError, match=r"tensor 'c\d+' holds .* export the model again"):
            compile_model(source, Recipe(passes=parse_passes("pack")), output=tmp_path / "o.onnx")


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name != "gram"])
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_rows_without_a_number_are_zeros_to_observers(name: str, bad: float) -> None:
    """A batch of nothing else counts as none; a single number that is none is refused as before."""
    batch = np.random.default_rng(0).standard_normal((4, 3, 8)).astype(np.float32)
    zeros, padded, broken = batch.copy(), batch.copy(), batch.copy()
    zeros[1:3, 1], padded[1:3, 1], broken[0, 0, 0] = 0, bad, bad
    plain, found = (observe(OBSERVERS[name]("x"), [own]) for own in (zeros, padded))
    assert plain.range(UINT8) == found.range(UINT8)
    nothing = observe(OBSERVERS[name]("x"), [np.full((2, 8), bad), padded])
    assert nothing.range(UINT8) == plain.range(UINT8)
    with pytest.raises(UserError, match="NaN or infinite"):
        observe(OBSERVERS[name]("x"), [broken])


@pytest.mark.parametrize("passes", ["qdq", "qdq(operators=all)", "smooth,qdq,bias_correction", "gptq,pack", "dynamic"])
def test_padding_of_which_the_float_model_makes_nan_stops_nothing(tmp_path: Path, passes: str) -> None:
    """A sequence that is masked throughout is NaN in the float model too; the others are right."""
    graph = Graph()
    x, mask = graph.input("b", 12, 32), graph.input("b", 12, dtype=np.bool_)
    chosen = graph.one("Where", mask, graph.constant(np.float32(0)), graph.constant(np.float32(-np.inf)))
    _attention(graph, graph.one("Unsqueeze", chosen, graph.constant(np.array([1], np.int64))), x)
    onnx.save(graph.model(), tmp_path / "m.onnx")
    feeds = graph.feeds(0)
    feeds[mask] = np.ones((8, 12), np.bool_)
    feeds[mask][0], feeds[mask][:, 9:] = False, False
    np.savez(tmp_path / "x.npz", **feeds)
    recipe = Recipe(passes=parse_passes(passes), group_size=32)
    compile_model(
        tmp_path / "m.onnx", recipe, output=tmp_path / "o.onnx", calibration=Calibration([str(tmp_path / "x.npz")])
    )
    (wanted,), (found,) = (run(session(tmp_path / f"{end}.onnx", kernels="portable"), None, feeds) for end in "mo")
    assert np.isnan(wanted[0]).all()
    noise = np.square(found[1:] - wanted[1:]).sum() / np.square(wanted[1:]).sum()
    assert noise < (0.04 if "pack" in passes else 0.01)


@pytest.mark.parametrize("op_type", ["MatMulInt4", "MatMulAddNF4", "EmbeddingInt8"])
def test_packed_products_are_products(op_type: str) -> None:
    """An infinity meets one as it meets a MatMul."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2, 8]))
    node = ir.node(op_type, [x], domain="qcompile")
    ir.Graph([x], node.outputs, nodes=[node])
    assert reaches_product(x) is op_type.startswith("MatMul")


def test_caches_in_half_precision_are_no_operands() -> None:
    caches = [ir.Value(name=name) for name in ("q", "k", "v", "past")]
    node = ir.node("GroupQueryAttentionF16", caches, domain="qcompile")
    ir.Graph(caches, node.outputs, nodes=[node, ir.node("MatMul", [node.outputs[0], node.outputs[0]])])
    assert [reaches_product(value) for value in caches] == [True, True, True, False]
