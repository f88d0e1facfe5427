"""Attention without caches becomes MultiHeadAttention: what is added to the scores is kept, whatever it is."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from fusing import fuse_attention, nodes_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.models.tiny.build import Builder
from qcompile.passes.base import Decision
from qcompile.runtime.sessions import session

Array = npt.NDArray[Any]
_LOW = float(np.finfo(np.float32).min)
Mask = Callable[[Builder, ir.Value, ir.Value], ir.Value]


def _run(model: ir.Model, feeds: dict[str, Array]) -> Array:
    own = session(ir.to_proto(model).SerializeToString())
    taken = {value.name for value in own.get_inputs()}
    return np.asarray(own.run(None, {name: array for name, array in feeds.items() if name in taken})[0])


def _attention(
    mask: Mask | None = None,
    *,
    heads: int = 3,
    widths: tuple[int, int] = (8, 8),
    hidden: bool | None = None,
    keys: str = "rows",
    cap: float = 0.0,
    dtype: str = "fp32",
    rows: int | str = "rows",
    guarded: bool = False,
) -> ir.Model:
    """x (batch, rows, 24), other (batch, positions, 24), seen (batch, positions) → y. hidden: what a Where hides.

    guarded: NaN of rows that nothing is let through to becomes 0.
    """
    b, rng = Builder(opset=21, dtype=dtype), np.random.default_rng(0)
    x = b.input("x", b.dtype, ["batch", rows, 24])
    other = x if keys == "rows" else b.input("other", b.dtype, ["batch", keys, 24])
    seen = b.input("seen", ir.DataType.BOOL, ["batch", rows if keys == "rows" else keys])

    def split(value: ir.Value, name: str, width: int) -> ir.Value:
        own = b.MatMul(value, b.weight(name, rng.standard_normal((24, heads * width)) / 3))
        return b.Transpose(b.Reshape(own, [0, 0, heads, width]), perm=[0, 2, 1, 3])

    q, k, v = split(x, "q", widths[0]), split(other, "k", widths[0]), split(other, "v", widths[1])
    scores = b.Mul(b.MatMul(q, b.Transpose(k, perm=[0, 1, 3, 2])), 0.4)
    scores = b.Mul(b.Tanh(b.Mul(scores, 1 / cap)), cap) if cap else scores
    if mask is not None:
        own = mask(b, seen, b.Concat(*(b.Shape(value, start=1, end=2) for value in (x, other)), axis=0))
        replaced = (own, _LOW, scores) if hidden else (own, scores, _LOW)
        scores = b.Add(scores, own) if hidden is None else b.Where(*replaced)
    weights = b.Softmax(scores, axis=-1)
    y = b.MatMul(b.Where(b.IsNaN(weights), 0.0, weights) if guarded else weights, v)
    return b.model({"y": b.Reshape(b.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, heads * widths[1]])})


def _padding(b: Builder, seen: ir.Value, ends: ir.Value) -> ir.Value:
    """(batch, 1, 1, positions)"""
    return b.Where(b.Unsqueeze(seen, [1, 2]), 0.0, _LOW)


def _infinite(b: Builder, seen: ir.Value, ends: ir.Value) -> ir.Value:
    return b.Where(b.Unsqueeze(seen, [1, 2]), 0.0, -np.inf)


def _times(b: Builder, seen: ir.Value, ends: ir.Value) -> ir.Value:
    """(1 - seen) * -10000, as BERT had it."""
    return b.Mul(b.Sub(1.0, b.Cast(b.Unsqueeze(seen, [1, 2]), to=1)), -1e4)


def _square(b: Builder, seen: ir.Value, ends: ir.Value) -> ir.Value:
    """(rows, positions): near positions count more, by numbers that are no fill."""
    rows, positions = (
        b.Range(np.int64(0), b.Squeeze(b.Slice(ends, [i], [i + 1], [0]), [0]), np.int64(1)) for i in (0, 1)
    )
    return b.Mul(b.Abs(b.Sub(b.Cast(b.Unsqueeze(rows, [1]), to=1), b.Cast(positions, to=1))), -0.3)


def _of_heads(b: Builder, seen: ir.Value, ends: ir.Value) -> ir.Value:
    """(1, heads, rows, positions), of each head another, as relative positions are."""
    return b.Mul(_square(b, seen, ends), b.weight("slopes", np.array([1, 2, 3], np.float32).reshape(1, 3, 1, 1)))


def _bool(b: Builder, seen: ir.Value, ends: ir.Value) -> ir.Value:
    return b.Unsqueeze(seen, [1, 2])


def _not(b: Builder, seen: ir.Value, ends: ir.Value) -> ir.Value:
    return b.Not(b.Unsqueeze(seen, [1, 2]))


_KINDS: dict[str, tuple[Mask | None, bool | None]] = {
    "none": (None, None),
    "padding": (_padding, None),
    "infinite": (_infinite, None),
    "times": (_times, None),
    "square": (_square, None),
    "of heads": (_of_heads, None),
    "where seen": (_bool, False),
    "where hidden": (_not, True),
}


def _same(model: ir.Model, made: ir.Model, feeds: dict[str, Array], tolerance: float = 2e-6) -> None:
    expected, found = (_run(own, feeds) for own in (model, made))
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_allclose(found, expected, atol=tolerance * np.nanmax(np.abs(expected), initial=1e-9), rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(list(_KINDS)),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 9)),
    widths=st.sampled_from([(8, 8), (4, 16), (5, 3)]),
    cross=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_numbers_are_those_of_the_plain_graph(
    kind: str, sizes: tuple[int, int, int], widths: tuple[int, int], cross: bool, seed: int
) -> None:
    """Padding anywhere, of all but one position; keys of the same rows or of others; values of another width."""
    mask, hidden = _KINDS[kind]
    model = _attention(mask, hidden=hidden, widths=widths, keys="positions" if cross else "rows")
    made, decisions = fuse_attention(model)
    assert [decision.reason for decision in decisions] == ["MultiHeadAttention"]
    assert not nodes_of(made, "Softmax")
    random = np.random.default_rng(seed)
    batch, rows, positions = sizes[0], sizes[1], sizes[2] if cross else sizes[1]
    seen = random.random((batch, positions)) < 0.6
    seen[:, random.integers(positions)] = True
    x, other = (random.standard_normal((batch, n, 24)).astype(np.float32) for n in (rows, positions))
    _same(model, made, {"x": x, "other": other, "seen": seen})


@pytest.mark.parametrize("masked", [[], [0], [3, 4, 5], range(6)])
def test_an_encoder_is_what_it_was_with_padding(masked: list[int]) -> None:
    """Rows of padding themselves, too, and a sequence of padding alone."""
    model = tiny_encoder()
    made, decisions = fuse_attention(model)
    assert [decision.action for decision in decisions] == ["fused"] * 2
    random = np.random.default_rng(0)
    mask = np.ones((2, 6), np.int64)
    mask[1, list(masked)] = 0
    feeds = {"input_ids": random.integers(0, 256, (2, 6)), "attention_mask": mask, "token_type_ids": mask * 0}
    _same(model, made, feeds)


def _feeds(batch: int, rows: int) -> dict[str, Array]:
    x = np.random.default_rng(0).standard_normal((batch, rows, 24)).astype(np.float32)
    return {"x": x, "seen": np.ones((batch, rows), bool)}


def test_results_of_two_axes_keep_them() -> None:
    """As exporters flatten (batch, rows) before the product behind."""
    model = _attention()
    reshape = nodes_of(model, "Reshape")[-1]
    b = ir.tensor(np.array([-1, 24]), name="flat")
    reshape.replace_input_with(
        1, ir.Value(name="flat", const_value=b, shape=ir.Shape([2]), type=ir.TensorType(b.dtype))
    )
    model.graph.register_initializer(reshape.inputs[1])  # type: ignore[arg-type]
    reshape.outputs[0].shape = ir.Shape([None, 24])
    made, _ = fuse_attention(model)
    assert len(nodes_of(made, "MultiHeadAttention")) == 1
    assert _run(made, _feeds(2, 5)).shape == (10, 24)
    _same(model, made, _feeds(2, 5))


def _kept(decisions: list[Decision]) -> set[str]:
    return {decision.reason for decision in decisions if decision.action == "kept"}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: _attention(cap=5.0), "MultiHeadAttention has no softcap"),
        (
            lambda: _attention(_infinite, guarded=True),
            "MultiHeadAttention has no zeros for rows that nothing is let through to",
        ),
        (lambda: _attention(dtype="fp16"), "not all of it is float32"),
        (lambda: tiny_decoder(outliers=False), "its keys have fewer heads than its queries"),
    ],
)
def test_what_it_cannot_be_stays_with_its_reason(model: Callable[[], ir.Model], reason: str) -> None:
    own = model()
    made, decisions = fuse_attention(own)
    assert not nodes_of(made, "MultiHeadAttention")
    assert _kept(decisions) == {reason}


# Masks that hide nothing


def _visible(b: Builder, seen: ir.Value, ends: ir.Value) -> ir.Value:
    """One True, as long as the scores are: what exporters write for vision models."""
    return b.Where(b.Expand(b.weight("true", np.array([[[[True]]]])), ends), 0.0, _LOW)


def _window(b: Builder, seen: ir.Value, ends: ir.Value) -> ir.Value:
    """Positions up to 64 away: small sizes show nothing of it."""
    return b.Where(b.Less(b.Mul(_square(b, seen, ends), -1 / 0.3), 64.5), 0.0, _LOW)


def _table(b: Builder, seen: ir.Value, ends: ir.Value) -> ir.Value:
    """The same, cut out of a table."""
    near = np.abs(np.subtract.outer(np.arange(200), np.arange(200))) <= 64
    return b.Where(b.Slice(b.weight("near", near), [0, 0], ends, [0, 1]), 0.0, _LOW)


@pytest.mark.parametrize("rows", ["rows", 5])
def test_a_mask_that_hides_nothing_goes(rows: int | str) -> None:
    model = _attention(_visible, rows=rows)
    made, _ = fuse_attention(model)
    (node,) = nodes_of(made, "MultiHeadAttention")
    assert len(node.inputs) == 3
    _same(model, made, _feeds(2, 5))


@pytest.mark.parametrize("mask", [_padding, _window, _table, _of_heads])
def test_a_mask_that_hides_something_at_some_size_stays(mask: Mask) -> None:
    model = _attention(mask)
    made, _ = fuse_attention(model)
    (node,) = nodes_of(made, "MultiHeadAttention")
    assert len(node.inputs) == 6
    _same(model, made, _feeds(1, 150))
