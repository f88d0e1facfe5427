"""measure/tasks: items that are what they say, the same every time, and models that are judged by likelihood."""

import builtins
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from said import complaints

import qcompile
from qcompile.compiler.api import evaluation
from qcompile.compiler.cli import main
from qcompile.compiler.data.tokens import Tokenizer
from qcompile.compiler.measure.loaded import Subject
from qcompile.compiler.measure.tasks import generated, texts
from qcompile.compiler.measure.tasks.items import Item, digest, item
from qcompile.compiler.measure.tasks.scoring import Encoded, _likelihoods, check_fit, score_tasks
from qcompile.compiler.measure.tasks.table import TASKS, named
from qcompile.models.text import calibration_text, tasks_text
from qcompile.models.tiny import tiny_decoder, tiny_encoder, tiny_tokenizer
from qcompile.passes.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(tiny_tokenizer(256, tmp_path))


def _saved(path: Path, noise: float = 0.0, **settings: Any) -> Path:
    model, generator = tiny_decoder(**settings), np.random.default_rng(0)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) == 2 and tensor.dtype == ir.DataType.FLOAT:
            array = tensor.numpy() * (1 + noise * generator.standard_normal(tensor.shape.numpy()))
            value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
    ir.save(model, path)
    return path


@pytest.mark.parametrize("name", TASKS)
def test_items_are_the_same_every_time(name: str, tokenizer: Tokenizer) -> None:
    if name in ("arithmetic", "pattern"):
        pytest.importorskip("reasoning_gym")
    items = TASKS[name](40, tokenizer, 1000)
    assert len(items) == 40
    assert len({own.context for own in items}) == 40
    assert digest(items) == digest(TASKS[name](40, tokenizer, 1000)) != digest(items[1:])
    assert all(len(set(own.choices)) == 4 for own in items)
    places = np.bincount([own.answer for own in items], minlength=4)
    assert places.min() > 2, "the right choice stands anywhere"


def _sizes(own: Item) -> list[int]:
    return [int(choice) if choice.strip().lstrip("-").isdigit() else len(choice) for choice in own.choices]


@pytest.mark.parametrize("name", [name for name in TASKS if name != "pattern"])  # whose numbers are as arithmetic's
def test_choices_alone_do_not_tell_the_right_one(name: str, tokenizer: Tokenizer) -> None:
    """By rank of size or length, by distances to the others, by how common it is.

    Guessing gets 25 %: 300 items or more, so 36 % are more than four standard errors above.
    """
    if name == "arithmetic":
        pytest.importorskip("reasoning_gym")
    items = TASKS[name](400, tokenizer, 600)
    assert len(items) >= 300
    sizes, answers = np.array([_sizes(own) for own in items]), np.array([own.answer for own in items])
    common = Counter(own.choices[own.answer] for own in items)
    guesses = [np.argsort(sizes, axis=1, kind="stable")[:, rank] for rank in range(4)]
    apart = np.abs(sizes[:, :, None] - sizes[:, None])
    guesses += [apart.sum(axis=2).argmin(axis=1), np.isin(apart, (1, 2, 3, 10)).sum(axis=2).argmax(axis=1)]
    others = [[common[c] - (place == own.answer) for place, c in enumerate(own.choices)] for own in items]
    guesses.append(np.argmax(others, axis=1))
    assert [share for share in ((own == answers).mean() for own in guesses) if share > 0.36] == []


def test_text_of_tasks_is_apart_from_other_texts() -> None:
    """No sentence of it is calibrated on, nor one of the evaluation texts; one quotation aside."""
    plain = [" ".join(text.split()) for text in (tasks_text(), calibration_text())]
    plain += [" ".join(path.read_text().split()) for path in (ROOT / "benchmarks" / "text").glob("*.txt")]
    sentences = [own for own in re.split(r"(?<=[.!?])\s+", plain[0]) if len(own) > 60]
    assert len(sentences) > 500
    assert [sum(own in other for own in sentences) <= 1 for other in plain[1:]] == [True] * 3


def test_cloze_and_next_sentence_come_from_the_text() -> None:
    """The right choice is what follows in it, the wrong ones do not; words are of one length, all from its text.

    None stands in the context: where one in eight right ones did, and no wrong one, that told it.
    """
    plain = " ".join(tasks_text().split())
    for own in texts.cloze(tasks_text(), 100):
        assert not {choice.strip() for choice in own.choices} & set(re.findall(r"\w+", own.context.lower()))
        assert own.context + own.choices[own.answer] in plain
        assert len({len(choice) for choice in own.choices}) == 1
        assert all(choice in plain for choice in own.choices)
    for own in texts.next_sentence(tasks_text(), 30):
        for number, choice in enumerate(own.choices):
            assert (own.context + choice in plain) == (number == own.answer)
    assert texts.cloze("One sentence. Another one.", 5) == []


