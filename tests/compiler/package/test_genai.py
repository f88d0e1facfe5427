"""`qcompile package --for genai`: the configuration says what the graph says, and what genai cannot run is refused."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from conftest import Bench
from graphs.genai import _decoder
from graphs.table import Graph
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler import cli
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.files.load import load_model
from qcompile.compiler.package import folder
from qcompile.compiler.package.beside import Beside
from qcompile.compiler.package.genai import genai_config, package
from qcompile.models.tiny import tiny_decoder, tiny_encoder, tiny_tokenizer
from qcompile.passes.errors import UserError
from qcompile.passes.library import library_path

_CONFIG = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4096}
_GENERATION = {"eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": 0, "temperature": 0.7, "top_k": None}
_PLANS = {"enable_mem_pattern": False}  # session options of every folder
Change = Callable[[ir.Model], object]


def _beside(model: Path, **changed: Any) -> Path:
    """The files of a Hugging Face folder beside a model."""
    for name, table in (("config.json", _CONFIG | changed), ("generation_config.json", _GENERATION)):
        (model.parent / name).write_text(json.dumps(table), encoding="utf-8")
    return model


def _packaged(model: Path, out: Path, **options: Any) -> dict[str, Any]:
    package(model, out, **options)
    found: dict[str, Any] = json.loads((out / "genai_config.json").read_text())
    return found


def _model(bench: Bench, **sizes: Any) -> Path:
    return _beside(bench.save(tiny_decoder(kv_cache=True, outliers=False, **sizes)))


@settings(max_examples=8, deadline=None)
@given(layers=st.integers(1, 3), groups=st.sampled_from([1, 2, 4]), vocab=st.sampled_from([256, 300]))
def test_sizes_are_the_graphs(make_bench: Callable[[str], Bench], layers: int, groups: int, vocab: int) -> None:
    bench = make_bench("sizes")
    model = _model(bench, layers=layers, kv_heads=groups, vocab=vocab)
    own = _packaged(model, bench.folder / "out")["model"]
    decoder = own["decoder"]
    assert own["vocab_size"] == vocab
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (layers, groups, 16)


def test_the_rest_is_what_lies_beside_the_model(bench: Bench) -> None:
    config = _packaged(_model(bench), bench.folder / "out")
    own = config["model"]
    assert {name: own[name] for name in ("type", "context_length", "eos_token_id", "bos_token_id", "pad_token_id")} == {
        "type": "llama", "context_length": 4096, "eos_token_id": [2, 7], "bos_token_id": 1, "pad_token_id": 0,
    }  # fmt: skip
    assert own["decoder"]["num_attention_heads"] == 4
    assert own["decoder"]["inputs"] == {
        "input_ids": "input_ids",
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    assert own["decoder"]["outputs"] == {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    assert config["search"]["temperature"] == 0.7
    assert "top_k" not in config["search"]


def test_one_buffer_where_every_cache_goes_to_an_operator_that_writes_it(bench: Bench) -> None:
    model = _model(bench)
    shared = []
    for attention in ("fused", "plain"):
        bench.compile(model, attention=attention)
        out = bench.folder / attention
        shared.append(_packaged(bench.folder / "out/model.onnx", out, tokenizer=model.parent)["search"])
    assert [own["past_present_share_buffer"] for own in shared] == [True, False]


def test_kernels_go_along_where_the_graph_has_use_for_them(bench: Bench) -> None:
    model, library = _model(bench), library_path().name
    folders = {}
    for target in ("qcompile", "matmulnbits"):
        bench.compile(model, target=target, output=f"{target}/model.onnx")
        folders[target] = bench.folder / f"packaged-{target}"
        package(bench.folder / target / "model.onnx", folders[target], tokenizer=model.parent)
    config = json.loads((folders["qcompile"] / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"] == _PLANS | {"custom_ops_library": library}
    assert (folders["qcompile"] / library).read_bytes() == library_path().read_bytes()
    assert "Apache License" in (folders["qcompile"] / "LICENSES.txt").read_text()
    config = json.loads((folders["matmulnbits"] / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"] == _PLANS
    assert not (folders["matmulnbits"] / library).exists()


def test_without_kernels_where_they_are_not_wanted(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = _model(bench), bench.folder / "packaged"
    bench.compile(model)
    options = ["--for", "genai", "--tokenizer", str(model.parent), "--kernels", "portable", "-o", str(out)]
    assert cli.main(["package", str(bench.folder / "out/model.onnx"), *options]) == 0
    assert "no native kernels: left out by --kernels portable" in capsys.readouterr().out
    assert not (out / library_path().name).exists()
    assert json.loads((out / "genai_config.json").read_text())["model"]["decoder"]["session_options"] == _PLANS


def test_what_a_compile_for_genai_wrote_is_told_with_its_weights(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = _model(bench), bench.folder / "app"
    assert bench.run(model, "--for", "genai", "--passes", "pack", "-o", str(out)) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(f"wrote {out} "))
    (data,) = out.glob("*.data")
    assert data.name in line


def test_the_compiled_file_is_copied_as_it_is(bench: Bench) -> None:
    model = _model(bench)
    (model.parent / "LICENSE.md").write_text("its terms")
    bench.compile(model)
    out = bench.folder / "packaged"
    done = package(bench.folder / "out/model.onnx", out, tokenizer=model.parent)
    model_file, data = done.files[:2]
    assert data.read_bytes() == (bench.folder / "out" / data.name).read_bytes()
    assert _sorted(model_file) == _sorted(bench.folder / "out/model.onnx")
    assert {path.name for path in done.files} == {path.name for path in out.iterdir()}
    assert (out / "LICENSE.md").read_text() == "its terms"
    assert "see LICENSE.md" in (out / "LICENSES.txt").read_text()


def _sorted(path: Path) -> bytes:
    """A model file's bytes, its metadata, which has no order, in one."""
    proto = onnx.load(path, load_external_data=False)
    entries = sorted((entry.key, entry.value) for entry in proto.metadata_props)
    del proto.metadata_props[:]
    for key, value in entries:
        proto.metadata_props.add(key=key, value=value)
    return bytes(proto.SerializeToString(deterministic=True))


