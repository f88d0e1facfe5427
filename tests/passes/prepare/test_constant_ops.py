"""passes/prepare/constant_ops.py: what an operator makes of constants is what ONNX Runtime computes, in every form.

Property, by operator: a form is folded where the runtime computes it (but for what `left` names), to the same shapes,
types and numbers; what the runtime refuses is not folded. `PLAIN` has a form of each that must be.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi import onnxruntime_pybind11_state as told

from qcompile.passes.errors import UserError
from qcompile.passes.prepare.constant_ops import _ARITHMETIC, _ON_INTEGERS, _REDUCTIONS, _RULES, made_of
from qcompile.passes.prepare.constant_types import Operand

F, D, H, L, I = np.float32, np.float64, np.float16, np.int64, np.int32  # noqa: E741
Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
# Of half precision the last bit may differ, by when it is rounded.
TOLERANCE = {np.dtype(F): 2e-6, np.dtype(D): 2e-6, np.dtype(H): 2e-3}
UNARY = ("Neg", "Abs", "Sqrt", "Exp", "Log", "Tanh", "Sigmoid", "Reciprocal", "Round", "Floor", "Ceil", "Sign", "Relu")


@dataclass(frozen=True)
class Form:
    """A node and what it reads (None: left out)."""

    operator: str
    operands: Sequence[Array | None]
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1

    def model(self) -> onnx.ModelProto:
        """The node alone, its operands as inputs of the graph."""
        names = ["" if array is None else f"x{i}" for i, array in enumerate(self.operands)]
        made, last = [f"y{i}" for i in range(self.outputs)], max(i for i, name in enumerate(names) if name)
        node = onnx.helper.make_node(self.operator, names[: last + 1], made, **self.attributes)
        inputs = [
            onnx.helper.make_tensor_value_info(n, onnx.helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for n, a in zip(names, self.operands, strict=True)
            if a is not None
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in made]
        graph = onnx.helper.make_graph([node], "g", inputs, outputs)
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)

    def by_runtime(self) -> list[Array] | None:
        """What ONNX Runtime computes; None where it refuses the form."""
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, 1
        feeds = {f"x{i}": np.asarray(array) for i, array in enumerate(self.operands) if array is not None}
        try:
            session = ort.InferenceSession(self.model().SerializeToString(), options)
            return [np.asarray(array) for array in session.run(None, feeds)]
        except (told.Fail, told.InvalidArgument, told.InvalidGraph, told.RuntimeException):
            return None

    def folded(self) -> list[Array] | None:
        """What prepare makes of it; None where it leaves the node."""
        node = next(iter(ir.from_proto(self.model()).graph))
        operands = [None if a is None else Operand(a.shape, ir.DataType.from_numpy(a.dtype), a) for a in self.operands]
        made = made_of(node, operands)
        if made is None:
            return None
        arrays = [] if made.by_shape else [a for a in self.operands if a is not None]
        try:
            found = list(made.function(arrays))
        except (UserError, ValueError):  # as the constant is read, which a damaged model comes to
            return None
        assert [array.shape for array in found] == list(made.shapes)
        assert all(array.dtype == made.dtype.numpy() for array in found)
        assert not made.same_bytes or found[0].tobytes() == arrays[0].tobytes()
        return found


def left(form: Form) -> bool:
    """What is not folded, by design: it leaves the node to the runtime."""
    told = form.attributes
    if form.operator == "Pad":
        sizes = form.operands[1]
        return told.get("mode", "constant") != "constant" or (sizes is not None and bool((sizes < 0).any()))
    if form.operator == "Reshape":
        return bool(told.get("allowzero")) and not np.size(form.operands[0])
    if form.operator in _REDUCTIONS:
        axes = form.operands[1]
        return bool(told.get("noop_with_empty_axes")) and (axes is None or not axes.size)
    on_integers = form.operator in _ARITHMETIC and form.operands[0].dtype.kind == "i"  # type: ignore[union-attr]
    return told.get("reduction", "none") != "none" or (on_integers and form.operator not in _ON_INTEGERS)


def check(form: Form) -> bool:
    """Whether it is folded, where and to what it is to be."""
    found = form.folded()
    try:
        wanted = form.by_runtime()
    except told.NotImplemented:  # no kernel for the type
        return found is not None
    if found is None or wanted is None:
        assert found is None, f"the runtime refuses {form}"
        assert wanted is None or left(form), f"not folded: {form}"
        return False
    for array, other in zip(found, wanted, strict=True):
        assert array.shape == other.shape
        assert array.dtype == other.dtype
        tolerance = TOLERANCE.get(array.dtype, 0)
        np.testing.assert_allclose(array, other, rtol=tolerance, atol=tolerance, err_msg=str(form))
    return True


def numbers(shape: Shape, kind: Any = F, low: float = -2, seed: int = 0) -> Array:
    """Quarters between low and 2, so that some lie in the middle of two integers."""
    return np.asarray((np.random.default_rng(seed).integers(4 * low, 9, shape) / 4).astype(kind))


def ints(*values: int) -> Array:
    return np.array(values, L)


x = numbers((2, 3, 4))
PLAIN = [
    *(Form(name, [np.abs(x) + F(0.25)]) for name in (*UNARY, "Softplus", "Identity", "Shape", "Size", "Softmax")),
    *(Form(name, [x, numbers((3, 1), low=1)]) for name in ("Add", "Sub", "Mul", "Div", "Sum", "Max", "Min")),
    *(Form(name, [ints(7, -7), ints(2, -3)]) for name in ("Add", "Sub", "Mul", "Div")),
    *(Form(name, [x, ints(-1, 0)], {"keepdims": 0}) for name in _REDUCTIONS),
    Form("Pow", [np.abs(x), F(1.5) * np.ones((), F)]),
    Form("Reshape", [x, ints(0, -1)]),
    Form("Squeeze", [x[:, :1], ints(-2)]),
    Form("Unsqueeze", [x, ints(1, -1)]),
    Form("Flatten", [x], {"axis": 2}),
    Form("Transpose", [x], {"perm": [2, 0, 1]}),
    Form("Cast", [x], {"to": onnx.TensorProto.FLOAT16}),
    Form("Slice", [x, ints(1), ints(9), ints(-1), ints(2)]),
    Form("Split", [x], {"axis": 2, "num_outputs": 3}, outputs=3),
    Form("Gather", [x, ints(1, -1)], {"axis": 1}),
    Form("GatherElements", [x, np.array([[[1, -1]]])], {"axis": 2}),
    Form("ScatterND", [x, np.array([[0, 1], [1, -1]]), numbers((2, 4), seed=1)]),
    Form("Concat", [x, x[:, :, :2]], {"axis": -1}),
    Form("Expand", [x[:, :1], ints(2, 1, 3, 1)]),
    Form("Where", [x > 0, x, np.zeros((), F)]),
    Form("Trilu", [x, np.int64(1)], {"upper": 0}),
    Form("Clip", [x, np.float32(-1), np.float32(1)]),
    Form("Tile", [x, ints(1, 2, 3)]),
    Form("Pad", [x, ints(1, 0, 2, 1), np.float32(7), ints(0, -1)]),
    Form("QuantizeLinear", [x, F([0.5, 0.25, 0.3]), np.array([1, 2, -3], np.int8)], {"axis": 1}),
    Form("MatMul", [x, numbers((4, 5))]),
    Form("Gemm", [x[0], numbers((5, 3)), numbers((5,))], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    Form("Einsum", [x, numbers((4, 5))], {"equation": "abc, cd -> bd"}),
    Form("BatchNormalization", [x, *(numbers((3,), low=1, seed=i) for i in range(4))]),
    Form("InstanceNormalization", [x, *(numbers((3,), low=1, seed=i) for i in range(2))]),
    Form("LayerNormalization", [x, numbers((4,))]),
]


@pytest.mark.parametrize("form", PLAIN, ids=lambda form: form.operator)
def test_plain_forms_are_folded(form: Form) -> None:
    assert check(form)


def test_every_operator_has_a_plain_form() -> None:
    assert {form.operator for form in PLAIN} == set(_RULES)


Draw = st.DrawFn
sizes, small, kinds = st.integers(0, 4), st.integers(-6, 6), st.sampled_from([F, F, D, H])
flags, seeds = st.sampled_from([0, 1]), st.integers(0, 99)


def _some(draw: Draw, least: int = 0, most: int = 4, kind: Any = None, sizes: st.SearchStrategy[int] = sizes) -> Array:
    shape = tuple(draw(st.lists(sizes, min_size=least, max_size=most)))
    return numbers(shape, draw(kinds) if kind is None else kind, seed=draw(seeds))


def _axes(draw: Draw, rank: int) -> Array:
    """Different ones, some from the end; now and then one that is none."""
    axes = draw(st.lists(st.integers(0, max(rank - 1, 0)), unique=True, max_size=3))
    return ints(*(axis - draw(flags) * rank + (draw(st.integers(0, 40)) == 40) * 9 for axis in axes))


def _maybe(draw: Draw, array: Array) -> Array | None:
    return array if draw(st.booleans()) else None


def _fitting(draw: Draw, shape: Shape, kind: Any) -> Array:
    """An array that broadcasts to a shape, or nearly."""
    own = tuple(1 if draw(st.booleans()) else n for n in shape[draw(st.integers(0, len(shape))) :])
    return numbers(own if draw(st.integers(0, 20)) else (*own, 5), kind, seed=draw(seeds))


def _reshape(draw: Draw) -> Form:
    a = _some(draw)
    wanted = draw(st.permutations([*a.shape, *draw(st.lists(st.just(1), max_size=2))]))
    wanted = [draw(st.sampled_from([n, n, n, -1, 0])) for n in wanted]
    return Form("Reshape", [a, ints(*wanted)], {"allowzero": draw(flags)})


def _squeeze(draw: Draw) -> Form:
    a = _some(draw, sizes=st.sampled_from([1, 1, 2]))
    return Form("Squeeze", [a, _maybe(draw, _axes(draw, a.ndim))])


def _unsqueeze(draw: Draw) -> Form:
    a = _some(draw, most=3)
    return Form("Unsqueeze", [a, _axes(draw, a.ndim + draw(st.integers(0, 2)))])


def _flatten(draw: Draw) -> Form:
    return Form("Flatten", [_some(draw)], {"axis": draw(st.integers(-4, 4))})


def _transpose(draw: Draw) -> Form:
    a = _some(draw, sizes=st.integers(1, 3))
    return Form(
        "Transpose", [a], {} if not a.ndim or draw(st.booleans()) else {"perm": draw(st.permutations(range(a.ndim)))}
    )


def _cast(draw: Draw) -> Form:
    kind, to = (draw(st.sampled_from([F, D, H, I, L, np.bool_])) for _ in range(2))
    return Form("Cast", [_some(draw, kind=kind)], {"to": int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to)))})


def _shape(draw: Draw) -> Form:
    if draw(st.booleans()):
        return Form("Size", [_some(draw)])
    return Form("Shape", [_some(draw)], {n: draw(small) for n in ("start", "end") if draw(st.booleans())})


def _slice(draw: Draw) -> Form:
    a = _some(draw, least=1)
    axes = _axes(draw, a.ndim)
    ends = st.one_of(small, st.sampled_from([-(2**62), 2**62]))
    starts, stops = (ints(*(draw(ends) for _ in axes)) for _ in range(2))
    steps = ints(*(draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in axes))
    if draw(st.booleans()):
        return Form("Slice", [a, starts, stops, axes, steps])
    return Form("Slice", [a, starts, stops, _maybe(draw, axes), None])


def _split(draw: Draw) -> Form:
    a = _some(draw, least=1)
    axis, count = draw(st.integers(-a.ndim, a.ndim - 1)), draw(st.integers(1, 3))
    if draw(st.booleans()):
        return Form("Split", [a], {"axis": axis, "num_outputs": count}, count)
    cuts = sorted(draw(st.integers(0, a.shape[axis])) for _ in range(count - 1))
    parts = np.diff([0, *cuts, a.shape[axis] + (draw(st.integers(0, 20)) == 20)])
    if count > 1 and draw(st.integers(0, 10)) == 10:  # one less than nothing
        parts += np.array([parts[1] + 1, -parts[1] - 1, *[0] * (count - 2)])
    return Form("Split", [a, parts.astype(L)], {"axis": axis}, count)


def _places(draw: Draw, shape: Shape, limit: int) -> Array:
    """Indices below a limit, some from the end; now and then beyond it."""
    beyond = draw(st.integers(0, 10)) == 10
    return np.random.default_rng(draw(seeds)).integers(-limit - beyond, max(limit, 1) + beyond, shape)


def _gather(draw: Draw) -> Form:
    a = _some(draw, least=1)
    axis = draw(st.integers(-a.ndim, a.ndim - 1))
    places = _places(draw, tuple(draw(st.lists(sizes, max_size=2))), a.shape[axis])
    return Form("Gather", [a, places.astype(draw(st.sampled_from([L, I])))], {"axis": axis})


def _gather_elements(draw: Draw) -> Form:
    a = _some(draw, least=1, sizes=st.integers(1, 4))
    axis = draw(st.integers(-a.ndim, a.ndim - 1))
    shape = tuple(draw(st.integers(1, n)) for n in a.shape)
    return Form("GatherElements", [a, _places(draw, shape, a.shape[axis])], {"axis": axis})


def _scatter(draw: Draw) -> Form:
    a = _some(draw, least=1, most=3, sizes=st.integers(1, 4))
    depth = draw(st.integers(1, a.ndim))
    beyond = draw(st.integers(0, 10)) == 10
    where = [draw(st.permutations(range(n))) for n in a.shape[:depth]]  # no place twice: the order is the runtime's
    places = np.array([[w[i] - n * draw(flags) + 9 * beyond for w, n in zip(where, a.shape, strict=False)]
                       for i in range(min(a.shape[:depth]))], L)  # fmt: skip
    updates = numbers((len(places), *a.shape[depth:]), a.dtype, seed=draw(seeds))
    return Form("ScatterND", [a, places, updates], {"reduction": draw(st.sampled_from(["none", "none", "add"]))})


def _concat(draw: Draw) -> Form:
    a = _some(draw, least=1)
    axis = draw(st.integers(-a.ndim, a.ndim - 1))
    parts = [numbers((*a.shape[: axis % a.ndim], draw(sizes), *a.shape[axis % a.ndim + 1 :]), a.dtype, seed=i)
             for i in range(draw(st.integers(0, 2)))]  # fmt: skip
    return Form(
        "Concat", [a, *parts, *([_some(draw, kind=a.dtype)] if draw(flags) * draw(flags) else [])], {"axis": axis}
    )


def _expand(draw: Draw) -> Form:
    a = _some(draw)
    return Form("Expand", [_fitting(draw, a.shape, F), ints(*a.shape)])


def _tile(draw: Draw) -> Form:
    a = _some(draw, least=1)
    return Form("Tile", [a, ints(*(draw(st.integers(0, 3)) for _ in a.shape))])


def _pad(draw: Draw) -> Form:
    a = _some(draw, least=1)
    axes = _maybe(draw, _axes(draw, a.ndim))
    around = ints(*(draw(st.integers(-1, 6)) // 2 for _ in range(2 * (a.ndim if axes is None else len(axes)))))
    return Form("Pad", [a, around, _maybe(draw, np.asarray(a.dtype.type(0.5))), axes],
                {"mode": draw(st.sampled_from(["constant", "constant", "edge"]))})  # fmt: skip


def _clip(draw: Draw) -> Form:
    a = _some(draw)
    return Form("Clip", [a, *(_maybe(draw, np.asarray(draw(small) / 4).astype(a.dtype)) for _ in range(2))])


def _softmax(draw: Draw) -> Form:
    return Form("Softmax", [_some(draw, sizes=st.integers(1, 4))], {"axis": draw(st.integers(-4, 3))})


def _where(draw: Draw) -> Form:
    a = _some(draw)
    return Form("Where", [_fitting(draw, a.shape, F) > 0, a, _fitting(draw, a.shape, a.dtype)])


def _trilu(draw: Draw) -> Form:
    a = _some(draw)
    return Form("Trilu", [a, _maybe(draw, np.asarray(draw(small)))], {"upper": draw(flags)})


def _elementwise(draw: Draw) -> Form:
    operator = draw(st.sampled_from(sorted(_ARITHMETIC)))
    a = _some(draw, kind=draw(st.sampled_from([F, F, D, H, I, L])))
    alone = operator in (*UNARY, "Softplus")
    others = [_fitting(draw, a.shape, a.dtype) for _ in range(0 if alone else 1)]
    return Form(operator, [a, *others, *(others if operator in ("Sum", "Max", "Min") else [])])


def _reduction(draw: Draw) -> Form:
    a = _some(draw, least=1, sizes=st.integers(1, 4))
    told = {"keepdims": draw(flags), "noop_with_empty_axes": draw(flags)}
    return Form(draw(st.sampled_from(sorted(_REDUCTIONS))), [a, _maybe(draw, _axes(draw, a.ndim))], told)


def _matmul(draw: Draw) -> Form:
    a = _some(draw, least=1, kind=draw(st.sampled_from([F, D])), sizes=st.integers(1, 4))
    k = a.shape[-1] + (draw(st.integers(0, 10)) == 10)
    batch = _fitting(draw, a.shape[:-2], F).shape
    shape = draw(st.sampled_from([(k,), (k, 3), (*batch, k, 3), (*batch, k, 1)]))
    return Form("MatMul", [a, numbers(shape, a.dtype, seed=draw(seeds))])


def _gemm(draw: Draw) -> Form:
    m, k, n = (draw(st.integers(1, 4)) for _ in range(3))
    flips = [draw(flags), draw(flags)]
    a = numbers((k, m) if flips[0] else (m, k), seed=draw(seeds))
    b = numbers((n, k) if flips[1] else (k + (draw(st.integers(0, 10)) == 10), n), seed=draw(seeds))
    told = {"transA": flips[0], "transB": flips[1], "alpha": draw(small) / 2, "beta": draw(small) / 2}
    c = [numbers(draw(st.sampled_from([(n,), (m, 1), (1, n), (m, n), ()])), seed=draw(seeds))] if draw(flags) else []
    return Form("Gemm", [a, b, *c], told)


def _einsum(draw: Draw) -> Form:
    equation = draw(
        st.sampled_from(["ab,bc->ac", "ab,bc", "ba->ab", "aab", "ab->", "a,b,c->cab", "ab,cb->ca", "ii->i"])
    )
    terms = equation.split("->")[0].split(",")
    size = {letter: draw(st.integers(1, 4)) for letter in "abci"}
    shapes = [tuple(size[letter] + (draw(st.integers(0, 20)) == 20) for letter in term) for term in terms]
    return Form("Einsum", [numbers(shape, seed=draw(seeds)) for shape in shapes], {"equation": equation})


def _norm(draw: Draw) -> Form:
    a = _some(draw, least=1, kind=F, sizes=st.integers(1, 4))
    kind = draw(st.sampled_from(["LayerNormalization", "InstanceNormalization", "BatchNormalization"]))
    told: dict[str, Any] = {"epsilon": draw(st.sampled_from([1e-5, 0.5]))}
    if kind == "LayerNormalization":
        axis = draw(st.integers(-a.ndim, a.ndim - 1))
        ends = [numbers(a.shape[axis % a.ndim :], seed=draw(seeds)) for _ in range(draw(st.integers(1, 2)))]
        return Form(kind, [a, *ends], {"axis": axis, **told})
    count, training = (2, 0) if kind == "InstanceNormalization" else (4, draw(flags))
    ends = [numbers((a.shape[min(1, a.ndim - 1)],), low=1, seed=draw(seeds)) for _ in range(count)]
    if training:
        return Form(
            kind, [a, *ends], {"training_mode": 1, "momentum": 0.75, **told}, 3
        )  # with one the runtime has no kernel
    return Form(kind, [a, *ends], told)


def _quantize(draw: Draw) -> Form:
    a = _some(draw, kind=F)
    axis = draw(st.integers(-a.ndim, max(a.ndim - 1, 0)))
    n = a.shape[axis] if a.ndim else 1
    shape = draw(st.sampled_from([(), (1,), (n,)]))
    zero = numbers(shape, draw(st.sampled_from([np.int8, np.uint8])), low=0, seed=draw(seeds))
    scale = numbers(shape, low=1, seed=draw(seeds)) / F(64)
    return Form("QuantizeLinear", [a, scale, zero], {"axis": axis})


FORMS: list[Callable[[Draw], Form]] = [
    *(_reshape, _squeeze, _unsqueeze, _flatten, _transpose, _cast, _shape, _slice, _split, _gather, _gather_elements),
    *(_scatter, _concat, _expand, _tile, _pad, _clip, _softmax, _where, _trilu, _elementwise, _reduction, _matmul),
    *(_gemm, _einsum, _norm, _quantize),
]


# Attributes that may be left out.
OPTIONAL = (
    "allowzero",
    "alpha",
    "axis",
    "beta",
    "end",
    "epsilon",
    "keepdims",
    "mode",
    "perm",
    "start",
    "transA",
    "upper",
)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_what_is_folded_is_what_the_runtime_computes(form: Callable[[Draw], Form]) -> None:
    folded = 0

    @settings(max_examples=40, deadline=None, database=None)
    @given(st.composite(form)(), st.sets(st.sampled_from(OPTIONAL)))
    def drawn(one: Form, defaults: set[str]) -> None:
        nonlocal folded
        if one.operator == "Concat" or one.attributes.get("training_mode"):
            defaults = set()
        told = {name: value for name, value in one.attributes.items() if name not in defaults}
        folded += check(replace(one, attributes=told))

    drawn()
    assert folded >= 5
