"""Caches in half precision through the whole job: by default for genai, elsewhere where they are asked for."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.compiler import cli
from qcompile.compiler.data.decoding import Decoding
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.files.load import load_model
from qcompile.models.tiny import tiny_decoder
from qcompile.models.tiny.tokenizer import tiny_tokenizer
from qcompile.runtime.sessions import session


@pytest.fixture(scope="module")
def made(make_bench: Any) -> Any:
    bench = make_bench("kv16")
    source = bench.save(tiny_decoder(kv_cache=True, outliers=False))
    return bench, source, bench.compile(source, "pack", caches="float16")


def _file(made: Any) -> Path:
    return Path(made[0].folder / "out" / "model.onnx")


def test_the_report_tells_what_they_cost(made: Any) -> None:
    report = made[2]
    assert [own.action for own in report.decisions["kv16"]] == ["coded"] * 2
    told = re.match("4 of 4 in half precision, which alone change logits by ([^,]+), .+ nats a", report.caches)
    assert told is not None
    assert 0 < float(told[1]) < 1e-3


@pytest.mark.parametrize("kernels", ["portable", "native"])
def test_token_by_token_it_is_what_it_is_at_once(made: Any, kernels: str) -> None:
    path = _file(made)
    plan, ids = input_plan(load_model(path)), np.random.default_rng(3).integers(0, 256, (1, 24))
    assert {pair.past.dtype for pair in plan.past} == {np.dtype(np.float16)}
    assert all(pair.shared and pair.empty(2).shape == (2, 2, 0, 16) for pair in plan.past)
    whole = Decoding(session(path, kernels=kernels), plan).logits(ids)
    stepwise = Decoding(session(path, kernels=kernels), plan)
    parts = [stepwise.logits(ids[:, :9]), *(stepwise.logits(ids[:, i : i + 1]) for i in range(9, 24))]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=2e-3 * np.abs(whole).max())


def test_every_command_runs_it(made: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bench, source, _ = made
    path, folder = str(_file(made)), str(source.parent)
    assert cli.main(["generate", path, "--prompt", "To be", "--max-tokens", "4", "--tokenizer", folder]) == 0
    text = ["--text", str(bench.text), "--tokens", "64", "--context", "32"]
    assert cli.main(["eval", path, "--against", str(source), *text]) == 0
    assert cli.main(["inspect", path]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ([], np.float16),
        (["--caches", "float"], np.float32),
        (["--attention", "plain"], np.float32),
        (["--target", "matmulnbits"], np.float32),
        (["--passes", "pack,kv"], np.int8),
    ],
)
def test_what_is_compiled_for_genai_has_them(bench: Any, options: list[str], kind: type) -> None:
    source = bench.save(tiny_decoder(kv_cache=True, outliers=False), tokenizer=False)
    tiny_tokenizer(256, source.parent)
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    (source.parent / "config.json").write_text(json.dumps(config | {"eos_token_id": 255}))
    folder = bench.folder / "app"
    own = options if "--passes" in options else ["--passes", "pack", *options]
    data = ["--calibration", str(bench.text), "--samples", "4", "--context", "32"]
    assert cli.main([str(source), "--for", "genai", "-o", str(folder), *own, *data]) == 0
    assert {pair.past.dtype for pair in input_plan(load_model(folder / "model.onnx")).past} == {np.dtype(kind)}


def test_a_compiled_file_may_get_them_later(made: Any, bench: Any) -> None:
    source = bench.save(tiny_decoder(kv_cache=True, outliers=False))
    bench.compile(source, "pack")
    report = bench.compile(bench.folder / "out" / "model.onnx", "kv16", output="late/model.onnx", calibration=())
    assert report.caches.startswith("4 of 4 in half precision")
