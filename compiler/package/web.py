"""The folder that transformers.js loads: a graph named by its type, in onnx/, and weights in chunks for browsers."""

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.compiler.facts.model import element_type
from qcompile.compiler.files import publish
from qcompile.compiler.files.load import check_model_file, check_output_path, load_model, save_model
from qcompile.compiler.package.beside import LICENCES, Beside, table
from qcompile.compiler.package.folder import Contents, Packaged, about, check_model, licences
from qcompile.compiler.package.genai import cache_names
from qcompile.compiler.package.written import check_replaced, digest, known, note
from qcompile.passes.errors import UserError
from qcompile.passes.formats.half_scales import halve
from qcompile.runtime.sessions import session

# What transformers.js 4.3 calls a model of a type. Types of 8 bits with floats in half precision have no name there.
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q8": "_quantized", "q4": "_q4", "q4f16": "_q4f16"}
_CONFIG, _ENTRY, _CHUNKS = "config.json", "transformers.js_config", "use_external_data_format"
_NAMES = [("past_key_values.%d.key", "present.%d.key"), ("past_key_values.%d.value", "present.%d.value")]
_BATCH = "batch_size"
# Browsers take no longer array.
_LONGEST = 2_000_000_000
_ALIGNED, _PIECE = 64, 1 << 24
# Smaller constants of 8 bits are no weights.
_LEAST = 1024


def package_web(
    source: Path | str, folder: Path | str, *, tokenizer: Path | None = None, kernels: str = "auto"
) -> Packaged:
    """--for transformers.js: write what it runs of a model into `folder`. Operators of domain `qcompile` run there
    by their bodies: kernels "native" is refused.
    """
    source, folder = Path(source), Path(folder).absolute()
    check_model_file(source)
    if kernels == "native":
        raise UserError("--for transformers.js takes no native kernels: leave --kernels out")
    model = load_model(source)
    with about(source):
        plan, beside = input_plan(model), Beside.of(tokenizer or source)
        if not beside.config:
            raise UserError(f"no config.json in {beside.folder}: give the model's own folder with --tokenizer DIR")
        if plan.past and cache_names(plan) != _NAMES:
            raise UserError(f"caches are not called {_NAMES[0][0]} and the like, as transformers.js wants them")
        if folder.is_dir() and folder.samefile(beside.folder):
            raise UserError(f"{folder} holds the model's own config.json: choose another folder with -o")
    _state_sizes(model, plan)
    kind = dtype(model)
    target = folder / "onnx" / f"model{SUFFIXES[kind]}.onnx"
    place = f"{target.parent.name}/"
    check_model(target, f"{place}{target.name}")
    copied = [path for path in beside.files if path.name != _CONFIG]
    beside_it = Contents(tuple(copied), {LICENCES: licences(beside.licences, None)}, "")
    beside_it.check(folder)
    chunks = target.parent.glob(f"{glob.escape(target.name)}_data*")
    check_replaced(folder, {_CONFIG: None, **{f"{place}{path.name}": None for path in chunks}})
    for path in (target, *(folder / name for name in (_CONFIG, *beside_it.names))):
        check_output_path(source, path, copied)
    with publish.staging(target) as staged, publish.writing(target):
        halve(model)
        written = save_model(model, staged).paths
        data = _in_chunks(*written) if len(written) > 1 else []
        session(staged, kernels="portable")
        config = json.dumps(_config(beside, folder, kind, target.name, len(data)), indent=2) + "\n"
        contents = Contents(tuple(copied), {_CONFIG: config, **beside_it.texts}, "")
        others, before = contents.write(staged.parent), known(folder)
        own = contents.digests | {f"{place}{path.name}": digest(path) for path in (staged, *data)}
        note(folder, own, before)
        files = publish.publish_named((staged, *data), target)
        for path in others:
            publish.replace_file(path, folder / path.name)
        sums = note(folder, own, {name: kept for name, kept in before.items() if name not in own})
    return Packaged((*files, *(folder / path.name for path in others), sums), "")


