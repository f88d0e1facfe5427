"""api/gate.py: `qcompile eval --gate` and `--junit`: which bounds there are, what is told, and exit codes."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from said import complaints

import qcompile
from qcompile.compiler.api import evaluation
from qcompile.compiler.api.gate import Gate, Kept, broken, junit
from qcompile.compiler.cli import main
from qcompile.compiler.console.visible import told_apart
from qcompile.models.tiny import tiny_conv, tiny_decoder, tiny_tokenizer
from qcompile.passes.errors import UserError

WORDS = "every unhappy family is unhappy in its own way and knows it well enough; " * 8


def _noisy(model: ir.Model, path: Path, noise: float) -> Path:
    generator = np.random.default_rng(0)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and len(tensor.shape) > 1 and tensor.dtype == ir.DataType.FLOAT:
            array = tensor.numpy() * (1 + noise * generator.standard_normal(tensor.shape.numpy()))
            value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
    ir.save(model, path)
    return path


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """`qcompile eval` of a decoder and a noisy one on a text."""
    a, b = (_noisy(tiny_decoder(), tmp_path / f"{name}.onnx", noise) for name, noise in (("a", 0), ("b", 0.1)))
    tiny_tokenizer(256, tmp_path)
    (tmp_path / "t.txt").write_text(WORDS)
    return ["eval", str(b), "--against", str(a), "--text", str(tmp_path / "t.txt"), "--context", "48"]


def _gate(tmp_path: Path, text: str, name: str = "gate.yaml") -> list[str]:
    (tmp_path / name).write_text(text)
    return ["--gate", str(tmp_path / name)]


def test_bounds_that_hold_and_do_not(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every bound is told, pass or fail, in the table, the JSON and JUnit XML; broken ones in the error, too."""
    told, xml = tmp_path / "told.json", tmp_path / "told.xml"
    gate = _gate(tmp_path, "kl: {max: 100}\nkl_p99: {max: 1e-9}\nperplexity_ratio: {min: 0.1, max: 10}\n")
    assert main([*command, *gate, "--json", str(told), "--junit", str(xml)]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("BROKEN") == 1
    assert "0.1 <= perplexity_ratio <= 10" in printed.out
    assert "1 of 3 bounds are broken" in complaints(printed.err)
    assert "b.onnx, t.txt: " in complaints(printed.err)
    rows = json.loads(told.read_text())
    assert [row.get("bound") for row in rows[2:]] == ["kl <= 100", "kl_p99 <= 1e-09", "0.1 <= perplexity_ratio <= 10"]
    assert [row["holds"] for row in rows[2:]] == [True, False, True]
    assert rows[3]["value"] == rows[1]["kl_p99"]
    suite = ElementTree.parse(xml).getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), len(suite)) == ("3", "1", 3)
    assert [case.find("failure") is None for case in suite] == [True, False, True]
    assert main([*command, *_gate(tmp_path, "kl: {max: 100}"), "--junit", str(xml)]) == 0
    assert ElementTree.parse(xml).getroot().get("failures") == "0"


