"""Errors name the keywords of a Python caller: one wording for the command line, turned at the door."""

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import qcompile
from qcompile.compiler import cli
from qcompile.compiler.api.door import door, keywords_of, worded
from qcompile.models.tiny import tiny_conv, tiny_decoder

KEYWORDS = frozenset().union(
    *(keywords_of(getattr(qcompile, name)) for name in ("compile", "evaluate", "sweep", "bench"))
)


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ("below --min-cosine 0.5 (relative error 1)", "below min_cosine=0.5 (relative error 1)"),
        ("(--exclude, --keep-worst) or", "(exclude=, keep_worst=) or"),
        ("leave some in float with --exclude NAME", "leave some in float with exclude=…"),
        ("--calibration norms runs nothing", 'calibration="norms" runs nothing'),
        ("--calibration a.txt is text, but", 'calibration="a.txt" is text, but'),
        ("--text FILE … or --data FILE.npz … with --against", "text=… or data=… with against="),
        ("--statistics are ranges", "statistics= are ranges"),
        ("add qdq to --passes after smooth", "add qdq to passes= after smooth"),
        ("choose integer products, --passes smooth,qdq", 'choose integer products, passes="smooth,qdq"'),
        ("give --metric module:function, or", 'give metric="module:function", or'),
        ("above --max-drop 0.5%", 'above max_drop="0.5%"'),
        ("--eval-data FILE … gives others", "evaluation=… gives others"),
        ("--grid: unknown key", "grid: unknown key"),
        ("tell them with --shape x=1,…", 'tell them with shapes={"x": (1,…)}'),
        ("choose another folder with -o DIR, or", "choose another folder with output=, or"),
        ("export it with --kv-cache", "export it with --kv-cache"),
        (
            "make it with `qcompile calibrate M -o x --passes qdq`",
            "make it with `qcompile calibrate M -o x --passes qdq`",
        ),
    ],
)
def test_options_become_keywords(told: str, wanted: str) -> None:
    assert worded(told, KEYWORDS) == wanted
    assert worded(wanted, KEYWORDS) == wanted


@given(st.text())
def test_other_text_stays(told: str) -> None:
    if not re.search(r"--[a-z]|-o", told):
        assert worded(told, KEYWORDS) == told
    assert worded(told, []) == told


def test_every_option_that_is_a_keyword_of_the_same_name_is_turned() -> None:
    for name in KEYWORDS:
        assert worded(f"give --{name.replace('_', '-')}.", KEYWORDS) == f"give {name}=."


def _calls(bench: Any) -> list[tuple[Callable[[], Any], str]]:
    decoder, conv = bench.save(tiny_decoder()), bench.save(tiny_conv(), "conv.onnx", tokenizer=False)
    out, rows = bench.folder / "o.onnx", np.zeros((4, 3, 32, 32), np.float32)
    other = {"image": np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)}
    fields: dict[str, Any] = {"output": out, "calibration": [rows]}
    return [
        (lambda: qcompile.compile(conv, "qdq", output=out), "give"),
        (lambda: qcompile.compile(conv, "qdq", min_coverage=1.0, exclude=["nothing"], **fields), "exclude"),
        (lambda: qcompile.compile(decoder, "gptq,pack", output=out, calibration="norms"), 'calibration="norms"'),
        (lambda: qcompile.compile(conv, "pack", statistics=bench.text, output=out), "statistic"),
        (lambda: qcompile.evaluate(decoder), "text= "),
        (lambda: qcompile.evaluate(conv, data=rows), "against=…"),
        (lambda: qcompile.evaluate(conv, data=rows, against=conv, max_kl=0.1), "max_kl= is for"),
        (lambda: qcompile.evaluate(decoder, text=bench.text, against=decoder, min_sqnr=9), "min_sqnr= is for"),
        (lambda: qcompile.evaluate(conv, data=rows, against=conv, metric="nothing"), "metric= nothing: give"),
        (lambda: qcompile.evaluate(conv, data=other, against=conv, labels=[1]), "labels= has 1 labels"),
        (lambda: qcompile.bench(conv, shapes={"y": (1,)}, rounds=0), "rounds= and decode_after= must"),
        (lambda: qcompile.sweep(conv, {"bots": [4]}, output=bench.folder / "s"), "grid: unknown key"),
        (lambda: qcompile.generate(decoder, "x", max_tokens=0), "max_tokens= must be"),
        (lambda: qcompile.dry_run(decoder, "qdq,pack", group_size=3), "group size 3"),
    ]


