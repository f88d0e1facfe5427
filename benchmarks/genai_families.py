"""Small random models of the families that onnxruntime-genai's builder supports, through its graph and every list.

    .venv/bin/python benchmarks/genai_families.py FOLDER --builder RIVALS/bin/python [--only llama,qwen3]
    .venv/bin/python benchmarks/genai_families.py FOLDER --table

--builder is a Python with benchmarks/requirements-rivals.txt. A cell: SQNR of the compiled model's logits to the graph
it was made from, on text that it did not see; the share of weights with a format; whether onnxruntime-genai, run on the
folder that `--for genai` writes, gives the tokens of `qcompile generate` ("same" or "other"). Rows are kept in
FOLDER/results.jsonl; what is there is not made again.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from architectures import Results, sqnr
from architectures_zoo import _LLM, ARCHITECTURES, Architecture
from tokenizers import Tokenizer

from qcompile.compiler.cli import main as qcompile
from qcompile.compiler.measure.generate import Sampling, generate_ids
from qcompile.compiler.measure.loaded import Subject
from qcompile.models import hf
from qcompile.models.tiny.tokenizer import tiny_tokenizer
from qcompile.passes.errors import UserError

_PLAIN = {key: value for key, value in _LLM.items() if key != "head_dim"}
FAMILIES = {name: ARCHITECTURES[name] for name in ("llama", "qwen2", "qwen3", "gemma2", "gemma3")} | {
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", _PLAIN | {"max_position_embeddings": 4096}),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", _LLM | {"sliding_window": 8}),
    "granite": Architecture("GraniteForCausalLM", "GraniteConfig", _PLAIN),
    "smollm3": Architecture("SmolLM3ForCausalLM", "SmolLM3Config", _PLAIN),
}
PRECISIONS = ("fp32", "fp16", "int4")
LISTS = ("pack", "smooth,awq,gptq,pack", "smooth,qdq", "pack,kv")
_TOKENS, _END = 12, 2
# Greedy tokens behind a prompt, until one ends the text.
_PROGRAM = """
import json, sys
import numpy as np, onnxruntime_genai as og
folder, tokens, prompt = sys.argv[1:]
model = og.Model(folder)
params = og.GeneratorParams(model)
params.set_search_options(max_length=64, do_sample=False)
generator = og.Generator(model, params)
generator.append_tokens(np.array([json.loads(prompt)], np.int32))
found = []
while len(found) < int(tokens) and not generator.is_done():
    generator.generate_next_token()
    found.append(int(generator.get_next_tokens()[0]))
print(json.dumps(found))
"""


def build(source: Path, target: Path, precision: str, builder: Path) -> dict[str, Any]:
    """The builder's graph for the CPU."""
    command = [builder, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target, "-p", precision]
    command += ["-e", "cpu", "-c", target.parent / "cache"]
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # kernels.py here is not theirs
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=own)
    if done.returncode or not (target / "model.onnx").exists():
        raise UserError(f"the builder: {done.stderr.strip().splitlines()[-1:]}")
    return {}


def attempted(graph: Path, passes: str, builder: Path) -> dict[str, Any]:
    """A compile as people run it, judged on text that it did not see."""
    folder = graph.parent / passes.replace(",", "-")
    words = ["--passes", passes, "--for", "genai", "--group-size", "32", "--samples", "32", "--context", "32"]
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        code = qcompile([str(graph), *words, "--min-cosine", "0", "-o", str(folder)])
    if code:
        raise UserError(told.getvalue().strip().splitlines()[-1])
    report = json.loads((folder / "model.report.json").read_text(encoding="utf-8"))
    made = Subject(folder / "model.onnx", accuracy_level=4)
    prompt = [int(token) for token in _unseen(graph.parent)[:5]]
    own = list(generate_ids(made, prompt, _TOKENS, Sampling(), frozenset({_END})))
    same = own == [token for token in in_genai(folder, prompt, builder) if token != _END]
    return {"sqnr": difference(graph, folder / "model.onnx"), "coverage": report["coverage"], "same": same}