def test_a_folder_may_be_packaged_where_it_lies(bench: Bench) -> None:
    model = _model(bench)
    bench.compile(model)
    out = bench.folder / "out"
    before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}
    package(out / "model.onnx", out, tokenizer=model.parent)
    first = (out / "genai_config.json").read_bytes()
    package(out / "model.onnx", out)  # by the files that lie there now
    assert (out / "genai_config.json").read_bytes() == first
    package(out / "model.onnx", bench.folder / "copy")
    assert (bench.folder / "copy" / "genai_config.json").read_bytes() == first
    assert "see LICENSES" not in (bench.folder / "copy" / "LICENSES.txt").read_text()
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() == digest for path, digest in before.items())


def test_what_the_builder_wrote_beside_its_model_is_kept(bench: Bench) -> None:
    make = Graph()
    _decoder(make, packed=True)
    model = bench.save(ir.from_proto(make.model()))
    given = {
        "model": {"type": "qwen3", "context_length": 77, "eos_token_id": 5, "decoder": {"filename": "x.onnx"}},
        "search": {"max_length": 33, "past_present_share_buffer": False},
    }
    (model.parent / "genai_config.json").write_text(json.dumps(given))
    tiny_tokenizer(96, model.parent)
    bench.compile(model)
    config = _packaged(bench.folder / "out/model.onnx", bench.folder / "packaged", tokenizer=model.parent)
    own = config["model"]
    assert (own["type"], own["context_length"], own["eos_token_id"]) == ("qwen3", 77, 5)
    assert config["search"] == {"max_length": 33, "past_present_share_buffer": True}
    decoder = own["decoder"]
    assert (decoder["filename"], decoder["head_size"], decoder["num_attention_heads"]) == ("model.onnx", 16, 4)
    assert "position_ids" not in decoder["inputs"]


@pytest.mark.parametrize(("told", "written"), [("qwen3", "qwen3"), ("gpt_oss", "gptoss"), ("olmo2", "decoder")])
def test_types_that_genai_does_not_know_are_plain_decoders(bench: Bench, told: str, written: str) -> None:
    model = bench.save(tiny_decoder(kv_cache=True))
    assert _packaged(_beside(model, model_type=told), bench.folder / "out")["model"]["type"] == written


def _rename_a_cache(model: ir.Model) -> None:
    next(value for value in model.graph.inputs if value.name == "past_key_values.1.key").name = "past.seven.key"


def _skip_a_layer(model: ir.Model) -> None:
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = str(value.name).replace(".1.", ".3.")


def _another_input(model: ir.Model) -> None:
    given = next(value for value in model.graph.inputs if value.name == "attention_mask")
    model.graph.inputs.append(ir.val("token_type_ids", dtype=ir.DataType.INT64, shape=given.shape))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_rename_a_cache, r"'past\.seven\.key'.*numbered from 0"),
        (_skip_a_layer, r"past_key_values\.%d\.key.*numbered from 0"),
        (_another_input, r"'token_type_ids'.*is none that onnxruntime-genai fills"),
    ],
)
def test_graphs_of_another_contract(bench: Bench, change: Change, message: str) -> None:
    model = tiny_decoder(kv_cache=True)
    change(model)
    _refused(bench, _beside(bench.save(model)), message)


def test_graphs_without_caches(bench: Bench) -> None:
    _refused(bench, _beside(bench.save(tiny_decoder())), "no caches.*--kv-cache")


def test_models_that_write_no_text(bench: Bench) -> None:
    _refused(bench, _beside(bench.save(tiny_encoder())), "no decoder")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tokenizer.json", None, r"no tokenizer\.json.*--tokenizer DIR"),
        ("config.json", None, r"no config\.json.*--tokenizer DIR"),
        ("config.json", "[1]", "no table of keys and values"),
        ("config.json", "{", "not valid JSON"),
        ("config.json", '{"model_type": "llama"}', "add max_position_embeddings"),
        ("generation_config.json", "{}", "add eos_token_id"),
    ],
)
def test_files_that_are_missing_or_broken(bench: Bench, name: str, text: str | None, message: str) -> None:
    model = _model(bench)
    (model.parent / name).unlink() if text is None else (model.parent / name).write_text(text)
    _refused(bench, model, message)


