"""Bad input to `qcompile MODEL.onnx`: exit code 2, one line that says what, where and what to do, nothing written."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from adapted import scale_at_run_time

from qcompile.models.tiny import tiny_decoder, tiny_encoder, tiny_mlp, tiny_tokenizer

# A case spoils something and gives the model to compile, with more options if need be, and what the message must say.
Case = tuple[Path, list[str], str]
CASES: dict[str, Callable[[Any], Case]] = {}
WEIGHT = "model.layers.1.mlp.up_proj.weight"


def case(make: Callable[[Any], Case]) -> Callable[[Any], Case]:
    """Register a case under its function's name."""
    CASES[make.__name__] = make
    return make


def _spoiled(bench: Any, name: str, value: float, *, rows: slice = slice(1)) -> Path:
    """A decoder with some entries of an initializer replaced."""
    model = tiny_decoder()
    tensor = model.graph.initializers[name]
    array = tensor.const_value.numpy().copy()
    array[rows] = value
    tensor.const_value = ir.tensor(array, name=name)
    return bench.save(model)


def _data(model: Path) -> Path:
    (path,) = model.parent.glob("*.data")
    return path


def _relocated(model: Path, location: str) -> Path:
    proto = onnx.load(model, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    model.write_bytes(proto.SerializeToString())
    return model


@case
def missing_model(bench: Any) -> Case:
    return bench.folder / "in" / "nothing.onnx", [], r"nothing\.onnx: no such file; give the path"


@case
def not_onnx(bench: Any) -> Case:
    path = bench.folder / "in" / "text.onnx"
    path.write_text("Once upon a time there was a model. " * 10)
    return path, [], r"text\.onnx .*no ONNX.*; copy or export it again"


@case
def truncated(bench: Any) -> Case:
    path = bench.save(tiny_decoder())
    path.write_bytes(path.read_bytes()[:4000])
    return path, [], r"model\.onnx .*truncated.*; copy or export it again"


@case
def missing_data(bench: Any) -> Case:
    path = bench.save(tiny_decoder())
    _data(path).unlink()
    return path, [], r"tensor '.*'.* external data file 'model-.*\.data' is missing; copy it beside the model"


@case
def short_data(bench: Any) -> Case:
    path = bench.save(tiny_decoder())
    os.truncate(_data(path), 70_000)
    return path, [], r"'model-.*\.data' is too short \(70000 bytes, \d+ needed\); copy or download it again"


@case
def data_in_the_parent_folder(bench: Any) -> Case:
    path = bench.save(tiny_decoder())
    _data(path).rename(bench.folder / "w.data")
    return _relocated(path, "../w.data"), [], r"'\.\./w\.data' lies outside of the model's folder; copy the data file"


@case
def data_at_an_absolute_path(bench: Any) -> Case:
    path = bench.save(tiny_decoder())
    return _relocated(path, str(_data(path))), [], r"lies outside of the model's folder"


@case
def data_behind_a_link(bench: Any) -> Case:
    path = bench.save(tiny_decoder())
    data = _data(path)
    data.rename(bench.folder / "w.data")
    data.symlink_to(bench.folder / "w.data")
    return path, [], r"lies outside of the model's folder"


@case
def nan_weight(bench: Any) -> Case:
    return _spoiled(bench, WEIGHT, np.nan), [], rf"tensor '{WEIGHT}' holds 160 NaN and 0 Inf among 10240 values"


@case
def infinite_weight(bench: Any) -> Case:
    return _spoiled(bench, WEIGHT, np.inf), [], rf"tensor '{WEIGHT}' holds 0 NaN and 160 Inf among 10240 values"


@case
def nan_activations(bench: Any) -> Case:
    name = "model.layers.1.post_attention_layernorm"
    path = _spoiled(bench, f"{name}.weight", 3e38, rows=slice(None))
    return path, ["--passes", "gptq,pack"], rf"activation {name}\.out is NaN or infinite .*calibration data"


@case
def nan_calibration(bench: Any) -> Case:
    path = bench.save(tiny_mlp(), tokenizer=False)
    np.savez(bench.folder / "x.npz", x=np.full((4, 48), np.nan, np.float32))
    options = ["--passes", "gptq,pack", "--calibration", str(bench.folder / "x.npz")]
    return path, options, r"x\.npz: array 'x' contains NaN or infinity"


@case
def float_inputs_without_npz(bench: Any) -> Case:
    return bench.save(tiny_mlp(), tokenizer=False), ["--passes", "awq,pack"], r"float input 'x' .*\.npz"


@case
def tokenizer_too_small(bench: Any) -> Case:
    path = bench.save(tiny_decoder())
    tiny_tokenizer(100, path.parent)
    return path, ["--passes", "gptq,pack"], r"tokenizer\.json does not fit the model: it has 100 ids, .* has 256 rows"


@case
def tokenizer_absent(bench: Any) -> Case:
    path = bench.save(tiny_decoder())
    return path, ["--tokenizer", str(bench.folder)], r"no tokenizer\.json at .*: give its folder with --tokenizer"


@case
def no_decoder(bench: Any) -> Case:
    return bench.save(tiny_encoder(), tokenizer=False), ["--passes", "gptq,pack"], r"it is no decoder.*give --tokenizer"


@case
def missing_text(bench: Any) -> Case:
    options = ["--passes", "gptq,pack", "--calibration", str(bench.folder / "no.txt")]
    return bench.save(tiny_decoder()), options, r"no\.txt: no such text file"


@case
def output_is_the_input(bench: Any) -> Case:
    path = bench.save(tiny_decoder())
    return path, ["-o", str(path)], r"the output .* is the input file .*; choose another name"


@case
def output_is_the_inputs_data(bench: Any) -> Case:
    path = bench.save(tiny_decoder())
    return path, ["-o", str(_data(path))], r"the output .* is the input file .*; choose another name"


@case
def recipe_with_an_unknown_key(bench: Any) -> Case:
    recipe = bench.folder / "r.yaml"
    recipe.write_text("group_sise: 32\n")
    return bench.save(tiny_decoder()), ["--recipe", str(recipe)], r"r\.yaml: unknown key 'group_sise'; known keys are"


@pytest.mark.parametrize("name", CASES)
def test_files_and_data(occupied: Any, capsys: Any, name: str) -> None:
    occupied.refuses(capsys, *CASES[name](occupied))


def test_a_bound_that_does_not_hold_is_a_verdict(occupied: Any, capsys: Any) -> None:
    """The input is sound: exit code 1, and nothing written all the same."""
    model = tiny_decoder()
    scale_at_run_time(model, WEIGHT.removesuffix(".weight"))
    told = r"only 90\.0% .*--min-coverage 0\.99.*left in float: .*\(10\.0% of all\); .*no output was writ"
    occupied.refuses(capsys, occupied.save(model), ["--min-coverage", "0.99"], told, code=1)
    told = r"output logits is destroyed: .* below --min-cosine 1"
    occupied.refuses(capsys, occupied.save(tiny_decoder()), ["--min-cosine", "1"], told, code=1)