def _state_sizes(model: ir.Model, plan: InputPlan) -> None:
    """Have the caches' inputs state what transformers.js makes empty ones of: numbers, and "batch_size".

    What else has a name is 0 there.
    """
    pasts = {pair.past.name: pair.past for pair in plan.past}
    names: dict[str | None, str] = {}
    for value in model.graph.inputs:
        if value.name in pasts and value.shape is not None:
            names[_symbol(value.shape[0])] = _BATCH
            value.shape = ir.Shape([own if isinstance(own, int) else old for own, old in
                                    zip(pasts[value.name].shape, value.shape, strict=True)])  # fmt: skip
    names.pop(None, None)
    made = (output for node in model.graph for output in node.outputs)
    for value in (*model.graph.inputs, *made):
        if value.shape is not None and any(_symbol(dim) in names for dim in value.shape):
            value.shape = ir.Shape([names.get(_symbol(dim), dim) for dim in value.shape])


def _symbol(dim: int | ir.SymbolicDim) -> str | None:
    return None if isinstance(dim, int) else dim.value


def dtype(model: ir.Model) -> str:
    """What transformers.js calls the type of a model's weights."""
    half = element_type(model) == ir.DataType.FLOAT16
    bits = set(_code_bits(model))
    if 4 in bits:
        return "q4f16" if half else "q4"
    return "q8" if bits else "fp16" if half else "fp32"


def _code_bits(model: ir.Model) -> Iterator[int]:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.size >= _LEAST and tensor.dtype.bitwidth <= 8:
            yield tensor.dtype.bitwidth
    yield from (node.attributes.get_int("bits", 4) for node in model.graph if node.op_type == "MatMulNBits")


def _config(beside: Beside, folder: Path, kind: str, name: str, chunks: int) -> dict[str, Any]:
    """config.json with the entries of transformers.js; those of files that lie in the folder already stay."""
    config = dict(beside.told(_CONFIG))
    there = table(folder / _CONFIG).get(_ENTRY, {})
    known = there.get(_CHUNKS, {}) if isinstance(there, dict) else {}
    files = (known if isinstance(known, dict) else {}) | {name: chunks}
    own = config.get(_ENTRY, {})
    config[_ENTRY] = (own if isinstance(own, dict) else {}) | {"dtype": kind, _CHUNKS: files}
    return config


def _in_chunks(model: Path, data: Path) -> list[Path]:
    """Move the weights of a saved model into files of at most `_LONGEST` bytes, as transformers.js names them."""
    proto = onnx.load(model, load_external_data=False)
    places = {tensor.name: _place(tensor) for tensor in proto.graph.initializer if tensor.external_data}
    moved: dict[tuple[int, int], tuple[str, int]] = {}
    files: list[Path] = []
    size = _LONGEST
    with open(data, "rb") as source:
        for offset, length in sorted(set(places.values())):
            start = -(-size // _ALIGNED) * _ALIGNED
            if start + length > _LONGEST:
                if length > _LONGEST:
                    raise UserError(f"a weight has {length / 1e9:.1f} GB, and browsers take 2: quantize it")
                files.append(model.with_name(f"{model.name}_data{f'_{len(files)}' if files else ''}"))
                start = 0
            moved[offset, length] = (files[-1].name, start)
            _copy(source, offset, length, files[-1], start)
            size = start + length
    for tensor in proto.graph.initializer:
        if tensor.external_data:
            location, start = moved[places[tensor.name]]
            entries = {"location": location, "offset": str(start), "length": str(places[tensor.name][1])}
            del tensor.external_data[:]
            for key, value in entries.items():
                tensor.external_data.add(key=key, value=value)
    model.write_bytes(proto.SerializeToString(deterministic=True))
    data.unlink()
    for file in (model, *files):
        with open(file, "rb+") as written:
            publish.settle(written)
    return files


def _place(tensor: onnx.TensorProto) -> tuple[int, int]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return int(entries.get("offset", 0)), int(entries["length"])


def _copy(source: Any, offset: int, length: int, target: Path, start: int) -> None:
    source.seek(offset)
    with open(target, "r+b" if target.exists() else "w+b") as file:
        file.seek(start)
        while length:
            piece = source.read(min(length, _PIECE))
            file.write(piece)
            length -= len(piece)
