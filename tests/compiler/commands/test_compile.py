"""compiler/commands/compile.py and dry_run.py: options, default names, recipes, what is printed and what is not."""

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from said import complaints

from qcompile.compiler import cli
from qcompile.compiler.files.load import load_model
from qcompile.compiler.recipe import Recipe, load_recipe, parse_passes
from qcompile.models.tiny import tiny_conv, tiny_decoder


def _recipe(bench: Any) -> dict[str, Any]:
    return json.loads((bench.folder / "out" / "model.report.json").read_text())["recipe"]


def _operators(path: Path) -> set[str]:
    return {f"{node.domain}:{node.op_type}" for node in load_model(path).graph}


def test_options_reach_the_recipe(bench: Any) -> None:
    options = [
        "--passes",
        "pack",
        "--bits",
        "8",
        "--group-size",
        "16",
        "--symmetric",
        "--lm-head",
        "keep",
        "--seed",
        "4",
    ]
    more = ["--embedding", "4", "--exclude", "*down*", "--exclude", "*up*", "--min-coverage", "0.5", "--target", "qdq"]
    assert bench.run(bench.save(tiny_decoder()), *options, *more) == 0
    expected = Recipe(
        passes=parse_passes("pack"), bits=8, group_size=16, symmetric=True, lm_head=None, embedding=4, seed=4,
        exclude=("*down*", "*up*"), min_coverage=0.5, target="qdq", samples=8, context=32,
    )  # fmt: skip
    assert _recipe(bench) == expected.to_dict()


@pytest.mark.parametrize(
    ("options", "packed", "kept"),
    [
        ([], 15, {}),
        (["--exclude", "*mlp*"], 9, {"excluded by '*mlp*'": 6}),
        (["--include", "*mlp*", "--include", "lm_head"], 7, {"not among the included names": 8}),
        (["--lm-head", "keep"], 14, {"lm_head is kept in float": 1}),
    ],
)
def test_what_the_user_keeps_is_no_gap(bench: Any, options: list[str], packed: int, kept: dict[str, int]) -> None:
    assert bench.run(bench.save(tiny_decoder()), "--passes", "pack", *options) == 0
    report = json.loads((bench.folder / "out" / "model.report.json").read_text())
    linears = [d for d in report["decisions"]["pack"] if d["detail"]["kind"] == "MatMul"]
    assert sum(d["action"] == "quantized" for d in linears) == packed
    reasons = [d["reason"] for d in linears if d["action"] == "kept"]
    assert {reason: reasons.count(reason) for reason in reasons} == kept
    assert report["coverage"] == 1.0


@pytest.mark.parametrize(
    ("target", "operators"),
    [
        ("qcompile", {"qcompile:MatMulInt4", "qcompile:MatMulInt8", "qcompile:EmbeddingInt8"}),
        ("matmulnbits", {"com.microsoft:MatMulNBits", "com.microsoft:GatherBlockQuantized"}),
        ("qdq", {":DequantizeLinear"}),
    ],
)
@pytest.mark.parametrize("way", ["--target", "pack(target=)"])
def test_targets(bench: Any, target: str, operators: set[str], way: str) -> None:
    options = ["--target", target, "--passes", "pack"] if way == "--target" else ["--passes", f"pack(target={target})"]
    assert bench.run(bench.save(tiny_decoder()), *options) == 0
    found = _operators(bench.folder / "out" / "model.onnx")
    assert {op for op in found if op.split(":")[0]} <= operators
    assert operators <= found
    assert _recipe(bench)["target"] == target


def test_a_saved_recipe_gives_the_same_bytes(bench: Any, tmp_path: Path) -> None:
    source = bench.save(tiny_decoder())
    recipe = tmp_path / "r.yaml"
    passes = "smooth(alpha=0.5),pack"
    assert bench.run(source, "--passes", passes, "--seed", "2", "--save-recipe", str(recipe)) == 0
    (first,) = [path.name for path in (bench.folder / "out").glob("*.data")]
    assert load_recipe(recipe).passes == parse_passes(passes)
    assert cli.main([str(source), "--recipe", str(recipe), "-o", str(bench.folder / "again" / "model.onnx")]) == 0
    assert [path.name for path in (bench.folder / "again").glob("*.data")] == [first]


