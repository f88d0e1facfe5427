"""measure/evaluate.py, metrics.py, loaded.py and `qcompile eval`, against float64 arithmetic written out here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from bos import put_before_texts
from graphs.inputs import strings_that_become_rows_of_a_table
from said import complaints

from qcompile.compiler.api import evaluation
from qcompile.compiler.cli import main
from qcompile.compiler.data.feeds import npz_batches
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.measure.evaluate import evaluate, evaluate_many, score_outputs
from qcompile.compiler.measure.loaded import text_windows
from qcompile.compiler.measure.metric import Metric
from qcompile.compiler.measure.metrics import OutputNoise, log_softmax
from qcompile.models.tiny import tiny_decoder, tiny_encoder, tiny_mlp, tiny_tokenizer
from qcompile.passes.base import Region
from qcompile.passes.contrib.attention import FuseAttention
from qcompile.passes.errors import UserError
from qcompile.passes.prepare import Prepare

WINDOWS = list(np.random.default_rng(3).integers(0, 256, size=(3, 20)))


def _saved(model: ir.Model, path: Path, *, noise: float = 0.0, poison: float | None = None) -> Path:
    """The model with noise on its matrices, or one value of its first matrix replaced."""
    generator = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or len(tensor.shape) != 2 or tensor.dtype != ir.DataType.FLOAT:
            continue
        array = tensor.numpy() * (1 + noise * generator.standard_normal(tensor.shape.numpy()))
        if poison is not None:
            array[:, 0] = poison
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
    ir.save(model, path)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return _saved(tiny_decoder(), tmp_path / "a.onnx"), _saved(tiny_decoder(), tmp_path / "b.onnx", noise=0.1)


def _log_probabilities(path: Path, window: Any) -> Any:
    made = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = np.asarray(window, np.int64)[None]
    logits = made.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0].astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_scores_equal_the_formulas(pair: tuple[Path, Path]) -> None:
    reference, candidate = pair
    nll, kl, agree = [], [], []
    for window in WINDOWS:
        p, q = _log_probabilities(reference, window)[:-1], _log_probabilities(candidate, window)[:-1]
        nll += [-q[i, token] for i, token in enumerate(window[1:])]
        kl += list((np.exp(p) * (p - q)).sum(axis=1))
        agree += list(p.argmax(axis=1) == q.argmax(axis=1))
    first, second = evaluate_many(reference, [candidate], WINDOWS)
    assert (first.kl, first.agreement, first.model) == (None, None, str(reference))
    assert (second.windows, second.context, second.scored) == (3, 20, 57)
    assert second.nll == pytest.approx(np.mean(nll), rel=1e-5)
    assert second.perplexity == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)
    assert second.kl == pytest.approx(np.mean(kl), rel=1e-4)
    assert second.kl_error == pytest.approx(np.std(kl, ddof=1) / np.sqrt(57), rel=1e-4)
    assert second.agreement == pytest.approx(np.mean(agree))
    assert second.kl > 1e-4  # the noise is visible


def test_a_model_is_its_own_reference(pair: tuple[Path, Path]) -> None:
    score = evaluate(pair[0], WINDOWS, reference=pair[0])
    assert (score.kl, score.agreement) == (0.0, 1.0)


def test_the_reference_runs_once_for_each_window(pair: tuple[Path, Path]) -> None:
    steps: list[tuple[int, int]] = []
    scores = evaluate_many(pair[0], [pair[1], pair[0]], WINDOWS, progress=lambda *step: steps.append(step))
    assert [score.model for score in scores] == [str(pair[0]), str(pair[1]), str(pair[0])]
    assert steps[-1] == (9, 9)


@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_cache_graphs_free_and_of_fixed_length_agree(tmp_path: Path, attention: str) -> None:
    """A graph that takes 4 tokens at a time is fed its own caches, and scores as one that takes all at once."""
    free = tiny_decoder(kv_cache=True, outliers=False)
    if attention == "fused":
        Prepare().call(Region.whole(free))
        FuseAttention().call(Region.whole(free))
    fixed = free.clone()
    for value in fixed.graph.inputs:
        if value.name in ("input_ids", "position_ids"):
            value.shape = ir.Shape(["batch", 4])
    assert input_plan(fixed).caches.shared == (attention == "fused")
    a = evaluate(_saved(free, tmp_path / "a.onnx"), WINDOWS)
    b = evaluate(_saved(fixed, tmp_path / "b.onnx"), WINDOWS)
    assert b.nll == pytest.approx(a.nll, rel=1e-5)
    assert b.scored == 57
    with pytest.raises(UserError, match="takes 4 tokens at a time, got a window of 3"):
        evaluate(tmp_path / "b.onnx", [WINDOWS[0][:3]])


def test_fixed_batches_score_like_free_ones(pair: tuple[Path, Path], tmp_path: Path) -> None:
    model = tiny_decoder()
    for value in model.graph.inputs:
        value.shape = ir.Shape([2, 20])
    score = evaluate(_saved(model, tmp_path / "fixed.onnx"), WINDOWS)
    assert score.nll == pytest.approx(evaluate(pair[0], WINDOWS).nll, rel=1e-5)


def test_what_cannot_be_evaluated(pair: tuple[Path, Path], tmp_path: Path) -> None:
    small = _saved(tiny_decoder(vocab=200), tmp_path / "small.onnx")
    with pytest.raises(UserError, match="only models of one vocabulary can be compared"):
        evaluate(small, [window % 200 for window in WINDOWS], reference=pair[0])
    with pytest.raises(UserError, match=r"token id \d+ in the text, 200 in the vocabulary"):
        evaluate(small, [np.array([1, 250])])
    poisoned = _saved(tiny_decoder(), tmp_path / "nan.onnx", poison=np.nan)
    with pytest.raises(UserError, match=r"nan.onnx: output 'logits' contains NaN"):
        evaluate(poisoned, WINDOWS)
    with pytest.raises(UserError, match=r"encoder\.onnx: the model is no decoder"):
        evaluate(_saved(tiny_encoder(), tmp_path / "encoder.onnx"), WINDOWS)


def test_log_softmax_of_large_and_half_logits() -> None:
    rows = np.array([[1000.0, 0.0], [3.0, 3.0]], np.float32)
    np.testing.assert_allclose(log_softmax(rows), [[0, -1000], [-np.log(2), -np.log(2)]], rtol=1e-6)
    assert log_softmax(rows.astype(np.float16)).dtype == np.float32


def test_noise_of_outputs() -> None:
    noise = OutputNoise()
    a, b = np.array([3.0, 0.0]), np.array([3.0, 0.3])
    noise.add(a, b)
    assert noise.sqnr == pytest.approx(20.0)
    assert noise.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    equal = OutputNoise()
    equal.add(a, a)
    assert (equal.sqnr, equal.cosine) == (np.inf, 1.0)


def _inputs(path: Path, width: int = 48) -> Path:
    np.savez(path, x=np.random.default_rng(0).standard_normal((5, width)).astype(np.float32))
    return path


def test_outputs_against_a_reference(tmp_path: Path) -> None:
    reference = _saved(tiny_mlp(), tmp_path / "a.onnx")
    candidate = _saved(tiny_mlp(), tmp_path / "b.onnx", noise=0.05)
    data = _inputs(tmp_path / "x.npz")
    x = dict(np.load(data))
    y, z = (ort.InferenceSession(str(path)).run(["y"], x)[0].astype(np.float64) for path in (reference, candidate))
    (score,) = score_outputs(reference, [candidate], lambda plan: npz_batches(plan, [data]))
    assert score.sqnr == pytest.approx(10 * np.log10((y**2).sum() / ((y - z) ** 2).sum()), abs=1e-3)
    assert score.cosine == pytest.approx((y * z).sum() / np.sqrt((y**2).sum() * (z**2).sum()), abs=1e-6)
    assert (score.output, score.values) == ("y", 50)
    with pytest.raises(UserError, match="has no output 'y'"):
        score_outputs(reference, [_saved(tiny_encoder(), tmp_path / "c.onnx")], lambda plan: [])


def test_labels_that_no_output_takes(tmp_path: Path) -> None:
    model, data = _saved(tiny_mlp(), tmp_path / "a.onnx"), _inputs(tmp_path / "x.npz")
    graph = onnx.load(model)
    graph.graph.node[-1].output[0] = graph.graph.output[0].name = "pooled_logits"
    onnx.save(graph, tmp_path / "b.onnx")
    labels = np.zeros(5, np.int64)

    def score(path: Path, given: Any, metric: Any = None) -> None:
        score_outputs(path, [path], lambda plan: npz_batches(plan, [data]), labels=given, metric=metric)

    score(model, labels)
    with pytest.raises(UserError, match=r"no output of .*b\.onnx scores classes.*--metric.*pooled_logits"):
        score(tmp_path / "b.onnx", labels)
    score(tmp_path / "b.onnx", labels, Metric(lambda inputs, outputs, labels: float(len(labels))))
    with pytest.raises(UserError, match="--labels: class -1"):
        score(model, labels - 1)


def test_bounds_that_decoders_have_not(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before any is run."""
    monkeypatch.setattr(evaluation, "score_tokens", None)
    (tmp_path / "t.txt").write_text("some words of a text")
    command = ["eval", str(pair[1]), "--against", str(pair[0]), "--text", str(tmp_path / "t.txt")]
    for bound in (["--max-drop", "1%"], ["--min-sqnr", "20"]):
        assert main([*command, *bound]) == 2
        assert f"{bound[0]} is for " in complaints(capsys.readouterr().err)