def test_titles_end_no_sentence() -> None:
    (own,) = texts.passages("It rained. Mr. Starbuck was wet. ")
    assert own.sentence == "Mr. Starbuck was wet."


def test_a_context_with_no_place_for_needles() -> None:
    with pytest.raises(UserError, match="needle: 20 tokens of context are too few: four words take 4"):
        texts.needle(tasks_text(), 1, lambda text: len(text.split()), 20)


@pytest.mark.parametrize("tokens", [120, 400])
def test_needles_are_in_a_context_of_as_many_tokens(tokens: int) -> None:
    """All four words stand in it, each behind its role; the question asks for one of them."""
    for own in texts.needle(tasks_text(), 10, lambda text: len(text.split()), tokens):
        assert tokens - 20 < len(own.context.split()) <= tokens
        hidden = dict(re.findall(r"secret word of the (\w+) is (\w+)\.", own.context))
        asked = re.findall(r"secret word of the (\w+) is$", own.context)
        assert own.choices[own.answer] == f" {hidden[asked[0]]}"
        assert {f" {word}" for word in hidden.values()} == set(own.choices)


def test_sums_and_sequences_are_right() -> None:
    pytest.importorskip("reasoning_gym")
    for own in generated.arithmetic(30):
        *solved, last = own.context.split("\n")
        for line in [*solved, last + own.choices[own.answer]]:
            left, right = line.split(" = ")
            assert eval(left, {}) == int(right)
        assert solved == generated.arithmetic(1)[0].context.split("\n")[:-1]
    assert all(own.context.count(",") >= 4 for own in generated.pattern(10))


