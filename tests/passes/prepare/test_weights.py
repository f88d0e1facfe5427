"""Weights wherever they are: behind what computes them from constants, and in every form of a product.

Property: a prepared model computes what the model did, and every product of a constant matrix with a computed value is
a MatMul of (…, K) and (K, N), or says why not.
"""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs.table import Graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from preparing import check, operators, prepare, reasons

from qcompile.passes.base import Decision
from qcompile.passes.linears import as_linear, find_embeddings, find_linears
from qcompile.passes.prepare.constant_types import Operand
from qcompile.passes.prepare.sizes import number_sizes
from qcompile.passes.state import node_state
from qcompile.passes.tensors import read

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
Draw = st.DrawFn


def _checked(make: Graph, *outputs: str, tolerance: float = 2e-5) -> tuple[ir.Model, list[Decision]]:
    make.output(*outputs)
    proto = make.model()
    proto.ir_version = 10
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    return model, check(model, make.feeds(1), tolerance=tolerance)


def _all_canonical(model: ir.Model) -> None:
    """Every product with a constant is a linear, or has its reason."""
    for node in model.graph:
        constants = [value for value in node.inputs if value is not None and value.const_value is not None]
        if node.op_type == "MatMul" and constants:
            found = as_linear(node)
            assert not isinstance(found, str) or node_state(node).left or found.startswith("the weight has rank"), found
        if node.op_type in ("Einsum", "Gemm") and constants:
            assert node_state(node).left


# Ways to write a constant of a shape, by name: each asks for other constants by `make_one`.
Writer = Callable[[Graph, Draw, tuple[int, ...], Callable[[tuple[int, ...]], str]], str]


def _axis(draw: Draw, shape: tuple[int, ...]) -> int:
    return draw(st.integers(0, len(shape) - 1))


