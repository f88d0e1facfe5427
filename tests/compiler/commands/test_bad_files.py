"""Files beside the model that are no files, or not what they say: one line, exit code 2, and nothing waits for ever."""

import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzz.seeds import TOKENIZER, seeds
from said import complaints

from qcompile.compiler import cli
from qcompile.compiler.data.tokens import Tokenizer
from qcompile.compiler.recipe import Recipe, dump_recipe, load_recipe
from qcompile.models.tiny import tiny_decoder, tiny_mlp
from qcompile.passes.errors import UserError

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")


@pytest.fixture(autouse=True)
def _in_time() -> Iterator[None]:
    """Opening a pipe that nobody writes to would hang the whole run."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _pipe(folder: Path, name: str) -> str:
    os.mkfifo(folder / name)
    return str(folder / name)


def _refused(capsys: Any, command: list[str], message: str) -> None:
    assert cli.main(command) == 2
    told = complaints(capsys.readouterr().err)
    assert told.count("\n") == 1, told
    assert re.search(message, told), told


def test_a_pipe_for_a_model(capsys: Any, tmp_path: Path) -> None:
    path = _pipe(tmp_path, "model.onnx")
    for command in (["inspect", path], [path, "--passes", "pack"], [path, "--dry-run"]):
        _refused(capsys, command, r"model\.onnx is not a file")


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--calibration", "text.txt", r"text\.txt is not a regular file: save the data in one"),
        ("--calibration", "x.npz", r"x\.npz is not a regular file"),
        ("--calibration", "x.png", r"x\.png is not a regular file"),
        ("--tokenizer", "tokenizer.json", r"no tokenizer\.json at"),
        ("--recipe", "r.yaml", r"r\.yaml is not a regular file"),
        ("--statistics", "s.npz", r"s\.npz: no such file"),
    ],
)
def test_a_pipe_for_another_file(bench: Any, capsys: Any, option: str, name: str, message: str) -> None:
    model = bench.save(tiny_decoder())
    path = _pipe(bench.folder, name)
    passes = [] if option == "--recipe" else ["--passes", "smooth,qdq"]
    _refused(capsys, [str(model), option, path, *passes, "-o", str(bench.folder / "o.onnx")], message)


def test_pipes_beside_the_output(bench: Any) -> None:
    """Models beside the output are read to see which data they name."""
    model = bench.save(tiny_mlp(), tokenizer=False)
    (bench.folder / "out").mkdir()
    _pipe(bench.folder / "out", "other.onnx")
    for settings in ({"bits": 4}, {"bits": 8}):  # the second compile looks for data of the first
        assert bench.compile(model, "pack", **settings).coverage == 1


_BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\npasses: *c\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_BOMB, "aliases .* are not read here"),
        ("bits: &x 4\ngroup_size: 32\n<<: *x\n", "aliases .* are not read here"),
        ("bits: " + "[" * 5000, "nested too deeply|cannot be read"),
        ("passes: [[pack]]\n", r"passes must be a list of names, got \[\['pack'\]\]"),
        ("exclude: [1]\n", r"exclude must be a list of patterns, got \[1\]"),
        (
            "include: {" + ", ".join(f"k{i}: v" for i in range(2000)) + "}\n",
            r"must be a list of patterns, got \{.{1,200}$",
        ),
        ("bits: " + "1" * 5000 + "\n", r"cannot be read: Exceeds the limit|bits"),
        ("seed: -1\n", r"seed must be 0 to \d+, got -1"),
        ("seed: 99999999999999999999999\n", r"seed must be 0 to"),
        ("samples: 99999999999\n", r"samples and context must be at most 10000000"),
        ("context: 1000000000000\n", r"samples and context must be at most 10000000"),
        ("min_coverage: .nan\n", r"min_coverage must lie between 0 and 1, got nan"),
        ("group_size: 1000000000000\n", r"group size 1000000000000 is not possible"),
        ("created: 2001-99-99\n", r"cannot be read"),
        ("? [bits]\n: 4\n", r"unknown key|cannot be read"),
        ("bits: 4\n\x1b: 1\n", r"cannot be read"),
        ("bits: 4\nseed: 1\nbits: 8\n", r"cannot be read: key 'bits' is there twice .*line 1"),
        ("passes: ['qdq(observer=minmax, observer=mse)']\n", r"a parameter is there twice"),
        ("passes: pack\n" + "# " + "x" * (1 << 20), r"over 1048576 bytes"),
    ],
)
def test_recipes(capsys: Any, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(path)
    assert len(str(caught.value)) < 1000


def test_recipes_that_are_written_are_read(tmp_path: Path) -> None:
    recipe = Recipe(include=("a*", "b"), exclude=("a*",), seed=2**62)
    (tmp_path / "r.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("smooth(alpha=nan),pack", "alpha"),
        ("smooth(alpha=1e400),pack", "alpha"),
        ("smooth(alpha=-1),pack", "alpha"),
        ("awq(grid=0),pack", "grid"),
        ("gptq(damping=nan),pack", "damping"),
        ("gptq(damping=-1),pack", "damping"),
        ("gptq(sweeps=-1),pack", "sweeps"),
        ("gptq(sweeps=1000000000),pack", "sweeps"),
        ("awq(grid=1000000000),pack", "grid"),
        ("awq(seed=-1),pack", "seed"),
        ("prepare(opset=1000),pack", "opset"),
        ("prepare(opset=-1),pack", "opset"),
        ("outlier(most=nan),qdq", "most"),
        ("smooth(alpha=" + "9" * 5000 + "),pack", "alpha"),
    ],
)
def test_absurd_numbers_of_passes(capsys: Any, tmp_path: Path, passes: str, message: str) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(seeds()[0].files["model.onnx"])
    _refused(capsys, [str(model), "--passes", passes, "--dry-run"], message)


_TREE = json.loads(next(seed.files[TOKENIZER] for seed in seeds() if TOKENIZER in seed.files))
_PANICS = {
    "a normalizer that is no map": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a template of nobody": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "gone", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
    "ids beyond the texts": {"decoder": {"type": "Strip", "content": "a", "start": 5, "stop": 9}},
}


def _used(path: Path) -> None:
    tokenizer = Tokenizer(path)
    tokenizer.around()
    tokenizer.decode(tokenizer.encode("a fox"))


@pytest.mark.parametrize("name", _PANICS)
def test_tokenizers_that_panic(capfd: Any, tmp_path: Path, name: str) -> None:
    """Rust's panics are BaseExceptions, and write lines to stderr beside Python."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(_TREE | _PANICS[name]))
    with pytest.raises(UserError, match=r"tokenizer\.json .*give the model's own with --tokenizer DIR"):
        _used(path)
    assert complaints(capfd.readouterr().err) == ""


