"""compiler/walk/extract.py: a piece of a graph computes what the whole graph computes there."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler.files.load import load_model, save_model
from qcompile.compiler.walk.extract import Piece, captured, extract
from qcompile.models.tiny import tiny_branch, tiny_decoder
from qcompile.runtime.sessions import run, session

IDS = np.random.default_rng(0).integers(0, 256, (2, 9))
FEEDS = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}


def _value(model: ir.Model, name: str) -> ir.Value:
    return next(v for node in model.graph for v in node.outputs if v.name == name)


def _exposed(model: ir.Model, names: list[str], feeds: dict[str, Any]) -> list[Any]:
    """Inner values of the model, run as a whole."""
    proto = ir.to_proto(model)
    proto.graph.output.extend(ir.serde.serialize_value(_value(model, name)) for name in names)
    return run(session(proto.SerializeToString()), names, feeds)


def _run(piece: Piece, feeds: dict[str, Any]) -> list[Any]:
    assert set(piece.inputs) <= set(feeds)
    return run(piece.session(), piece.outputs, {name: feeds[name] for name in piece.inputs})


MIDDLE = "model.layers.1.input_layernorm.residual.out"
INNER = "model.layers.1.mlp.act.out"


SKIP = [f"model.layers.1.input_layernorm.out{i}" for i in (3, 0)]


@pytest.mark.parametrize(("norm", "border"), [("rms", [MIDDLE]), ("layer", [MIDDLE]), ("skip", SKIP)])
def test_from_the_inputs_and_from_inner_values(norm: str, border: list[str]) -> None:
    model = tiny_decoder(norm=norm)
    *expected, last = _exposed(model, [*border, INNER], FEEDS)
    values = [_value(model, name) for name in border]
    for found, wanted in zip(_run(extract(model, [], values), FEEDS), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    given = FEEDS | dict(zip(border, expected, strict=True))
    (found,) = _run(extract(model, values, [_value(model, INNER)]), given)
    np.testing.assert_allclose(found, last, rtol=1e-5, atol=1e-6)


def test_a_piece_holds_only_what_it_needs() -> None:
    model = tiny_decoder()
    piece = extract(model, [_value(model, MIDDLE)], [_value(model, INNER)])
    names = {node.name for node in piece.proto.graph.node}
    assert "model.layers.1.mlp.up_proj" in names
    assert "model.layers.1.mlp.down_proj" not in names
    assert "model.layers.0.mlp.up_proj" not in names
    assert "input_ids" in piece.inputs, "the mask needs the sequence's length"
    assert len(piece.proto.SerializeToString()) < 50_000, "weights stay outside"


def test_a_weight_of_its_own_can_be_added() -> None:
    model = tiny_decoder()
    piece = extract(model, [], [_value(model, MIDDLE)])
    name = piece.add_weight("extra", np.arange(4096, dtype=np.float32))
    piece.proto.graph.node.add(op_type="ReduceSum", input=[name], output=["sum"])
    piece.proto.graph.output.add(name="sum")
    (total,) = run(piece.session(), ["sum"], {n: FEEDS[n] for n in piece.inputs})
    assert float(total.reshape(-1)[0]) == pytest.approx(4095 * 4096 / 2, rel=1e-6)


@pytest.mark.parametrize("flag", [True, False])
def test_subgraphs_bring_what_they_capture(flag: bool) -> None:
    model = tiny_branch()
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 32)).astype("f4"), "flag": np.array(flag)}
    (whole,) = run(session(ir.to_proto(model).SerializeToString()), ["y"], feeds)
    (node,) = [node for node in model.graph if node.op_type == "If"]
    assert {v.name for v in captured(node)} >= {"flag", "outer.weight"}
    outer = _value(model, "outer.out")
    piece = extract(model, [outer], [model.graph.outputs[0]])
    (found,) = _run(
        piece, feeds | {"outer.out": feeds["x"] @ model.graph.initializers["outer.weight"].const_value.numpy()}
    )
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5)


def test_a_large_tied_table_is_read_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head's Transpose goes; what a body reads of it, and a table that is small, stay."""
    model, wanted = tiny_decoder(), ["logits"]
    (expected,) = run(session(ir.to_proto(model).SerializeToString()), wanted, FEEDS)
    for least, kind in ((1 << 30, "MatMul"), (0, "FusedMatMul")):
        monkeypatch.setattr("qcompile.compiler.walk.extract._TURNED", least)
        piece = extract(model, [], [_value(model, "logits")])
        turns = [node.op_type for node in piece.proto.graph.node].count("Transpose")
        piece.unturn()
        operators = [node.op_type for node in piece.proto.graph.node]
        assert operators.count("Transpose") == turns - (kind == "FusedMatMul")
        assert kind in operators
        np.testing.assert_allclose(_run(piece, FEEDS)[0], expected, rtol=1e-4, atol=1e-5)


def test_a_session_maps_weights_from_their_files(tmp_path: Path) -> None:
    """Of one folder by their places, of others from memory; all from memory where the piece went to another process."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        save_model(tiny_decoder(), folder / "in-memory")  # a name that means nothing
    model, other = (load_model(folder / "in-memory") for folder in folders)
    (expected,) = _exposed(tiny_decoder(), [INNER], FEEDS)
    up = "model.layers.0.mlp.up_proj.weight"
    model.graph.initializers[up].const_value = other.graph.initializers[up].const_value
    for prepack in (True, False):
        piece = extract(model, [], [_value(model, INNER)])
        piece.prepack = prepack
        _, folder, names = piece._located()
        assert folder == folders[0]
        assert up in piece.weights
        assert up not in names
        assert {"model.layers.0.mlp.gate_proj.weight", "model.layers.0.self_attn.q_proj.weight"} <= names
        gone = pickle.loads(pickle.dumps(piece))
        assert not gone.stored
        for own in (piece, gone):
            np.testing.assert_allclose(_run(own, FEEDS)[0], expected, rtol=1e-5, atol=1e-6)