def _with(shape: tuple[int, ...], axis: int, size: int) -> tuple[int, ...]:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _transposed(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    order = draw(st.permutations(range(len(shape))))
    return make.one("Transpose", one(tuple(shape[order.index(i)] for i in range(len(shape)))), perm=order)


def _reshaped(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    return make.one("Reshape", one((int(np.prod(shape)),)), make.constant(np.array(shape, np.int64)))


def _squeezed(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    return make.one("Squeeze", one((1, *shape)), make.constant(np.array([0], np.int64)))


def _sliced(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    axis, step = _axis(draw, shape), draw(st.sampled_from([1, 2, -1, -2]))
    size = shape[axis] * abs(step) + draw(st.integers(0, 3))
    ends = {1: (size - shape[axis], 2**62), -1: (-1, size - shape[axis] - 1 - size), 2: (0, 2 * shape[axis] - 1)}
    start, end = ends.get(step, (2 * shape[axis] - 1, -(2**62)))
    numbers = ([start], [end], [axis - len(shape)], [step])
    return make.one("Slice", one(_with(shape, axis, size)), *(make.constant(np.array(n, np.int64)) for n in numbers))


def _gathered(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    axis, layers = _axis(draw, shape), draw(st.integers(1, 3))
    index = draw(st.integers(-layers, layers - 1))
    return make.one("Gather", one((*shape[:axis], layers, *shape[axis:])), make.constant(np.int64(index)), axis=axis)


def _part(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    axis, rest = _axis(draw, shape), draw(st.integers(1, 4))
    sizes = make.constant(np.array([rest, shape[axis]], np.int64))
    return make.op("Split", one(_with(shape, axis, shape[axis] + rest)), sizes, axis=axis, outputs=2)[1]


def _joined(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    axis = _axis(draw, shape)
    first = draw(st.integers(0, shape[axis]))
    return make.one("Concat", one(_with(shape, axis, first)), one(_with(shape, axis, shape[axis] - first)), axis=axis)


def _combined(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    other = draw(st.sampled_from([shape, shape[-1:], ()]))
    operator = draw(st.sampled_from(["Add", "Sub", "Mul", "Div"]))
    by = make.constant((make.random.uniform(1, 2, other)).astype(np.float32))
    return make.one(operator, one(shape), by)


def _product_of_two(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    if len(shape) < 2:
        return one(shape)
    rank = draw(st.integers(1, 4))
    return make.one("MatMul", one((*shape[:-1], rank)), one((rank, shape[-1])))


def _normalized(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    """Weight normalization, as torch exports it."""
    raw, axes = one(shape), make.constant(np.array([_axis(draw, shape)], np.int64))
    make.opsets[""] = 18
    return make.one("Div", raw, make.one("Add", make.one("ReduceL2", raw, axes), make.constant(np.float32(0.5))))


def _standardized(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    """Weight standardization, as torch exports it: a norm in training, of one's own mean and variance."""
    kind = draw(st.sampled_from(["BatchNormalization", "InstanceNormalization", "LayerNormalization"]))
    if len(shape) < (3 if kind == "InstanceNormalization" else 2) or kind == "LayerNormalization":
        axis = _axis(draw, shape)
        scale = make.constant(make.random.uniform(1, 2, shape[axis:]).astype(np.float32))
        return make.one("LayerNormalization", one(shape), scale, axis=axis, epsilon=0.1)
    scale, bias = (make.constant(make.random.uniform(1, 2, shape[1]).astype(np.float32)) for _ in range(2))
    if kind == "InstanceNormalization":
        return make.one(kind, one(shape), scale, bias, epsilon=0.1)
    given, training = [make.constant(np.full(shape[1], 0.5, np.float32)) for _ in range(2)], draw(st.booleans())
    told = {"training_mode": 1, "outputs": 3} if training else {"outputs": 1}
    return make.op("BatchNormalization", one(shape), scale, bias, *given, epsilon=0.1, **told)[0]


def _permuted(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    axis = _axis(draw, shape)
    size = shape[axis] + draw(st.integers(0, 3))
    places = make.random.integers(-size, size, shape)
    return make.one(
        "GatherElements", one(tuple(n + 1 for n in _with(shape, axis, size - 1))), make.constant(places), axis=axis
    )


def _scattered(make: Graph, draw: Draw, shape: tuple[int, ...], one: Callable[[tuple[int, ...]], str]) -> str:
    depth = draw(st.integers(1, len(shape)))
    number = draw(st.integers(1, min(shape[0], 3)))
    rows = make.random.permutation(shape[0])[:number] - shape[0] * make.random.integers(0, 2, number)
    rest = [make.random.integers(-size, size, number) for size in shape[1:depth]]
    places = make.constant(np.stack([rows, *rest], -1))
    return make.one("ScatterND", one(shape), places, one((number, *shape[depth:])))


WRITERS: list[Writer] = [
    _scattered,
    _standardized,
    _permuted,
    _transposed,
    _reshaped,
    _squeezed,
    _sliced,
    _gathered,
    _part,
    _joined,
    _combined,
    _product_of_two,
    _normalized,
]


def _constant(make: Graph, draw: Draw, shape: tuple[int, ...], depth: int = 3) -> str:
    """A constant of the shape, maybe computed."""
    writer = draw(st.sampled_from([None, *WRITERS])) if depth and np.prod(shape) else None
    if writer is None:
        return make.floats(*shape, scale=0.3)
    return writer(make, draw, shape, lambda wanted: _constant(make, draw, wanted, depth - 1))


def _with_matmul(make: Graph, draw: Draw) -> str:
    k, n, lead = draw(st.sampled_from([3, 32, 70])), draw(st.sampled_from([1, 32, 40])), draw(st.integers(0, 3))
    weight = _constant(make, draw, (1,) * draw(st.integers(0, 2)) + (k, n))
    return make.one("MatMul", make.input(*(2, 3, 4)[:lead], k), weight)


def _with_left(make: Graph, draw: Draw) -> str:
    k, n, lead = draw(st.sampled_from([3, 32, 70])), draw(st.sampled_from([1, 32, 40])), draw(st.integers(0, 2))
    ones = draw(st.integers(0, 3))
    weight = _constant(make, draw, (1,) * ones + (n, k))
    if draw(st.booleans()):
        return make.one("MatMul", weight, make.input(k))
    order = [*range(lead), lead + 1, lead]
    turned = draw(st.booleans()), draw(st.booleans())
    x = make.input(*(2, 3)[:lead], *((5, k) if turned[0] else (k, 5)))
    x = make.one("Transpose", x, perm=order) if turned[0] else x
    y = make.one("MatMul", weight, x)
    back = [*range(max(lead, ones)), max(lead, ones) + 1, max(lead, ones)]
    return make.one("Relu", make.one("Transpose", y, perm=back)) if turned[1] else y


def _with_gemm(make: Graph, draw: Draw) -> str:
    k, n, flags = 40, 36, [draw(st.integers(0, 1)) for _ in range(2)]
    on_left = draw(st.booleans())
    shapes = [(5, k)[:: -1 if flags[0] else 1], (k, n)[:: -1 if flags[1] else 1]]
    if on_left:
        shapes = [(n, k)[:: -1 if flags[0] else 1], (k, 5)[:: -1 if flags[1] else 1]]
    operands = [make.input(*shape) if i == on_left else _constant(make, draw, shape) for i, shape in enumerate(shapes)]
    bias = draw(st.sampled_from([None, (), (1,), "row", "full"]))
    rows, columns = (n, 5) if on_left else (5, n)
    if bias is not None:
        shape = {"row": (columns,), "full": (rows, columns)}.get(bias, bias) if isinstance(bias, str) else bias
        operands.append(_constant(make, draw, shape) if shape else make.constant(np.float32(0.3)))
    alpha, beta = draw(st.sampled_from([1.0, 0.5])), draw(st.sampled_from([1.0, -2.0, 0.0]))
    return make.one("Gemm", *operands, transA=flags[0], transB=flags[1], alpha=alpha, beta=beta)


EQUATIONS = [
    ("bk,kn->bn", {}),
    ("kn,bk->bn", {}),
    ("bk,nk->nb", {}),
    ("bk,kn", {}),
    ("abc,cde->abde", {}),  # keras, heads parted
    ("abcd,cde->abe", {}),  # keras, heads joined
    ("aecd,abcd->acbe", {"e": 2}),  # no product with a constant: skipped below where it does not fit
    ("...k,kn->...n", {}),
    ("...k,nk->n...", {}),
    ("bhk,hkn->bhn", {}),
    ("bhk,hkn->hbn", {}),
    ("hk,hkn->hn", {}),
    ("bshk,hkn->bshn", {}),
    ("k,kn->n", {}),
    ("bik,kn->ibn", {}),
    ("bki,nk->bni", {}),
    ("bk,k->b", {}),
    ("bk,bk->bk", {}),
    ("bk,kn->b", {}),
    ("bk,kn->bkn", {}),
]


def _with_einsum(make: Graph, draw: Draw) -> str:
    equation, sizes = draw(st.sampled_from(EQUATIONS))
    terms = equation.split("->")[0].split(",")
    sizes = dict(zip("abcdehikns", (2, 3, 4, 5, 6, 3, 4, 8, 7, 2), strict=True)) | sizes
    shapes = [tuple(sizes[letter] for letter in term.replace("...", "as")) for term in terms]
    on_left = equation.startswith("kn,")
    named = draw(st.booleans())
    operands = []
    for i, (shape, term) in enumerate(zip(shapes, terms, strict=True)):
        if i == (not on_left):
            operands.append(_constant(make, draw, shape))
        else:
            symbols = [
                letter if named and letter not in terms[not on_left] else n
                for letter, n in zip(term, shape, strict=False)
            ]
            plain = "..." in term or not named
            operands.append(make.input(*shape) if plain else make.input(*symbols, sizes=sizes))
    return make.one("Einsum", *operands, equation=equation)


@QUICK
@given(st.data())
def test_every_product_of_a_constant_is_canonical(data):
    make = Graph()
    kind = data.draw(st.sampled_from([_with_matmul, _with_left, _with_gemm, _with_einsum]))
    model, _ = _checked(make, kind(make, data.draw))
    _all_canonical(model)
    assert "Einsum" not in operators(model) or any(node_state(node).left for node in model.graph)


@QUICK
@given(st.data())
def test_what_constants_compute_is_a_constant(data):
    """Of any rank, and read by something that is no product."""
    make = Graph()
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    model, _ = _checked(make, make.one("Mul", make.input(*shape), _constant(make, data.draw, shape, 4)))
    assert operators(model) == ["Mul"]


def test_large_results_are_lazy_and_small_ones_are_not():
    make = Graph()
    x, w = make.input(2, 200), make.floats(200, 100)
    scaled = make.one("Mul", make.one("Transpose", make.one("Transpose", w)), make.constant(np.float32(2)))
    bias = make.one("Neg", make.floats(100))
    model, _ = _checked(make, make.one("Add", make.one("MatMul", x, scaled), bias))
    assert operators(model) == ["MatMul", "Add"]
    product, add = model.graph
    assert isinstance(product.inputs[1].const_value, ir.LazyTensor)
    assert isinstance(add.inputs[1].const_value, ir.Tensor)


def test_slices_of_one_packed_weight_are_weights_of_their_own():
    make = Graph()
    x, packed = make.input(2, 100), make.floats(100, 600)
    parts = make.op("Split", packed, make.constant(np.array([200] * 3, np.int64)), axis=1, outputs=3)
    model, decisions = _checked(make, *(make.one("MatMul", x, part) for part in parts))
    assert [linear.shape for linear in find_linears(model.graph)] == [(100, 200)] * 3
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) == 100 * 600 * 4
    assert len(reasons(decisions, "folded")) == 3


@pytest.mark.parametrize(("ways", "folded"), [(1, True), (2, True), (3, False)])
def test_what_comes_of_one_weight_is_weighed_together(ways: int, folded: bool) -> None:
    """Two weights for products may take the place of one that all come of; three may not."""
    make = Graph()
    x, weight = make.input(2, 200), make.floats(200, 200)
    parts = [make.one("Mul", weight, make.constant(np.full(200, n + 2, np.float32))) for n in range(ways)]
    model, decisions = _checked(make, *(make.one("MatMul", x, part) for part in parts), tolerance=1e-4)
    assert operators(model).count("Mul") == (0 if folded else ways)
    told = "what is computed from w2 takes more than w2 itself"
    assert reasons(decisions, "kept") == ([] if folded else [told] * ways)


def test_a_packed_weight_that_another_reads_keeps_its_one_copy():
    make = Graph()
    x, packed = make.input(2, 256), make.floats(600, 256)
    ids = make.input(3, dtype=np.int64, draw=lambda random, shape: np.arange(3))
    part = make.one("Slice", packed, *(make.constant(np.array([n], np.int64)) for n in (0, 300)))
    y = make.one("MatMul", x, make.one("Transpose", part))
    model, decisions = _checked(make, y, make.one("Gather", packed, ids))
    assert operators(model).count("Slice") == 1
    assert "w2 is also used without this Slice; one copy of it is kept" in reasons(decisions, "kept")
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert as_linear(product) == (
        "its weight is computed from constants: w2 is also used without this Transpose; one copy of it is kept"
    )
    assert [embedding.table.name for embedding in find_embeddings(model.graph)] == ["w2"]


def test_a_small_constant_is_not_spread_over_a_large_one():
    make = Graph()
    x, c = make.input(2, 1000), make.floats(1000, 1)
    spread = make.one("Expand", c, make.constant(np.array([1000, 1000], np.int64)))
    model, decisions = _checked(make, make.one("MatMul", x, spread))
    assert operators(model) == ["Expand", "MatMul"]
    assert reasons(decisions, "kept") == ["the 4016 bytes that it is computed from are fewer than its codes would be"]


def test_many_small_results_together_are_bounded():
    """Each of them is small, but none of their bytes was in the file."""
    make = Graph()
    x, size = make.input(100, 100), make.constant(np.array([100, 100], np.int64))
    sums = [make.one("Add", x, make.one("Expand", make.constant(np.float32(i)), size)) for i in range(60)]
    model, decisions = _checked(make, make.one("Sum", *sums))
    assert 1 < operators(model).count("Expand") < 60
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) < (1 << 20) + 10_000
    assert len(reasons(decisions, "kept")) == operators(model).count("Expand")


def test_a_long_chain_of_constants_is_folded_in_one_go():
    make = Graph()
    value = make.floats(8, 8)
    half = make.constant(np.float32(0.5))
    for i in range(2000):
        value = make.one("Mul", value, half) if i % 2 else make.one("Add", value, value)
    model, _ = _checked(make, make.one("MatMul", make.input(2, 8), value))
    assert operators(model) == ["MatMul"]


def test_a_product_of_constants_that_takes_long_stays():
    make = Graph()
    a = make.constant(np.full((4096, 64), 0.01, np.float32))
    square = make.one("MatMul", a, make.one("Transpose", a))
    for _ in range(2):
        square = make.one("MatMul", square, square)
    make.output(make.one("MatMul", make.input(1, 4096), square))
    proto = make.model()
    proto.ir_version = 10
    decisions = prepare(ir.from_proto(onnx.shape_inference.infer_shapes(proto)))
    assert "takes too long" in reasons(decisions, "kept")[0]


def test_fake_quantized_weights_become_codes():
    make = Graph()
    x, w = make.input(2, 64), make.floats(64, 48)
    grid = make.constant(np.full(48, 0.01, np.float32)), make.constant(np.zeros(48, np.int8))
    codes = make.one("QuantizeLinear", w, *grid, axis=1)
    model, _ = _checked(make, make.one("MatMul", x, make.one("DequantizeLinear", codes, *grid, axis=1)))
    assert operators(model) == ["DequantizeLinear", "MatMul"]
    assert model.graph[0].inputs[0].const_value.dtype == ir.DataType.INT8
    assert as_linear(model.graph[1]) == "its weight is quantized already, to INT8"


def test_halves_behind_a_cast_are_read_as_they_are():
    make = Graph()
    make.dtype = np.float16
    w = make.floats(200, 200)
    make.dtype = np.float32
    x = make.input(2, 200)
    model, _ = _checked(make, make.one("MatMul", x, make.one("Cast", w, to=onnx.TensorProto.FLOAT)))
    (linear,) = find_linears(model.graph)
    assert linear.weight.const_value.dtype == ir.DataType.FLOAT
    np.testing.assert_array_equal(read(linear.weight.const_value), onnx.numpy_helper.to_array(make.constants[0]))


def test_weights_that_stay_computed_say_by_what():
    """Codes with a scale of one's own, as some exporters write them; and an operator that nothing folds."""
    make = Graph()
    x, codes = make.input(2, 64), make.constant(np.ones((64, 48), np.int8))
    scaled = make.one("Mul", make.one("Cast", codes, to=onnx.TensorProto.FLOAT), make.constant(np.float32(0.1)))
    model, _ = _checked(make, make.one("MatMul", x, scaled), make.one("MatMul", x, make.one("Erf", make.floats(64, 8))))
    first, second = (node for node in model.graph if node.op_type == "MatMul")
    assert as_linear(first) == "its weight is computed from constants by Cast n_Cast3"
    assert as_linear(second).startswith("its weight is computed from constants by Erf")


def test_constants_within_bodies():
    make = Graph()
    x, w = make.input(2, 64), make.floats(48, 64)
    turned = onnx.helper.make_node("Transpose", [w], ["turned"])
    branches = {
        name: onnx.helper.make_graph(
            [turned, onnx.helper.make_node("MatMul", [x, "turned"], ["out"])],
            name,
            [],
            [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [2, 48])],
        )
        for name in ("then_branch", "else_branch")
    }
    choice = make.input(dtype=np.bool_, draw=lambda random, shape: np.array(True))
    model, _ = _checked(make, make.one("If", choice, **branches))
    assert [node.op_type for node in model.graph.all_nodes()] == ["If", "MatMul", "MatMul"]
    assert len(model.graph.initializers) == 1


@pytest.mark.parametrize(
    ("equation", "shapes", "products"),
    [
        ("bk,kr,rn->bn", [(2, 40), (40, 8), (8, 50)], 2),
        ("kr,bk,rn->bn", [(40, 8), (2, 40), (8, 50)], 2),
        ("bi,oij,bj->bo", [(2, 40), (50, 40, 30), (2, 30)], 1),
        ("bhts,bshe,hed", [(2, 4, 5, 6), (2, 6, 4, 8), (4, 8, 40)], 1),
        ("bk, kn, n -> nb", [(2, 40), (40, 50), (50,)], 1),
    ],
)
def test_einsums_of_several_operands_are_taken_two_by_two(equation, shapes, products):
    make = Graph()
    weights = {"kr", "rn", "oij", "hed", "kn", "n"}
    terms = equation.replace(" ", "").split("->")[0].split(",")
    operands = [
        make.floats(*shape) if term in weights else make.input(*shape)
        for term, shape in zip(terms, shapes, strict=True)
    ]
    model, _ = _checked(make, make.one("Einsum", *operands, equation=equation))
    assert operators(model).count("MatMul") == products
    assert all(len(node.inputs) == 2 for node in model.graph if node.op_type == "Einsum")
    _all_canonical(model)


def test_what_constants_make_keeps_its_rank():
    """A scalar that others compute with is not a row: Range refuses that, and a lookup gets another rank."""
    make = Graph()
    x = make.input("b", 5, 64)
    length = make.one("Gather", make.one("Shape", x), make.constant(np.int64(1)))
    half = make.one("Div", make.one("Mul", length, make.constant(np.int64(-3))), make.constant(np.int64(2)))
    places = make.one("Range", half, make.constant(np.int64(0)), make.constant(np.int64(1)))
    table = make.one("Gather", make.floats(9, 64), make.one("Sub", make.constant(np.int64(0)), length))
    wide = make.one("Sqrt", make.one("Abs", make.constant(np.float32(-4))))
    model, _ = _checked(
        make, make.one("Mul", x, wide), make.one("Add", x, table), make.one("Cast", places, to=onnx.TensorProto.FLOAT)
    )
    assert set(operators(model)) <= {"Mul", "Add", "Range", "Cast", "Gather"}


@pytest.mark.parametrize("sizes", [("b", 5, 64), ("b", "t", 64)])
def test_a_weight_that_sizes_cut(sizes):
    """Cross attention of torch: one weight for q, k and v, cut where the input's last size says."""
    make = Graph()
    x, w = make.input(*sizes), make.floats(192, 64)
    shape = make.one("Shape", x)
    ends = [make.constant(np.array([n], np.int64)) for n in (-1, 2**63 - 1, 0)]
    size = make.one("Squeeze", make.one("Slice", shape, *ends), make.constant(np.array([0], np.int64)))
    double = make.one("Mul", size, make.constant(np.int64(2)))
    begin, zero = make.one("Unsqueeze", double, ends[2]), ends[2]
    part = make.one("Slice", w, begin, make.constant(np.array([192], np.int64)), zero)
    model, _ = _checked(make, make.one("MatMul", x, make.one("Transpose", part, perm=[1, 0])))
    assert operators(model) == ["MatMul"]
    assert find_linears(model.graph)[0].shape == (64, 64)


@pytest.mark.parametrize("operator", ["Tile", "Expand"])
def test_a_weight_that_sizes_of_a_repeated_constant_cut(operator):
    """A pooling head of torch: one learnt row for each picture of the batch asks the weight for its part."""
    make = Graph()
    x, w = make.input("b", 7, 64), make.floats(192, 64)
    zero, ones = (make.constant(np.array(n, np.int64)) for n in ([0], [1, 1]))
    batch = make.one("Slice", make.one("Shape", x), zero, make.constant(np.array([1], np.int64)), zero)
    like = make.one(
        "ConstantOfShape",
        make.constant(np.array([3], np.int64)),
        value=onnx.numpy_helper.from_array(np.ones(1, np.int64)),
    )
    probe = make.one("Expand", make.floats(1, 1, 64), like)
    rows = make.one("Transpose", make.one(operator, probe, make.one("Concat", batch, ones, axis=0)), perm=[1, 0, 2])
    ends = [make.constant(np.array([n], np.int64)) for n in (-1, 2**63 - 1)]
    size = make.one("Slice", make.one("Shape", rows), *ends, zero)
    part = make.one("Slice", w, zero, size, zero)
    score = make.one("MatMul", rows, make.one("Transpose", part, perm=[1, 0]))
    model, _ = _checked(make, score)
    assert [linear.shape for linear in find_linears(model.graph)] == [(64, 64)]


@QUICK
@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.sets(st.integers(0, 2)), st.data())
def test_what_is_stated_of_repeated_constants_is_so(own, hidden, data):
    """By numbers of which some are known only when the model runs."""
    by = data.draw(st.tuples(*(st.sampled_from([n, 1]) if n > 1 else st.integers(1, 3) for n in own)))
    for operator, result in (("Tile", np.tile(np.ones(own), by)), ("Expand", np.ones(own) * np.ones(by))):
        make = Graph()
        shape = make.one("Shape", make.input(*(f"s{i}" if i in hidden else n for i, n in enumerate(by))))
        y = make.one("Transpose", make.one(operator, make.input(*own), shape))
        make.output(make.one("Neg", y))
        model = ir.from_proto(onnx.shape_inference.infer_shapes(make.model()))
        number_sizes(model, lambda *_, **__: None)
        found = [size if isinstance(size, int) else None for size in model.graph.node(-2).outputs[0].shape]
        for axis, (size, real) in enumerate(zip(reversed(found), result.shape, strict=True)):
            assert size == real or (size is None and axis in hidden)


def test_outputs_keep_the_sizes_that_the_file_says():
    make = Graph()
    make.outputs.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", "b"]))
    make.nodes.append(onnx.helper.make_node("Transpose", [make.input("b", 4)], ["y"]))
    model = ir.from_proto(make.model())
    number_sizes(model, lambda *_, **__: None)
    assert model.graph.outputs[0].shape == ir.Shape(["n", "b"])


@pytest.mark.parametrize(
    ("equation", "shapes", "reason"),
    [
        ("bk,k->b", [(2, 40), (40,)], "its weight has no index of its own"),
        ("bk,kn->b", [(2, 40), (40, 50)], "sums over 'n', an index of one operand alone"),
        ("bk,kn->bkn", [(2, 40), (40, 50)], "it sums over no index"),
        ("kk,kn->n", [(40, 40), (40, 50)], "an index stands twice in one operand"),
        ("...k,kn,no->...o", [(2, 40), (40, 50), (50, 40)], "it has 3 operands"),
        ("kk,kn,no->o", [(40, 40), (40, 50), (50, 40)], "it has 3 operands"),
        ("bk,...k->b...", [(2, 40), (50, 40)], "the indices of its weight are not told one by one"),
    ],
)
def test_other_einsums_have_their_reason(equation, shapes, reason):
    make = Graph()
    operands = [make.input(*shapes[0]), *(make.floats(*shape) for shape in shapes[1:])]
    model, decisions = _checked(make, make.one("Einsum", *operands, equation=equation))
    assert operators(model) == ["Einsum"]
    assert reason in reasons(decisions, "skipped")[0]
    assert reason in node_state(model.graph[0]).left


@pytest.mark.parametrize(
    ("weight", "rank", "reason"),
    [
        ((16, 40), 2, "16 x 40 too small to turn its input round"),
        ((40,), 2, "its weight is a vector"),
        ((3, 20, 40), 3, "a matrix for each of 3"),
        ((40, 40), None, "the rank of the right one is unknown"),
    ],
)
def test_other_products_on_the_left_have_their_reason(weight, rank, reason):
    make = Graph()
    x = make.input(*(3, 40, 5)[-(rank or 2) :])
    if rank is None:
        size = make.input("n", dtype=np.int64, draw=lambda random, shape: np.array([40, 5]))
        x = make.one("Reshape", x, size)
    y = make.one("MatMul", make.floats(*weight), x)
    y = y if rank else make.one("Reshape", y, make.constant(np.array([40, 5], np.int64)))
    model, decisions = _checked(make, y)
    (product,) = (node for node in model.graph if node.op_type == "MatMul")
    assert any(reason in why for why in reasons(decisions, "skipped"))
    assert reason in as_linear(product)


def test_transposes_around_a_product_on_the_left_go():
    make = Graph()
    x = make.one("Transpose", make.input("b", 40), perm=[1, 0])
    y = make.one("Transpose", make.one("MatMul", make.floats(50, 40), x), perm=[1, 0])
    model, _ = _checked(make, make.one("Relu", y))
    assert operators(model) == ["MatMul", "Relu"]


def test_a_constant_of_strings_has_a_size():
    assert Operand((3,), ir.DataType.STRING).nbytes == 24
    assert Operand((3,), ir.DataType.INT4).nbytes == 2
