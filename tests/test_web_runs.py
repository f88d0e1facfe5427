"""What `qcompile package --for transformers.js` writes runs in Node, and writes the text that `generate` writes."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import Bench

from qcompile.compiler.measure.generate import Sampling, generate_ids
from qcompile.compiler.measure.loaded import Subject
from qcompile.compiler.package.web import package_web
from qcompile.models.tiny import tiny_decoder

pytestmark = pytest.mark.slow
_PACKAGE = "@huggingface/transformers@4.3.2"
_TOKENS = 12
_PROGRAM = """
import { AutoTokenizer, AutoModelForCausalLM, env } from '@huggingface/transformers';
const [root, name, prompt, tokens] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = root;
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name);
const inputs = tokenizer(prompt);
const ids = await model.generate({ ...inputs, max_new_tokens: Number(tokens), do_sample: false });
console.log(JSON.stringify([inputs.input_ids.tolist()[0].map(Number), ids.tolist()[0].map(Number)]));
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with transformers.js and the program."""
    folder = tmp_path_factory.mktemp("node")
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("there is no Node with npm here")
    (folder / "package.json").write_text("{}")
    npm = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", _PACKAGE]
    done = subprocess.run(npm, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm cannot install {_PACKAGE}: {done.stderr.strip().splitlines()[:1]}")
    (folder / "run.mjs").write_text(_PROGRAM)
    return folder


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"attention": "plain"}, {"target": "matmulnbits"}, {"target": "qdq"}, None],
    ids=["bodies", "plain", "matmulnbits", "qdq", "float"],
)
def test_the_text_is_that_of_generate(bench: Bench, node: Path, dtype: str, settings: dict[str, str] | None) -> None:
    model = bench.save(tiny_decoder(kv_cache=True, outliers=False, dtype=dtype))
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 128, "eos_token_id": 255,
        "pad_token_id": 255, "vocab_size": 256,
    }  # fmt: skip
    (model.parent / "config.json").write_text(json.dumps(config))
    source = model
    if settings is not None:
        bench.compile(model, **settings)
        source = bench.folder / "out" / "model.onnx"
    package_web(source, bench.folder / "web" / "tiny", tokenizer=model.parent)
    program = ["node", "run.mjs", f"{bench.folder / 'web'}/", "tiny", "the old house", str(_TOKENS)]
    done = subprocess.run(program, cwd=node, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    given, found = json.loads(done.stdout.splitlines()[-1])
    subject = Subject(source, kernels="portable", accuracy_level=4)
    assert found == [*given, *generate_ids(subject, given, _TOKENS, Sampling())]