_ODD = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | st.sampled_from([[], {}])


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(["config.json", "generation_config.json", "tokenizer_config.json", "genai_config.json"]),
    key=st.sampled_from(
        ["model_type", "max_position_embeddings", "hidden_size", "num_attention_heads", "text_config", "eos_token_id",
         "bos_token_id", "pad_token_id", "temperature", "model_max_length", "model", "search"]
    ),
    value=_ODD,
)  # fmt: skip
def test_odd_values_are_left_out_or_refused(odd: Bench, name: str, key: str, value: Any) -> None:
    """Whatever a file says: a configuration that can be read back, or one line."""
    files = {path: path.read_bytes() for path in (odd.folder / "in").glob("*.json")}
    path = odd.folder / "in" / name
    table = json.loads(files[path]) if path in files else {}
    path.write_text(json.dumps(table | {key: value}))
    plan = input_plan(load_model(odd.folder / "in" / "model.onnx"))
    told = ""
    try:
        model = load_model(odd.folder / "in" / "model.onnx")
        found = genai_config(model, plan, Beside.of(path.parent), None)
        if name != "genai_config.json":  # which is kept as it is
            json.dumps(found, allow_nan=False)
    except UserError as error:
        told = str(error)
    finally:
        path.unlink()
        for file, content in files.items():
            file.write_bytes(content)
    assert "\n" not in told


@pytest.fixture(scope="module")
def odd(make_bench: Callable[[str], Bench]) -> Bench:
    """A model whose files a test may change."""
    bench = make_bench("odd")
    _model(bench)
    return bench


def test_a_context_that_only_the_tokenizer_tells(bench: Bench) -> None:
    model = _beside(bench.save(tiny_decoder(kv_cache=True)), max_position_embeddings=None)
    (model.parent / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    config = _packaged(model, bench.folder / "out")
    assert (config["model"]["context_length"], config["search"]["max_length"]) == (512, 512)


def test_a_model_that_was_not_packaged_is_never_replaced(bench: Bench) -> None:
    model = _model(bench)
    bench.compile(model, output="in/small.onnx")
    _refused(bench, bench.folder / "in" / "small.onnx", "no earlier package", out="in")


def _refused(bench: Bench, model: Path, message: str, *, out: str = "out") -> None:
    """A UserError of one line that names a file, and nothing has changed."""
    before = bench.snapshot()
    with pytest.raises(UserError) as error:
        package(model, bench.folder / out)
    assert re.search(message, str(error.value)), str(error.value)
    assert str(bench.folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert bench.snapshot() == before


def test_a_session_that_fails_leaves_the_folder_as_it_was(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise UserError("ONNX Runtime cannot load it")

    model, out = _model(bench), bench.folder / "out"
    package(model, out)
    bench.save(tiny_decoder(kv_cache=True, seed=1), "model.onnx")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(folder, "session", broken)
    with pytest.raises(UserError):
        package(model, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_compile_may_make_the_folder(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """As `package` does behind it, but that attention has the contract of genai."""
    model, out = _model(bench), bench.folder / "app"
    assert bench.run(model, "--passes", "pack", "--for", "genai", "-o", str(out)) == 0
    assert "libqcompile_kernels" in capsys.readouterr().out
    compiled = onnx.load(out / "model.onnx", load_external_data=False)
    attention = [node for node in compiled.graph.node if node.op_type == "GroupQueryAttentionF16"]
    assert {len(node.input) for node in attention} == {9}
    assert json.loads((out / "genai_config.json").read_text())["search"]["past_present_share_buffer"]
    assert (out / "model.report.json").exists()
    assert bench.run(model, "--passes", "pack", "--for", "genai", "-o", str(out)) == 0  # again, over itself


def test_plain_attention_stays_plain(bench: Bench) -> None:
    model, out = _model(bench), bench.folder / "app"
    assert bench.run(model, "--passes", "pack", "--attention", "plain", "--for", "genai", "-o", str(out)) == 0
    assert not json.loads((out / "genai_config.json").read_text())["search"]["past_present_share_buffer"]


def test_what_genai_cannot_run_is_said_before_the_compile(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    model = _beside(bench.save(tiny_decoder()))
    bench.refuses(capsys, model, ["--for", "genai", "-o", str(bench.folder / "app")], "no caches.*--kv-cache")
    (model.parent / "config.json").unlink()
    cached = bench.save(tiny_decoder(kv_cache=True))
    bench.refuses(capsys, cached, ["--for", "genai", "-o", str(bench.folder / "app")], r"no config\.json")
    bench.refuses(capsys, _beside(cached), ["--for", "genai", "-o", str(cached.parent)], "is the input file")
