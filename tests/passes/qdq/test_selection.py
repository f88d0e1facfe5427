"""passes/qdq/selection.py: which nodes become integer for each `operators` and provider, and why the others do not."""

from itertools import product

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from qdq_graphs import Tiny
from qdq_runs import Made, Q, quantized, redundant_pairs, session

from qcompile.compiler.plan import build
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.policy import Policy
from qcompile.passes.prepare import Prepare
from qcompile.passes.qdq import qdq
from qcompile.passes.qdq.selection import MASKED, quantized_output, select, weight_position
from qcompile.passes.qdq.weights import SPEC


def _attention() -> Tiny:
    """A head: x (1, 6, 32), three projections, QKᵀ, Softmax, PV, and the residual."""
    tiny = Tiny()
    x = tiny.input(1, 6, 32)
    q, k, v = (tiny.one("MatMul", x, tiny.floats(32, 32)) for _ in range(3))
    scores = tiny.one("MatMul", q, tiny.one("Transpose", k, perm=[0, 2, 1]))
    y = tiny.one("MatMul", tiny.one("Softmax", tiny.one("Mul", scores, tiny.constant(np.float32(0.03)))), v)
    return tiny.output(tiny.one("Add", tiny.one("MatMul", y, tiny.floats(32, 32)), x))


def _network(*, pool: bool = True) -> Tiny:
    """Conv, Sigmoid, a product of both, maybe a pool, and a second Conv."""
    tiny = Tiny()
    first = tiny.one("Conv", tiny.input(1, 8, 8, 8), tiny.floats(16, 8, 1, 1))
    y = tiny.one("Mul", first, tiny.one("Sigmoid", first))
    if pool:
        y = tiny.one("AveragePool", y, kernel_shape=[2, 2], strides=[2, 2])
    return tiny.output(tiny.one("Conv", y, tiny.floats(4, 16, 1, 1)))


GRAPHS = {"attention": _attention, "pooled": _network, "gated": lambda: _network(pool=False)}


def _integer(made: Made) -> list[str]:
    """Operators of the nodes that were quantized, sorted."""
    return sorted(d.detail["kind"] for d in made.decisions("quantized"))


# A pool, slower in integers, stands between "pooled" Mul and Conv: with "auto" it and what is before it stay float.
INTEGER = {
    ("auto", "attention"): ["MatMul"] * 4,
    ("weights", "attention"): ["MatMul"] * 4,
    ("all", "attention"): ["Add", *["MatMul"] * 6, "Transpose"],
    ("auto", "gated"): ["Conv", "Conv", "Mul", "Sigmoid"],
    ("auto", "pooled"): ["Conv", "Conv"],
    ("weights", "gated"): ["Conv", "Conv"],
    ("all", "pooled"): ["Conv", "Conv", "Mul", "Sigmoid"],
}


@pytest.mark.parametrize(("operators", "graph"), INTEGER)
def test_what_becomes_integer(operators, graph) -> None:
    made = quantized(GRAPHS[graph](), operators=operators)
    assert _integer(made) == INTEGER[operators, graph]
    assert redundant_pairs(made.after) == []
    assert made.error() < (0.03 if operators != "all" and graph == "attention" else 0.06)


def test_slower_operators_only_if_asked(tmp_path) -> None:
    made = quantized(_network(), operators="all", slower=True)
    assert "AveragePool" in _integer(made)
    assert made.optimized(tmp_path)["QLinearAveragePool"] == 1
    made = quantized(_attention(), operators="all", slower=True)
    assert made.optimized(tmp_path)["QLinearSoftmax"] == 1


def test_all_of_attention_is_integer(tmp_path) -> None:
    found = quantized(_attention(), operators="all").optimized(tmp_path)
    assert found["MatMul"] == 0
    assert found["QLinearMatMul"] + found["MatMulIntegerToFloat"] == 6