def test_the_tokenizers_stderr_comes_back(capfd: Any, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(_TREE))
    assert Tokenizer(path).encode("the") != []
    os.write(2, b"still there\n")
    print("and Python's", file=sys.stderr, flush=True)
    assert complaints(capfd.readouterr().err) == "still there\nand Python's\n"


def test_a_name_that_is_no_text(bench: Any, capsys: Any) -> None:
    """A file name of other bytes than UTF-8 is a string with lone surrogates, which nothing can write."""
    model = bench.save(tiny_mlp(), tokenizer=False)
    odd = os.fsdecode(os.fsencode(bench.folder) + b"/x\xff.npz")
    np.savez(bench.folder / "x.npz", x=np.random.default_rng(0).standard_normal((8, 48)).astype(np.float32))
    os.rename(bench.folder / "x.npz", odd)
    out = bench.folder / "out" / "model.onnx"
    command = [str(model), "--passes", "smooth,qdq", "--min-coverage", "0", "--calibration", odd, "-o", str(out)]
    assert cli.main(command) == 0, capsys.readouterr().err
    assert "x\\udcff.npz" in capsys.readouterr().out
    _refused(capsys, ["inspect", odd], r"x\\udcff\.npz is no ONNX model")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_an_error_that_stderr_does_not_take_has_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stderr", full)
        assert cli.main(["inspect", "nothing.onnx"]) == 2
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
