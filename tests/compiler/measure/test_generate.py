"""compiler/measure/generate.py and `qcompile generate`: with and without cache, choices, text in pieces."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler.cli import main
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.measure.generate import Sampling, generate_ids, stream
from qcompile.compiler.measure.loaded import Subject
from qcompile.models.tiny import tiny_decoder, tiny_encoder, tiny_tokenizer
from qcompile.passes.errors import UserError

PROMPT = [5, 6, 7, 8]


def _subject(path: Path, model: ir.Model) -> Subject:
    ir.save(model, path)
    return Subject(path)


def _greedy(subject: Subject, count: int) -> list[int]:
    """Greedy text by running everything again, written out."""
    ids = list(PROMPT)
    for _ in range(count):
        ids.append(int(subject.logits(np.array(ids))[-1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("kind", ["plain", "cache", "fixed"])
def test_greedy_text_equals_running_everything_again(tmp_path: Path, kind: str) -> None:
    plain = _subject(tmp_path / "plain.onnx", tiny_decoder())
    model = tiny_decoder(kv_cache=kind == "cache")
    if kind == "fixed":
        for value in model.graph.inputs:
            value.shape = ir.Shape([1, 16])
    subject = _subject(tmp_path / "model.onnx", model)
    expected = _greedy(subject if kind == "cache" else plain, 12)
    assert list(generate_ids(subject, PROMPT, 12, Sampling())) == expected


def test_stops_at_end_of_text_without_giving_it(tmp_path: Path) -> None:
    subject = _subject(tmp_path / "model.onnx", tiny_decoder())
    ids = list(generate_ids(subject, PROMPT, 8, Sampling(temperature=1.0)))
    stop = ids[3]
    cut = list(generate_ids(subject, PROMPT, 8, Sampling(temperature=1.0), frozenset({stop})))
    assert cut == ids[: ids.index(stop)]


def test_seeds_decide_and_repeat(tmp_path: Path) -> None:
    subject = _subject(tmp_path / "model.onnx", tiny_decoder())
    texts = [list(generate_ids(subject, PROMPT, 12, Sampling(temperature=2.0, seed=seed))) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_top_p_keeps_the_smallest_likely_set() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
    generator = np.random.default_rng(0)
    drawn = {Sampling(temperature=1.0, top_p=0.7).choose(logits, generator) for _ in range(200)}
    assert drawn == {1, 3}
    counts = np.bincount([Sampling(temperature=1.0).choose(logits, generator) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, [0.1, 0.5, 0.15, 0.25], atol=0.03)
    assert Sampling().choose(logits, generator) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [({"temperature": -1}, "temperature must be 0 or more"), ({"top_p": 0}, "top-p"), ({"seed": -1}, "seed")],
)
def test_impossible_sampling(settings: dict[str, float], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Sampling(**settings)  # type: ignore[arg-type]


def test_nan_logits_are_refused() -> None:
    with pytest.raises(UserError, match="NaN"):
        Sampling().choose(np.array([0.0, np.nan]), np.random.default_rng(0))


def test_what_cannot_generate(tmp_path: Path) -> None:
    subject = _subject(tmp_path / "model.onnx", tiny_decoder())
    with pytest.raises(UserError, match="the prompt has no tokens"):
        generate_ids(subject, [], 4, Sampling())
    with pytest.raises(UserError, match="no decoder"):
        generate_ids(_subject(tmp_path / "e.onnx", tiny_encoder()), PROMPT, 4, Sampling())
    fixed = tiny_decoder()
    for value in fixed.graph.inputs:
        value.shape = ir.Shape([1, 6])
    with pytest.raises(UserError, match=r"fixed shape \[1, 6\]: it cannot take 8 tokens"):
        generate_ids(_subject(tmp_path / "f.onnx", fixed), PROMPT, 4, Sampling())


def test_pieces_of_a_character_wait_for_the_rest(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_tokenizer(256, tmp_path))
    ids = tokenizer.encode("aé€b")
    assert len(ids) == 7
    pieces = list(stream(tokenizer, iter(ids)))
    assert "".join(pieces) == "aé€b"
    assert "é" in pieces
    assert "€" in pieces


def test_generate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _subject(tmp_path / "model.onnx", tiny_decoder(kv_cache=True))
    tiny_tokenizer(256, tmp_path)
    model = str(tmp_path / "model.onnx")
    assert main(["generate", model, "--prompt", "Once upon", "--max-tokens", "8", "--temperature", "1"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("Once upon")
    assert "8 tokens after a prompt of 9" in captured.err
    assert "tokens/s" in captured.err
    assert main(["generate", model, "--prompt", "x", "--max-tokens", "0"]) == 2
    assert main(["generate", model]) == 2