@pytest.mark.parametrize("operators", ["auto", "weights", "all"])
def test_no_float_product_is_left(tmp_path, operators) -> None:
    for make in (_attention, _network):
        found = quantized(make(), operators=operators).optimized(tmp_path)
        assert found["Conv"] == 0
        assert found["MatMul"] + found["FusedMatMul"] == (2 if make is _attention and operators != "all" else 0)


def _constant_operands() -> Tiny:
    """Add, Mul, Where and Concat of an activation and a constant, between two products."""
    tiny = Tiny()
    y = tiny.one("MatMul", tiny.input(1, 4, 32), tiny.floats(32, 32))
    y = tiny.one("Mul", y, tiny.floats(1, 1, 32))
    y = tiny.one("Add", tiny.floats(4, 32), y)
    y = tiny.one("Where", tiny.constant(np.ones((4, 32), np.bool_)), y, tiny.floats(4, 32))
    y = tiny.one("Concat", y, tiny.floats(1, 4, 32), axis=1)
    return tiny.output(tiny.one("MatMul", y, tiny.floats(32, 8)))


@pytest.mark.parametrize("operators", ["auto", "all"])
def test_operators_on_constants_stay_float(operators) -> None:
    made = quantized(_constant_operands(), operators=operators)
    assert _integer(made) == ["MatMul", "MatMul"]
    assert made.error() < 0.03


def _reasons(made: Made, action: str) -> dict[str, str]:
    return {d.detail["kind"]: d.reason for d in made.decisions(action)}


def test_what_the_user_excludes_is_kept() -> None:
    tiny = _attention()
    name = tiny.nodes[0].output[0]
    made = quantized(tiny, recipe={"exclude": (name,)})
    (kept,) = made.decisions("kept")
    assert kept.node == name
    assert "exclude" in kept.reason
    assert kept.detail["weights"] == 32 * 32
    assert made.producer(made.producer(name).input[1]) is None


def test_what_the_user_does_not_include_is_kept() -> None:
    tiny = _attention()
    made = quantized(tiny, recipe={"include": (tiny.nodes[0].output[0],)})
    assert len(made.decisions("quantized")) == 1
    assert len(made.decisions("kept")) == 3


@pytest.mark.parametrize(("group", "axis"), [(1, 1), (4, 1)])
def test_a_transposed_convolution_has_no_kernel_but_int8_weights(group: int, axis: int) -> None:
    """One scale for each output channel of a group, which is axis 1 of its weight; channels differ by powers of ten."""
    tiny = Tiny()
    w = tiny.random.standard_normal((8, 4, 2, 2)) * 10.0 ** np.arange(-2, 2).reshape(1, 4, 1, 1)
    x, weight = tiny.input(1, 8, 9, 9), tiny.constant(w.astype(np.float32))
    made = quantized(tiny.output(tiny.one("ConvTranspose", x, weight, group=group, strides=[2, 2])))
    assert _reasons(made, "quantized") == {"ConvTranspose": "int8 per channel, weights only"}
    (read,) = made.nodes("DequantizeLinear")
    assert read.attribute[0].i == axis
    assert made.array(read.input[1]).shape == (4,)
    (feeds,) = made.feeds[:1]
    wanted, found = (session(model).run(None, feeds)[0] for model in (made.before, made.after))
    parts = (a.reshape(len(a), group, 4, -1) for a in (found - wanted, wanted))
    noise, power = (np.square(a).sum(axis=(0, 1, 3)) for a in parts)
    assert (noise < 1e-4 * power).all()
    made = quantized(tiny, provider="tensorrt")
    assert [d.detail["kind"] for d in made.decisions("quantized")] == ["ConvTranspose"]


def test_cuda_gets_products_only() -> None:
    for operators in ("auto", "all"):
        assert _integer(quantized(_network(), provider="cuda", operators=operators)) == ["Conv", "Conv"]