def test_no_more_is_generated_than_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The item behind the first 100 sequences takes half a minute."""
    gym, seen = pytest.importorskip("reasoning_gym"), list[int]()

    class Made:
        def __getitem__(self, index: int) -> dict[str, str]:
            seen.append(index)
            return {"question": f"{index // 2}, ?", "answer": "1"}

    monkeypatch.setattr(gym, "create_dataset", lambda *_, **__: Made())
    assert [own.context for own in generated.pattern(3)] == ["0,", "1,", "2,"]
    assert seen == [0, 1, 2, 3, 4]


def test_examples_are_numpys() -> None:
    for own in generated.code(20):
        assert own.context.startswith(">>> ")
        assert own.context.endswith("\n")


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *more: Any, **settings: Any) -> Any:
        if name == "reasoning_gym":
            raise ImportError(name)
        return real(name, *more, **settings)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"need reasoning-gym: pip install 'qcompile-onnx\[tasks\]'"):
        generated.pattern(3)


class _Known:
    """A model of four tokens that knows the log-probabilities of what follows, whatever stands before."""

    def __init__(self, probabilities: Sequence[float], sequence: int | None = None) -> None:
        self.runs: list[int] = []
        self._row = np.log(np.asarray(probabilities, np.float64))
        self.plan = type("Plan", (), {"sequence": sequence, "past": ()})()

    def logits(self, window: np.ndarray) -> np.ndarray:
        self.runs.append(len(window))
        return np.tile(self._row, (len(window), 1)).astype(np.float32)


class _Counting(_Known):
    """A model of four tokens whose scores tell all that stands before."""

    def __init__(self, sequence: int | None) -> None:
        super().__init__([0.25] * 4, sequence)

    def logits(self, window: np.ndarray) -> np.ndarray:
        self.runs.append(len(window))
        sums = np.cumsum(window * np.arange(1, len(window) + 1))
        return np.stack([np.sin(sums + number) for number in range(4)], axis=1).astype(np.float32)


class _Letters:
    """a, b, c, d are 0 to 3."""

    def encode(self, text: str) -> list[int]:
        return ["abcd".index(letter) for letter in text]

    def around(self) -> tuple[list[int], list[int]]:
        return [], []


def _right(own: Item, model: _Known, before: Sequence[int] = ()) -> bool:
    encoded: Any = Encoded.of(own, _Letters(), before)  # type: ignore[arg-type]
    return bool(encoded.right(model))


def test_the_likeliest_choice_is_the_models() -> None:
    """By log-likelihood a byte: -0.69 of "b" twice beats -1.05 a byte of "c". What all stand behind is run once."""
    short = Item("aa", ("b", "c", "d", "a"), 0)
    model = _Known([0.05, 0.5, 0.35, 0.1])
    assert _right(short, model)
    assert model.runs == [2]
    assert not _right(Item("aa", ("c", "b", "d", "a"), 0), model)
    longer = Item("aa", ("bb", "c", "dd", "a"), 0)
    model = _Known([0.05, 0.5, 0.35, 0.1])
    assert _right(longer, model)
    assert model.runs == [3, 3]


@given(
    st.text("abcd", min_size=1, max_size=4),
    st.lists(st.text("abcd", min_size=1, max_size=4), min_size=4, max_size=4, unique=True),
    st.sampled_from([None, 8]),
)
def test_runs_that_are_shared_change_no_likelihood(context: str, choices: list[str], sequence: int | None) -> None:
    """By a model whose next token depends on all before it, against each choice by itself."""
    model = _Counting(sequence)
    encoded = Encoded.of(Item(context, tuple(choices), 0), _Letters(), [])  # type: ignore[arg-type]
    found = _likelihoods(model, encoded.windows)  # type: ignore[arg-type]
    assert len(model.runs) <= len({choice[:-1] for choice in choices})
    for own, (ids, start) in zip(found, encoded.windows, strict=True):
        (alone,) = _likelihoods(_Counting(sequence), [(ids, start)])  # type: ignore[arg-type]
        assert own == alone


def test_fixed_lengths_and_texts_of_one_token() -> None:
    """A graph of fixed length gets that many tokens; a context that the tokenizer starts needs no text."""
    model = _Known([0.1, 0.2, 0.6, 0.1], sequence=8)
    assert _right(Item("ab", ("cc", "b", "d", "a"), 0), model)
    assert set(model.runs) == {8}
    short = _Known([0.1, 0.2, 0.6, 0.1], sequence=2)
    assert _right(Item("abab", ("cc", "bc", "dd", "ab"), 0), short), "a context that is too long is cut at its start"
    assert set(short.runs) == {2}
    check_fit("t", [Item("abab", ("cc", "b", "d", "a"), 0)], _Letters(), 2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="task t: choices of 3 tokens, and the model takes 2"):
        check_fit("t", [Item("abab", ("ccc", "b", "d", "a"), 0)], _Letters(), 2)  # type: ignore[arg-type]
    assert _right(Item("", ("c", "b", "d", "a"), 0), _Known([0.1, 0.2, 0.6, 0.1]), before=[0])


def test_scores_of_two_models(tmp_path: Path, tokenizer: Tokenizer) -> None:
    a, b = _saved(tmp_path / "a.onnx"), _saved(tmp_path / "b.onnx", 0.5)
    items = texts.next_sentence(tasks_text(), 24)
    first, second = score_tasks([Subject(a), Subject(b)], {"next-sentence": items}, tokenizer, compared=True)
    assert first.paired is None
    assert second.paired is not None
    assert second.paired.reference == first.accuracy
    assert second.paired.lost - second.paired.won == round(24 * (first.accuracy - second.accuracy))
    assert second.paired.lost + second.paired.won > 0, "half of the weights' size as noise changes some choices"
    assert first.accuracy_low < first.accuracy < first.accuracy_high
    assert first.digest == second.digest == digest(items)
    cached = _saved(tmp_path / "c.onnx", kv_cache=True)
    (alone,) = score_tasks([Subject(cached)], {"next-sentence": items[:4]}, tokenizer, compared=False)
    assert (alone.items, alone.paired) == (4, None)


def test_tasks_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --text the bundled one is scored; tasks are in the table, the JSON, the gate and JUnit XML."""
    tiny_tokenizer(256, tmp_path)
    a, b = _saved(tmp_path / "a.onnx"), _saved(tmp_path / "b.onnx", 0.3)
    (tmp_path / "g.yaml").write_text("tasks.cloze.accuracy_drop: {max: 1}\ntasks: {needle: {mcnemar_p: {min: 2}}}\n")
    command = ["eval", str(b), "--against", str(a), "--tokens", "800", "--context", "400", "--task-items", "6"]
    out, xml = tmp_path / "o.json", tmp_path / "o.xml"
    command += ["--tasks", "cloze,needle", "--json", str(out)]
    assert main([*command, "--gate", str(tmp_path / "g.yaml"), "--junit", str(xml)]) == 1
    printed = capsys.readouterr()
    assert "McNemar's p" in printed.out
    assert "task needle: " in complaints(printed.err)
    rows = json.loads(out.read_text())
    assert Path(rows[0]["text"]).name == "tasks.txt"
    tasks = [row for row in rows if "task" in row]
    assert [(row["task"], Path(row["model"]).name) for row in tasks] == [
        (task, f"{name}.onnx") for task in ("cloze", "needle") for name in "ab"
    ]
    assert tasks[1]["accuracy_drop"] == tasks[0]["accuracy"] - tasks[1]["accuracy"]
    assert [row["holds"] for row in rows if "bound" in row] == [True, False]
    assert xml.read_text().count("<system-out>") == 4
    assert main([*command, "--junit", str(xml)]) == 0
    found = qcompile.evaluate(b, against=a, tasks=["cloze"], task_items=6, tokens=800, context=400)
    assert found.to_dict()["tasks"][1]["accuracy"] == tasks[1]["accuracy"]
    assert "McNemar's p" in str(found)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--tasks", "clozed"], "--tasks: no task 'clozed'"),
        (["--tasks", "cloze", "--task-items", "0"], "--task-items must be at least 1"),
        (["--tasks", "cloze", "--data", "{x}"], "--tasks are for decoders on text, and --data is for other models"),
        (
            ["--tasks", "cloze", "--gate", "{g}"],
            "there is no tasks.needle.accuracy here: ask for the task needle by --tasks",
        ),
    ],
)
def test_tasks_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, words: list[str], reason: str
) -> None:
    monkeypatch.setattr(evaluation, "score_tokens", None)
    tiny_tokenizer(256, tmp_path)
    model = _saved(tmp_path / "a.onnx")
    (tmp_path / "g.yaml").write_text("tasks.needle.accuracy: {min: 0.5}")
    places = {"x": tmp_path / "x.npz", "g": tmp_path / "g.yaml"}
    command = ["eval", str(model), "--against", str(model), *(word.format(**places) for word in words)]
    assert main(command) == 2
    assert reason in complaints(capsys.readouterr().err)


