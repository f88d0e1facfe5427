"""What `qcompile package --for genai` writes runs in onnxruntime-genai, and writes the text that `generate` writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
from conftest import Bench

from qcompile.compiler.measure.generate import Sampling, generate_ids
from qcompile.compiler.measure.loaded import Subject
from qcompile.compiler.package.genai import package
from qcompile.models.tiny import tiny_decoder
from qcompile.models.tiny.tokenizer import tiny_tokenizer

pytestmark = pytest.mark.slow
_WHEEL = "onnxruntime-genai==0.18.0"
_TOKENS = 12
_PROMPTS = ["the old house", "a", "rain on the sea"]
# Greedy tokens behind the prompts, as one batch, of the model in a folder.
_PROGRAM = """
import json, sys
import onnxruntime_genai as og
folder, tokens, *prompts = sys.argv[1:]
model = og.Model(folder)
tokenizer, params = og.Tokenizer(model), og.GeneratorParams(model)
params.set_search_options(max_length=64, batch_size=len(prompts), do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode_batch(prompts))
found = [[] for _ in prompts]
for _ in range(int(tokens)):
    generator.generate_next_token()
    for own, token in zip(found, generator.get_next_tokens()):
        own.append(int(token))
print(json.dumps([[tokenizer.encode(prompt).tolist() for prompt in prompts], found]))
"""


@pytest.fixture(scope="module")
def genai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with onnxruntime-genai alone, which this environment does not have."""
    target = tmp_path_factory.mktemp("genai")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), _WHEEL]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"pip cannot install {_WHEEL}: {done.stderr.strip().splitlines()[-1:]}")
    return target


def _generated(genai: Path, folder: Path, prompts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """(ids of the prompts, ids behind them)"""
    program = [sys.executable, "-c", _PROGRAM, str(folder), str(_TOKENS), *prompts]
    done = subprocess.run(
        program, capture_output=True, text=True, env={"PYTHONPATH": str(genai), "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    given, found = json.loads(done.stdout.splitlines()[-1])
    return given, found


def _model(bench: Bench, model: ir.Model) -> Path:
    """A model with the files of a Hugging Face folder; no token that it writes ends a text."""
    path = bench.save(model, tokenizer=False)
    tiny_tokenizer(256, path.parent)
    config = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    (path.parent / "config.json").write_text(json.dumps(config | {"eos_token_id": 255, "pad_token_id": 255}))
    return path


@pytest.mark.parametrize("batch", [False, True], ids=["one text", "texts of different length"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("passes", "settings"),
    [
        ("pack", {}),
        ("pack,fuse", {}),
        ("pack", {"attention": "plain"}),
        ("pack", {"target": "matmulnbits"}),
        ("pack,fuse,fuse_attention(padding=false)", {}),
        ("", {}),
        ("pack,kv", {"attention": "plain"}),
        ("pack,kv", {}),
        ("pack", {"caches": "float16"}),
    ],
    ids=["fused", "joined", "plain", "matmulnbits", "by lengths", "float", "plain coded", "coded", "half precision"],
)
def test_the_text_is_that_of_generate(
    bench: Bench, genai: Path, passes: str, settings: dict[str, str], dtype: str, *, batch: bool
) -> None:
    model = _model(bench, tiny_decoder(kv_cache=True, outliers=False, dtype=dtype))
    source = model
    if passes:
        bench.compile(model, passes, **settings)
        source = bench.folder / "out" / "model.onnx"
    folder = bench.folder / "packaged"
    package(source, folder, tokenizer=model.parent)
    prompts = _PROMPTS if batch else _PROMPTS[:1]
    given, found = _generated(genai, folder, prompts)
    subject = Subject(source, accuracy_level=0 if source is model else 4)
    expected = [list(generate_ids(subject, ids, _TOKENS, Sampling())) for ids in given]
    assert found == expected


def test_a_program_in_cpp_gives_the_same_tokens(bench: Bench, genai: Path, tmp_path: Path) -> None:
    """The library's own loop, without Python: what C++, C#, Java and Swift programs call."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    model = _model(bench, tiny_decoder(kv_cache=True, outliers=False))
    bench.compile(model)
    source, folder = bench.folder / "out" / "model.onnx", bench.folder / "packaged"
    package(source, folder, tokenizer=model.parent)
    program, library = tmp_path / "main", genai / "onnxruntime_genai" / "libonnxruntime-genai.so"
    text = Path(__file__).with_name("genai_main.cpp")
    command = [compiler, "-std=c++17", str(text), str(library), f"-Wl,-rpath,{library.parent}", "-o", str(program)]
    subprocess.run(command, check=True)
    (onnx_runtime,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*")
    done = subprocess.run(
        [str(program), str(folder), str(_TOKENS), _PROMPTS[0]],
        capture_output=True,
        text=True,
        env=os.environ | {"ORT_LIB_PATH": str(onnx_runtime)},
    )
    assert done.returncode == 0, done.stderr
    given, _ = _generated(genai, folder, _PROMPTS[:1])
    expected = list(generate_ids(Subject(source, accuracy_level=4), given[0], _TOKENS, Sampling()))
    assert [int(token) for token in done.stdout.split()] == expected
