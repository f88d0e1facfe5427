"""Folders in, folders out: a folder stands for its model, and what is made of it needs no further option."""

import html
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from said import complaints

import qcompile
from qcompile.compiler.cli import main
from qcompile.compiler.commands import compile as compile_command
from qcompile.compiler.data.chat import chat_template, prompt_of
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.files.folders import graphs, is_checkpoint, model_file
from qcompile.compiler.pipeline import compile_model
from qcompile.models.tiny import tiny_decoder, tiny_tokenizer
from qcompile.passes.errors import UserError

QUICK = ["--passes", "pack", "--group-size", "32", "--samples", "4", "--context", "32"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture
def folder(bench: Any) -> Path:
    """An exported decoder with caches, its tokenizer, configuration, chat template and licence."""
    made = bench.save(tiny_decoder(kv_cache=True)).parent
    (made / "config.json").write_text('{"model_type": "llama"}')
    (made / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (made / "LICENSE").write_text("as is")
    (made / "notes.txt").write_text("mine")
    return Path(made)


def test_a_folder_is_compiled_with_what_lies_beside_its_model(
    folder: Path, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = bench.folder / "small"
    assert main([str(folder), *QUICK, "-o", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"model.onnx", "tokenizer.json", "config.json", "tokenizer_config.json", "LICENSE"} <= names
    assert "notes.txt" not in names
    told = capsys.readouterr().out
    wrote = {Path(line.split(maxsplit=1)[1]).name for line in told.splitlines() if line.startswith("wrote ")}
    assert wrote == names
    same = [folder / "model.onnx", *QUICK, "-o", bench.folder / "file" / "model.onnx"]
    assert main([str(word) for word in same]) == 0
    assert (bench.folder / "file" / "model.onnx").read_bytes() == (out / "model.onnx").read_bytes()
    capsys.readouterr()
    for words in (
        ["generate", out, "--prompt", "hello", "--max-tokens", "2"],
        ["eval", out, "--against", folder, "--text", bench.text, "--tokens", "64", "--context", "32"],
        ["inspect", out],
        ["bench", out, "--rounds", "1", "--decode", "0", "--prompt-tokens", "4", "--threads", "1"],
        ["package", out, "--for", "ort", "-o", bench.folder / "ort", "--kernels", "portable"],
        [out, "--dry-run", "--passes", "fuse"],
    ):
        assert main([str(word) for word in words]) == 0, capsys.readouterr().err
    assert main([str(folder), *QUICK, "--bits", "8", "-o", str(out)]) == 0, "an earlier compile is replaced"


def test_where_it_goes_without_a_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert main([folder.name, *QUICK]) == 0
    assert main([folder.name, "--passes", "qdq", *QUICK[2:]]) == 0
    monkeypatch.chdir(folder)
    assert main([".", *QUICK, "--bits", "8"]) == 0
    found = sorted(path.name for path in folder.parent.iterdir() if path.name.startswith(f"{folder.name}-"))
    assert found == [f"{folder.name}-int4", f"{folder.name}-int8"]


@pytest.mark.parametrize("layout", ["model.onnx", "onnx/model.onnx", "other.onnx"])
def test_where_the_graph_of_a_folder_lies(bench: Any, tmp_path: Path, layout: str) -> None:
    path = tmp_path / "m" / layout
    path.parent.mkdir(parents=True)
    onnx.save(onnx.load(bench.save(tiny_decoder(layers=1))), path)
    tiny_tokenizer(256, tmp_path / "m")
    assert model_file(tmp_path / "m") == path
    assert main([str(tmp_path / "m"), *QUICK, "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert main(["generate", str(tmp_path / "out"), "--prompt", "a", "--max-tokens", "1"]) == 0


def test_every_graph_of_a_folder_is_compiled(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load(bench.save(tiny_decoder(layers=1)))
    for name in ("encoder", "decoder"):
        (tmp_path / "m").mkdir(exist_ok=True)
        onnx.save(model, tmp_path / "m" / f"{name}.onnx")
    assert main([str(tmp_path / "m"), *QUICK]) == 2
    assert "holds 2 models (decoder.onnx, encoder.onnx), and no export.json makes them one" in capsys.readouterr().err
    (tmp_path / "m" / "export.json").write_text('{"graphs": {"encoder.onnx": 0, "decoder.onnx": 0}}')
    assert [path.name for path in graphs(tmp_path / "m")] == ["decoder.onnx", "encoder.onnx"]
    assert main([str(tmp_path / "m"), *QUICK, "-o", str(tmp_path / "out"), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert [Path(own["output"]).name for own in made] == ["decoder.onnx", "encoder.onnx"]
    assert len(list((tmp_path / "out").glob("*.onnx"))) == 2


@pytest.mark.parametrize("door", ["command", "function"])
def test_commands_in_the_report_name_the_folders(folder: Path, tmp_path: Path, door: str) -> None:
    """Not the graph, which may lie in the cache, nor the file in the output folder: they run as they are printed."""
    out = tmp_path / "out"
    if door == "command":
        assert main([str(folder), *QUICK, "-o", str(out)]) == 0
    else:
        qcompile.compile(folder, "pack", group_size=32, output=out)
    page = (out / "model.report.html").read_text()
    commands = re.findall(r"qcompile [^<]*", page[page.index("What to try") :].split("</dl>")[0])
    assert commands
    for told in commands:
        name, source, *words = shlex.split(html.unescape(told))
        assert (name, source, words[-2:]) == ("qcompile", str(folder), ["-o", str(out)])
    assert main([source, *words]) == 0


def test_folders_that_cannot_be_compiled(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("of something else")
    for words, told in (
        ([tmp_path / "empty"], "no .onnx model in it, and no Hugging Face model"),
        ([folder, "-o", folder], "is the folder that is compiled"),
        ([folder, "-o", tmp_path / "x.onnx"], "name one with -o DIR"),
        ([folder, "-o", tmp_path / "other"], r"has files of something else (config.json)"),
        (["inspect", tmp_path / "empty"], "no .onnx model in this folder"),
    ):
        assert main([str(word) for word in words]) == 2
        assert told in complaints(capsys.readouterr().err)
    assert (tmp_path / "other" / "config.json").read_text() == "of something else"
    shutil.copy(folder / "model.onnx", folder / "second.onnx")
    (folder / "model.onnx").rename(folder / "first.onnx")
    with pytest.raises(UserError, match=r"holds 2 models \(first\.onnx, second\.onnx\): give one"):
        model_file(folder)


def test_a_file_into_a_folder_of_something_else(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("of something else")
    assert main([str(folder / "model.onnx"), *QUICK, "-o", str(tmp_path)]) == 0
    assert "kept      config.json" in capsys.readouterr().out
    assert (tmp_path / "config.json").read_text() == "of something else"
    assert (tmp_path / "model.onnx").is_file()


def test_a_report_makes_no_file_ours(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A compile without -o puts its report beside the user's own model."""
    (tmp_path / "tokenizer.json").write_text("mine")
    (tmp_path / "config.json").symlink_to("nowhere")
    (tmp_path / "own-int4.report.json").write_text("{}")
    assert main([str(folder), *QUICK, "-o", str(tmp_path)]) == 2
    assert "files of something else (config.json, tokenizer.json)" in capsys.readouterr().err
    assert main([str(folder / "model.onnx"), *QUICK, "-o", str(tmp_path)]) == 0
    assert (tmp_path / "tokenizer.json").read_text() == "mine"
    assert not (tmp_path / "tokenizer_config.json").exists()


def test_a_file_that_comes_during_the_compile_stays(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiling(*given: Any, **how: Any) -> Any:
        report = compile_model(*given, **how)
        (tmp_path / "config.json").write_text("mine")
        return report

    monkeypatch.setattr(compile_command, "compile_model", compiling)
    assert main([str(folder), *QUICK, "-o", str(tmp_path)]) == 0
    assert "kept      config.json" in capsys.readouterr().out
    assert (tmp_path / "config.json").read_text() == "mine"


def test_an_interrupt_behind_the_first_of_several_models_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(folder / "model.onnx", folder / "second.onnx")
    (folder / "model.onnx").rename(folder / "first.onnx")
    (folder / "export.json").write_text('{"graphs": {"first.onnx": 0, "second.onnx": 0}}')

    def compiling(model: Path, *given: Any, **how: Any) -> Any:
        if model.name == "second.onnx":
            raise KeyboardInterrupt
        return compile_model(model, *given, **how)

    monkeypatch.setattr(compile_command, "compile_model", compiling)
    assert main([str(folder), *QUICK, "-o", str(tmp_path / "out")]) == 130
    told = complaints(capsys.readouterr().err)
    assert f"interrupted: {tmp_path / 'out' / 'first.onnx'} is written" in told
    (folder / "first.onnx").unlink()
    (folder / "export.json").unlink()
    assert main([str(folder), *QUICK, "-o", str(tmp_path / "out")]) == 130
    assert "interrupted, nothing was written" in complaints(capsys.readouterr().err)


def test_an_instruct_model_answers_by_its_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(folder)
    assert prompt_of(tokenizer, chat_template(tokenizer) or "", "hello") == "<user>hello\n<a>"
    words = ["generate", str(folder), "--prompt", "hello", "--max-tokens", "2"]
    assert main(words) == 0
    told = capsys.readouterr()
    assert f"after a prompt of {len(tokenizer.encode('<user>hello' + chr(10) + '<a>'))}" in told.err
    assert not told.out.startswith("hello"), "the answer alone"
    assert main([*words, "--raw", "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw["chat"] is False
    assert raw["text"].startswith("hello")
    assert raw["prompt_tokens"] == len(tokenizer.encode("hello", special=True))


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"chat_template.jinja": "a"}, "a"),
        ({"chat_template.json": '{"chat_template": "b"}'}, "b"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "default", "template": "c"}]}'}, "c"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "tools", "template": "c"}]}'}, None),
        ({"tokenizer_config.json": "no json"}, None),
        ({"chat_template.jinja": "a", "chat_template.json": '{"chat_template": "b"}'}, "a"),
    ],
)
def test_where_a_template_is(tmp_path: Path, files: dict[str, str], found: str | None) -> None:
    tiny_tokenizer(64, tmp_path)
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert chat_template(load_tokenizer(tmp_path)) == found


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for", "chat template cannot be used"),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "cannot be used"),
        ("{{ messages[0].nothing.there }}", "cannot be used"),
    ],
)
def test_templates_that_do_not_work(tmp_path: Path, template: str, told: str) -> None:
    tiny_tokenizer(64, tmp_path)
    with pytest.raises(UserError, match=told) as error:
        prompt_of(load_tokenizer(tmp_path), template, "a")
    assert "--raw" in str(error.value)


def test_what_templates_use(tmp_path: Path) -> None:
    tiny_tokenizer(64, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}, "eos_token": "</s>"}')
    template = (
        "{{ bos_token }}{% for m in messages %}{% if loop.first %}{{ m.content | tojson }}{% endif %}{% break %}"
        "{% endfor %}{{ eos_token }}{{ strftime_now('%Y') | length }}"
    )
    assert prompt_of(load_tokenizer(tmp_path), template, 'a"é') == '<s>"a\\"é"</s>4'


def test_a_checkpoint_is_exported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A Hugging Face folder becomes a compiled decoder with caches and all that lies beside it, in one command."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=128,
    )  # fmt: skip
    source = tmp_path / "Tiny.Llama-1"
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    tiny_tokenizer(256, source)
    monkeypatch.setenv("QCOMPILE_CACHE", str(tmp_path / "cache"))
    assert is_checkpoint(source)
    with pytest.raises(UserError, match="exports and compiles it"):
        model_file(source)
    assert main([str(source), *QUICK]) == 0
    out = tmp_path / "Tiny.Llama-1-int4"
    assert {"model.onnx", "config.json", "tokenizer.json", "generation_config.json"} <= {p.name for p in out.iterdir()}
    inputs = {own.name for own in onnx.load(out / "model.onnx", load_external_data=False).graph.input}
    assert "past_key_values.0.key" in inputs
    assert main(["generate", str(out), "--prompt", "hello", "--max-tokens", "2"]) == 0
    capsys.readouterr()
    assert main([str(source), *QUICK, "--bits", "8", "-o", str(tmp_path / "eight")]) == 0
    assert "translating" not in capsys.readouterr().err, "the export is kept"


def test_decoders_are_exported_with_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qcompile.compiler.commands import export

    seen: list[Any] = []

    def exporting(*_: Any, **how: Any) -> Any:
        seen.append(how["kv_cache"])
        raise UserError("far enough")

    monkeypatch.setattr(export.export, "export_model", exporting)
    for words in ([], ["--kv-cache"], ["--no-kv-cache"], ["--for", "genai"]):
        assert main(["export", "x", "-o", str(tmp_path), *words]) == 2
    assert seen == [None, True, False, True]
