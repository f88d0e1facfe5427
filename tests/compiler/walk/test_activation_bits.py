"""Activation bits: the int8 rounding measured beside products, the choice, and what is written."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from qcompile.compiler.files.load import load_model
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.results.errors import NodeError
from qcompile.compiler.walk import activation_bits
from qcompile.models.tiny import tiny_decoder, tiny_mlp
from qcompile.passes.activations import int8_change, packed_rows
from qcompile.passes.errors import UserError
from qcompile.passes.formats.functions import is_product
from qcompile.passes.observers import nodes as observers
from qcompile.runtime.sessions import run, session


def _int8(x: np.ndarray, block: int) -> np.ndarray:
    """Rows (rows, k) as a kernel with int8 activations sees them, group by group as runtime/kernels/layout.h cuts."""
    rounded = np.zeros_like(x)
    k = x.shape[1]
    size = min(block, k)
    splits = (size + 127) // 128
    depth = ((size + splits - 1) // splits + 7) // 8 * 8
    for start in range(0, k, block):
        for split in range(splits):
            part = slice(start + split * depth, min(start + (split + 1) * depth, start + block, k))
            scale = np.abs(x[:, part]).max(axis=1, keepdims=True, initial=0) / np.float32(127)
            rounded[:, part] = np.rint(x[:, part] / np.where(scale > 0, scale, 1)) * scale
    return rounded


@pytest.mark.parametrize(
    ("k", "block"),
    [(64, 32), (576, 128), (100, 100), (300, 300), (260, 256), (40, 12), (9, 16), (576, 576), (131, 130)],
)
def test_the_rounding_is_that_of_the_kernels(k: int, block: int) -> None:
    x = np.random.default_rng(0).standard_normal((3, 4, k)).astype(np.float32)
    x[0, 1], x[1, 2, : k // 2], x[:, :, k // 3] = 0, 0, 20
    w = np.random.default_rng(1).standard_normal((k, 5)).astype(np.float32)
    graph = helper.make_graph([], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4, k])], [])
    graph.initializer.append(onnx.numpy_helper.from_array(w, "w"))
    graph.node.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    change = int8_change(graph, "x", k, block)
    assert int8_change(graph, "x", k, block) == change, "made once"
    names = observers.compare_product(graph, "y", "x", "w", ".exact", change=change)
    observers.add_outputs(graph, [change])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = session(proto.SerializeToString(), threads=1, kernels="portable")
    found = dict(zip([*names, change], run(made, [*names, change], {"x": x}), strict=True))
    rows = x.reshape(-1, k)
    wanted = _int8(rows, block) - rows
    np.testing.assert_allclose(found[change], wanted, rtol=0, atol=2e-6 * np.abs(rows).max())
    assert found[observers.added("y", ".exact")] == pytest.approx(np.square(wanted @ w).sum(), rel=1e-3)
    assert found[observers.reference("y", ".exact")] == pytest.approx(np.square(rows @ w).sum(), rel=1e-4)
    assert found[observers.difference("y", ".exact")] < 1e-6


def test_packed_groups_hold_every_row_once() -> None:
    for k in (1, 7, 8, 127, 128, 129, 300, 576):
        for block in (8, 12, 32, 100, 128, 130, 256, k):
            rows = packed_rows(k, block)
            assert rows.shape[1] <= 128
            assert sorted(rows[rows < k]) == list(range(k))
            for group in rows:
                assert len({row // block for row in group[group < k]}) <= 1, "one scale of the weight each"


def _node(name: str, error: float, int8: float | None, weights: int = 100) -> NodeError:
    return NodeError(name, error, 0.0, int8, weights=weights)


def _bits(errors: list[NodeError], wanted: int | None = None) -> dict[str, int]:
    return {e.node: e.activation_bits for e in activation_bits.choose(errors, wanted, {e.node for e in errors})}


def test_what_the_user_says_goes() -> None:
    errors = [_node("a", 0.1, 0.5), _node("b", 0.1, None)]
    assert _bits(errors, 8) == {"a": 8, "b": 8}
    assert _bits(errors, 16) == {"a": 16, "b": 16}


def test_without_measured_inputs_16_bits_stay() -> None:
    assert _bits([_node("a", 0.1, None), _node("b", 0.1, 0.0001)]) == {"a": 16, "b": 8}


def test_the_budget_goes_where_most_multiply_adds_are() -> None:
    """Of 100 times 0.01, 0.5 % is 0.005: five of 0.03² = 0.0009 fit, the widest ones."""
    rest = [_node(f"r{i}", 0.1, None) for i in range(90)]
    some = [_node(f"s{i}", 0.1, 0.03, weights=1000 + i) for i in range(10)]
    own = activation_bits.OWN_BUDGET
    activation_bits.OWN_BUDGET = 1.0
    try:
        bits = _bits([*rest, *some])
    finally:
        activation_bits.OWN_BUDGET = own
    assert [name for name, n in bits.items() if n == 8] == ["s5", "s6", "s7", "s8", "s9"]


def test_a_nearly_exact_weight_keeps_exact_activations() -> None:
    """A head of 8 bits: its own error is far below that of int8 activations, though the sum would not notice."""
    errors = [*(_node(f"r{i}", 0.1, 0.5) for i in range(200)), _node("lm_head", 0.003, 0.006, 10**8)]
    assert set(_bits(errors).values()) == {16}


def test_the_choice_is_written_and_reported(bench: Any) -> None:
    report = bench.compile(bench.save(tiny_decoder()), "pack")
    bits = {error.node: error.activation_bits for error in report.nodes}
    assert all(error.int8_error is not None and 0 < error.int8_error < 0.05 for error in report.nodes)
    assert bits["lm_head"] == 16
    assert set(bits.values()) == {8, 16}
    model = load_model(bench.folder / "out" / "model.onnx")
    assert {n.name: n.attributes["activation_bits"].as_int() for n in model.graph if is_product(n)} == bits


@pytest.mark.parametrize("target", ["qdq", "matmulnbits"])
def test_other_targets_have_no_such_attribute(bench: Any, target: str) -> None:
    report = bench.compile(bench.save(tiny_decoder()), "pack", target=target)
    assert {(error.int8_error, error.activation_bits) for error in report.nodes} == {(None, 16)}
    for node in load_model(bench.folder / "out" / "model.onnx").graph:
        assert "activation_bits" not in node.attributes
    with pytest.raises(UserError, match=f"activations 8 needs target qcompile: the operators of {target}"):
        Recipe(activations=8, target=target)


def test_random_inputs_choose_nothing_and_a_user_may(bench: Any) -> None:
    source = bench.save(tiny_mlp(), tokenizer=False)
    assert {e.activation_bits for e in bench.compile(source, calibration=[]).nodes} == {16}
    assert {e.activation_bits for e in bench.compile(source, calibration=[], activations=8).nodes} == {8}


def test_every_scale_of_a_compiled_decoder_is_a_half_precision_number(bench: Any) -> None:
    """So kernels keep two bytes of each: whichever pass made it."""
    for passes in ("pack", "smooth,awq,gptq,pack"):
        for settings in ({}, {"symmetric": True}, {"bits": 8}):
            bench.compile(bench.save(tiny_decoder()), passes, **settings)
            model = load_model(bench.folder / "out" / "model.onnx")
            scales = [n.inputs[2] for n in model.graph if n.domain == "qcompile"]
            assert len(scales) == 16
            for value in scales:
                assert isinstance(value, ir.Value)
                scale = value.const_value.numpy()
                assert scale.dtype == np.float32
                np.testing.assert_array_equal(scale, scale.astype(np.float16))
