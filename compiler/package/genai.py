"""The folder that onnxruntime-genai loads: a decoder, and in genai_config.json what it is told of it."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.compiler.data.inputs import Input, InputPlan, input_plan, role_by_name
from qcompile.compiler.files.load import check_model_file, check_output_path, load_model
from qcompile.compiler.package.beside import GENAI, LICENCES, Beside
from qcompile.compiler.package.folder import (
    MODEL,
    Contents,
    Packaged,
    about,
    check_compiled,
    licences,
    native_library,
    write_folder,
)
from qcompile.passes.caches import is_group_query
from qcompile.passes.errors import UserError

# Types that onnxruntime-genai 0.18 runs by the inputs that Hugging Face's decoders have, each by its model_type there.
# It takes others as "decoder", which has no ways of its own; its "gpt2" and "lfm2" want caches of another form.
TYPES = {
    name: name
    for name in (
        "chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gemma4_text", "granite", "internlm2", "llama",
        "mistral", "nemotron", "olmo", "phi", "phi3", "phi3small", "phimoe", "qwen2", "qwen3", "smollm3",
    )
} | {"gpt_oss": "gptoss", "hunyuan_v1_dense": "hunyuandensev1"}  # fmt: skip
_OTHERS = "decoder"
_TOKENIZER = "tokenizer_config.json"
# Tokens that a text has where the application does not say: the shared buffer is made for so many.
_LENGTH = 2048
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx")
_SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")


@dataclass(frozen=True)
class Caches:
    """Those of all layers: the names with %d for the layer, heads and width.

    shared: whether one buffer may be past and present at once, in all layers.
    """

    past_key: str
    past_value: str
    present_key: str
    present_value: str
    layers: int
    heads: int
    width: int
    shared: bool


def package(
    source: Path | str, folder: Path | str, *, tokenizer: Path | None = None, kernels: str = "auto"
) -> Packaged:
    """--for genai: write what it runs of a decoder into `folder`: graph, weights, configuration, tokenizer, kernels.

    source: a compiled model or a float one; it may be model.onnx of `folder` itself, and stays as it is then.
    tokenizer: the folder with tokenizer.json and config.json, where they do not lie beside the model.
    kernels: "portable" leaves the native kernels out, "native" makes their absence an error.
    UserError for what genai cannot run; nothing is written then.
    """
    source, target = Path(source), Path(folder).absolute() / MODEL
    check_model_file(source)
    model = load_model(source)
    with about(source):
        contents = _contents(model, source, target.parent, tokenizer, kernels)
    return write_folder(model, source, target, contents)


def check_package(source: Path | str, folder: Path | str, tokenizer: Path | None = None) -> None:
    """Raise UserError where `package` would refuse what is compiled of a source: said before the work."""
    source = Path(source)
    check_model_file(source)
    model = load_model(source)
    with about(source):
        contents = _contents(model, source, Path(folder), tokenizer, "auto")
    for name in (MODEL, *contents.names):
        check_output_path(source, Path(folder) / name, contents.copied)
    check_compiled(Path(folder).absolute() / MODEL)
    contents.check(Path(folder))


def _contents(model: ir.Model, source: Path, folder: Path, tokenizer: Path | None, kernels: str) -> Contents:
    plan = input_plan(model)
    plan.require_decoder()
    beside = Beside.of(tokenizer or source)
    library, lacking = native_library(model, source, kernels)
    config = genai_config(model, plan, beside, library.name if library else None)
    beside.tokenizer.check_vocabulary(plan.vocabulary)
    texts = {GENAI: json.dumps(config, indent=2) + "\n", LICENCES: licences(beside.licences, library)}
    if not (beside.folder / _TOKENIZER).is_file():  # genai asks for the file, whatever it says
        texts[_TOKENIZER] = '{"tokenizer_class": "PreTrainedTokenizerFast"}\n'
    there = folder.is_dir() and folder.samefile(beside.folder)
    copied = ([] if there else beside.files) + ([library] if library else [])
    return Contents(tuple(copied), texts, lacking, frozenset({GENAI} if there else ()))


def genai_config(model: ir.Model, plan: InputPlan, beside: Beside, library: str | None) -> dict[str, Any]:
    """The configuration of a decoder, from its graph and from the files beside the model.

    Invariant: names, layers, heads, widths and the vocabulary are the graph's; the rest is what a genai_config.json
    beside the model says (as behind genai's builder), else config.json and generation_config.json.
    library: the file of native kernels in the same folder. UserError for what genai cannot run.
    """
    logits = plan.require_decoder()
    caches = _caches(plan)
    given = beside.told(GENAI)
    config: dict[str, Any] = deepcopy(dict(given)) if given else _written(beside)
    own = _part(config, "model", beside)
    own |= {"vocab_size": _vocabulary(model.graph, plan, logits)}
    decoder = _part(own, "decoder", beside)
    decoder |= {
        "filename": MODEL,
        "session_options": _session_options(_part(decoder, "session_options", beside), library),
        "head_size": caches.width,
        "num_attention_heads": _heads(model.graph, beside, caches),
        "num_key_value_heads": caches.heads,
        "num_hidden_layers": caches.layers,
        "inputs": _inputs(plan) | {"past_key_names": caches.past_key, "past_value_names": caches.past_value},
        "outputs": {
            "logits": logits,
            "present_key_names": caches.present_key,
            "present_value_names": caches.present_value,
        },
    }
    _part(config, "search", beside)["past_present_share_buffer"] = caches.shared
    return config


def _part(table: dict[str, Any], name: str, beside: Beside) -> dict[str, Any]:
    """The table of that name in another one, an empty one where there is none."""
    own = table.setdefault(name, {})
    if not isinstance(own, dict):
        raise UserError(f"{beside.folder / GENAI}: {name} is no table of keys and values; copy it from the model again")
    return own


def _written(beside: Beside) -> dict[str, Any]:
    """What config.json, generation_config.json and the tokenizer say."""
    config, generation = beside.config, beside.told("generation_config.json")
    if not config:
        raise UserError(f"no config.json in {beside.folder}: give the model's own folder with --tokenizer DIR")
    told = str(config.get("model_type"))
    context = beside.number(*_CONTEXT) or _tokenizer_length(beside)
    own: dict[str, Any] = {"type": TYPES.get(told, _OTHERS), "context_length": context}
    ends = sorted(beside.tokenizer.eos_ids)
    if not ends:
        where = f"generation_config.json in {beside.folder}"
        raise UserError(f"nothing says which token ends a text: add eos_token_id to {where}")
    own |= {"eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": ends[0]}
    for name in ("bos_token_id", "pad_token_id"):
        ids = (table.get(name) for table in (generation, config))
        found = next((number for number in ids if isinstance(number, int) and number >= 0), None)
        own |= {} if found is None else {name: found}
    hidden = beside.number("hidden_size", "n_embd", "d_model")
    own["decoder"] = {} if hidden is None else {"hidden_size": hidden}
    numbers = {name: generation[name] for name in _SAMPLING if isinstance(generation.get(name), (int, float))}
    chosen = {name: number for name, number in numbers.items() if math.isfinite(number)}
    return {"model": own, "search": {"do_sample": False, **chosen, "max_length": min(context, _LENGTH)}}


def _tokenizer_length(beside: Beside) -> int:
    """The model's context by tokenizer_config.json, where config.json has none."""
    length = beside.told("tokenizer_config.json").get("model_max_length")
    if isinstance(length, int) and 0 < length < 1 << 30:
        return length
    path = beside.folder / "config.json"
    raise UserError(f"{path} does not say how many tokens the model takes: add max_position_embeddings to it")


def _session_options(given: Mapping[str, Any], library: str | None) -> dict[str, Any]:
    """No plans of memory by the sizes of inputs, unless told otherwise: each token has others; and the library."""
    kept = {"enable_mem_pattern": False} | {name: v for name, v in given.items() if name != "custom_ops_library"}
    return kept | ({} if library is None else {"custom_ops_library": library})


def _vocabulary(graph: ir.Graph, plan: InputPlan, logits: str) -> int:
    """Scores of a token: the width of the logits, of which genai makes the buffer."""
    shape = next(value.shape for value in graph.outputs if value.name == logits)
    width = shape[-1] if shape is not None else None
    if isinstance(width, int):
        return width
    if plan.vocabulary is None:
        raise UserError(f"output {logits!r} does not say how many scores a token has: export the model again")
    return plan.vocabulary


def _heads(graph: ir.Graph, beside: Beside, caches: Caches) -> int:
    """Heads of the queries."""
    told = (node.attributes.get_int("num_heads", 0) for node in graph if is_group_query(node))
    return next(told, 0) or beside.number("num_attention_heads", "n_head") or caches.heads


def _inputs(plan: InputPlan) -> dict[str, str]:
    """Names of the inputs that are no caches. UserError for one that genai would not fill."""
    ids = plan.require_tokens()
    if len(ids.shape) != 2 or plan.batch or plan.sequence:
        told = f"input {ids.name!r} has the shape {list(ids.shape)}"
        raise UserError(f"{told}: onnxruntime-genai needs free numbers of texts and tokens; export it so")
    roles = {"input_ids": ids.name}
    for role, given in _filled(plan):
        if role in roles or len(given.shape) != 2 or given.dtype.kind not in "iu":
            told = f"input {given.name!r} ({given.dtype}, shape {list(given.shape)})"
            raise UserError(f"{told} is none that onnxruntime-genai fills: export the model without it")
        roles[role] = given.name
    return roles


def _filled(plan: InputPlan) -> Iterator[tuple[str, Input]]:
    """(what genai calls it, the input) of masks and positions, those that no node reads too; "input_ids" for others."""
    names = {"mask": "attention_mask", "positions": "position_ids"}
    for given in (plan.mask, plan.positions, plan.types, *plan.unread):
        if given is not None:
            yield names.get(role_by_name(given, 2) or "", "input_ids"), given


def _caches(plan: InputPlan) -> Caches:
    if not plan.past:
        told = "the graph has no caches, and onnxruntime-genai runs decoders with caches"
        raise UserError(f"{told}: export it with qcompile export --kv-cache")
    shapes = {pair.past.shape[1:2] + pair.past.shape[3:] for pair in plan.past}
    sizes = next(iter(shapes))
    odd = [pair.past for pair in plan.past if len(pair.past.shape) != 4 or pair.axis != 2]
    if odd or len(shapes) > 1 or not all(isinstance(size, int) for size in sizes):
        own = (odd or [pair.past for pair in plan.past])[0]
        told = f"cache {own.name!r} has the shape {list(own.shape)}"
        raise UserError(f"{told}: onnxruntime-genai needs (batch, heads, tokens, width), the same in all layers")
    (past_key, present_key), (past_value, present_value) = cache_names(plan)
    heads, width = sizes
    shared = all(pair.shared or pair.window for pair in plan.past)
    assert isinstance(heads, int)
    assert isinstance(width, int)
    return Caches(past_key, past_value, present_key, present_value, len(plan.past) // 2, heads, width, shared)


def cache_names(plan: InputPlan) -> list[tuple[str, str]]:
    """(past, present) of keys and of values, with %d where the number of the layer stands."""
    layers: dict[tuple[str, str], list[str]] = {}
    for pair in plan.past:
        found = [re.fullmatch(r"([^\d%]*)(\d+)([^%]*)", name) for name in (pair.past.name, pair.present)]
        past, present = (("", "", "") if match is None else match.groups() for match in found)
        if past[1] != present[1] or not past[1]:
            raise UserError(f"cache {pair.past.name!r} is continued as {pair.present!r}: {_ASKED}")
        patterns = (f"{past[0]}%d{past[2]}", f"{present[0]}%d{present[2]}")
        layers.setdefault(patterns, []).append(past[1])
    wanted = [str(layer) for layer in range(len(plan.past) // 2)]
    if len(layers) != 2 or any(sorted(own, key=int) != wanted for own in layers.values()):
        raise UserError(f"caches are called {', '.join(past for past, _ in layers)}: {_ASKED}")
    return sorted(layers, key=lambda own: "key" not in own[0])


_ASKED = "onnxruntime-genai needs one for the keys and one for the values of each layer, numbered from 0"
