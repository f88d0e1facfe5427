"""`qcompile diff`: nodes of two models that are one, whatever they are called and joined to; sizes that add up."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.cli import main
from qcompile.compiler.files.load import save_model
from qcompile.compiler.report.difference import Difference, Pair, difference
from qcompile.models.tiny import (
    tiny_branch,
    tiny_classifier,
    tiny_conv,
    tiny_decoder,
    tiny_encoder,
    tiny_mlp,
    tiny_tokenizer,
)
from qcompile.passes.errors import UserError
from qcompile.passes.joined_names import joined_name, parts_of

LAYERS, TEXT = 3, "It was the best of times, it was the worst of times, it was the age of wisdom. " * 12
# By name of the file: passes and settings.
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "joined": ("pack,fuse", {}),
    "qdq": ("pack", {"target": "qdq"}),
    "eight": ("pack", {"bits": 8, "attention": "plain"}),
    "fitted": ("gptq,pack", {"attention": "plain"}),
    "plain": ("pack", {"attention": "plain"}),
    "int8": ("dynamic", {}),
    "table": ("pack,fuse", {"weights": "nf4(group=32)"}),
    "tables": ("pack", {"weights": "nf4(group=32)", "attention": "plain"}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float decoder and what is compiled of it."""
    folder = tmp_path_factory.mktemp("made")
    save_model(tiny_decoder(layers=LAYERS, hidden=256, ffn=512, kv_cache=True), folder / "float.onnx")
    tiny_tokenizer(256, folder)
    (folder / "text.txt").write_text(TEXT)
    random = np.random.default_rng(0)
    for name, (passes, settings) in MADE.items():
        recipe = Recipe(parse_passes(passes), group_size=32, samples=4, context=32, **settings)
        text = folder / "calibration.txt"
        text.write_text("".join(map(chr, random.integers(97, 122, 2000))))
        compile_model(folder / "float.onnx", recipe, output=folder / f"{name}.onnx", calibration=[str(text)])
    return folder


def _adds_up(found: Difference) -> None:
    for at, side in enumerate(("a", "b")):
        nodes = sum(own.bytes for pair in found.nodes if (own := getattr(pair, side)) is not None)
        assert nodes == sum(sizes[at] for sizes in found.formats.values())
        assert sum(sizes[at] for sizes in found.kinds.values()) == found.bytes[at]


@pytest.mark.parametrize("a", ["float", *MADE])
@pytest.mark.parametrize("b", ["float", *MADE])
def test_every_node_has_its_partner(made: Path, a: str, b: str) -> None:
    """Joined, called by their weights, lookups of a tied table: none is in one model alone, and bytes add up."""
    found = difference(made / f"{a}.onnx", made / f"{b}.onnx")
    assert [own.node for own in found.nodes if own.a is None or own.b is None] == []
    kinds = [own.a.kind for own in found.nodes if own.a is not None]
    assert kinds.count("embedding") == 1
    separate = (
        2 + 4 * LAYERS if {"joined", "table"} & {a, b} else 2 + 7 * LAYERS
    )  # the table, the head; q+k+v, o, gate+up, down
    assert len(found.nodes) == separate
    _adds_up(found)
    for own in found.nodes:
        assert own.a is not None
        assert own.b is not None
        assert own.a.weights == own.b.weights
        assert own.same <= (own.a.form == own.b.form)
    if a == b:
        assert all(own.same for own in found.nodes)
        assert not found.sheet().rows
        assert not found.recipe
        assert not found.operators


def test_without_reports_names_are_enough(made: Path, tmp_path: Path) -> None:
    for name in ("joined", "qdq"):
        for file in made.glob(f"{name}*"):
            if ".report." not in file.name:
                shutil.copy(file, tmp_path)
    found = difference(tmp_path / "joined.onnx", tmp_path / "qdq.onnx")
    assert all(own.a and own.b for own in found.nodes)
    assert [note.split(":")[0] for note in found.notes if note.startswith("no errors")] == [
        f"no errors and decisions of {tmp_path / name}.onnx" for name in ("joined", "qdq")
    ]
    with pytest.raises(UserError, match="has errors of nodes to rank them by: leave out --worst"):
        difference(tmp_path / "joined.onnx", tmp_path / "qdq.onnx", worst=3)


