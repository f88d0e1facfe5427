"""Pass fuse_attention: the same numbers as the attention that it replaces, whatever is padded and however it is run."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from fusing import Running, check_same, fuse_attention, nodes_of
from graphs.decoders import Written
from graphs.table import Graph
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.models.tiny import decoder, tiny_decoder
from qcompile.models.tiny.build import Builder
from qcompile.models.tiny.weights import norm_scale
from qcompile.passes.contrib.attention import FuseAttention


def _grouped() -> ir.Model:
    return tiny_decoder(kv_cache=True, outliers=False)


def _one_head_each() -> ir.Model:
    return tiny_decoder(kv_cache=True, kv_heads=4, outliers=False)


def _of_one_cache_head() -> ir.Model:
    return tiny_decoder(kv_cache=True, kv_heads=1, outliers=False, norm="layer")


_KINDS: dict[str, Callable[[], ir.Model]] = {
    "grouped": _grouped,
    "one head each": _one_head_each,
    "one cache head": _of_one_cache_head,
}


@pytest.fixture(scope="module", params=_KINDS)
def both(request: pytest.FixtureRequest) -> tuple[ir.Model, ir.Model]:
    """A decoder, and the same with its attention fused."""
    model = _KINDS[request.param]()
    fused, _ = fuse_attention(model)
    assert len(nodes_of(fused, "GroupQueryAttention")) == 2
    assert not nodes_of(fused, "Softmax")
    return model, fused


@settings(max_examples=15, deadline=None)
@given(data=st.data(), tokens=st.integers(1, 9))
def test_sequences_of_a_batch_may_be_padded_on_either_side(
    both: tuple[ir.Model, ir.Model], data: st.DataObject, tokens: int
) -> None:
    """On the left, on the right, both; then token by token. The first token of each sequence is never padding alone."""
    batch = data.draw(st.integers(1, 3))
    mask = np.ones((batch, tokens), np.int64)
    for row in mask:
        left = data.draw(st.integers(0, tokens - 1))
        right = data.draw(st.integers(0, tokens - 1 - left))
        row[:left], row[tokens - right :] = 0, 0
    check_same(*both, mask, [1, 1, 1], counted=data.draw(st.booleans()))


def test_one_sequence_may_go_on_by_several_rows(both: tuple[ir.Model, ir.Model]) -> None:
    check_same(*both, np.ones((1, 5), np.int64), [3, 1, 4])


def test_caches_hold_the_same(both: tuple[ir.Model, ir.Model]) -> None:
    runs = [Running(model, 2) for model in both]
    for run in runs:
        run(np.arange(10).reshape(2, 5), np.ones((2, 5), np.int64), np.tile(np.arange(5), (2, 1)))
    for name, cache in runs[0].caches.items():
        np.testing.assert_allclose(runs[1].caches[name], cache, atol=1e-5, err_msg=name)


def test_any_position_ids_of_one_sequence_count(both: tuple[ir.Model, ir.Model]) -> None:
    """A cache from which old positions were dropped, say: positions go on beyond its length."""
    found = []
    for model in both:
        run = Running(model, 1)
        run(np.arange(6)[None], np.ones((1, 6), np.int64), np.arange(6)[None])
        run.caches = {name: cache[:, :, -4:] for name, cache in run.caches.items()}
        found.append(run(np.array([[7]]), np.ones((1, 5), np.int64), np.array([[6]])))
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_windows_and_interleaved_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions see four behind them (Mistral, Gemma), and neighbours are turned together (GPT-J, Cohere)."""
    whole = decoder._mask

    def window(b: Builder, past: ir.Value, sequence: ir.Value, attention_mask: ir.Value) -> ir.Value:
        total = b.Add(past, sequence)
        keys, queries = b.Range(np.int64(0), total, np.int64(1)), b.Range(past, total, np.int64(1))
        near = b.Greater(b.Unsqueeze(keys, [0]), b.Sub(b.Unsqueeze(queries, [1]), np.int64(4)))
        return b.And(whole(b, past, sequence, attention_mask), near)

    def pairs(own: decoder._Decoder, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
        b, ends = own.b, [2**31 - 1]
        even, odd = b.Slice(x, [0], ends, [3], [2]), b.Slice(x, [1], ends, [3], [2])
        cos, sin = (b.Slice(table, [0], [own.head_dim // 2], [3], [1]) for table in (cos, sin))
        turned = b.Sub(b.Mul(even, cos), b.Mul(odd, sin)), b.Add(b.Mul(odd, cos), b.Mul(even, sin))
        joined = b.Concat(*(b.Unsqueeze(part, [4]) for part in turned), axis=4)
        return b.Reshape(joined, b.Shape(x))

    monkeypatch.setattr(decoder, "_mask", window)
    monkeypatch.setattr(decoder._Decoder, "rotate", pairs)
    model = _grouped()
    fused, decisions = fuse_attention(model)
    assert {decision.action for decision in decisions} == {"fused"}
    made = nodes_of(fused, "GroupQueryAttention")
    assert [node.attributes.get_int("local_window_size", 0) for node in made] == [4, 4]
    assert [node.attributes.get_int("rotary_interleaved", 0) for node in made] == [1, 1]
    check_same(model, fused, np.array([[0, 1, 1, 1, 1, 1, 1], [1] * 7]), [1, 1])
    check_same(model, fused, np.ones((1, 7), np.int64), [3, 1])


@pytest.mark.parametrize("order", ["qkv", "kqv"])
def test_what_one_product_gives_is_not_cut_apart(order: str) -> None:
    """Where queries, keys and values lie side by side in that order, and there alone."""
    model = _grouped()
    for layer in range(2):
        products = [
            node for node in model.graph if f"layers.{layer}.self_attn" in str(node.name) and node.op_type == "MatMul"
        ]
        _join(model, {node.name.rsplit(".", 1)[1][0]: node for node in products[:3]}, order)
    fused, _ = fuse_attention(model)
    assert [node.inputs[1] is None for node in nodes_of(fused, "GroupQueryAttention")] == [order == "qkv"] * 2
    assert bool(nodes_of(fused, "Split")) == (order != "qkv")
    check_same(model, fused, np.ones((2, 6), np.int64), [1])


def _join(model: ir.Model, products: dict[str, ir.Node], order: str) -> None:
    """One product for all three, and a Split."""
    nodes = [products[letter] for letter in order]
    weights = [node.inputs[1].const_value.numpy() for node in nodes]
    joined = _constant(model, f"{nodes[0].name}.joined", np.concatenate(weights, 1))
    widths = _constant(model, f"{nodes[0].name}.widths", [w.shape[1] for w in weights])
    product = ir.node("MatMul", [nodes[0].inputs[0], joined], name=f"{nodes[0].name}.whole")
    split = ir.node("Split", [product.outputs[0], widths], {"axis": -1}, num_outputs=3, name=f"{nodes[0].name}.split")
    first = min(nodes, key=list(model.graph).index)
    model.graph.insert_before(first, [product, split])
    product.outputs[0].name = f"{nodes[0].name}.whole.out"
    for node, output in zip(nodes, split.outputs, strict=True):
        output.name = f"{node.name}.cut"
        ir.convenience.replace_all_uses_with(node.outputs[0], output)
        model.graph.remove(node, safe=True)


def test_masks_cut_to_the_keys_and_guards_against_rows_of_nothing() -> None:
    """As TorchScript writes scaled_dot_product_attention: a mask is cut to what the keys' shape says, NaN becomes 0."""
    model = _grouped()
    for softmax in nodes_of(model, "Softmax"):
        where = softmax.inputs[0].producer()
        scores = where.inputs[1].producer().inputs[0].producer()
        numbers = [_constant(model, f"{softmax.name}.{n}", [n]) for n in (0, 3, -1)]
        length = ir.node("Shape", [scores.inputs[1]], {"start": 3, "end": 4}, name=f"{softmax.name}.length")
        cut = ir.node("Slice", [where.inputs[0], numbers[0], length.outputs[0], numbers[1]], name=f"{softmax.name}.cut")
        where.prepend([length, cut])
        where.replace_input_with(0, cut.outputs[0])
        test = ir.node("IsNaN", [softmax.outputs[0]], name=f"{softmax.name}.test")
        zero = _constant(model, f"{softmax.name}.zero", np.zeros(1, np.float32))
        guard = ir.node("Where", [test.outputs[0], zero, softmax.outputs[0]], name=f"{softmax.name}.guard")
        readers = [(use.node, use.idx) for use in softmax.outputs[0].uses() if use.node not in (test, guard)]
        softmax.append([test, guard])
        for node in (length, cut, test, guard):
            node.outputs[0].name = f"{node.name}.out"
        for reader, place in readers:
            reader.replace_input_with(place, guard.outputs[0])
    fused, decisions = fuse_attention(model)
    assert {decision.action for decision in decisions} == {"fused"}
    check_same(model, fused, np.array([[0, 0, 1, 1, 1], [1] * 5]), [1, 1])


def _constant(model: ir.Model, name: str, numbers: object) -> ir.Value:
    tensor = ir.tensor(np.asarray(numbers))
    value = ir.Value(
        name=name, shape=ir.Shape(tensor.shape.numpy()), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    model.graph.register_initializer(value)
    return value


@pytest.mark.parametrize("single", [False, True])
def test_half_precision_stays_half_precision(*, single: bool) -> None:
    """Where rotations and Softmax are computed in single precision, too."""
    model = _written(half=True) if single else tiny_decoder(kv_cache=True, dtype="fp16", outliers=False)
    fused, _ = fuse_attention(model)
    assert len(nodes_of(fused, "GroupQueryAttention")) == 2
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    check_same(model, fused, mask, [1, 1], tolerance=2e-2)


def test_norms_take_the_sum_before_them_along() -> None:
    fused, decisions = fuse_attention(_grouped())
    assert len(nodes_of(fused, "SkipSimplifiedLayerNormalization")) == 4
    assert len(nodes_of(fused, "SimplifiedLayerNormalization")) == 1
    assert not nodes_of(fused, "ReduceMean")
    assert {decision.action for decision in decisions} == {"fused"}


@pytest.mark.parametrize(("kind", "found"), [("half", [4, 1, 0]), ("single", [0, 5, 0]), ("double", [0, 0, 5])])
def test_norms_written_in_single_precision_are_fused_in_half(
    monkeypatch: pytest.MonkeyPatch, kind: str, found: list[int]
) -> None:
    """As torch exports a float16 model: Cast, the norm, Cast, gamma (half), or gamma before the Cast (single)."""
    wide = np.float64 if kind == "double" else np.float32

    def add_norm(own: decoder._Decoder, x: ir.Value, branch: ir.Value | None, name: str, *, outliers: bool) -> Any:
        def constant(what: str, numbers: Any) -> ir.Value:
            return b.initializers.setdefault(what, ir.val(what, const_value=ir.tensor(np.asarray(numbers, wide))))

        b, gamma = own.b, norm_scale(own.rng, own.hidden, outliers=outliers)
        x = x if branch is None else own.typed(b.Add(x, branch))
        high = own.typed(b.Cast(x, to=int(ir.DataType.from_numpy(np.dtype(wide)))))
        high.dtype = ir.DataType.from_numpy(np.dtype(wide))
        mean = b.ReduceMean(b.Pow(high, constant("two", 2)), [-1], keepdims=1)
        normed = b.Div(high, b.Sqrt(b.Add(mean, constant("epsilon", 1e-5))))
        if kind == "single":
            return x, own.typed(b.Cast(b.Mul(normed, constant(f"{name}.weight", gamma)), to=10))
        return x, b.Mul(b.weight(f"{name}.weight", gamma), own.typed(b.Cast(normed, to=10)))

    monkeypatch.setattr(decoder._Decoder, "add_norm", add_norm)
    model = tiny_decoder(kv_cache=True, dtype="fp16", outliers=False)
    fused, _ = fuse_attention(model)
    kinds = ("SkipSimplifiedLayerNormalization", "SimplifiedLayerNormalization", "ReduceMean")
    assert [len(nodes_of(fused, name)) for name in kinds] == found
    check_same(model, fused, np.ones((2, 6), np.int64), [1, 1], tolerance=2e-2)


def test_without_padding_no_mask_is_read() -> None:
    """The contract of onnxruntime-genai: the sum of attention_mask says where a sequence ends."""
    model = _grouped()
    fused, _ = fuse_attention(model, padding=False)
    assert all(len(node.inputs) == 9 for node in nodes_of(fused, "GroupQueryAttention"))
    check_same(model, fused, np.ones((2, 6), np.int64), [1, 1])


@pytest.fixture(scope="module", params=[ir.DataType.INT64, ir.DataType.INT32], ids=["int64", "int32"])
def ending_apart(request: pytest.FixtureRequest) -> tuple[ir.Model, ir.Model]:
    """A decoder, and the same with its attention fused for sequences that end where their masks do."""
    model = _grouped()
    mask = next(value for value in model.graph.inputs if value.name == "attention_mask")
    for value in (mask, *(use.node.outputs[0] for use in mask.uses())):
        value.dtype = request.param
    return model, fuse_attention(model, padding=False)[0]


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_without_padding_sequences_of_a_batch_end_where_their_masks_do(
    ending_apart: tuple[ir.Model, ir.Model], lengths: list[int]
) -> None:
    """As onnxruntime-genai pads: behind each sequence. What follows a short one takes the next of its own positions."""
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    check_same(*ending_apart, mask, [1, 1, 1])


def test_decoders_without_caches_stay() -> None:
    model = tiny_decoder()
    fused, decisions = fuse_attention(model)
    assert not nodes_of(fused, "GroupQueryAttention")
    assert nodes_of(fused, "ReduceMean")
    kept = {(decision.action, decision.reason) for decision in decisions}
    assert kept == {("kept", "its keys have fewer heads than its queries")}


def _written(**how: Any) -> ir.Model:
    graph = Graph()
    Written(**how).build(graph)
    return ir.from_proto(graph.model())


def test_caches_for_the_next_run_are_those_that_attention_reads() -> None:
    """In the first layer it reads keys that it does not leave there."""
    model = _written()
    kept = next(value for value in model.graph.outputs if value.name == "present.0.key")
    past, new = kept.producer().inputs
    changed = ir.node("Relu", [new], name="changed")
    read = ir.node("Concat", [past, changed.outputs[0]], {"axis": 2}, name="read")
    for use in list(kept.uses()):
        use.node.replace_input_with(use.idx, read.outputs[0])
    changed.outputs[0].name, read.outputs[0].name = "changed", "read"
    kept.producer().append([changed, read])
    fused, decisions = fuse_attention(model)
    told = [(own.action, own.reason) for own in decisions if "Softmax" in own.node]
    assert told == [("kept", "its keys and values are not appended to caches"), ("fused", "GroupQueryAttention")]
    check_same(model, fused, np.ones((2, 5), np.int64), [1])


def test_keys_that_other_layers_read_stay_turned_as_they_are() -> None:
    """What a fused attention lengthens by keys turned in its own way would be other keys for them."""
    model = _written(layers=4, shared=True)
    fused, decisions = fuse_attention(model)
    assert {decision.action for decision in decisions} == {"fused"}
    check_same(model, fused, np.array([[0, 0, 1, 1, 1], [1] * 5]), [1, 1])


_HOWS = st.fixed_dictionaries(
    {
        "layers": st.sampled_from([1, 2, 4]),
        "heads": st.sampled_from([2, 4]),
        "groups": st.sampled_from([1, 2]),
        "wide": st.sampled_from([16, 16, 24]),
        "mask": st.sampled_from(["causal", "causal", "positions", "all"]),
        "padding": st.booleans(),
        "inverted": st.booleans(),
        "shared": st.booleans(),
        "named": st.booleans(),
        "turned": st.booleans(),
        "sizes": st.sampled_from(["bspt", "bsss", "nnnn", "????"]),
    }
)


@settings(max_examples=8, deadline=None)
@given(how=_HOWS, lead=st.integers(0, 3))
def test_however_it_is_written_it_stays_what_it_was(how: dict[str, Any], lead: int) -> None:
    """Fused or not, and every attention with its decision."""
    model = _written(**how)
    fused, decisions = fuse_attention(model)
    told = [own for own in decisions if "Softmax" in own.node]
    assert len(told) == how["layers"]
    mask = np.ones((2, 5), np.int64)
    if how["padding"] and how["mask"] == "causal":
        mask[0, :lead] = 0
    check_same(model, fused, mask, [1, 1])


def test_a_fill_may_take_either_branch_of_the_choice() -> None:
    model = _written(inverted=True)
    swapped = model.clone()
    for node in nodes_of(swapped, "Where"):
        hidden, fill, scores = node.inputs
        seen = ir.node("Not", [hidden], name=f"{node.name}.seen")
        seen.outputs[0].name = seen.name
        node.prepend(seen)
        for i, value in enumerate((seen.outputs[0], scores, fill)):
            node.replace_input_with(i, value)
    for own in (model, swapped):
        fused, _ = fuse_attention(own)
        assert len(nodes_of(fused, "GroupQueryAttention")) == 2
        check_same(own, fused, np.array([[0, 1, 1, 1, 1], [1] * 5]), [1])


@pytest.mark.parametrize("padding", [True, False])
def test_a_mask_says_how_long_caches_are_where_attention_looks_at_it(padding: bool) -> None:
    """Else it may be an encoder's, or hold anything."""
    model = _written(padding=padding)
    fused, _ = fuse_attention(model)
    made = nodes_of(fused, "GroupQueryAttention")
    assert len(made) == 2
    mask = next(value for value in fused.graph.inputs if value.name == "attention_mask")
    assert bool(mask.uses()) == padding
    check_same(model, fused, np.ones((2, 5), np.int64), [1, 1])


@pytest.mark.parametrize("positions", [[[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]], [[0, 1, 2, 3, 4], [0, 3, 4, 9, 11]]])
def test_without_a_mask_sequences_have_positions_of_their_own(positions: list[list[int]]) -> None:
    """GroupQueryAttention turns all sequences of a first prompt by the positions of the first one."""
    model = _written(padding=False)
    fused, _ = fuse_attention(model)
    assert len(nodes_of(fused, "GroupQueryAttention")) == 2
    at, random = np.array(positions), np.random.default_rng(0)
    ids, runs = random.integers(0, 60, (2, 7)), [Running(own, 2) for own in (model, fused)]
    first = [run(ids[:, :5], np.ones((2, 5), np.int64), at) for run in runs]
    then = [run(ids[:, 5:6], np.ones((2, 6), np.int64), at[:, -1:] + 1) for run in runs]
    for expected, found in (first, then):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    feeds = {"input_ids": ids[:, :5], "position_ids": at, "attention_mask": np.ones((2, 5), np.int64)}
    feeds["past_key_values.0.key"] = np.zeros((2, 2, 0, 16), np.float32)
    assert FuseAttention().unfit(model, feeds) == ""
    for own, other in ((FuseAttention(padding=False), model), (FuseAttention(), _written())):
        assert own.unfit(other, feeds) == "the data has other position_ids in each sequence"


def _without(model: ir.Model, op_type: str, replacement: str) -> ir.Model:
    for node in nodes_of(model, op_type):
        node.op_type = replacement
    return model


def _masked(model: ir.Model, by_head: list[float]) -> ir.Model:
    """The written one, its mask plus these numbers for every other head."""
    model = _written(heads=4)
    numbers = np.tile(np.float32(by_head), 2).reshape(1, 4, 1, 1)
    for softmax in nodes_of(model, "Softmax"):
        scores = softmax.inputs[0].producer()
        added = ir.node("Add", [scores.inputs[1], _constant(model, f"{softmax.name}.more", numbers)])
        added.outputs[0].name = f"{softmax.name}.mask"
        scores.prepend(added)
        scores.replace_input_with(1, added.outputs[0])
    return model


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: _without(model, "LessOrEqual", "GreaterOrEqual"), "its mask is neither causal nor a window"),
        (lambda model: _without(model, "Cos", "Sin"), "no rotation by cosines and sines is found before its scores"),
        (lambda model: _without(model, "Neg", "Identity"), "it is turned in none of the two usual ways"),
        (lambda _: _written(mask="positions"), "its mask is neither causal nor a window"),
        (lambda _: _written(mask="all"), "it has no mask: every row sees all positions"),
        (
            lambda _: _written(wide=24),
            "GroupQueryAttention takes no values of 2 heads of 24 beside keys of 2 of 16",
        ),
        (
            lambda model: _masked(model, [0.0, -3.0]),
            "its mask holds other numbers than zeros and a lowest one, as of relative positions",
        ),
        (lambda model: _masked(model, [0.0, -1e9]), "its mask is another one for each head"),
    ],
)
def test_what_is_no_such_attention_stays_with_its_reason(change: Callable[[ir.Model], ir.Model], reason: str) -> None:
    model = change(_grouped())
    fused, decisions = fuse_attention(model)
    assert not nodes_of(fused, "GroupQueryAttention")
    assert [decision.reason for decision in decisions if decision.action == "kept"] == [reason] * 2
    check_same(model, fused, np.ones((2, 6), np.int64), [1])