def test_outputs_without_numbers_are_left_out(tmp_path: Path) -> None:
    graph = strings_that_become_rows_of_a_table.made()
    model, data = tmp_path / "m.onnx", tmp_path / "x.npz"
    onnx.save(graph.model(), model)
    np.savez(data, **graph.feeds(0))
    (score,) = score_outputs(model, [model], lambda plan: npz_batches(plan, [data]))
    assert score.output.startswith("MatMul")


def test_eval_command(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer(256, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike; each unhappy family is unhappy in its own way. " * 4)
    out = tmp_path / "scores.json"
    arguments = ["eval", pair[1], "--against", pair[0], "--text", text, "--context", 32, "--tokens", 128]
    assert main([str(word) for word in [*arguments, "--json", out]]) == 0
    shown = capsys.readouterr().out
    assert "4 windows of 32 tokens" in shown
    assert "accuracy level 0" in shown
    assert str(pair[1]) in shown  # not wrapped in a pipe
    first, second = json.loads(out.read_text())
    assert (first["kl"], second["scored"]) == (None, 124)
    assert second["kl"] > 0
    assert second["file_bytes"] == pair[1].stat().st_size


def test_every_window_begins_with_bos(tmp_path: Path) -> None:
    """Where the tokenizer puts one before a text: the first is scored on nothing else, and no window is longer."""
    tokenizer = tiny_tokenizer(256, tmp_path)
    text, plan = tmp_path / "text.txt", input_plan(tiny_decoder())
    text.write_text("All happy families are alike. " * 8)
    ids = load_tokenizer(tokenizer).encode(text.read_text())
    put_before_texts(tokenizer, 7)
    windows = text_windows(text, load_tokenizer(tokenizer), plan, 16, 60)
    assert [list(window) for window in windows] == [[7, *ids[at : at + 15]] for at in range(0, 60, 15)]
    encoder = text_windows(text, load_tokenizer(tokenizer), input_plan(tiny_encoder()), 16, 32)
    assert [list(window) for window in encoder] == [[7, *ids[:15]], ids[15:31]], "an encoder's text has it once"


def test_a_file_of_scores_is_strict_json(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """One token has no standard error, and equal outputs no noise: null, as on stdout, where a strict reader stops."""
    tiny_tokenizer(256, tmp_path)
    (tmp_path / "t.txt").write_text("two words")
    ir.save(tiny_encoder(), tmp_path / "e.onnx")
    text, out = str(tmp_path / "t.txt"), tmp_path / "o.json"
    for name, tokens, figure in (("a", "2", "kl_error"), ("e", "8", "sqnr")):
        model = str(tmp_path / f"{name}.onnx")
        command = ["eval", model, "--against", model, "--text", text, "--tokens", tokens, "--json", str(out)]
        assert main(command) == 0
        assert json.loads(out.read_text(), parse_constant=pytest.fail)[-1][figure] is None


def test_a_verdict_on_several_texts(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows over all texts are what their tokens together say; the tables are asked for, the JSON has it all."""
    tiny_tokenizer(256, tmp_path)
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for text, words in zip(texts, ("every unhappy family ", "a truth acknowledged "), strict=True):
        text.write_text(words * 20)
    out = tmp_path / "scores.json"
    command = ["eval", pair[1], "--against", pair[0], "--text", *texts, "--context", 40, "--json", out]
    command = [str(word) for word in command]
    assert main(command) == 0
    assert "flips" not in capsys.readouterr().out
    assert main([*command, "--verdict"]) == 0
    shown = capsys.readouterr().out
    assert "perplexity ratio" in shown
    assert "1-31" in shown
    rows = json.loads(out.read_text())
    assert [Path(row["text"]).name for row in rows[::2]] == ["a.txt", "b.txt", "all texts"]
    a, b, together = rows[1::2]
    assert together["scored"] == a["scored"] + b["scored"]
    for name in ("kl", "flips", "flips_lost", "accuracy", "accuracy_drop"):
        assert together[name] * together["scored"] == pytest.approx(a[name] * a["scored"] + b[name] * b["scored"])
    assert together["kl_max"] == max(a["kl_max"], b["kl_max"])
    assert together["perplexity_ratio"] == pytest.approx(together["perplexity"] / rows[-2]["perplexity"])
    assert together["flips"] == pytest.approx(1 - together["agreement"])
    assert main([*command[:2], *command[4:], "--verdict"]) == 0
    assert "--verdict has no effect here" in capsys.readouterr().err


def test_lines_of_jsonl_are_texts(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As in calibration data: what is scored is what the lines say, and none of their JSON."""
    tiny_tokenizer(256, tmp_path)
    (tmp_path / "t.txt").write_text("every unhappy family\n is unhappy in its own way\n")
    (tmp_path / "t.jsonl").write_text('"every unhappy family\\n"\n{"text": " is unhappy in its own way\\n", "id": 1}\n')
    (tmp_path / "bad.jsonl").write_text('"every unhappy family"\n[3]\n')
    rows = []
    for name in ("t.txt", "t.jsonl"):
        out = tmp_path / f"{name}.json"
        assert main(["eval", str(pair[0]), "--text", str(tmp_path / name), "--json", str(out)]) == 0
        rows.append({key: own for key, own in json.loads(out.read_text())[0].items() if key != "text"})
    assert rows[0] == rows[1]
    assert main(["eval", str(pair[0]), "--text", str(tmp_path / "bad.jsonl")]) == 2
    assert "bad.jsonl, line 2: no text" in complaints(capsys.readouterr().err)


def test_eval_command_on_encoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (_saved(tiny_encoder(), tmp_path / f"{n}.onnx", noise=s) for n, s in (("a", 0), ("b", 0.01)))
    tiny_tokenizer(256, tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("word " * 100)
    assert main(["eval", str(b), "--against", str(a), "--text", str(text), "--context", "32"]) == 0
    assert "last_hidden_state" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{a}"], "either --text FILE … for a language model or --data"),
        (["{a}", "--data", "{x}"], "give it with --against REF.onnx"),
        (["{a}", "--text", "{t}", "--tokens", "1"], "--tokens must be at least 2"),
        (["{a}", "--text", "{t}"], "no tokenizer.json at"),
        (["{a}", "--text", "{t}", "--provider", "warp"], "no tokenizer.json at"),
        (["{m}", "--text", "{t}"], "float input 'x'"),
        (["{a}", "--text", "{t}", "--accuracy-level", "9"], "--accuracy-level: expected 0, 1, 2, 3 or 4, got '9'"),
    ],
)
def test_eval_command_refuses(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    text = tmp_path / "t.txt"
    text.write_text("some text")
    places = {"a": pair[0], "x": _inputs(tmp_path / "x.npz"), "t": text, "m": _saved(tiny_mlp(), tmp_path / "m.onnx")}
    assert main(["eval", *(word.format(**places) for word in arguments)]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert complaints(captured.err).count("\n") == 1
    assert captured.out == ""
