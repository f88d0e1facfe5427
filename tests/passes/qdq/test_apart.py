"""passes/qdq/apart.py: what stays in float is computed in float by ONNX Runtime, too, and by no codes of its own."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qdq_graphs import Tiny
from qdq_runs import DQ, Made, Q, drawn, quantized, session

MOVES = {"nothing": (), "Reshape": ([0, 8, 3, -1],), "Transpose": (), "MaxPool": (), "Squeeze": ()}
ATTRIBUTES = {"Transpose": {"perm": [0, 1, 3, 2]}, "MaxPool": {"kernel_shape": [2, 2]}}


def _uneven(tiny: Tiny, *shape: int, axis: int = 0) -> str:
    """A weight whose output channels (along axis) differ so much that one scale for all of them loses most."""
    sizes = np.exp(tiny.random.normal(0, 2, [size if i == axis else 1 for i, size in enumerate(shape)]))
    scale = (shape[axis] / np.prod(shape)) ** 0.5
    return tiny.constant((tiny.random.standard_normal(shape) * sizes * scale).astype(np.float32))


def _convolutions(move: str, *, group: int = 1, positions: int = 6, bias: float = 0.1) -> tuple[Tiny, str]:
    """Three convolutions with Relus between, and the output of the second, before which `move` may stand."""
    tiny, padded = Tiny(), {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    first = tiny.one("Conv", tiny.input(2, 3, positions, positions), tiny.floats(8, 3, 3, 3), **padded)
    hidden = tiny.one("Relu", first)
    if move == "Squeeze":
        hidden = tiny.one("Unsqueeze", hidden, tiny.constant(np.int64([1])))
        hidden = tiny.one("Squeeze", hidden, tiny.constant(np.int64([1])))
    elif move != "nothing":
        shapes = [tiny.constant(np.int64(own)) for own in MOVES[move]]
        hidden = tiny.one(move, hidden, *shapes, **ATTRIBUTES.get(move, {}))
    biases = tiny.constant(np.float32([bias, *np.full(15, 0.1)]))
    middle = tiny.one("Conv", hidden, _uneven(tiny, 16, 8 // group, 3, 3), biases, group=group, **padded)
    last = tiny.one("Conv", tiny.one("Relu", middle), tiny.floats(4, 16, 3, 3), **padded)
    return tiny.output(last), middle


def _gemms(operator: str) -> tuple[Tiny, str]:
    """Three linears, each a Gemm, or a MatMul and an Add that ONNX Runtime makes one of."""
    tiny = Tiny()

    def linear(x: str, k: int, n: int) -> tuple[str, str]:
        if operator == "Gemm":
            y = tiny.one("Gemm", x, _uneven(tiny, n, k), tiny.floats(n), transB=1)
            return y, y
        product = tiny.one("MatMul", x, _uneven(tiny, k, n, axis=1))
        return tiny.one("Add", product, tiny.floats(n)), product

    hidden, _ = linear(tiny.input(4, 32), 32, 24)
    middle, name = linear(tiny.one("Relu", hidden), 24, 16)
    return tiny.output(linear(tiny.one("Relu", middle), 16, 8)[0]), name


def _as_it_is(made: Made) -> None:
    """Optimized or not, the file gives the same, but for single steps of the last grid."""
    for feeds in made.feeds:
        levels = ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL")
        (there,), (here,) = (session(made.after, level=level).run(None, feeds) for level in levels)
        assert np.linalg.norm(there - here) < 4e-3 * np.linalg.norm(here)


@pytest.mark.parametrize("provider", ["cpu", "cuda", "tensorrt"])
@pytest.mark.parametrize("move", MOVES)
def test_an_excluded_convolution_is_computed_in_float(move, provider) -> None:
    tiny, name = _convolutions(move)
    made = quantized(tiny, provider=provider, recipe={"exclude": (name,)})
    assert [decision.node for decision in made.decisions("kept")] == [name]
    _as_it_is(made)


def test_its_neighbours_are_computed_in_integers(tmp_path) -> None:
    tiny, name = _convolutions("nothing")
    found = quantized(tiny, recipe={"exclude": (name,)}).optimized(tmp_path)
    assert found["QLinearConv"] == 2
    assert found["FusedConv"] + found["Conv"] == 1


@pytest.mark.parametrize("operator", ["Gemm", "MatMul"])
def test_an_excluded_linear_is_computed_in_float(operator) -> None:
    tiny, name = _gemms(operator)
    _as_it_is(quantized(tiny, recipe={"exclude": (name,)}))


def test_a_bias_that_no_codes_hold_is_added_in_float() -> None:
    """Its weight is codes; codes of the bias would be those of an infinity, and what they decode to arbitrary."""
    tiny, name = _convolutions("nothing", bias=-3e38)
    made = quantized(tiny)
    (told,) = (decision for decision in made.decisions("quantized") if decision.node == name)
    assert told.reason.endswith("weights only: its bias holds a number so large that codes leave no room for others")
    _as_it_is(made)


@settings(deadline=None, max_examples=12)
@given(st.sampled_from([1, 2, 8]), st.integers(1, 4), st.sampled_from(["nothing", "MaxPool", "Transpose"]))
def test_sizes_make_no_difference(group: int, positions: int, move: str) -> None:
    if move == "MaxPool" and positions < 2:
        return
    tiny, name = _convolutions(move, group=group, positions=positions)
    _as_it_is(quantized(tiny, recipe={"exclude": (name,)}))


def test_where_no_axis_is_known_the_float_value_is_read() -> None:
    tiny, name = _convolutions("nothing")
    proto = onnx.load_from_string(tiny.model())
    for dim in proto.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = f"n{dim.dim_value}"
    feeds = [{key: value.repeat(3, 2).repeat(3, 3) for key, value in drawn(proto).items()}]
    _as_it_is(quantized(proto, feeds, recipe={"exclude": (name,)}))


def test_without_such_products_a_value_has_one_pair() -> None:
    made = quantized(_convolutions("nothing")[0])
    assert not any(node.name.endswith(".by_axis") for node in made.after.graph.node)
    assert all(len([n for n in made.nodes(DQ) if n.input[0] == q.output[0]]) == 1 for q in made.nodes(Q))