def test_values_of_other_types_stay() -> None:
    """Gather of indices, Where of integers, Concat of shapes: nothing of that is an activation."""
    tiny = Tiny()
    x = tiny.input("b", "s", 32)
    shape = tiny.one("Concat", tiny.one("Shape", x, start=0, end=2), tiny.constant(np.array([-1])), axis=0)
    y = tiny.one("MatMul", tiny.one("Reshape", x, shape), tiny.floats(32, 8))
    made = quantized(tiny.output(y), operators="all")
    assert "Concat" not in _integer(made)
    assert made.error() < 0.03


def test_an_activation_that_was_never_seen_is_refused() -> None:
    proto = onnx.load_from_string(_attention().model())
    for node in proto.graph.node:
        node.name = node.output[0]
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    made = build(Recipe(passes=parse_passes("qdq")))[-1]
    made.observed(model)
    with pytest.raises(UserError, match=r"activation \S+ was never seen on the calibration data: is it empty"):
        made.call(Region.whole(model))


@pytest.mark.parametrize("rank", [1, 3])
def test_weights_of_other_ranks(rank) -> None:
    """A vector, or a stack of matrices: MatMul has no kernel for their channels."""
    tiny = Tiny()
    shape = {1: (32,), 3: (2, 32, 8)}[rank]
    made = quantized(tiny.output(tiny.one("MatMul", tiny.input(2, 4, 32), tiny.floats(*shape))))
    assert made.decisions("quantized") == []
    assert made.error() == 0


def test_grouped_and_one_dimensional_convolutions(tmp_path) -> None:
    tiny = Tiny()
    x = tiny.input(1, 8, 9, 9)
    depthwise = tiny.one("Conv", x, tiny.floats(8, 1, 3, 3), group=8)
    made = quantized(tiny.output(tiny.one("Conv", depthwise, tiny.floats(4, 2, 1, 1), group=4)))
    assert made.optimized(tmp_path)["QLinearConv"] == 2
    assert made.error() < 0.03
    tiny = Tiny()
    made = quantized(tiny.output(tiny.one("Conv", tiny.input(1, 8, 20), tiny.floats(4, 8, 3))))
    assert made.optimized(tmp_path)["QLinearConv"] == 1
    assert made.error() < 0.03


def test_half_precision_inputs_of_mixed_graphs() -> None:
    """A float16 product between Casts: its Q and DQ have float16 scales, those of the others float32 ones."""
    tiny = Tiny()
    y = tiny.one("MatMul", tiny.input(4, 32), tiny.floats(32, 32))
    half = tiny.one("Cast", y, to=TensorProto.FLOAT16)
    half = tiny.one("MatMul", half, tiny.constant(tiny.random.standard_normal((32, 8)).astype("f2")))
    made = quantized(tiny.output(tiny.one("Cast", half, to=TensorProto.FLOAT)))
    types = [made.array(node.input[1]).dtype for node in made.nodes(Q)]
    assert sorted(map(str, types)) == ["float16", "float32"]
    assert made.error() < 0.03


def test_helper_sees_redundant_pairs() -> None:
    """The property that the tests above ask for, on a graph that has it not."""
    tiny = Tiny()
    grid = [tiny.constant(np.float32(0.1)), tiny.constant(np.uint8(128))]
    codes = tiny.one("QuantizeLinear", tiny.input(4), *grid)
    again = tiny.one("QuantizeLinear", tiny.one("DequantizeLinear", codes, *grid), *grid)
    proto = onnx.load_from_string(tiny.output(tiny.one("DequantizeLinear", again, *grid)).model())
    assert len(redundant_pairs(proto)) == 1


def test_an_excluded_operator_without_a_weight_stays_in_float() -> None:
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load_from_string(_attention().model())))
    for node in model.graph:
        node.name = node.outputs[0].name
    softmaxes = {node: str(node.name) for node in model.graph if node.op_type == "Softmax"}
    for exclude, operators in product((("Softmax",), tuple(softmaxes.values())), ("all", "auto")):
        policy = Policy(SPEC, SPEC, SPEC, exclude=exclude)
        assert not softmaxes.keys() & select(model, policy, "cpu", operators, slower=True).nodes.keys()
    found = select(model, Policy(SPEC, SPEC, SPEC), "cpu", "all", slower=True)
    assert softmaxes.keys() <= found.nodes.keys(), "without a pattern they are integer"
    found = select(model, Policy(SPEC, SPEC, SPEC, exclude=("Softmax",)), "cpu", "all", slower=True)
    assert {found.kept[node] for node in softmaxes} == {("kept", "excluded by 'Softmax'")}