def test_texts_of_one_name_are_told_apart_by_their_folders(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In all tables, and in the bounds; a text whose name no other has goes by that alone."""
    texts = [tmp_path / "law" / "t.txt", tmp_path / "prose" / "t.txt", tmp_path / "prose" / "u.txt"]
    for number, text in enumerate(texts):
        text.parent.mkdir(exist_ok=True)
        text.write_text(WORDS[10 * number :])
    asked = [*command[:4], "--text", *map(str, texts), *command[6:]]
    assert main([*asked, "--verdict", *_gate(tmp_path, "kl: {max: 100}"), "--json", str(tmp_path / "o.json")]) == 0
    shown = capsys.readouterr().out.split()
    for name, times in (("law/t.txt", 5), ("prose/t.txt", 5), ("u.txt", 5), ("t.txt", 0)):
        assert shown.count(name) == times, name
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["on"] for row in rows if "bound" in row] == ["law/t.txt", "prose/t.txt", "u.txt", "all texts"]
    assert [row["text"] for row in rows if "text" in row][::2] == [*map(str, texts), "all texts"]


@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("/".join), max_size=5))
def test_names_of_files_tell_them_apart(paths: list[str]) -> None:
    """Each is the end of its path, and no shorter one than needs be."""
    names = told_apart(paths)
    assert len(set(names.values())) == len(set(paths))
    for path, name in names.items():
        assert f"/{path}".endswith(f"/{name}")
        shorter = name.partition("/")[2]
        others = [f"/{other}" for other in names if other != path]
        assert not shorter or any(other.endswith(f"/{shorter}") for other in others)


def test_the_document_of_a_broken_gate_is_on_stdout(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *_gate(tmp_path, "kl: {max: 0}"), "--max-kl", "0", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)[-1]["holds"] is False
    assert "--max-kl 0" in printed.err, "both are told"
    assert "1 of 1 bounds" in printed.err


def test_every_bin_of_positions_is_bound(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *_gate(tmp_path, "kl_by_position: {max: 1e-9}"), "--json"]) == 1
    bounds = [row for row in json.loads(capsys.readouterr().out) if "bound" in row]
    assert [row["on"] for row in bounds] == ["t.txt, 1-31", "t.txt, 32-47"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("kl_p9: {max: 1}", "no figure 'kl_p9': did you mean 'kl_p99'?"),
        ("kl: 0.1", "kl takes bounds, such as `kl: {max: 0.1}`"),
        ("kl: {maximum: 1}", "kl takes min and max, got 'maximum'"),
        ("kl: {max: much}", "max of kl is a number, got 'much'"),
        ("kl: {max: true}", "max of kl is a number, got True"),
        ("kl: {max: .nan}", "max of kl is a number, got nan"),
        ("kl: {min: 2, max: 1}", "kl has min 2 above max 1"),
        ("kl: {max: 1}\nkl: {max: 2}", "key 'kl' is there twice"),
        ("- kl", "a gate is a table of bounds"),
        ("kl: {max", "gate.yaml: "),
        (" ", "holds no text"),
        ("sqnr: {min: 20}", "there is no sqnr here: only outputs of models that are no decoders on --text have it"),
        ("classes.top1: {min: 0.9}", "there is no classes.top1 here"),
    ],
)
def test_gates_that_say_nothing(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, text: str, reason: str
) -> None:
    """Bad input, told before any model is run."""
    monkeypatch.setattr(evaluation, "score_tokens", None)
    assert main([*command, *_gate(tmp_path, text)]) == 2
    assert reason in complaints(capsys.readouterr().err)


def test_figures_that_an_evaluation_has_not(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = [*command[:2], *command[4:]]
    assert main([*alone, *_gate(tmp_path, "kl: {max: 1}")]) == 2
    assert "it compares with a reference: give --against" in complaints(capsys.readouterr().err)
    assert main([*alone, *_gate(tmp_path, "perplexity: {max: 1e300}\nfile_bytes: {max: 10000000}")]) == 0
    told = tmp_path / "told.json"
    capsys.readouterr()
    short = [*command, "--tokens", "20", *_gate(tmp_path, "kl: {max: 100}\nflips_high: {max: 1}")]
    assert main([*short, "--json", str(told), "--junit", str(tmp_path / "x.xml")]) == 2
    printed = capsys.readouterr()
    assert "flips_high is not known of" in complaints(printed.err)
    assert "perplexity" in printed.out, "what was found is not lost"
    assert len(json.loads(told.read_text())) == 2
    suite = ElementTree.parse(tmp_path / "x.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "1"), "nothing has passed"
    assert "flips_high is not known of" in str(suite[0][0].get("message"))
    assert main([*command, "--junit", str(tmp_path / "x.xml")]) == 2
    assert "--junit is of bounds" in complaints(capsys.readouterr().err)
    same = [*_gate(tmp_path, "kl: {max: 1}"), "--junit", str(tmp_path / "x"), "--json", str(tmp_path / "x")]
    assert main([*command, *same]) == 2
    assert main([*command, *_gate(tmp_path, "kl: {max: 1}"), "--junit", str(tmp_path / "b.onnx")]) == 2


def test_toml_and_nested_tables() -> None:
    plain = {"classes": {"top1": {"min": 0.5}, "accuracy_drop": {"max": "1e-2"}}}
    assert [(own.figure, own.min, own.max) for own in Gate.of(plain).bounds] == [
        ("classes.top1", 0.5, None),
        ("classes.accuracy_drop", None, 0.01),
    ]


def test_outputs_and_classes(tmp_path: Path) -> None:
    a, b = (_noisy(tiny_conv(), tmp_path / f"{name}.onnx", noise) for name, noise in (("a", 0), ("b", 0.05)))
    rows = np.random.default_rng(0).normal(size=(20, 3, 32, 32)).astype(np.float32)
    labels = [0] * 20
    kept = qcompile.evaluate(
        b, against=a, data=[rows], labels=labels, gate={"sqnr": {"min": 1}, "classes.accuracy_drop_low": {"max": 0.9}}
    ).kept
    assert [own.holds for own in kept] == [True, True]
    with pytest.raises(qcompile.Verdict, match="breaks 200 <= sqnr") as error:
        qcompile.evaluate(b, against=a, data=[rows], labels=labels, gate={"sqnr": {"min": 200}})
    assert error.value.document.to_dict()["gate"][0]["holds"] is False
    with pytest.raises(UserError, match="only decoders on text"):
        qcompile.evaluate(b, against=a, data=[rows], gate={"kl": {"max": 1}})


@pytest.mark.parametrize(
    ("figure", "reason"),
    [
        ("classes.lost", "there is no classes.lost here: give labels="),
        ("classes.mcnemar_p", "give labels="),
        ("metric", "give metric="),
    ],
)
def test_no_bound_holds_for_want_of_labels_or_a_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: str, reason: str
) -> None:
    """Rows that are lost are none where nobody knows what is right: said before any model is run."""
    monkeypatch.setattr(evaluation, "score_outputs", None)
    a, rows = _noisy(tiny_conv(), tmp_path / "a.onnx", 0), np.zeros((2, 3, 32, 32), np.float32)
    with pytest.raises(UserError, match=reason):
        qcompile.evaluate(a, against=a, data=[rows], gate={figure: {"max": 0}})


def test_figures_of_no_output() -> None:
    """Classes are of some outputs only; what no row has is an error, and so is what one row alone lacks."""
    rows = [{"model": "m", "output": "a", "classes": {"top1": 0.5, "top5": None}}, {"model": "m", "output": "b"}]
    assert [own.on for own in Gate.of({"classes.top1": {"min": 0}}).kept(rows)] == ["a"]
    with pytest.raises(UserError, match=r"classes\.top5 is not known here: no output scores six or more classes"):
        Gate.of({"classes.top5": {"min": 0}}).kept(rows)
    rows = [{"model": name, "output": "a", "linear_bits": bits} for name, bits in (("m", 4.5), ("n", None))]
    with pytest.raises(UserError, match="linear_bits is not known of n on a: it has no linear weights"):
        Gate.of({"linear_bits": {"max": 5}}).kept(rows)


def test_a_model_against_itself_is_judged(tmp_path: Path) -> None:
    a = _noisy(tiny_decoder(), tmp_path / "a.onnx", 0)
    tiny_tokenizer(256, tmp_path)
    scores = qcompile.evaluate(a, against=a, text=WORDS, context=48, gate={"kl": {"max": 0}, "flips": {"max": 0}})
    assert [own.holds for own in scores.kept] == [True, True]


def test_junit_of_odd_names() -> None:
    """XML has no control characters: what a file is called does not break what CI reads."""
    kept = [Kept("kl <= 1", None, 1.0, "a\x1b<&>\ud800.onnx", "t\x00.txt", 2.0, False)]
    case = ElementTree.fromstring(junit(kept).encode())[0][0]
    assert case.get("classname") == "a?<&>?.onnx"
    assert "t?.txt" in str(case.get("name"))
    assert "2 breaks kl <= 1" in broken(kept)
    assert broken([]) == ""
    assert broken(kept * 9).endswith("; and 5 more")
