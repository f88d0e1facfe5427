"""What `qcompile package --for transformers.js` writes runs in Node, and gives what it gives here.

By transformers.js (onnxruntime-node), and by onnxruntime-web in WebAssembly, which is what it takes in browsers.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Bench

from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.files.load import load_model
from qcompile.compiler.measure.generate import Sampling, generate_ids
from qcompile.compiler.measure.loaded import Subject
from qcompile.compiler.package.web import package_web
from qcompile.compiler.recipe import Step
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.runtime.sessions import session

pytestmark = pytest.mark.slow
_PACKAGE = "@huggingface/transformers@4.3.2"
_TOKENS = 12
_TEXT = "the old house"
_LOAD = """
import { AutoTokenizer, AutoModel, AutoModelForCausalLM, env } from '@huggingface/transformers';
const [root, name, text, tokens] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = root;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const inputs = tokenizer(text);
const ids = inputs.input_ids.tolist()[0].map(Number);
"""
_PROGRAMS = {
    "generate.mjs": f"""{_LOAD}
const model = await AutoModelForCausalLM.from_pretrained(name);
const all = await model.generate({{ ...inputs, max_new_tokens: Number(tokens), do_sample: false }});
console.log(JSON.stringify([ids, all.tolist()[0].map(Number)]));
""",
    "encode.mjs": f"""{_LOAD}
const model = await AutoModel.from_pretrained(name);
const found = await model(inputs);
console.log(JSON.stringify([ids, Array.from(found.last_hidden_state.data)]));
""",
    # Element types by which a feed is made; half precision goes as its bits.
    "wasm.mjs": """
import * as ort from 'onnxruntime-web';
import fs from 'fs';
const [path, given] = process.argv.slice(2);
const arrays = { int64: x => BigInt64Array.from(x.map(BigInt)), float32: x => Float32Array.from(x),
                 float16: x => Uint16Array.from(x), int8: x => Int8Array.from(x) };
const feeds = {};
for (const [name, [type, numbers, shape]] of Object.entries(JSON.parse(fs.readFileSync(given))))
  feeds[name] = new ort.Tensor(type, arrays[type](numbers), shape);
const folder = path.replace(/[^/]*$/, '');
const externalData = fs.readdirSync(folder).filter(name => name.includes('.onnx_data'))
  .map(name => ({ path: name, data: fs.readFileSync(folder + name) }));