def test_a_softmax_behind_a_mask_stays_in_float() -> None:
    """Its input holds the mask's fill, as the choice before it does."""
    model = tiny_decoder(layers=1)
    Prepare().call(Region.whole(model))
    found = select(model, Policy(SPEC, SPEC, SPEC), "cpu", "all", slower=True)
    masked = [node for node in model.graph if node.op_type in ("Softmax", "Where")]
    assert masked
    assert not found.nodes.keys() & set(masked)
    assert {found.kept[node] for node in masked if node in found.kept} == {("skipped", MASKED)}


@pytest.mark.parametrize("lm_head", [None, SPEC])
def test_an_lm_head_is_integer_unless_it_is_kept(lm_head) -> None:
    """And no other product hangs on it."""
    model = tiny_decoder(tied=False)
    Prepare().call(Region.whole(model))
    found = select(model, Policy(SPEC, lm_head, None), "cpu", "all", slower=True)
    products = [node for node in model.graph if node.op_type == "MatMul" and node.inputs[1].is_initializer()]
    left = [found.kept[node][1] for node in products if node in found.kept]
    assert left == ([] if lm_head is not None else ["lm_head is kept in float"])
    assert sum(node in found.nodes or node in found.heads for node in products) == len(products) - len(left) > 2


@pytest.mark.parametrize("operators", ["auto", "all"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_one_thing_is_decided_of_a_node(graph: str, operators: str) -> None:
    """Whichever product is to have but an int8 weight, or to stay as it is: it becomes nothing else besides."""
    model = ir.from_proto(onnx.load_from_string(GRAPHS[graph]().model()))
    Prepare().call(Region.whole(model))
    plain = select(model, Policy(SPEC, SPEC, None), "cpu", operators, slower=True)
    for node in [node for node in plain.nodes if weight_position(node) is not None]:
        name = str(node.name)
        alone, kept = Policy(SPEC, SPEC, None, weights_only={name: "x"}), Policy(SPEC, SPEC, None, kept={name: "x"})
        found = select(model, alone, "cpu", operators, slower=True)
        assert (node in found.heads, node in found.nodes, node in found.kept) == (True, False, False)
        found = select(model, kept, "cpu", operators, slower=True)
        assert (node in found.heads, node in found.nodes, node in found.kept) == (False, False, True)


@pytest.mark.parametrize("operators", ["auto", "all"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_what_touches_a_value_reads_it_or_gives_it(graph: str, operators: str) -> None:
    """Of every value that is to have a Q: the nodes that lose it if calibration never reached it."""
    model = ir.from_proto(onnx.load_from_string(GRAPHS[graph]().model()))
    Prepare().call(Region.whole(model))
    selection = select(model, Policy(SPEC, SPEC, None), "cpu", operators, slower=True)
    assert selection.values
    givers, readers = 0, 0
    for value in selection.values:
        reading = {use.node for use in value.uses()} & set(selection.nodes)
        giving = {value.producer()} & set(selection.nodes)
        found = qdq._touching(selection, {value})
        assert reading <= set(found) <= reading | giving
        assert found == [node for node in selection.nodes if node in set(found)], "in order, each once"
        for node in giving:
            assert (node in found) == (node in reading or quantized_output(node) is value)
        givers, readers = givers + len(set(found) - reading), readers + len(reading)
    assert readers
    assert givers or operators == "auto"
    assert qdq._touching(selection, set()) == []
    assert set(qdq._touching(selection, set(selection.values))) == set(selection.nodes)
