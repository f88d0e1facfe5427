"""What every command takes: --json, -q, --threads, help, and where each thing is said."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from said import complaints

from qcompile.compiler import cli
from qcompile.compiler.cli import COMMANDS, main
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import Verdict
from qcompile.passes.threads import limit, limited, workers

QUICK = ["--passes", "pack", "--group-size", "32", "--samples", "4", "--context", "32"]


@pytest.fixture(scope="module")
def made(make_bench: Any) -> Any:
    """A folder with a small decoder, its tokenizer, and what pack makes of it."""
    own = make_bench("common")
    own.save(tiny_decoder())
    own.compile(own.folder / "in" / "model.onnx", output="in/q.onnx")
    return own


def _documents(made: Any) -> dict[str, list[str]]:
    """A command line for each command that needs nothing else."""
    float_model, compiled, out = (str(made.folder / path) for path in ("in/model.onnx", "in/q.onnx", "made"))
    text = str(made.text)
    data = ["--calibration", text, "--samples", "4", "--context", "32"]
    return {
        "compile": [float_model, *QUICK, "-o", f"{out}/c.onnx"],
        "plan": [float_model, *QUICK, "--dry-run"],
        "calibrate": ["calibrate", float_model, *data, "-o", f"{out}.statistics"],
        "sensitivity": ["sensitivity", float_model, *data, "--passes", "qdq"],
        "eval": ["eval", compiled, "--against", float_model, "--text", text, "--tokens", "64", "--context", "32"],
        "bench": ["bench", compiled, "--rounds", "1", "--prompt-tokens", "4", "--decode", "0", "--threads", "1"],
        "timings": ["timings", float_model, "--passes", "pack", "--threads", "1"],
        "inspect": ["inspect", compiled],
        "explain": ["explain", compiled],
        "diff": ["diff", float_model, compiled, "--text", text, "--tokens", "64", "--context", "32"],
        "passes": ["passes"],
        "one pass": ["passes", "pack"],
        "generate": ["generate", compiled, "--prompt", "hello", "--max-tokens", "2"],
        "package": ["package", compiled, "-o", f"{out}/ort", "--for", "ort", "--kernels", "portable"],
        "sweep": ["sweep", float_model, "--grid", "passes=pack", "bits=8", "samples=4", "context=32", "--tokens", "32",
                  "--context", "32", "--calibration", text, "-o", f"{out}/sweep"],
        "zoo": ["export", "--list"],
        "recipe": ["recipe"],
        "schema": ["recipe", "--schema"],
    }  # fmt: skip


NAMES = [
    "compile", "plan", "calibrate", "sensitivity", "eval", "bench", "timings", "inspect", "explain", "diff", "passes",
    "one pass", "generate", "package", "sweep", "zoo", "recipe", "schema",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_one_document(made: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """stdout is one JSON text of a table or a list, strict JSON; what is said beside it goes to stderr."""
    assert main([*_documents(made)[name], "--json"]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert isinstance(found, (dict, list))
    assert found


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("package", "sweep")])
def test_no_command_prints_a_line_end_by_its_number(made: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """What a screen prints is one line: `visible` shows line ends in it as it does those of strangers' names."""
    assert main(_documents(made)[name]) == 0
    assert "\\u000a" not in "".join(capsys.readouterr())


def test_every_command_is_there() -> None:
    covered = {name.split()[0] for name in NAMES} | {"export", "completion"}
    assert set(COMMANDS) <= covered