ort.env.wasm.numThreads = 1;
const own = await ort.InferenceSession.create(fs.readFileSync(path), { executionProviders: ['wasm'], externalData });
const found = (await own.run(feeds))[own.outputNames[0]];
console.log(JSON.stringify([found.type, Array.from(found.data)]));
""",
}
# By what the table of docs/web.md calls them; None: the float model.
_G32 = {"group": 32}
_FILES: dict[str, dict[str, Any] | None] = {
    "float": None,
    "bodies": {},
    "plain": {"attention": "plain"},
    "matmulnbits": {"target": "matmulnbits"},
    "qdq": {"target": "qdq"},
    "int8": {"passes": "smooth,qdq", "target": "qdq"},
    "int3": {"weights": Step("int3", _G32), "lm_head": Step("int6", _G32), "embedding": Step("int2", _G32)},
    "pairs3": {"weights": Step("pairs3"), "lm_head": Step("pairs3"), "embedding": Step("pairs2.5")},
    "nvfp4": {"weights": Step("nvfp4"), "lm_head": Step("nvfp4"), "embedding": Step("nvfp4")},
}
_DECODERS = _FILES | {"caches": {"passes": "pack,kv"}, "plain caches": {"passes": "pack,kv", "attention": "plain"}}
_ENCODERS = _FILES | {"dynamic": {"passes": "dynamic", "target": "qdq"}}
_SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 128}
_LLAMA = {"model_type": "llama", "num_key_value_heads": 2, "eos_token_id": 255, "pad_token_id": 255, "vocab_size": 256}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers.js and the programs."""
    folder = tmp_path_factory.mktemp("node")
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("there is no Node with npm here")
    (folder / "package.json").write_text("{}")
    npm = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", _PACKAGE]
    done = subprocess.run(npm, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm cannot install {_PACKAGE}: {done.stderr.strip().splitlines()[:1]}")
    for name, program in _PROGRAMS.items():
        (folder / name).write_text(program)
    return folder


def _packaged(bench: Bench, model: Any, settings: dict[str, Any] | None, config: dict[str, Any]) -> tuple[Path, Path]:
    """The file that was packaged, and its graph in the folder web/tiny."""
    source = bench.save(model)
    (source.parent / "config.json").write_text(json.dumps(_SHAPE | config))
    written = source
    if settings is not None:
        bench.compile(source, **settings)
        written = bench.folder / "out" / "model.onnx"
    package_web(written, bench.folder / "web" / "tiny", tokenizer=source.parent)
    (graph,) = (bench.folder / "web" / "tiny" / "onnx").glob("*.onnx")
    return written, graph


def _run(node: Path, *words: object) -> Any:
    done = subprocess.run(["node", *map(str, words)], cwd=node, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _decoder(dtype: str) -> Any:
    return tiny_decoder(kv_cache=True, outliers=False, dtype=dtype)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("file", _DECODERS)
def test_the_text_is_that_of_generate(bench: Bench, node: Path, dtype: str, file: str) -> None:
    source, _ = _packaged(bench, _decoder(dtype), _DECODERS[file], _LLAMA | {"architectures": ["LlamaForCausalLM"]})
    given, found = _run(node, "generate.mjs", f"{bench.folder / 'web'}/", "tiny", _TEXT, _TOKENS)
    subject = Subject(source, kernels="portable", accuracy_level=4)
    assert found == [*given, *generate_ids(subject, given, _TOKENS, Sampling())]


@pytest.mark.parametrize("file", _ENCODERS)
def test_an_encoder_gives_what_it_gives_here(bench: Bench, node: Path, file: str) -> None:
    config = {"model_type": "bert", "architectures": ["BertModel"]}
    source, _ = _packaged(bench, tiny_encoder(outliers=False), _ENCODERS[file], config)
    given, found = _run(node, "encode.mjs", f"{bench.folder / 'web'}/", "tiny", _TEXT)
    ids = np.array([given])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    wanted = session(source, kernels="portable", accuracy_level=4).run(None, feeds)[0].reshape(-1)
    assert np.linalg.norm(np.array(found) - wanted) <= 1e-3 * np.linalg.norm(wanted)


_WASM = [("decoder", dtype, file) for dtype in ("fp32", "fp16") for file in _DECODERS]
_WASM += [("encoder", "fp32", file) for file in _ENCODERS]


@pytest.mark.parametrize(("kind", "dtype", "file"), _WASM)
def test_webassembly_computes_what_the_cpu_does(bench: Bench, node: Path, kind: str, dtype: str, file: str) -> None:
    """A padded text. Products with activations in 8 bits round them in another order there."""
    model = _decoder(dtype) if kind == "decoder" else tiny_encoder(outliers=False)
    settings = (_DECODERS if kind == "decoder" else _ENCODERS)[file]
    source, graph = _packaged(bench, model, settings, _LLAMA | {"architectures": ["LlamaForCausalLM"]})
    ids = np.arange(2, 22)[None]
    feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feeds["attention_mask"][0, -4:] = 0
    plan = input_plan(load_model(source))
    feeds |= {pair.past.name: pair.empty(1) for pair in plan.past}
    feeds["position_ids" if kind == "decoder" else "token_type_ids"] = np.arange(20)[None] * (kind == "decoder")
    told = {name: [str(x.dtype), _numbers(x), list(x.shape)] for name, x in feeds.items()}
    (bench.folder / "feeds.json").write_text(json.dumps(told))
    element, found = _run(node, "wasm.mjs", graph, bench.folder / "feeds.json")
    wanted = session(source, kernels="portable", accuracy_level=4).run(None, feeds)[0].astype(np.float32)
    own = np.array(found, np.uint16).view(np.float16) if element == "float16" else np.array(found)
    seen = feeds["attention_mask"].astype(bool)
    own = own.astype(np.float32).reshape(wanted.shape)
    assert np.linalg.norm((own - wanted)[seen]) <= 0.01 * np.linalg.norm(wanted[seen])


def _numbers(x: Any) -> list[float]:
    numbers: list[float] = (x.view(np.uint16) if x.dtype == np.float16 else x).reshape(-1).tolist()
    return numbers
