"""Files that qcompile compiled, compiled again: what late passes make of them is what they make at once."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.compiler.files.load import load_model
from qcompile.compiler.recipe import Step
from qcompile.compiler.report.stored_weights import all_weights
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.passes.formats import BY_NAME, named
from qcompile.passes.formats.base import ACTIVATION_BITS, COLUMNS_AT_8
from qcompile.runtime.sessions import run, session

FUSED = "fuse(faster=true),fuse_attention"


def _decoder(bench: Any) -> Path:
    return bench.save(tiny_decoder(kv_cache=True, outliers=False))


def _count(path: Path) -> int:
    return len(onnx.load(path, load_external_data=False).graph.node)


def _nodes(path: Path) -> Counter[str]:
    """Operators that are no standard ones, with their activation bits, products by name; what joins leave behind."""
    found: Counter[str] = Counter()
    for node in onnx.load(path, load_external_data=False).graph.node:
        if not node.domain and node.op_type not in ("MatMul", "Split", "Sigmoid", "Softmax"):
            continue
        bits = [a.i for a in node.attribute if a.name == ACTIVATION_BITS]
        columns = [i for a in node.attribute if a.name == COLUMNS_AT_8 for i in a.ints]
        found[f"{node.domain}.{node.op_type} {node.name if bits else ''} {bits} {columns}"] += 1
    return found


def _weights(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.raw_data for tensor in onnx.load(path).graph.initializer if len(tensor.dims) == 2}


def _again(bench: Any, source: Path, lists: Sequence[str], **settings: Any) -> Path:
    """The file that the first list makes of the source, taken through the others, one by one."""
    for i, passes in enumerate(lists):
        bench.compile(source, passes, output=f"in/again{i}.onnx", **(settings if i == 0 else {}))
        source = bench.folder / "in" / f"again{i}.onnx"
    return source


@pytest.mark.parametrize(
    "lists",
    [
        ["pack", FUSED],
        ["pack", "fuse(faster=true)", "fuse_attention"],
        ["pack", "fuse_attention", "fuse(faster=true)"],
        ["pack", "fuse_attention", "prepare,fuse(faster=true)"],
    ],
)
def test_late_passes_make_of_a_compiled_file_what_they_make_at_once(bench: Any, lists: list[str]) -> None:
    """In whatever order they come, codes and nodes are the same."""
    source = _decoder(bench)
    bench.compile(source, "pack")
    again = _again(bench, source, lists, attention="plain")
    at_once = bench.folder / "out" / "model.onnx"
    assert _nodes(again) == _nodes(at_once)
    assert _count(again) <= _count(at_once), "what lengths and positions are made of is looked through once more"
    assert _weights(again) == _weights(at_once)


def test_the_default_joins_nothing_in_models_without_caches(bench: Any) -> None:
    """Of an encoder attention alone is another operator: its products are what they were, node by node."""
    for i, make in enumerate((tiny_decoder, tiny_encoder)):
        source = bench.save(make(), f"{i}.onnx")
        bench.compile(source, "pack", output=f"out/{i}.onnx")
        bench.compile(source, "pack", output=f"plain/{i}.onnx", attention="plain")
        graphs = [onnx.load(bench.folder / f"{own}/{i}.onnx").graph for own in ("out", "plain")]
        if make is tiny_decoder:
            assert graphs[0].SerializeToString() == graphs[1].SerializeToString()
        products = [[n.SerializeToString() for n in graph.node if n.domain == "qcompile"] for graph in graphs]
        assert products[0] == products[1]
        assert len(products[0]) > 8


def test_a_decoder_with_caches_has_one_product_an_input(bench: Any) -> None:
    bench.compile(_decoder(bench), "pack", activations=16)
    nodes = onnx.load(bench.folder / "out" / "model.onnx", load_external_data=False).graph.node
    assert Counter(node.op_type for node in nodes if node.op_type in ("MatMulInt4", "SwiGLU", "Split", "Sigmoid")) == {
        "MatMulInt4": 8,  # of two layers: queries, keys and values; the output; gate and up; down
        "SwiGLU": 2,
    }


@pytest.mark.parametrize("told", [None, 8, 16])
def test_products_that_came_with_the_file_keep_their_activations(bench: Any, told: int | None) -> None:
    """Nothing is measured of them again; who asks for other bits gets these."""
    source = _decoder(bench)
    bench.compile(source, "pack", output="in/plain.onnx", attention="plain")
    compiled = bench.folder / "in" / "plain.onnx"
    model = onnx.load(compiled, load_external_data=False)
    products = [node for node in model.graph.node if node.op_type.startswith("MatMulInt")]
    for i, node in enumerate(products):
        next(a for a in node.attribute if a.name == ACTIVATION_BITS).i = (8, 16)[i % 2]
    compiled.write_bytes(model.SerializeToString())
    bench.compile(compiled, "prepare", output="out/again.onnx", activations=told)
    again = onnx.load(bench.folder / "out" / "again.onnx", load_external_data=False).graph.node
    bits = {node.name: a.i for node in again for a in node.attribute if a.name == ACTIVATION_BITS}
    assert bits == {node.name: told or (8, 16)[i % 2] for i, node in enumerate(products)}


def test_products_of_other_bits_are_joined_too(bench: Any) -> None:
    """Each keeps its bits; who asks for other ones of the joined file gets these of all columns."""
    source = _decoder(bench)
    bench.compile(source, "pack", output="in/plain.onnx", attention="plain", activations=8)
    compiled = bench.folder / "in" / "plain.onnx"
    model = onnx.load(compiled, load_external_data=False)
    for node in model.graph.node:
        if "up_proj" in node.name:
            next(a for a in node.attribute if a.name == ACTIVATION_BITS).i = 16
    compiled.write_bytes(model.SerializeToString())
    joined = _again(bench, compiled, ["fuse(faster=true)"])
    made = [name for name in _nodes(joined) if "gate_proj+up_proj" in name]
    assert len(made) == 2
    assert all(name.endswith("[16] [0, 160]") for name in made), made
    bench.compile(joined, "prepare", output="out/told.onnx", activations=16)
    told = [name for name in _nodes(bench.folder / "out" / "told.onnx") if "MatMulInt" in name]
    assert told
    assert all(name.endswith("[16] []") for name in told), told


def test_a_file_without_packed_products_has_nothing_to_fuse(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    source = bench.save(tiny_encoder())
    bench.refuses(capsys, source, ["--passes", "fuse"], "pass 'fuse' must come after pack: add it to --passes before")
    bench.compile(source, "pack", output="in/packed.onnx", target="matmulnbits")
    packed = bench.folder / "in" / "packed.onnx"
    bench.refuses(capsys, packed, ["--passes", "fuse"], "pass 'fuse' must come after pack")


def test_an_encoder_is_fused_later_for_any_target(bench: Any) -> None:
    bench.compile(bench.save(tiny_encoder()), "pack", output="in/packed.onnx")
    for target, settings in {"qcompile": {}, "matmulnbits": {"accuracy_level": 0}, "qdq": {}}.items():
        given: dict[str, Any] = {"output": f"out/{target}.onnx", "target": target, **settings}
        report = bench.compile(bench.folder / "in" / "packed.onnx", "fuse", **given)
        assert len([d for d in report.decisions["fuse"] if d.action == "fused"]) > 1
        assert max(o.relative for o in report.outputs) < 1e-5
    assert np.sum([name.count("MatMulAddInt4") for name in _nodes(bench.folder / "out" / "qcompile.onnx")]) > 0


def _constants(path: Path) -> dict[str, tuple[int, ...]]:
    """Large constants of a file by their names."""
    found = onnx.load(path, load_external_data=False).graph.initializer
    return {own.name: tuple(own.dims) for own in found if np.prod(own.dims) >= 512}


@pytest.mark.parametrize("target", ["qcompile", "qdq"])
@pytest.mark.parametrize("weights", list(BY_NAME))
def test_scales_of_packed_weights_are_no_weights(bench: Any, weights: str, target: str) -> None:
    """Packed again, a packed model has the weights that it had, under the names that they had, and the same numbers.

    A table of scales that a lookup reads beside its codes was made int8.
    """
    source = bench.save(tiny_decoder(hidden=256, ffn=512, layers=1))
    form = Step(weights, {"group": 32} if weights in ("int4", "int8") else {})
    settings = {"weights": form, "embedding": form, "lm_head": form, "target": target, "scale_bits": 16}
    bench.compile(source, output="in/first.onnx", context=16, samples=2, **settings)
    first = bench.folder / "in" / "first.onnx"
    report = bench.compile(first, output="in/second.onnx", context=16, samples=2, min_coverage=0, target=target)
    second = bench.folder / "in" / "second.onnx"
    assert not [own for own in report.decisions["pack"] if own.action == "quantized"]
    told = [Counter((w.kind, w.shape, w.form) for w in all_weights(load_model(path))) for path in (first, second)]
    if target == "qcompile" or not named(weights).shifts():  # else sizes that prepare folds tell `inspect` the form
        assert told[0] == told[1]
    assert not any(form.startswith("float") for own in told for _, _, form in own)
    assert sum(kind == "embedding" for kind, _, _ in told[0]) == 1
    if target == "qcompile":
        assert _constants(first) == _constants(second)
    feeds = {"input_ids": np.arange(24).reshape(2, 12), "attention_mask": np.ones((2, 12), np.int64)}
    logits = [run(session(path, threads=1, kernels="portable"), ["logits"], feeds)[0] for path in (first, second)]
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-2 * np.abs(logits[0]).max())