@pytest.mark.parametrize("model", [tiny_mlp, tiny_branch, tiny_conv], ids=lambda model: str(model.__name__))
def test_products_of_other_kinds_have_their_partners(model: Any, tmp_path: Path) -> None:
    """Gemm with transposed and scaled weights, shared ones, bodies of If: whatever the target calls node and codes."""
    save_model(model(), tmp_path / "float.onnx")
    feeds = _feeds(model())
    made = {"packed": ("pack", {}), "qdq": ("pack", {"target": "qdq"}), "int8": ("dynamic", {}), "static": ("qdq", {})}
    for name, (passes, settings) in made.items():
        recipe = Recipe(parse_passes(passes), min_coverage=0, **settings)
        compile_model(tmp_path / "float.onnx", recipe, output=tmp_path / f"{name}.onnx", calibration=feeds)
    for a in ("float", *made):
        for b in ("float", *made):
            found = difference(tmp_path / f"{a}.onnx", tmp_path / f"{b}.onnx")
            assert [own.node for own in found.nodes if own.a is None or own.b is None] == []
            _adds_up(found)
            if a == b or "float" in (a, b):
                assert all(own.same for own in found.nodes) == (a == b)


def _feeds(model: ir.Model) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    sizes = {v.name: [d if isinstance(d, int) else 8 for d in v.shape] for v in model.graph.inputs}
    return [
        {v.name: random.normal(size=sizes[v.name]).astype(v.dtype.numpy()) for v in model.graph.inputs}
        for _ in range(4)
    ]


def _errors(made: Path, name: str) -> dict[str, float]:
    report = json.loads((made / f"{name}.report.json").read_text())
    return {own["node"]: own["error"] for own in report["nodes"]}


def test_errors_are_those_of_the_reports(made: Path) -> None:
    """Of joined nodes the root mean square; also where the file calls a product by its weight."""
    found = difference(made / "joined.onnx", made / "qdq.onnx")
    joined, qdq = _errors(made, "joined"), _errors(made, "qdq")
    three = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    (own,) = [own for own in found.nodes if own.node == joined_name(three)]
    assert own.a is not None
    assert own.b is not None
    for side, errors in ((own.a, joined), (own.b, qdq)):
        assert side.error == pytest.approx(math.sqrt(sum(errors[name] ** 2 for name in three) / 3))
        assert "pack: quantized: int4 g32 asym" in side.decisions


def test_the_worst_are_those_whose_errors_grew_most(made: Path) -> None:
    found = difference(made / "eight.onnx", made / "plain.onnx", worst=3)
    before, after = _errors(made, "eight"), _errors(made, "plain")
    grown = sorted(after, key=lambda name: before[name] - after[name])
    assert [row[0] for row in found.sheet().rows] == grown[:3]
    assert all(own.growth == 0 for own in found.nodes if own.a is not None and own.a.kind == "embedding")
    none = difference(made / "plain.onnx", made / "eight.onnx", worst=30).sheet()
    assert not none.rows
    assert none.notes[0] == "no node that differs has a larger error in b"
    assert none.notes[0] not in found.sheet().notes
    with pytest.raises(UserError, match="at least 1"):
        difference(made / "eight.onnx", made / "plain.onnx", worst=0)


def test_other_numbers_of_one_format_are_told(made: Path) -> None:
    """Codes that gptq chose, beside those of plain rounding."""
    found = difference(made / "plain.onnx", made / "fitted.onnx")
    other = [own for own in found.nodes if not own.same]
    assert other
    assert all(own.a is not None and own.b is not None and own.a.form == own.b.form for own in other)
    assert any(own.same for own in found.nodes), "the table is rounded alike"
    assert found.recipe == {"passes": (["pack"], ["gptq", "pack"])}


