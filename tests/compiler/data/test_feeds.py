"""compiler/data/inputs.py, feeds.py, sampling.py: roles by wiring, batches that a graph accepts, sampled text."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler.data import feeds
from qcompile.compiler.data.feeds import Batch, beginning, complete, input_plan, npz_batches, token_batches
from qcompile.compiler.data.sampling import sample_windows
from qcompile.models.tiny import tiny_conv, tiny_decoder, tiny_encoder, tiny_mlp
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import run, session

WINDOW = np.arange(1, 13)


def _session(model: ir.Model) -> Any:
    return session(ir.to_proto(model).SerializeToString(), threads=1)


def _renamed(model: ir.Model) -> ir.Model:
    """The model with meaningless input names, where wiring alone must do."""
    for index, value in enumerate(model.graph.inputs):
        if value.name == "input_ids" or "past" in (value.name or ""):
            value.name = f"v{index}"
    return model


def _graph(nodes: list[Any], inputs: list[Any], outputs: list[Any], **weights: Any) -> ir.Model:
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qcompile", 1), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def _value(name: str, kind: int, shape: list[Any] | None) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def test_roles_of_a_decoder_without_its_names() -> None:
    plan = input_plan(_renamed(tiny_decoder(kv_cache=True, vocab=256)))
    assert plan.ids is not None
    assert plan.ids.name == "v0"
    assert (plan.vocabulary, plan.logits) == (256, "logits")
    assert plan.mask is not None
    assert plan.positions is not None
    assert len(plan.past) == 4
    assert {pair.axis for pair in plan.past} == {2}
    assert all(pair.present.startswith("present") for pair in plan.past)
    assert (plan.floats, plan.unknown, plan.batch, plan.sequence) == ((), (), None, None)


def test_prefill_and_decode_step_equal_one_long_run() -> None:
    """The decode step, fed by the prefill's presents, gives the logits of the whole window's last token."""
    model = tiny_decoder(kv_cache=True)
    plan, made = input_plan(model), _session(model)
    (whole,) = token_batches(plan, [WINDOW])
    expected = run(made, ["logits"], whole.feeds)[0]
    prefill, step = token_batches(plan, [WINDOW], decode_step=True)
    assert (prefill.rows, prefill.follows, step.rows, step.follows) == (11, None, 1, 0)
    names = [o.name for o in made.get_outputs()]
    outputs = dict(zip(names, run(made, names, prefill.feeds), strict=True))
    np.testing.assert_allclose(outputs["logits"], expected[:, :-1], atol=2e-5)
    last = run(made, ["logits"], complete(plan, step.feeds, outputs))[0]
    np.testing.assert_allclose(last, expected[:, -1:], atol=2e-5)


def test_several_windows_number_the_batches_they_follow() -> None:
    batches = token_batches(input_plan(tiny_decoder(kv_cache=True)), [WINDOW, WINDOW[:5]], decode_step=True)
    assert [b.follows for b in batches] == [None, 0, None, 2]
    assert batches[2].feeds["input_ids"].shape == (1, 4)


def test_a_model_without_cache_gets_whole_windows() -> None:
    (batch,) = token_batches(input_plan(tiny_decoder()), [WINDOW], decode_step=True)
    assert batch.feeds["input_ids"].tolist() == [WINDOW.tolist()]
    assert batch.feeds["attention_mask"].tolist() == [[1] * 12]


def test_the_largest_table_makes_the_ids() -> None:
    """An encoder looks up positions and types too; only the word table is indexed by the ids."""
    model = tiny_encoder()
    plan = input_plan(model)
    assert plan.ids is not None
    assert plan.ids.name == "input_ids"
    run(_session(model), None, token_batches(plan, [WINDOW])[0].feeds)
    with pytest.raises(UserError, match="no decoder"):
        plan.require_decoder()


@pytest.mark.parametrize("kind", ["qcompile", "block", "dequantized"])
def test_quantized_embeddings_are_lookups(kind: str) -> None:
    rows, width = 12, 4
    scale = np.ones((1, rows), np.float32)
    if kind == "qcompile":
        nodes = [helper.make_node("EmbeddingInt4", ["a", "w", "s"], ["y"], domain="qcompile")]
        weights = {"w": np.zeros((width, rows // 2), np.uint8), "s": scale}
    elif kind == "block":
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": 16}
        nodes = [helper.make_node("GatherBlockQuantized", ["w", "a", "s"], ["y"], domain="com.microsoft", **attributes)]
        weights = {"w": np.zeros((rows, width), np.uint8), "s": scale.T}
    else:
        nodes = [
            helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0),
            helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0]),
            helper.make_node("Unsqueeze", ["a", "axes"], ["u"]),
            helper.make_node("Gather", ["t", "u"], ["y"], axis=0),
        ]
        axes = np.array([0], np.int64)
        weights = {"w": np.zeros((width, rows), np.int8), "s": np.ones(width, np.float32), "axes": axes}
    model = _graph(nodes, [_value("a", 7, ["b", "s"])], [_value("y", 1, None)], **weights)
    plan = input_plan(model)
    assert plan.ids is not None
    assert (plan.ids.name, plan.vocabulary) == ("a", rows)


def test_a_transposed_cache_grows_along_the_axis_of_the_input() -> None:
    nodes = [
        helper.make_node("Transpose", ["p"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Concat", ["t", "new"], ["c"], axis=-3),
        helper.make_node("Transpose", ["c"], ["present"], perm=[0, 2, 1, 3]),
    ]
    inputs = [_value("p", 10, ["b", 2, "past", 3]), _value("new", 10, ["b", "s", 2, 3])]
    plan = input_plan(_graph(nodes, inputs, [_value("present", 10, None)]))
    (pair,) = plan.past
    assert (pair.past.name, pair.present, pair.axis) == ("p", "present", 2)
    empty = pair.empty(5)
    assert (empty.shape, empty.dtype) == ((5, 2, 0, 3), np.float16)
    assert [given.name for given in plan.floats] == ["new"]


def test_grouped_query_attention_holds_a_cache() -> None:
    names = ["q", "k", "v", "pk", "pv", "lens", "total"]
    node = helper.make_node("GroupQueryAttention", names, ["y", "nk", "nv"], domain="com.microsoft", num_heads=2)
    inputs = [_value(n, 1, ["b", 1, "t", 8]) for n in names[:5]] + [_value(n, 6, ["n"]) for n in names[5:]]
    plan = input_plan(_graph([node], inputs, [_value(n, 1, None) for n in ("y", "nk", "nv")]))
    assert [(p.past.name, p.present, p.axis) for p in plan.past] == [("pk", "nk", 2), ("pv", "nv", 2)]
    assert [given.name for given in plan.unknown] == ["lens", "total"]


def test_what_text_cannot_make_asks_for_npz() -> None:
    with pytest.raises(UserError, match=r"float input 'input'.* cannot be made from text: give all inputs in \.npz"):
        token_batches(input_plan(_floats("input")), [WINDOW])
    node = helper.make_node("Identity", ["flag"], ["y"])
    model = _graph([node], [_value("flag", TensorProto.BOOL, [1])], [_value("y", TensorProto.BOOL, [1])])
    with pytest.raises(UserError, match=r"input 'flag' \(bool.*\.npz"):
        token_batches(input_plan(model), [WINDOW])


def _floats(name: str, shape: list[Any] | None = None) -> ir.Model:
    shape = shape or ["batch", 3]
    return _graph([helper.make_node("Relu", [name], ["y"])], [_value(name, 1, shape)], [_value("y", 1, shape)])


def _fixed(batch: int, sequence: int) -> ir.Model:
    model = tiny_decoder()
    for value in model.graph.inputs:
        value.shape = ir.Shape([batch, sequence])
    return model


def test_fixed_shapes_take_stacks_of_exact_windows() -> None:
    plan = input_plan(_fixed(2, 12))
    (batch,) = token_batches(plan, [WINDOW] * 3)
    assert batch.feeds["input_ids"].shape == (2, 12)
    with pytest.raises(UserError, match="exactly 12 tokens, got a window of 5: use --context 12"):
        token_batches(plan, [WINDOW[:5]] * 2)
    with pytest.raises(UserError, match="exactly 2 windows"):
        token_batches(plan, [WINDOW])


def _save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_npz_by_input_name_and_ragged(tmp_path: Path) -> None:
    plan = input_plan(tiny_mlp())
    (given,) = plan.inputs
    width = given.shape[-1]
    paths = [_save(tmp_path / f"{n}.npz", **{given.name: np.ones((n, width), np.float64)}) for n in (2, 5)]
    batches = npz_batches(plan, paths)
    assert [b.rows for b in batches] == [2, 5]
    assert batches[0].feeds[given.name].dtype == np.float32


def test_npz_is_split_where_the_graph_fixes_the_batch(tmp_path: Path) -> None:
    plan = input_plan(_floats("x", [2, 3]))
    path = _save(tmp_path / "a.npz", x=np.arange(18, dtype=np.float32).reshape(6, 3))
    parts = npz_batches(plan, [path])
    assert [part.feeds["x"].shape for part in parts] == [(2, 3)] * 3
    assert parts[1].feeds["x"][0, 0] == 6


def test_npz_is_read_anew_for_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_HELD", 0)
    path = _save(tmp_path / "a.npz", x=np.ones((2, 3), np.float32))
    (batch,) = npz_batches(input_plan(_floats("x")), [path])
    first, second = batch.feeds["x"], batch.feeds["x"]
    assert first is not second, "nothing is kept"
    assert first.tobytes() == second.tobytes()
    _save(path, x=np.full((2, 3), np.nan, np.float32))
    with pytest.raises(UserError, match="contains NaN"):
        _ = batch.feeds
    path.unlink()
    with pytest.raises(UserError, match="no such file"):
        _ = batch.feeds


@pytest.mark.parametrize("held", [23, 24, 47, 48, 71, 72, 1000])
def test_small_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    """24 bytes each; of a large file between small ones nothing is kept, of those behind it what fits."""
    monkeypatch.setattr(feeds, "_HELD", held)
    sizes = [2, 200, 2, 2]
    paths = [_save(tmp_path / f"{i}.npz", x=np.full((n, 3), i, np.float32)) for i, n in enumerate(sizes)]
    batches = npz_batches(input_plan(_floats("x")), paths)
    kept = [batch.feeds["x"] is batch.feeds["x"] for batch in batches]
    assert kept == [held >= 24, False, held >= 48, held >= 72]
    for i, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
        np.testing.assert_array_equal(batch.feeds["x"], np.full((size, 3), i, np.float32))


def test_text_is_read_anew(tmp_path: Path) -> None:
    """How much memory its objects take is not known of their array."""
    graph = helper.make_graph(
        [helper.make_node("StringNormalizer", ["x"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.STRING, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.STRING, ["n"])],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))
    (batch,) = npz_batches(input_plan(model), [_save(tmp_path / "a.npz", x=np.array(["a", "bc"]))])
    first, second = batch.feeds["x"], batch.feeds["x"]
    assert first.tolist() == second.tolist() == ["a", "bc"]
    assert first is not second


def test_every_npz_is_checked_before_any_is_used(tmp_path: Path) -> None:
    good, bad = _save(tmp_path / "a.npz", x=np.ones((2, 3), "f")), _save(tmp_path / "b.npz", x=np.ones((2, 4), "f"))
    with pytest.raises(UserError, match=r"b.npz: array 'x' has shape \[2, 4\]"):
        npz_batches(input_plan(_floats("x")), [good] * 3 + [bad])


@pytest.mark.parametrize("product", [False, True])
def test_infinities_are_taken_where_no_product_meets_them(tmp_path: Path, product: bool) -> None:
    """An additive mask is fed as numbers; behind a Softmax none of them is infinite."""
    node = helper.make_node("MatMul", ["a", "a"], ["b"]) if product else helper.make_node("Softmax", ["a"], ["b"])
    nodes = [helper.make_node("Neg", ["x"], ["a"]), node, helper.make_node("MatMul", ["b", "b"], ["y"])]
    plan = input_plan(_graph(nodes, [_value("x", 1, [3, 3])], [_value("y", 1, [3, 3])]))
    path = _save(tmp_path / "a.npz", x=np.where(np.tri(3), 0, np.inf))
    if product:
        with pytest.raises(UserError, match="array 'x' contains NaN or infinity"):
            npz_batches(plan, [path])
        return
    (batch,) = npz_batches(plan, [path])
    assert np.isinf(batch.feeds["x"]).sum() == 3
    assert batch.feeds["x"].dtype == np.float32
    _save(path, x=np.full((3, 3), 1e300))
    with pytest.raises(UserError, match="holds numbers that float32"):
        npz_batches(plan, [path])


def test_bfloat16_arrays_come_back_from_numpys_files(tmp_path: Path) -> None:
    """numpy stores them as two nameless bytes; for another input those are no numbers."""
    array = np.array([[1.5, -2, 3]], ml_dtypes.bfloat16)
    path = _save(tmp_path / "a.npz", x=array)
    brain = _graph([helper.make_node("Relu", ["x"], ["y"])], [_value("x", 16, ["n", 3])], [_value("y", 16, ["n", 3])])
    (batch,) = npz_batches(input_plan(brain), [path])
    assert batch.feeds["x"].tolist() == array.tolist()
    for stored in (array, np.zeros((1, 3), "V4"), np.zeros((1, 3), [("a", "f4")])):
        with pytest.raises(UserError, match=r"array 'x' is .*, the input is float32"):
            npz_batches(input_plan(_floats("x")), [_save(path, x=stored)])


def test_minus_one_is_a_free_dimension(tmp_path: Path) -> None:
    plan = input_plan(_floats("x", [-1, 3]))
    assert plan.inputs[0].shape == (None, 3)
    assert len(npz_batches(plan, [_save(tmp_path / "a.npz", x=np.ones((5, 3), np.float32))])) == 1


def test_npz_of_ids_derives_masks_and_caches(tmp_path: Path) -> None:
    model = tiny_decoder(kv_cache=True)
    (batch,) = npz_batches(input_plan(model), [_save(tmp_path / "a.npz", input_ids=np.ones((2, 4), np.int32))])
    assert run(_session(model), ["logits"], batch.feeds)[0].shape[:2] == (2, 4)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"z": np.ones((1, 3), "f")}, r"array 'z' is no input of the model \(inputs: x\)"),
        ({}, "no array for input 'x'"),
        ({"x": np.full((1, 3), np.nan, "f")}, "array 'x' contains NaN"),
        ({"x": np.array([[np.inf, np.nan, 0]], "f")}, "array 'x' contains NaN or infinity"),
        ({"x": np.ones((1, 3), np.int64)}, "array 'x' is int64, the input is float32"),
        ({"x": np.ones((1, 4), "f")}, r"array 'x' has shape \[1, 4\], the input is \[batch, 3\]"),
        ({"x": np.ones(3, "f")}, r"array 'x' has shape \[3\]"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        npz_batches(input_plan(_floats("x")), [_save(tmp_path / "a.npz", **arrays)])


def test_npz_files_that_are_none(tmp_path: Path) -> None:
    plan = input_plan(_floats("x"))
    with pytest.raises(UserError, match="no such file"):
        npz_batches(plan, [tmp_path / "absent.npz"])
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(UserError, match=r"not a readable \.npz"):
        npz_batches(plan, [tmp_path / "text.npz"])
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(UserError, match="single array"):
        npz_batches(plan, [tmp_path / "a.npz"])
    with pytest.raises(UserError, match="ids outside 0 … 255"):
        npz_batches(input_plan(tiny_decoder()), [_save(tmp_path / "i.npz", input_ids=np.full((1, 2), 999))])


@pytest.mark.parametrize("kind", ["plain", "cache", "fixed"])
def test_sampled_windows_are_seeded_and_likely(kind: str) -> None:
    model = _fixed(1, 16) if kind == "fixed" else tiny_decoder(kv_cache=kind == "cache")
    plan, made = input_plan(model), _session(model)
    first = sample_windows(made, plan, 3, 16, 7)
    assert [w.shape for w in first] == [(16,)] * 3
    assert all((w >= 0).all() and (w < 256).all() for w in first)
    again = sample_windows(made, plan, 3, 16, 7)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    # What the model says about its own tokens is better than what it says about random ones.
    random = list(np.random.default_rng(0).integers(256, size=(3, 16)))
    assert _likelihood(made, plan, first) > _likelihood(made, plan, random)


def _likelihood(made: Any, plan: Any, windows: list[Any]) -> float:
    total = 0.0
    for window, batch in zip(windows, token_batches(plan, windows), strict=True):
        logits = run(made, ["logits"], batch.feeds)[0][0].astype(np.float64)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        total += logits[np.arange(len(window) - 1), window[1:]].mean()
    return total


def test_sampling_is_bounded_and_needs_a_decoder() -> None:
    model = tiny_decoder()
    assert len(sample_windows(_session(model), input_plan(model), 9, 8, 0, budget=24)) == 3
    with pytest.raises(UserError, match="no decoder"):
        sample_windows(None, input_plan(tiny_encoder()), 1, 8, 0)
    with pytest.raises(UserError, match="float input"):
        sample_windows(None, input_plan(tiny_conv()), 1, 8, 0)


@pytest.mark.parametrize("cached", [False, True])
def test_texts_of_arrays_are_cut_to_their_beginning(cached: bool) -> None:
    """Ids and what follows from them; a past of no length stays, and the graph takes what is left."""
    model = tiny_decoder(kv_cache=cached)
    plan = input_plan(model)
    (whole,) = token_batches(plan, [WINDOW])
    cut = beginning(plan, whole, 5)
    assert {name: array.shape for name, array in cut.feeds.items() if "past" not in name} == {
        name: (1, 5) for name in whole.feeds if "past" not in name
    }
    names = [str(value.name) for value in model.graph.outputs]
    running = session(ir.to_proto(model).SerializeToString())
    logits, short = (run(running, names, own.feeds)[0] for own in (whole, cut))
    np.testing.assert_allclose(short, logits[:, :5], rtol=0, atol=1e-4 * np.abs(logits).max())


def test_texts_that_cannot_be_cut_stay() -> None:
    """Padding in front, a cache of its own, a batch that follows another, a length that the graph fixes."""
    plan = input_plan(tiny_decoder(kv_cache=True))
    (whole,) = token_batches(plan, [WINDOW])
    length = next(iter(whole.feeds.values())).shape[1]
    padded = Batch(whole.feeds | {"attention_mask": np.arange(length)[None] % length}, 1)
    assert plan.mask is not None
    past = {
        pair.past.name: np.zeros([2 if size == 0 else size for size in whole.feeds[pair.past.name].shape], "f")
        for pair in plan.past
    }
    for batch in (padded, Batch(whole.feeds | past, 1), Batch(whole.feeds, 1, follows=0)):
        assert beginning(plan, batch, 5) is batch
    floats = input_plan(_floats("x"))
    arrays = Batch({"x": np.ones((9, 3), np.float32)}, 9)
    assert beginning(floats, arrays, 5) is arrays