def test_what_functions_raise_names_no_option_of_theirs(bench: Any) -> None:
    for call, told in _calls(bench):
        with pytest.raises(qcompile.UserError) as error:
            call()
        assert told in str(error.value), str(error.value)
        options = {word.strip("-").replace("-", "_") for word in re.findall(r"--[a-z-]+", str(error.value))}
        assert not options & KEYWORDS, str(error.value)


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), ZeroDivisionError("a"), qcompile.UserError("--fresh")])
def test_so_do_notes_of_whatever_they_raise(raised: BaseException) -> None:
    @door
    def fails(fresh: bool) -> None:
        raise raised

    raised.add_note("the same command goes on there, not `the same command`; --fresh starts over")
    with pytest.raises(type(raised)) as error:
        fails(fresh=True)
    assert error.value.__notes__ == ["the same call goes on there, not `the same command`; fresh= starts over"]


def test_warnings_do_so_and_point_at_the_caller(bench: Any) -> None:
    path, out = bench.save(tiny_decoder()), bench.folder / "o.onnx"
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        qcompile.compile(path, "pack", keep_as="float", samples=4, context=32, group_size=32, output=out)
    (one,) = [own for own in found if "no effect" in str(own.message)]
    assert "(keep_worst=, keep_share=, max_kl= or min_sqnr= do that)" in str(one.message)
    assert one.filename == __file__


def test_bounds_that_do_not_hold_are_verdicts_with_what_was_found(bench: Any) -> None:
    """As the command line ends with 1."""
    decoder, out = bench.save(tiny_decoder()), bench.folder / "o.onnx"
    fields: dict[str, Any] = {"samples": 4, "context": 32, "group_size": 32}
    qcompile.compile(decoder, "pack", output=out, **fields)
    text = "Something else entirely, and nothing of what was there before. " * 8
    judged = qcompile.evaluate(out, against=decoder, text=text, context=32, max_kl=100)
    kl = judged.rows[-1].scores.kl  # type: ignore[union-attr]
    with pytest.raises(qcompile.Verdict, match=r"KL .* nats a token is above max_kl=1e-09") as error:
        qcompile.evaluate(out, against=decoder, text=text, context=32, max_kl=1e-9)
    assert isinstance(error.value.document, qcompile.Evaluation)
    assert error.value.document.rows[-1].scores.kl == kl  # type: ignore[union-attr]
    conv = bench.save(tiny_conv(), "conv.onnx", tokenizer=False)
    rows = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    qcompile.compile(conv, "qdq", calibration=[rows], output=out)

    def mean(inputs: Any, outputs: Any, labels: Any) -> float:
        return float(np.mean([np.square(own["scores"]).mean() for own in outputs]))

    for bounds in ({"min_sqnr": 200}, {"metric": lambda i, o, labels: mean(i, o, labels), "max_drop": -0.0}):
        with pytest.raises(qcompile.Verdict) as error:
            qcompile.compare({"int8": out}, conv, data=rows + 1, **bounds)
        assert "int8:" in str(error.value)


def test_a_dry_run_is_the_commands(bench: Any, capsys: Any) -> None:
    path = bench.save(tiny_decoder())
    plan = qcompile.dry_run(path, "smooth,awq,pack", group_size=32)
    assert cli.main([str(path), "--passes", "smooth,awq,pack", "--group-size", "32", "--dry-run", "--json"]) == 0
    told = capsys.readouterr().out
    assert f'"compiled_bytes": {plan.to_dict()["report"]["compiled_bytes"]}' in told
    assert plan.report.coverage == 1
    assert str(plan).startswith(f"{path}: ")
    assert "about" in plan._repr_html_()
    assert not list(bench.folder.glob("**/*int4*"))


@pytest.mark.parametrize("body", ["import sys\nsys.exit(3)", "import sys\ndef f(i, o, l): sys.exit(3)"])
def test_a_module_of_the_users_that_ends_the_program(bench: Any, tmp_path: Path, monkeypatch: Any, body: str,
                                                     capsys: Any) -> None:  # fmt: skip
    """It is named, as a bad input of the option; before, "nothing was done" was told behind a compile."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    name = f"ends_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    conv, data = bench.save(tiny_conv(), tokenizer=False), bench.folder / "d.npz"
    np.savez(data, image=np.zeros((4, 3, 32, 32), np.float32) + np.arange(32, dtype=np.float32))
    assert cli.main(["eval", str(conv), "--against", str(conv), "--data", str(data), "--metric", f"{name}:f"]) == 2
    assert f"--metric {name}:f ended the program by itself: sys.exit(3)" in capsys.readouterr().err
