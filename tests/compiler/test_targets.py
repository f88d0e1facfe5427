"""Targets of runtimes that are not at hand: what they make of a recipe, and whole compiles in ONNX Runtime's CPU."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler.plan import fitted, planned
from qcompile.compiler.recipe import Recipe, Step, parse_passes
from qcompile.models.tiny import tiny_decoder, tiny_encoder
from qcompile.passes.errors import UserError

FOREIGN = ("tensorrt", "qnn")


def _recipe(passes: str = "pack", **settings: Any) -> Recipe:
    return Recipe(passes=parse_passes(passes), **settings)


# --- what becomes of settings -----------------------------------------------------------------------------------------

FITTED: dict[str, tuple[Recipe, dict[str, Any], list[str]]] = {
    "tensorrt": (
        _recipe(target="tensorrt"),
        {"symmetric": True, "group_size": 128, "lm_head": None, "embedding": None},
        ["symmetric True: TensorRT takes no zero points", "lm_head keep: TensorRT takes weights of 4 bits",
         "embedding keep: TensorRT takes constant scales alone, and those of an embedding are not"],
    ),
    "qnn": (
        _recipe(target="qnn"),
        {"symmetric": True, "group_size": 64, "lm_head": 8, "embedding": 8},
        ["group_size 64: the QNN provider takes groups of 32 or 64", "symmetric True: the QNN provider takes no zero"],
    ),
    "given": (
        _recipe(target="qnn", group_size=32, symmetric=True, lm_head=4), {"group_size": 32, "lm_head": 4}, []
    ),
    "a format": (
        _recipe(target="qnn", weights=Step("int4"), lm_head=Step("int8")),
        {"weights": Step("int4", {"group": 64, "symmetric": True}), "lm_head": Step("int8", {"group": 64})},
        ["weights int4(group=64, symmetric=true): the QNN provider takes groups of 32 or 64 and takes no zero points",
         "lm_head int8(group=64): the QNN provider takes groups of 32 or 64"],
    ),
    "a step's target": (_recipe("pack(target=qnn)"), {"target": "qnn", "group_size": 64}, ["group_size", "symmetric"]),
    "a provider's target": (
        _recipe("qdq(provider=tensorrt)"), {"target": "tensorrt", "embedding": None, "lm_head": 8}, ["embedding keep"]
    ),
    "integer": (
        _recipe("smooth,qdq", target="qnn"),
        {"passes": (Step("smooth"), Step("qdq", {"provider": "qnn"})), "group_size": 128},
        [],
    ),
    "here": (_recipe(target="qdq", group_size=100), {"group_size": 100, "symmetric": False}, []),
}  # fmt: skip


@pytest.mark.parametrize("name", FITTED)
def test_what_nobody_gave_is_fitted_and_told(name: str) -> None:
    recipe, wanted, told = FITTED[name]
    made, changes = fitted(recipe)
    assert {key: getattr(made, key) for key in wanted} == wanted
    assert len(changes) == len(told)
    assert all(change.startswith(start) for change, start in zip(changes, told, strict=True))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({"target": "tensorrt", "bits": 8}, "takes weights of 4 bits, got 8: leave out bits, or .*smooth,qdq"),
    "group": ({"target": "qnn", "group_size": 16}, "takes groups of 32 or 64, got 16: give another one"),
    "format": ({"target": "tensorrt", "weights": Step("nf4")}, "takes weights as int4, got weights nf4"),
    "format of qnn": ({"target": "qnn", "weights": Step("mxfp4")}, "takes weights as int4 or int8, got weights mxfp4"),
    "head": ({"target": "tensorrt", "lm_head": Step("int8")}, "takes weights as int4, got lm_head int8"),
    "group of a format": (
        {"target": "qnn", "weights": Step("int4", {"group": 128})}, r"got weights int4\(group=128\): give another group"
    ),
    "zero points": (
        {"target": "qnn", "weights": Step("int4", {"symmetric": False})}, "takes no zero points, got .*: leave out"
    ),
    "lookups": ({"target": "tensorrt", "embedding": 4}, "takes no codes in embedding tables, got embedding 4: keep"),
    "dynamic": ({"target": "qnn", "passes": "dynamic"}, "pass dynamic does not go with target qnn: .* choose qdq"),
    "attention": (
        {"target": "tensorrt", "passes": "pack,fuse_attention"},
        "pass fuse_attention does not go with target tensorrt: TensorRT has no GroupQueryAttention, leave it out",
    ),
    "provider": (
        {"target": "qnn", "passes": "qdq(provider=tensorrt)"}, "is for provider qnn, qdq says tensorrt: leave one out"
    ),
    "float8": ({"target": "qnn", "passes": "qdq(activations=float8)"}, "qnn takes activations of 8 and 16 bits"),
    "accuracy level": ({"target": "qnn", "accuracy_level": 4}, "accuracy_level 4 needs target matmulnbits"),
    "activations": ({"target": "qnn", "activations": 8}, "activations 8 needs target qcompile"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_given_and_does_not_fit_is_refused(name: str) -> None:
    settings, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as found:
        planned(fitted(_recipe(settings.pop("passes", "pack"), **settings))[0])
    assert "\n" not in str(found.value)


@given(
    target=st.sampled_from(["qcompile", "matmulnbits", "qdq", *FOREIGN]),
    passes=st.sampled_from(["pack", "smooth,awq,gptq,pack", "smooth,qdq", "qdq(activations=uint16)", "smooth"]),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([0, 16, 32, 64, 100, 128]),
    symmetric=st.booleans(),
    head=st.sampled_from([4, 8, None, Step("int4"), Step("nf4"), Step("int8", {"group": 32})]),
    table=st.sampled_from([4, 8, None, Step("int8")]),
)
def test_a_fitted_recipe_fits(target, passes, bits, group, symmetric, head, table) -> None:
    """Once more, nothing changes; and the target alone decides, where another runtime is asked for."""
    recipe = _recipe(
        passes, target=target, bits=bits, group_size=group, symmetric=symmetric, lm_head=head, embedding=table
    )
    try:
        made, told = fitted(recipe)
    except UserError:
        assert target in FOREIGN
        return
    assert fitted(made) == (made, ())
    assert made == recipe or target in FOREIGN
    assert not told or target in FOREIGN


# --- whole compiles ---------------------------------------------------------------------------------------------------


def _operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


MODELS = {
    "decoder": lambda: tiny_decoder(tied=False),
    "cache": lambda: tiny_decoder(kv_cache=True),
    "half": lambda: tiny_decoder(dtype="fp16"),
    "encoder": tiny_encoder,
}


@pytest.mark.parametrize(
    ("target", "passes", "model", "most"),
    [
        ("tensorrt", "smooth,awq,gptq,pack", "cache", 0.15),
        ("tensorrt", "pack", "half", 0.15),
        ("tensorrt", "smooth,qdq", "decoder", 0.1),
        ("tensorrt", "qdq(operators=all)", "half", 0.15),
        ("qnn", "smooth,awq,gptq,pack", "decoder", 0.15),
        ("qnn", "pack", "half", 0.15),
        ("qnn", "smooth,qdq", "half", 0.12),
        ("qnn", "qdq(activations=uint16)", "cache", 0.05),  # on text that calibration has not seen
        ("qnn", "qdq(activations=int16)", "encoder", 0.05),
    ],
)
def test_files_for_other_runtimes_keep_to_their_rules_and_run_here(
    bench: Any, target: str, passes: str, model: str, most: float
) -> None:
    report = bench.compile(bench.save(MODELS[model]()), passes, target=target, min_coverage=0)
    assert max(output.relative for output in report.outputs) < most
    rules = [line for line in report.target if "keep to the documented rules" in line]
    assert len(rules) == 1
    assert rules[0].endswith("checked by their text, not run here")
    found = _operators(bench.folder / "out" / "model.onnx")
    assert ("MatMulNBits" in found) == (target == "qnn" and "pack" in passes)
    assert ("QuantizeLinear" in found) == ("qdq" in passes)


def _convolutions() -> onnx.ModelProto:
    """Conv, Relu, ConvTranspose, each with a bias."""
    random = np.random.default_rng(2)
    shapes = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 4, 3, 3), "b1": (4,)}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["a"], name="conv", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("ConvTranspose", ["r", "w1", "b1"], ["y"], name="up", pads=[1] * 4),
    ]
    values = [helper.make_tensor_value_info(*own) for own in (("x", 1, [1, 3, 16, 16]), ("y", 1, [1, 4, 16, 16]))]
    constants = [numpy_helper.from_array(random.standard_normal(s).astype("f4") / 4, n) for n, s in shapes.items()]
    graph = helper.make_graph(nodes, "convolutions", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("target", FOREIGN)
def test_convolutions_for_other_runtimes(bench: Any, target: str) -> None:
    """One scale a channel; biases int32 for QNN, floats for TensorRT."""
    report = _compile(bench, _convolutions(), "qdq", (8, 3, 16, 16), target=target)
    assert report.coverage == 1
    assert max(output.relative for output in report.outputs) < 0.03
    model = onnx.load(bench.folder / "out" / "model.onnx", load_external_data=False)
    made = {name: node for node in model.graph.node for name in node.output}
    kinds = {own.name: own.data_type for own in model.graph.initializer}
    for node in (own for own in model.graph.node if own.op_type.startswith("Conv")):
        bias = made[node.input[2]].input[0] if node.input[2] in made else node.input[2]
        assert kinds[bias] == (TensorProto.INT32 if target == "qnn" else TensorProto.FLOAT)
        assert made[node.input[1]].attribute[0].i == (0 if node.op_type == "Conv" else 1)


def _products(rows: int, bias: bool = False) -> onnx.ModelProto:
    """x (…, 64) times (64, rows) and a product of so many rows."""
    random = np.random.default_rng(2)
    weights = [random.standard_normal(shape).astype("f4") / 8 for shape in ((64, rows), (rows, 32), (32,))]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
        helper.make_node("MatMul", ["a", "w1"], ["b"], name="second"),
        helper.make_node("Add", ["b", "w2"], ["y"], name="bias"),
    ]
    values = [helper.make_tensor_value_info(*own) for own in (("x", 1, [1, "s", 64]), ("y", 1, [1, "s", 32]))]
    constants = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)]
    graph = helper.make_graph(nodes, "products", values[:1], values[1:], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _compile(
    bench: Any, model: onnx.ModelProto, passes: str, shape: tuple[int, ...] = (1, 128, 64), **settings: Any
) -> Any:
    source = bench.save(ir.serde.deserialize_model(model), tokenizer=False)
    np.savez(bench.folder / "data.npz", x=np.random.default_rng(1).standard_normal(shape).astype("f4"))
    return bench.compile(source, passes, calibration=[str(bench.folder / "data.npz")], min_coverage=0, **settings)


@pytest.mark.parametrize(
    ("target", "rows", "block"),
    [
        ("tensorrt", 192, 64),
        ("tensorrt", 96, 32),
        ("qnn", 96, 32),
        ("qnn", 128, 64),
        ("tensorrt", 80, 0),
        ("qnn", 80, 0),
    ],
)
def test_blocks_divide_the_rows_or_the_weight_is_skipped(bench: Any, target: str, rows: int, block: int) -> None:
    """Of default groups; a smaller block where that divides, down to 32."""
    report = _compile(bench, _products(rows), "pack", target=target, group_size=64 if target == "qnn" else 128)
    (second,) = (d for d in report.decisions["pack"] if d.node == "second")
    assert second.action == ("quantized" if block else "skipped")
    assert second.reason.startswith(
        f"int4 g{block} sym" if block else {"qnn": "the QNN", "tensorrt": "TensorRT"}[target]
    )
    assert block or "80 rows are no multiple of 32" in second.reason
    assert (report.coverage == 1) == bool(block)


def test_a_bias_stands_behind_the_product_for_qnn(bench: Any) -> None:
    report = _compile(bench, _products(64), "pack,fuse(faster=false)", target="qnn", group_size=32)
    assert any(d.action == "fused" for d in report.decisions["fuse"])
    found = _operators(bench.folder / "out" / "model.onnx")
    assert (found["MatMulNBits"], found["Add"]) == (2, 1)


def test_a_file_with_codes_of_its_own_that_break_the_rules_is_refused(bench: Any) -> None:
    """One line, with the node's name, and nothing is left behind."""
    model = _products(64)
    model.graph.node.insert(0, helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"], name="theirs"))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["again"], name="back"))
    model.graph.output.append(helper.make_tensor_value_info("again", 1, [1, "s", 64]))
    with pytest.raises(UserError, match=r"by the rules of TensorRT DynamicQuantizeLinear 'theirs' is an operator") as e:
        _compile(bench, model, "pack", target="tensorrt", group_size=32)
    assert "\n" not in str(e.value)
    assert not list((bench.folder / "out").glob("*"))


def test_a_router_keeps_its_float_weight_where_four_bits_are_all(bench: Any) -> None:
    """8 bits without zero points for QNN."""
    model = _products(64)
    model.graph.node.extend([
        helper.make_node("Softmax", ["y"], ["p"], name="softmax", axis=-1),
        helper.make_node("TopK", ["p", "k"], ["v", "i"], name="topk"),
    ])  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), "k"))
    model.graph.node.append(helper.make_node("Gather", ["rows", "i"], ["chosen"], name="experts"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((40, 4), np.float32), "rows"))
    model.graph.output.append(helper.make_tensor_value_info("chosen", 1, [1, "s", 2, 4]))
    told = {}
    for target in FOREIGN:
        report = _compile(bench, model, "pack", target=target, group_size=32)
        told[target] = next(d for d in report.decisions["pack"] if d.node == "second")
    assert told["tensorrt"].action == "skipped"
    assert "TensorRT has 4 bits for weights alone" in told["tensorrt"].reason
    assert told["qnn"].reason.startswith("int8 g32 sym")