def in_genai(folder: Path, prompt: list[int], builder: Path) -> list[int]:
    """What onnxruntime-genai writes behind the prompt."""
    command = [str(builder), "-c", _PROGRAM, str(folder), str(_TOKENS), json.dumps(prompt)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"genai: {done.stderr.strip().splitlines()[-1]}")
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def difference(wanted: Path, found: Path) -> float:
    """SQNR in dB of the logits."""
    return sqnr(*([Subject(path).logits(_unseen(wanted.parent))] for path in (wanted, found)))


def _unseen(source: Path) -> np.ndarray:
    text = (Path(__file__).parent / "text" / "eval-novel.txt").read_text(encoding="utf-8")[:96]
    return np.array(Tokenizer.from_file(str(source / "tokenizer.json")).encode(text).ids, np.int64)


def run(folder: Path, names: list[str], builder: Path) -> None:
    """Everything that is missing."""
    results = Results(folder / "results.jsonl")
    for name in names:
        source = folder / name / "source"
        if not (source / "tokenizer.json").is_file():
            with hf.quiet():
                FAMILIES[name].make().save_pretrained(source)
            _tell_rotations(source / "config.json")
            tiny_tokenizer(250, source)  # some families' tokenizers add tokens
        for precision in PRECISIONS:
            target = folder / name / precision
            built = results.get((name, precision, "builder"), lambda: build(source, target, precision, builder))  # noqa: B023
            for key, make in _rows(target / "model.onnx", builder) if not built else ():
                results.get((name, precision, key), make)


def _tell_rotations(config: Path) -> None:
    """Of a family with two rotations, say them as builder 0.18 reads them, too: transformers 5 says them by kind of
    layer alone, and drops what stands outside of them.
    """
    told = json.loads(config.read_text(encoding="utf-8"))
    rotations = told.get("rope_parameters") or {}
    if {"full_attention", "sliding_attention"} <= rotations.keys():
        local = {"rope_local_base_freq": rotations["sliding_attention"]["rope_theta"]}
        told["rope_parameters"] = rotations | rotations["full_attention"] | local
        config.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _rows(graph: Path, builder: Path) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    if graph.parent.name == "int4":
        whole = graph.parent.with_name("fp32") / "model.onnx"
        return [
            ("evaluated", lambda: {"sqnr": difference(whole, graph)}),
            ("pack", lambda: attempted(graph, "pack", builder)),
        ]
    return [(passes, lambda passes=passes: attempted(graph, passes, builder)) for passes in LISTS]  # type: ignore[misc]


def table(folder: Path) -> None:
    """A Markdown table, and every reason below it."""
    results, reasons = Results(folder / "results.jsonl").rows, dict[str, int]()

    def cell(*key: str) -> str:
        row = results.get(key, {})
        if reason := row.get("refused") or row.get("crash"):
            return f"{'refused' if 'refused' in row else 'crash'} [{reasons.setdefault(reason, len(reasons) + 1)}]"
        if "sqnr" not in row:
            return ""
        same = {None: "", True: ", same", False: ", other"}[row.get("same")]
        return f"{row['sqnr']:.1f} dB" + (f", {row['coverage']:.0%}" if "coverage" in row else "") + same

    print("| family | builder's | " + " | ".join(LISTS) + " |\n|---|---|" + "---|" * len(LISTS))
    for name, precision in itertools.product(FAMILIES, PRECISIONS[:2]):
        failed = cell(name, precision, "builder")
        print(f"| {name} | {precision} | " + " | ".join(failed or cell(name, precision, key) for key in LISTS) + " |")
    print("\n| family | builder's int4 to its fp32 | compiled again |\n|---|---|---|")
    for name in FAMILIES:
        print(f"| {name} | {cell(name, 'int4', 'evaluated')} | {cell(name, 'int4', 'pack')} |")
    for reason, number in reasons.items():
        print(f"\n[{number}] {reason}")


def main() -> int:
    """Rows, or the table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--builder", type=Path, default=Path(sys.executable), metavar="PYTHON")
    parser.add_argument("--only", default=",".join(FAMILIES), metavar="NAME,…")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        args.folder.mkdir(parents=True, exist_ok=True)
        run(args.folder.resolve(), args.only.split(","), args.builder.absolute())
    table(args.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
