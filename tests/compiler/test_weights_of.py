"""--weights-of: a weight has the format that the first pattern says, whatever its neighbours have."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.results.report import Report
from qcompile.models.tiny import tiny_decoder
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_embeddings, find_linears

FORMATS = ("int4(group=32)", "int8(group=32)", "nf4(group=32)", "int3(group=32)", "int6(group=64)", "mxfp4", "keep")
SITES = [own.name for own in (*find_linears(tiny_decoder().graph), *find_embeddings(tiny_decoder().graph))]


def _compiled(folder: Path, recipe: Recipe) -> Report:
    ir.save(tiny_decoder(), folder / "m.onnx")
    random = np.random.default_rng(0)
    feeds = [{"input_ids": random.integers(0, 256, (1, 24))} for _ in range(4)]
    return compile_model(folder / "m.onnx", recipe, output=folder / "o.onnx", calibration=feeds)


def _stored(report: Report) -> dict[str, str]:
    """By node, the format that its weight has; "keep" of float."""
    told = report.decisions["pack"]
    return {own.node: own.format if own.action == "quantized" else "keep" for own in told}


@pytest.mark.parametrize("seed", range(6))
def test_every_weight_has_its_own(tmp_path: Path, seed: int) -> None:
    """Verified by the compile itself, behind `fuse`; those that nobody named have what they would have had."""
    random = np.random.default_rng(seed)
    wanted = {name: str(random.choice(FORMATS)) for name in SITES if random.random() < (seed + 1) / 6}
    named = tuple(f"{name}={told}" for name, told in wanted.items())
    recipe = Recipe(parse_passes("pack"), group_size=32, min_coverage=0, weights_of=named)
    stored = _stored(_compiled(tmp_path, recipe))
    for name in SITES:
        other = "int8" if name in ("lm_head", "model.embed_tokens") else "int4"
        assert stored[name] == wanted.get(name, other).partition("(")[0], name


def test_data_rounds_each_by_its_own_grid(tmp_path: Path) -> None:
    """q, k and v read one input and have three formats: the list chooses codes of each, and the file holds them."""
    named = ("*k_proj*=int6(group=32)", "*v_proj*=nf4(group=32)", "*down_proj*=keep", "*.0.*=int8")
    recipe = Recipe(parse_passes("smooth,awq,rotate,gptq,pack"), group_size=32, min_coverage=0, weights_of=named)
    report = _compiled(tmp_path, recipe)
    stored = _stored(report)
    for layer, other in (("0", "int8"), ("1", "int4")):
        own = {name.rpartition(".")[2]: told for name, told in stored.items() if f".{layer}." in name}
        assert own == {
            "q_proj": other, "k_proj": "int6", "v_proj": "nf4", "o_proj": other,
            "gate_proj": other, "up_proj": other, "down_proj": "keep",
        }  # fmt: skip
    rounded = {own.node.rpartition(".")[2] for own in report.decisions["gptq"] if own.action == "rounded"}
    assert {"q_proj", "k_proj", "v_proj"} <= rounded, "of three formats, for one input"


def test_a_target_that_lacks_the_format_refuses_it_before_any_work(tmp_path: Path) -> None:
    ir.save(tiny_decoder(), tmp_path / "m.onnx")
    recipe = Recipe(parse_passes("pack"), target="matmulnbits", weights_of=("*q_proj*=int3",))
    with pytest.raises(UserError, match="int3"):
        compile_model(tmp_path / "m.onnx", recipe, output=tmp_path / "o.onnx")
    recipe = Recipe(parse_passes("pack"), target="tensorrt", weights_of=("*q_proj*=nf4",))
    with pytest.raises(UserError, match=r"target tensorrt takes weights as int4.*got weights_of nf4"):
        compile_model(tmp_path / "m.onnx", recipe, output=tmp_path / "o.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_integer_products_have_one_format(tmp_path: Path) -> None:
    """What makes int8 of all weights takes none; `keep` it does."""
    ir.save(tiny_decoder(), tmp_path / "m.onnx")
    with pytest.raises(UserError, match=r"weights_of \*q_proj\*: int4 is for"):
        compile_model(
            tmp_path / "m.onnx", Recipe(parse_passes("dynamic"), weights_of=("*q_proj*=int4",)), output=tmp_path / "o"
        )
    recipe = Recipe(parse_passes("dynamic"), min_coverage=0, weights_of=("*q_proj*=keep",))
    kept = [own for own in _compiled(tmp_path, recipe).decisions["dynamic"] if own.action == "kept"]
    assert {"kept in float by '*q_proj*'"} <= {str(own.reason) for own in kept}


@pytest.mark.parametrize("target", ["qcompile", "matmulnbits", "qdq", "qnn"])
@pytest.mark.parametrize("told", ["int8(group=64)", "int4(group=64)", "int4(group=64, symmetric=true)"])
@pytest.mark.parametrize("setting", ["weights_of", "embedding"])
def test_a_table_has_the_zero_points_that_its_operator_reads(
    tmp_path: Path, target: str, told: str, setting: str
) -> None:
    """Whatever the target's products have, and wherever its format is said: also tied to a head without them."""
    given = {"weights_of": (f"*embed_tokens={told}",)} if setting == "weights_of" else {"embedding": told}
    recipe = Recipe(parse_passes("pack"), target=target, group_size=64, **given)
    made = _stored(_compiled(tmp_path, recipe))
    assert made["model.embed_tokens"] == told.partition("(")[0]


def test_a_named_table_stays_in_float_where_the_target_decodes_none(tmp_path: Path) -> None:
    recipe = Recipe(parse_passes("pack"), target="tensorrt", min_coverage=0, weights_of=("*embed_tokens=int4",))
    (own,) = (d for d in _compiled(tmp_path, recipe).decisions["pack"] if d.node == "model.embed_tokens")
    assert own.action == "skipped"
    assert own.reason == "TensorRT takes constant scales alone, and those of a lookup are not"