@pytest.mark.parametrize("name", ["compile", "calibrate", "package"])
def test_quiet_commands_that_write_say_nothing(made: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([*_documents(made)[name], "-q"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["eval", "inspect", "generate", "plan"])
def test_quiet_commands_that_answer_answer(made: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    assert main([*_documents(made)[name], "-q"]) == 0
    told = capsys.readouterr()
    assert told.out
    assert told.err == ""


def test_progress_is_on_stderr_in_plain_lines(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(_documents(made)["compile"]) == 0
    told = capsys.readouterr()
    assert all(re.fullmatch(r" *\d+ s  .+", line) for line in told.err.splitlines())
    assert complaints(told.err) == ""
    assert "loading" in told.err
    assert not re.search(r"^ *\d+ s  ", told.out, re.M)


def test_json_goes_to_a_file_beside_the_tables(made: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, file = _documents(made)["eval"], tmp_path / "e.json"
    assert main([*words, "--json", str(file)]) == 0
    assert "perplexity" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(file.read_text())


@pytest.mark.parametrize(
    "leading", [["-q"], ["--threads", "1"], ["--threads=1"], ["--log-level", "error", "-v"], ["--json", "--traceback"]]
)
def test_what_every_command_takes_may_stand_first(made: Any, leading: list[str], capsys: Any) -> None:
    assert main([*leading, *_documents(made)["inspect"]]) == 0
    assert "q.onnx" in capsys.readouterr().out


@pytest.mark.parametrize("threads", [1, 2])
def test_threads(made: Any, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int | None, int]] = []
    module = cli.load("inspect")
    monkeypatch.setattr(module, "run", lambda args: seen.append((limit(), workers())))
    assert main(["inspect", "x", "--threads", str(threads)]) == 0
    assert main(["inspect", "x"]) == 0
    assert seen == [(threads, threads), (None, workers())]
    with limited(8):
        assert (limit(), workers()) == (8, 8)


def test_a_session_has_as_many_threads(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    from qcompile.runtime.sessions import session

    seen = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime, "InferenceSession",
        lambda source, options, **more: (seen.append(options.intra_op_num_threads), real(source, options, **more))[1],
    )  # fmt: skip
    with limited(1):
        session(made.folder / "in" / "model.onnx")
        session(made.folder / "in" / "model.onnx", threads=2)
    assert seen == [1, 2]


def test_a_broken_verdict_is_told_behind_its_document(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def run(args: Any) -> None:
        raise Verdict("KL 0.3 is above --max-kl 0.1", {"kl": 0.3})

    monkeypatch.setattr(cli.load("inspect"), "run", run)
    assert main(["inspect", "x", "--json"]) == 1
    told = capsys.readouterr()
    assert told.err == "qcompile: error: KL 0.3 is above --max-kl 0.1\n"
    assert json.loads(told.out) == {"kl": 0.3}


def test_help_and_version_in_every_form(capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for words in (["help"], ["--help"], ["-h"]):
        assert main(words) == 0
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    for name in COMMANDS:
        assert main(["help", name]) == 0
        assert f"usage: qcompile {name} " in capsys.readouterr().out
    assert main(["-V"]) == main(["--version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


@pytest.mark.parametrize("width", [40, 60, 200])
def test_narrow_help_breaks_no_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        shown = capsys.readouterr().out
        options = re.findall(r"^  ((?:-\w, )?--\S+)", shown, re.M)
        assert len(options) > 4
        assert "preprocessor_config.json" in shown or name not in ("compile", "calibrate", "sensitivity")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["m.onnx", "--passes", "smoth,pack"], "'smooth'"),
        (["m.onnx", "--passes", "qdq(observer=mset)"], "'mse'"),
        (["m.onnx", "--passes", "awq(gird=3),pack"], "'grid'"),
        (["m.onnx", "--weights", "nf5"], "'nf4'"),
        (["m.onnx", "--target", "qd"], "'qdq'"),
        (["m.onnx", "--attention", "fuse"], "'fused'"),
        (["m.onnx", "--recipe", "r.yaml"], "'bits'"),
        (["m.onnx", "--grup-size", "3"], "'--group-size'"),
        (["sweep", "m.onnx", "-o", "s", "--grid", "bit=4"], "'bits'"),
        (["passes", "pck"], "'pack'"),
        (["export", "smollm2-135", "-o", "x"], "'smollm2-135m'"),
        (["inspekt", "m"], "'inspect'"),
        (["help", "inspekt"], "'inspect'"),
    ],
)
def test_did_you_mean(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(made.folder / "in" / "model.onnx", "m.onnx")
    for file in (made.folder / "in").glob("model*.data"):
        shutil.copy(file, tmp_path)
    Path("r.yaml").write_text("bit: 4\n")
    assert main([*words]) == 2
    told = complaints(capsys.readouterr().err)
    assert re.search(rf"did you mean ({'|'.join(hint.split(' or '))})\?", told), told
    assert told.count("\n") == 1


def test_completion(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """bash completes commands, options and values from the script, without starting qcompile."""
    script = tmp_path / "qcompile.bash"
    assert main(["completion", "bash"]) == 0
    script.write_text(capsys.readouterr().out)
    if shutil.which("bash"):
        ask = "source {}; COMP_WORDS=({}); COMP_CWORD={}; _qcompile; echo ${{COMPREPLY[@]}}"
        for words, found in (
            ("qcompile sens", "sensitivity"),
            ("qcompile eval --ag", "--against"),
            ("qcompile compile --attention fu", "fused"),
            ("qcompile compile --lm-head ke", "keep"),  # values that mix words, numbers and formats
            ("qcompile compile --embedding nf", "nf4"),
            ("qcompile compile --weights mx", "mxfp4"),
            ("qcompile --pa", "--passes"),
        ):
            line = ask.format(script, words, len(words.split()) - 1)
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
            assert done.stdout.split() == [found]
    for shell in ("zsh", "fish"):
        assert main(["completion", shell]) == 0
        assert "--against" in capsys.readouterr().out or shell == "fish"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["completion", "fish", "--install", "--json"]) == 0
    assert "against" in Path(json.loads(capsys.readouterr().out)["path"]).read_text()


def test_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "qcompile", "-V"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("qcompile ")