def test_joined_codes_are_those_of_their_parts(made: Path) -> None:
    """Side by side; other codes are not."""
    assert all(own.same for own in difference(made / "plain.onnx", made / "joined.onnx").nodes)
    assert all(own.same for own in difference(made / "table.onnx", made / "tables.onnx").nodes)
    assert not all(own.same for own in difference(made / "joined.onnx", made / "fitted.onnx").nodes)


def test_what_differs_in_recipes_and_operators(made: Path) -> None:
    found = difference(made / "plain.onnx", made / "eight.onnx")
    assert found.recipe == {"bits": (4, 8)}
    assert "recipe: bits 4 → 8" in found.sheet().notes
    assert found.operators == {"qcompile.MatMulInt4": (21, 0), "qcompile.MatMulInt8": (1, 22)}
    told = difference(made / "float.onnx", made / "plain.onnx").sheet().notes
    assert "recipe: b alone was compiled, by passes pack" in told
    assert not any(note.startswith("recipe: bits") for note in told)


def test_models_that_have_nothing_in_common(made: Path, tmp_path: Path) -> None:
    save_model(tiny_mlp(), tmp_path / "mlp.onnx")
    found = difference(made / "float.onnx", tmp_path / "mlp.onnx")
    assert all((own.a is None) != (own.b is None) for own in found.nodes)
    _adds_up(found)
    told = "\n".join(found.sheet().notes)
    assert "only in a: " in told
    assert "only in b: " in told
    assert "inputs of a alone: " in told


def test_alike_nodes_are_a_row(made: Path) -> None:
    rows = difference(made / "float.onnx", made / "plain.onnx").sheet().rows
    assert [(row[0], row[1]) for row in rows][1] == ("model.layers.*.self_attn.q_proj…", str(LAYERS))
    every = difference(made / "float.onnx", made / "plain.onnx", every=True).sheet().rows
    assert len(every) == 2 + 7 * LAYERS
    assert sum(int(row[1]) for row in rows) == len(every)


def test_data_tells_what_b_makes_of_it(made: Path) -> None:
    """KL as `evaluate` has it, and the residual stream between: coarser weights, larger errors."""
    text = made / "text.txt"
    found = qcompile.diff(made / "float.onnx", made / "plain.onnx", text=text, context=32, tokens=200)
    scored = qcompile.evaluate(made / "plain.onnx", against=made / "float.onnx", text=text, context=32, tokens=200)
    (row,) = found.scores
    assert row["kl"] == scored.records()[1]["kl"] > 0
    assert f"KL(a ‖ b) {row['kl']:.5f}" in str(found)
    finer = qcompile.diff(made / "float.onnx", made / "eight.onnx", text=text, context=32, tokens=200)
    names = [own.value for own in found.layers]
    assert len(names) >= LAYERS
    assert [own.value for own in finer.layers] == names
    for coarse, fine in zip(found.layers, finer.layers, strict=True):
        assert 0 < fine.error < coarse.error / 3
    assert found.layers[0].behind == "model.layers.0.self_attn.o_proj"
    assert f"behind {found.layers[0].behind} {found.layers[0].error:.2g}, " in str(found)
    same = qcompile.diff(made / "plain.onnx", made / "plain.onnx", text=text, context=32, tokens=200)
    assert {own.error for own in same.layers} == {0.0}


def test_arrays_tell_of_outputs(tmp_path: Path) -> None:
    """A model that is no decoder: SQNR of its outputs."""
    save_model(tiny_encoder(), tmp_path / "model.onnx")
    random, shape = np.random.default_rng(0), (4, 12)
    feeds = {"input_ids": random.integers(0, 99, shape), "attention_mask": np.ones(shape, np.int64)}
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "x.npz", **feeds)
    recipe = Recipe(parse_passes("pack"), group_size=32, min_coverage=0)
    compile_model(tmp_path / "model.onnx", recipe, output=tmp_path / "o.onnx", calibration=[feeds])
    found = qcompile.diff(tmp_path / "model.onnx", tmp_path / "o.onnx", data=[str(tmp_path / "data")])
    assert found.scores
    assert all(0 < row["sqnr"] < 60 for row in found.scores)
    assert "SQNR" in str(found)