def test_options_win_over_the_recipe_file(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('passes = "pack"\nbits = 8\nseed = 9\n')
    assert bench.run(bench.save(tiny_decoder()), "--recipe", str(tmp_path / "r.toml"), "--bits", "4") == 0
    assert (_recipe(bench)["bits"], _recipe(bench)["seed"]) == (4, 9)


def test_default_names(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bench.save(tiny_decoder())
    monkeypatch.chdir(source.parent)
    quick = ["--passes", "pack", "--group-size", "32"]
    assert cli.main(["model.onnx", *quick]) == 0
    assert Path("model-int4.onnx").is_file()
    assert cli.main(["model.onnx", *quick, "--bits", "8"]) == 0
    assert Path("model-int8.onnx").is_file()
    assert Path("model-int4.onnx").is_file()
    assert cli.main(["model.onnx", *quick, "-o", "folder/"]) == 0
    assert Path("folder/model.onnx").is_file()


def test_what_is_printed(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.run(bench.save(tiny_decoder()), "--passes", "pack") == 0
    printed = capsys.readouterr()
    assert complaints(printed.err) == ""
    assert [f"s  {step}" in printed.err for step in ("loading", "preparing", "saving")] == [True] * 3
    assert "coverage  100.0%" in printed.out
    assert re.search(r"size      0\.4 MB → 0\.1 MB, 5\.79 bits per quantized MatMul weight", printed.out)
    written = [line.split()[1] for line in printed.out.splitlines() if line.startswith("wrote ")]
    assert sorted(Path(name).name for name in written) == sorted(os.listdir(bench.folder / "out"))


@pytest.mark.parametrize("passes", ["pack", "smooth,awq,gptq,pack"])
def test_a_dry_run_tells_the_plan_and_does_nothing(bench: Any, capsys: pytest.CaptureFixture[str], passes: str) -> None:
    source = bench.save(tiny_decoder())
    before = bench.snapshot()
    assert bench.run(source, "--passes", passes, "--dry-run") == 0
    assert bench.snapshot() == before
    shown = capsys.readouterr().out
    assert f"prepare, {passes.replace(',', ', ')}" in shown
    assert "segments  5; inputs: input_ids, attention_mask" in shown
    assert re.search(r"memory    about [\d.]+ GB; disk about [\d.e-]+ GB", shown)
    predicted = float(re.search(r"→ about (\d+\.\d) MB", shown)[1])  # type: ignore[index]
    report = bench.compile(source, passes)
    assert predicted == pytest.approx(report.compiled_bytes / 1e6, abs=0.06)


def test_a_second_compile_replaces_the_first(bench: Any) -> None:
    source = bench.save(tiny_decoder())
    for seed, passes in enumerate(("pack", "gptq,pack", "pack")):
        assert bench.run(source, "--passes", passes, "--seed", str(seed)) == 0
        names = sorted(os.listdir(bench.folder / "out"))
        assert len(names) == 4, "the model, its data, the report twice; nothing of the run before"


@pytest.mark.parametrize("name", ["a/file/recipe.yaml", "folder", "pipe", "out/model.onnx", "out/model.report.json"])
def test_a_recipe_that_cannot_be_saved_is_told_before_the_work(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = bench.save(tiny_decoder(layers=1))
    (bench.folder / "a").mkdir()
    (bench.folder / "a" / "file").write_text("x")
    (bench.folder / "folder").mkdir()
    os.mkfifo(bench.folder / "pipe")

    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("qcompile.compiler.commands.compile.compile_model", worked)
    message = "cannot write|is a (folder|FIFO)|would overwrite a model or its report"
    bench.refuses(capsys, source, ["--save-recipe", str(bench.folder / name)], message)


def test_a_compile_that_fails_saves_no_recipe(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = bench.save(tiny_decoder(layers=1))
    recipe = bench.folder / "r" / "recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text("bits: 8\n")
    bench.refuses(
        capsys, source, ["--exclude", "nothing", "--save-recipe", str(recipe)], "--exclude 'nothing' matches no"
    )
    assert [path.name for path in recipe.parent.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("name", ["pipe", "link", "out/model.report.json"])
def test_the_output_replaces_nothing_but_files(bench: Any, capsys: pytest.CaptureFixture[str], name: str) -> None:
    source, place = bench.save(tiny_decoder(layers=1)), bench.folder / name
    place.parent.mkdir(exist_ok=True)
    os.mkfifo(bench.folder / "pipe" if name == "link" else place)
    if name == "link":
        place.symlink_to(bench.folder / "pipe")
    given = bench.folder / "out" / "model.onnx" if name.startswith("out") else place
    bench.refuses(capsys, source, ["-o", str(given)], "is a FIFO, and would be replaced by a file")


@pytest.mark.parametrize(
    ("passes", "told"),
    [
        ("pack", ["2 Conv float: no packed format for Conv weights", "2 MatMul int4 g32 asym"]),
        ("qdq", ["2 Conv int8 per channel static, uint8 asym", "2 MatMul int8 per channel"]),
        ("prepare", ["1 Conv float: no pass of the list", "1 MatMul float: no pass of the list"]),
    ],
)
def test_a_dry_run_tells_of_every_large_constant(
    bench: Any, capsys: pytest.CaptureFixture[str], passes: str, told: list[str]
) -> None:
    source = bench.save(tiny_conv(), tokenizer=False)
    assert bench.run(source, "--passes", passes, "--dry-run") == 0
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for part in told:
        assert any(line.startswith(part) for line in shown), shown


def test_a_place_that_cannot_be_written_is_told_before_the_work(
    bench: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = bench.save(tiny_decoder(layers=1))
    before = [path.name for path in bench.folder.iterdir()]
    (bench.folder / "file").write_text("x")

    def worked(*_: Any, **__: Any) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("qcompile.compiler.commands.compile.compile_model", worked)
    bench.refuses(capsys, source, ["-o", str(bench.folder / "file" / "a" / "o.onnx")], r"cannot write .*file is a file")
    bench.refuses(capsys, source, ["-o", str(bench.folder / f"{'n' * 240}.onnx")], "takes no file of that name")
    if sys.platform == "linux":
        bench.refuses(capsys, source, ["-o", "/proc/o.onnx"], "the folder /proc takes no file of that name .*; choose")
    assert sorted(path.name for path in bench.folder.iterdir()) == sorted([*before, "file"]), "the trial left nothing"

    def denied(**_: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("qcompile.compiler.files.publish.tempfile.mkdtemp", denied)
    bench.refuses(capsys, source, ["-o", str(bench.folder / "new" / "o.onnx")], "cannot write .* is read-only; choose")
