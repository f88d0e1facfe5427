"""Caches in codes through the whole job: what is written is verified, told of, and run by every command."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import QUICK

from qcompile.compiler import cli
from qcompile.compiler.api.calibrate import calibrate_model
from qcompile.compiler.data.decoding import Decoding
from qcompile.compiler.data.feeds import npz_batches
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.files.load import load_model
from qcompile.compiler.measure.evaluate import score_outputs
from qcompile.compiler.measure.loaded import Subject
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.runtime.sessions import session


def _unseen(bench: Any) -> Path:
    """A text that no calibration has seen."""
    path = Path(bench.folder) / "unseen.txt"
    path.write_text(bench.text.read_text().swapcase())
    return path


@pytest.fixture(scope="module")
def made(make_bench: Any) -> Any:
    """The tiny decoder compiled with float and with int8 caches, weights alike."""
    bench = make_bench("kv")
    source = bench.save(tiny_decoder(kv_cache=True, outliers=False))
    reports = {
        passes: bench.compile(source, passes, output=f"out/{name}.onnx")
        for name, passes in (("float", "pack"), ("kv", "pack,kv"))
    }
    return bench, source, reports


def test_the_report_tells_what_they_cost(made: Any) -> None:
    _, _, reports = made
    own = reports["pack,kv"]
    assert [decision.action for decision in own.decisions["kv"]] == ["coded"] * 2
    assert own.caches.startswith("4 of 4 in codes, which alone change logits by 0.00")
    assert "nats a token of KL" in own.caches
    assert reports["pack"].caches == ""
    errors = {output.name: output.relative for output in own.outputs}
    floats = {output.name: output.relative for output in reports["pack"].outputs}
    assert errors.keys() == floats.keys()
    for name, error in errors.items():  # caches are compared as floats, whatever the file gives
        assert 0 < error < floats[name] + 0.02, name


def test_the_file_takes_and_gives_codes(made: Any) -> None:
    plan = input_plan(load_model(made[0].folder / "out" / "kv.onnx"))
    assert {pair.past.dtype for pair in plan.past} == {np.dtype(np.int8)}
    assert all(pair.shared and pair.empty(2).shape == (2, 2, 0, 16) for pair in plan.past)


def test_token_by_token_it_is_what_it_is_at_once(made: Any) -> None:
    """Attention reads the codes of the rows of its own run, too: how a text is cut into runs makes no difference."""
    path = made[0].folder / "out" / "kv.onnx"
    plan, ids = input_plan(load_model(path)), np.random.default_rng(3).integers(0, 256, (1, 24))
    whole = Decoding(session(path, kernels="portable"), plan).logits(ids)
    stepwise = Decoding(session(path, kernels="portable"), plan)
    parts = [stepwise.logits(ids[:, :9]), *(stepwise.logits(ids[:, i : i + 1]) for i in range(9, 24))]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-3 * np.abs(whole).max())


def test_generate_eval_and_bench_run_it(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench, source, _ = made
    path, folder = str(bench.folder / "out" / "kv.onnx"), str(source.parent)
    assert cli.main(["generate", path, "--prompt", "To be", "--max-tokens", "4", "--tokenizer", folder]) == 0
    text = ["--text", str(_unseen(bench)), "--tokens", "64", "--context", "32"]
    assert cli.main(["eval", path, "--against", str(source), *text]) == 0
    sizes = ["--prompt-tokens", "4", "--decode", "2", "--decode-after", "3", "--threads", "1", "--rounds", "1"]
    assert cli.main(["bench", path, "--against", str(source), *sizes]) == 0
    assert "decode 2 after 3" in capsys.readouterr().out


def test_caches_that_are_given_may_be_floats(made: Any, tmp_path: Path) -> None:
    """An .npz of a model with float caches is data for one with codes."""
    bench = made[0]
    random, names = np.random.default_rng(0), [f"{i}.{kind}" for i in (0, 1) for kind in ("key", "value")]
    caches = {f"past_key_values.{name}": random.standard_normal((1, 2, 4, 16)).astype("f4") * 0.3 for name in names}
    tokens = {"input_ids": random.integers(0, 256, (1, 8)), "attention_mask": np.ones((1, 12), np.int64)}
    data = tmp_path / "data.npz"
    np.savez(data, **tokens, position_ids=np.arange(4, 12)[None], **caches)
    paths = [bench.folder / "out" / f"{name}.onnx" for name in ("float", "kv")]
    found = score_outputs(paths[0], paths[1:], lambda plan: npz_batches(plan, [data]), kernels="portable")
    assert all(own.sqnr > 35 for own in found)  # 1 in 127 and less
    taken = npz_batches(Subject(paths[1], kernels="portable").plan, [data])[0].feeds
    assert taken["past_key_values.0.key"].dtype == np.int8


def test_ranges_may_come_from_a_file(made: Any) -> None:
    bench, source, _ = made
    own = bench.folder / "ranges"
    settings = Recipe(**{**QUICK, "passes": parse_passes("pack,kv")})
    calibrate_model(source, settings, output=own, calibration=[str(bench.text)])
    bench.compile(source, "pack,kv", output="out/again.onnx", statistics=own)
    scales = [
        {name: value.const_value.numpy() for name, value in load_model(path).graph.initializers.items()}
        for path in (bench.folder / "out" / "kv.onnx", bench.folder / "out" / "again.onnx")
    ]
    kept = [name for name in scales[0] if name.startswith("present")]
    assert len(kept) == 4
    for name in kept:
        np.testing.assert_array_equal(scales[0][name], scales[1][name])


def test_float_weights_may_have_coded_caches(bench: Any) -> None:
    source = bench.save(tiny_decoder(kv_cache=True, outliers=False))
    report = bench.compile(source, "fuse_attention,kv", min_coverage=0)
    assert "4 of 4 in codes" in report.caches
    assert all(output.relative < 0.02 for output in report.outputs)


def test_a_compiled_file_may_have_its_caches_coded(made: Any) -> None:
    """Its weights are what they were; its caches alone are other ones."""
    bench = made[0]
    report = bench.compile(
        bench.folder / "out" / "float.onnx", "fuse_attention,kv", output="out/late.onnx", calibration=()
    )
    assert "4 of 4 in codes" in report.caches
    assert report.outputs[0].name == "logits"
    assert report.outputs[0].relative < 0.02
    paths = [bench.folder / "out" / f"{name}.onnx" for name in ("float", "late")]
    stored = [
        {
            name: v.const_value.numpy().tobytes()
            for name, v in load_model(path).graph.initializers.items()
            if "proj" in name
        }
        for path in paths
    ]
    assert stored[0] == stored[1]
    assert len(stored[0]) > 14


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tiny_encoder, ["--passes", "pack,kv"], "kv: the model has no caches to store in codes: export it with --kv"),
        (tiny_decoder, ["--passes", "pack,kv"], "kv: the model has no caches"),
        (tiny_decoder, ["--passes", "kv"], "kv: the model has no caches"),
        (tiny_decoder, ["--passes", "pack,kv", "--attention", "plain"], "kv: the model has no caches"),
        (tiny_decoder, ["--passes", "pack,kv(bits=3)"], "parameter bits takes 8, got 3"),
        (tiny_decoder, ["--passes", "pack,kv(scales=row)"], "parameter scales takes 'channel' or 'tensor', got 'row'"),
    ],
)
def test_what_it_is_not_for_is_refused(
    bench: Any, capsys: pytest.CaptureFixture[str], model: Any, options: list[str], message: str
) -> None:
    bench.refuses(capsys, bench.save(model()), options, message)


def test_caches_of_attention_that_cannot_be_fused_are_coded_by_standard_operators(bench: Any) -> None:
    """Heads of 12 channels, which GroupQueryAttention does not take."""
    report = bench.compile(bench.save(tiny_decoder(kv_cache=True, hidden=48, outliers=False)), "pack,kv")
    kept = [decision.reason for decision in report.decisions["fuse_attention"] if decision.action == "kept"]
    assert len(kept) == 2
    assert all("takes heads and halves of rotations in multiples of 8, not 12" in reason for reason in kept)
    told = "int8 caches by standard operators, a scale for each channel"
    assert [decision.reason for decision in report.decisions["kv"]] == [told] * 4
    assert "4 of 4 in codes" in report.caches


@pytest.mark.parametrize("passes", ["kv", "pack,kv", "qdq,kv", "dynamic,kv(scales=tensor)"])
def test_standard_operators_alone_hold_codes(bench: Any, passes: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Written, read again, run with one token a time and at once, and by every command."""
    source = bench.save(tiny_decoder(kv_cache=True, outliers=False))
    report = bench.compile(source, passes, attention="plain", target="qdq", min_coverage=0)
    assert report.caches.startswith("4 of 4 in codes, which alone change logits by 0.0"), report.caches
    assert all(node.error < 0.2 for node in report.nodes)  # scales on what a node reads are on what its float one reads
    path = bench.folder / "out" / "model.onnx"
    model = load_model(path)
    assert not {node.op_type for node in model.graph} & {"GroupQueryAttention"}
    plan, ids = input_plan(model), np.random.default_rng(3).integers(0, 256, (1, 24))
    assert {pair.past.dtype for pair in plan.past} == {np.dtype(np.int8)}
    assert all(pair.codes is not None and not pair.shared for pair in plan.past)
    whole = Decoding(session(path, kernels="portable"), plan).logits(ids)
    stepwise = Decoding(session(path, kernels="portable"), plan)
    parts = [stepwise.logits(ids[:, :9]), *(stepwise.logits(ids[:, i : i + 1]) for i in range(9, 24))]
    exact = 2e-3 if passes in ("kv", "pack,kv") else 0.1  # int8 activations of a row depend on the other rows' range
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=exact * np.abs(whole).max())
    folder = str(source.parent)
    assert cli.main(["generate", str(path), "--prompt", "To be", "--max-tokens", "4", "--tokenizer", folder]) == 0
    text = ["--text", str(_unseen(bench)), "--tokens", "64", "--context", "32"]
    assert cli.main(["eval", str(path), "--against", str(source), *text]) == 0
    capsys.readouterr()


@pytest.mark.parametrize("attention", ["plain", "fused"])
def test_caches_whose_width_has_a_name_may_hold_codes(bench: Any, attention: str) -> None:
    """As genai's builder writes them; the file tells heads and width by what is appended, or by the queries."""
    model = tiny_decoder(kv_cache=True, outliers=False)
    for value in model.graph.inputs:
        if "past" in str(value.name) and value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:3], "kv_cache_dim"])
    bench.compile(bench.save(model), "pack,kv", attention=attention)
    plan = input_plan(load_model(bench.folder / "out" / "model.onnx"))
    assert {pair.empty(1).shape for pair in plan.past} == {(1, 2, 0, 16)}
    assert {pair.past.dtype for pair in plan.past} == {np.dtype(np.int8)}