def test_data_that_a_program_gives_once_is_read_for_layers_too(made: Path) -> None:
    """A generator is empty behind the scores."""
    save_model(tiny_classifier(), made / "classifier.onnx")
    feeds, output = _feeds(tiny_classifier()), made / "static.onnx"
    compile_model(
        made / "classifier.onnx", Recipe(parse_passes("qdq")), output=output, calibration=_feeds(tiny_classifier())
    )
    found = qcompile.diff(made / "classifier.onnx", output, data=(own for own in feeds))
    assert found.scores
    assert [own.behind for own in found.layers] == ["conv_2"]


def test_nothing_that_goes_on_is_a_note(tmp_path: Path) -> None:
    """Of a model that has other names in between."""
    save_model(tiny_mlp(), tmp_path / "m.onnx")
    recipe = Recipe(parse_passes("dynamic"), min_coverage=0)
    compile_model(tmp_path / "m.onnx", recipe, output=tmp_path / "o.onnx", calibration=_feeds(tiny_mlp()))
    found = qcompile.diff(tmp_path / "m.onnx", tmp_path / "o.onnx", data=_feeds(tiny_mlp()))
    assert found.scores
    assert not found.layers
    assert [note for note in found.notes if "between layers is not told (nothing of one name goes on" in note]


def test_what_cannot_be_run_by_its_parts_is_a_note(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("x")

    monkeypatch.setattr("qcompile.compiler.api.difference.by_segments", broken)
    found = qcompile.diff(made / "float.onnx", made / "plain.onnx", text=made / "text.txt", context=32, tokens=100)
    assert found.scores
    assert not found.layers
    assert "what goes on between layers is not told (KeyError: 'x')" in found.notes


def test_the_command(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["diff", str(made / "float.onnx"), str(made / "joined.onnx")]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["nodes"]) == 2 + 4 * LAYERS
    assert document["nodes"][1]["b"]["form"] == "uint4 g32 asym"
    assert main([*words, "--worst", "2"]) == 0
    assert main(["diff", str(made / "float.onnx"), str(made / "text.txt")]) == 2
    assert "text.txt" in capsys.readouterr().err
    assert main([*words, "--text", "a", "--data", "b"]) == 2
    assert "give one of both" in capsys.readouterr().err
    assert main([*words, "--context", "9"]) == 0
    assert "--context has no effect here: it is for --text" in capsys.readouterr().err


def test_a_damaged_report_and_recipe_are_none(made: Path, tmp_path: Path) -> None:
    for file in made.glob("plain*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "plain.report.json").write_text("[[[")
    found = difference(tmp_path / "plain.onnx", made / "eight.onnx")
    assert any(note.startswith(f"no errors and decisions of {tmp_path / 'plain.onnx'}") for note in found.notes)
    assert all(own.a is not None and own.a.error is None for own in found.nodes)


NAME = st.text("ab./", min_size=1, max_size=6).filter(lambda name: name.strip("./") != "")


@given(st.lists(NAME, min_size=1, max_size=3, unique=True))
def test_parts_are_those_that_were_joined(names: list[str]) -> None:
    assert {*parts_of(joined_name(names), {*names})} == {*names}


def test_a_name_with_a_plus_that_nothing_was_joined_to() -> None:
    assert parts_of("a.b+c", {"a.b"}) == ["a.b+c"]
    assert parts_of("a.b+c", {"a.b", "c"}) == ["a.b", "c"]
    assert parts_of("a.b+c", {"a.b", "a.c", "c"}) == ["a.b", "a.c"]
    assert Pair("x", None, None).growth == 0.0