def test_a_graph_of_fixed_length(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Most contexts are longer than its 64 tokens; it answers as the free one does to their last tokens."""
    free, fixed = _saved(tmp_path / "a.onnx"), tmp_path / "f.onnx"
    model = onnx.load(free)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = 64
    onnx.save(model, fixed)
    one = [own for own in texts.cloze(tasks_text(), 40) if len(tokenizer.encode(own.context)) > 64][:8]
    assert len(one) == 8
    subjects = Subject(fixed), Subject(free)
    for own in one:
        encoded = Encoded.of(own, tokenizer, [])
        cut = [(ids[-65:], start - max(len(ids) - 65, 0)) for ids, start in encoded.windows]
        assert encoded.right(subjects[0]) == replace(encoded, windows=cut).right(subjects[1])
    scores = qcompile.evaluate(fixed, tasks="cloze", task_items=4, context=64, tokens=128)
    assert scores.tasks[0].items == 4
    with pytest.raises(UserError, match="needle: 64 tokens of context are too few"):
        qcompile.evaluate(fixed, tasks="needle", task_items=4, context=64)


def test_models_are_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For two texts and a task, each of two."""
    tiny_tokenizer(256, tmp_path)
    loaded, a, b = list[Path](), _saved(tmp_path / "a.onnx"), _saved(tmp_path / "b.onnx", 0.1)
    monkeypatch.setattr(evaluation, "Subject", lambda path, **how: loaded.append(path) or Subject(path, **how))
    found = qcompile.evaluate(b, against=a, text=["some words", "and others"], tasks="cloze", task_items=2)
    assert loaded == [a, b]
    assert (len(found.rows), len(found.tasks)) == (6, 2)


def test_a_task_without_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python without docstrings (-OO) has no examples of numpy's: told before the work, not a division by zero."""
    tiny_tokenizer(256, tmp_path)
    monkeypatch.setattr(evaluation, "score_tokens", None)
    monkeypatch.setattr(generated, "_examples", lambda: iter(()))
    with pytest.raises(UserError, match="task code: there are no items here: leave it out"):
        qcompile.evaluate(_saved(tmp_path / "a.onnx"), tasks="code")


def test_tasks_are_for_decoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer(256, tmp_path)
    ir.save(tiny_encoder(), tmp_path / "e.onnx")
    model = str(tmp_path / "e.onnx")
    assert main(["eval", model, "--against", model, "--tasks", "cloze"]) == 2
    assert "the model is no decoder" in complaints(capsys.readouterr().err)


def test_names_of_tasks() -> None:
    assert named("cloze, needle,cloze") == ("cloze", "needle")
    assert named("all") == tuple(TASKS)
    assert named(["code"]) == ("code",)
    with pytest.raises(UserError, match="did you mean 'needle'"):
        named("needles")
    with pytest.raises(ValueError, match="choices that are the same"):
        item("a", "b", ["b"], Any)  # type: ignore[arg-type]
