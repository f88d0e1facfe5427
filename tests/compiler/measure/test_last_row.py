"""Decoders whose head scores the last row of each sequence only: what works, and what says that it needs all rows."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.cli import main
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.data.sampling import sample_windows
from qcompile.compiler.measure.evaluate import evaluate
from qcompile.compiler.measure.generate import Sampling, generate_ids
from qcompile.compiler.measure.loaded import Subject
from qcompile.models.tiny import tiny_decoder, tiny_tokenizer
from qcompile.passes.errors import UserError
from qcompile.passes.graph import add_initializer
from qcompile.runtime.sessions import run, session


def _made(*, last_row: bool, tied: bool = True) -> ir.Model:
    """A decoder with caches; its head behind a Slice of the last row, as `--logits last` exports it."""
    model = tiny_decoder(kv_cache=True, outliers=False, tied=tied)
    if last_row:
        head = next(node for node in model.graph if node.name == "lm_head")
        ends = [add_initializer(model.graph, f"row{n}", ir.tensor(np.array([n]))) for n in (-1, 2**31, 1)]
        cut = ir.node("Slice", [head.inputs[0], *ends])
        cut.outputs[0].dtype, cut.outputs[0].shape = head.inputs[0].dtype, ir.Shape(["batch", 1, 64])
        head.prepend(cut)
        head.replace_input_with(0, cut.outputs[0])
        head.outputs[0].shape = ir.Shape(["batch", 1, 256])
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("passes", ["smooth,awq,gptq,pack", "qdq", "dynamic"])
def test_it_compiles_as_the_same_model_with_all_rows(tmp_path: Path, passes: str, tied: bool) -> None:
    """The same weights where nothing follows from the head's statistics; the scores of the last row, anyway."""
    texts, found = [], []
    for last_row in (True, False):
        folder = tmp_path / str(last_row)
        folder.mkdir()
        ir.save(_made(last_row=last_row, tied=tied), folder / "model.onnx")
        recipe = Recipe(passes=parse_passes(passes), samples=4, context=32, group_size=32)
        report = compile_model(folder / "model.onnx", recipe, output=folder / "out.onnx")
        assert report.coverage == 1
        subject = Subject(folder / "out.onnx")
        texts.append(list(generate_ids(subject, [5, 6, 7, 8], 12, Sampling())))
        feeds = {"input_ids": np.array([[3, 1, 4]]), "attention_mask": np.ones((1, 3), np.int64)}
        feeds |= {"position_ids": np.arange(3)[None]} | {p.past.name: p.empty(1) for p in subject.plan.past}
        found.append(run(subject.session, ["logits"], feeds)[0][:, -1:])
    assert found[0].shape == (1, 1, 256)
    np.testing.assert_allclose(found[0], found[1], atol=0.2 * np.abs(found[1]).max())
    assert tied is False or passes != "smooth,awq,gptq,pack" or texts[0] == texts[1]


def test_tokens_are_drawn_from_it() -> None:
    windows = []
    for last_row in (True, False):
        model = _made(last_row=last_row)
        made = session(ir.to_proto(model).SerializeToString())
        windows.append(sample_windows(made, input_plan(model), 2, 12, 0))
    np.testing.assert_array_equal(*windows)


def test_what_needs_all_rows_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.onnx"
    ir.save(_made(last_row=True), path)
    tiny_tokenizer(256, tmp_path)
    said = r"output 'logits' scores 1 of 9 tokens, all are needed: evaluate the same model exported with --logits all"
    with pytest.raises(UserError, match=said):
        evaluate(path, [np.arange(9)])
    (tmp_path / "text.txt").write_text("It was a dark and stormy night. " * 4)
    assert main(["eval", str(path), "--text", str(tmp_path / "text.txt"), "--context", "16"]) == 2
    assert "exported with --logits all" in capsys.readouterr().err
