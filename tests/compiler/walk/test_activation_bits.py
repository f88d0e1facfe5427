"""Activation bits: the int8 rounding measured beside products, the choice, and what is written."""

import io
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from rich.console import Console

from qcompile.compiler.files.load import load_model
from qcompile.compiler.plan import build
from qcompile.compiler.recipe import Recipe, Step, parse_passes
from qcompile.compiler.report.terminal import print_report
from qcompile.compiler.results.errors import NodeError
from qcompile.compiler.results.report import Report
from qcompile.compiler.walk import activation_bits
from qcompile.models.tiny import tiny_decoder, tiny_mlp
from qcompile.passes.activations import INT8, int8_change, nbits_rows, packed_rows
from qcompile.passes.errors import UserError
from qcompile.passes.formats import nbits
from qcompile.passes.formats.functions import is_product
from qcompile.passes.observers import nodes as observers
from qcompile.runtime.sessions import run, session


def _int8(x: np.ndarray, block: int) -> np.ndarray:
    """Rows (rows, k) as a kernel with int8 activations sees them, group by group as runtime/kernels/layout.h cuts."""
    rounded = np.zeros_like(x)
    k = x.shape[1]
    size = min(block, k)
    splits = (size + 127) // 128
    step = 64 if block >= k else 8
    depth = -(-size // (splits * step)) * step
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
    graph = helper.make_graph([], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4, k])], [])
    change = int8_change(graph, "x", k, block, INT8["qcompile"])
    assert int8_change(graph, "x", k, block, INT8["qcompile"]) == change, "made once"
    observers.add_outputs(graph, [change])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = session(proto.SerializeToString(), threads=1, kernels="portable")
    (found,) = run(made, [change], {"x": x})
    rows = x.reshape(-1, k)
    wanted = _int8(rows, block) - rows
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(rows).max())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("k", "block"), [(64, 16), (300, 32), (576, 128), (300, 256), (300, 512), (1100, 1024)])
def test_the_rounding_is_that_of_level_4(k: int, block: int, bits: int, symmetric: bool) -> None:
    """Against ONNX Runtime itself, on rows with zeros and outliers: int8 products then differ by float rounding."""
    random = np.random.default_rng(k + block)
    x = random.standard_normal((5, k)).astype(np.float32)
    x[1], x[2, : k // 2], x[:, k // 3] = 0, 0, 20
    groups = -(-k // block)
    codes = random.integers(0, 1 << bits, (k, 24)).astype(np.uint8)
    scale = random.uniform(0.5, 1, (groups, 24)).astype(np.float32)
    middle = 1 << (bits - 1)
    zeros = np.full_like(scale, middle) if symmetric else random.integers(0, 1 << bits, scale.shape)
    rows = np.arange(k) // block
    weight = ((codes - zeros[rows].astype(np.float32)) * scale[rows]).astype(np.float32)
    exact, int8 = (_level(x, codes, scale, None if symmetric else zeros, bits, block, level) for level in (0, 4))
    rounded = np.zeros((5, k + 1), np.float32)
    for part in nbits_rows(k, block):
        given = np.pad(x, ((0, 0), (0, 1)))[:, part]
        step = np.abs(given).max(axis=1, keepdims=True) / np.float32(127)
        rounded[:, part] = np.rint(given / np.where(step > 0, step, 1)) * step
    whole = np.linalg.norm(exact)
    assert np.linalg.norm(exact - x @ weight) < 1e-5 * whole
    assert np.linalg.norm(int8 - rounded[:, :k] @ weight) < 1e-5 * whole
    assert np.linalg.norm(int8 - exact) > 1e-3 * whole


def _level(
    x: np.ndarray, codes: np.ndarray, scale: np.ndarray, zeros: np.ndarray | None, bits: int, block: int, level: int
) -> np.ndarray:
    """x (m, K) times codes (K, N) by MatMulNBits at an accuracy level; scale, zeros: (groups, N)."""
    (k, n), groups = codes.shape, len(scale)
    padded = np.pad(codes, ((0, groups * block - k), (0, 0))).T
    given = {"b": _packed(padded, bits).reshape(n, groups, -1), "s": np.ascontiguousarray(scale.T)}
    if zeros is not None:
        given["z"] = _packed(zeros.astype(np.uint8).T, bits)
    attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
    node = helper.make_node("MatMulNBits", ["x", *given], ["y"], domain="com.microsoft", **attributes)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name, size in (("x", k), ("y", n))]
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in given.items()]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], tensors)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=domains, ir_version=10)
    made = session(proto.SerializeToString(), threads=1, kernels="portable")
    found: np.ndarray = run(made, ["y"], {"x": x})[0]
    return found


def _packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (N, groups or rows) as bytes, each row in whole ones."""
    if bits == 8:
        return np.ascontiguousarray(codes)
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return np.ascontiguousarray(even[:, ::2] | even[:, 1::2] << 4)


@pytest.mark.parametrize("k", [1, 16, 255, 256, 257, 600])
@pytest.mark.parametrize("block", [16, 64, 256, 1024])
def test_blocks_of_level_4_hold_every_row_once(k: int, block: int) -> None:
    rows = nbits_rows(k, block)
    assert rows.shape[1] <= 256
    assert sorted(rows[rows < k]) == list(range(k))
    for part in rows:
        assert len({row // block for row in part[part < k]}) == 1, "one scale of the weight each"


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


def _bits(errors: list[NodeError], wanted: int | None = None, *, alone: bool = False) -> dict[str, int]:
    taking = dict.fromkeys((e.node for e in errors), alone)
    return {e.node: e.activation_bits for e in activation_bits.choose(errors, wanted, taking)}


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


def test_where_nothing_else_is_fast_the_sum_alone_decides() -> None:
    """An 8-bit head for MatMulNBits: its weight is nearly exact, and floats decode it whole for every token."""
    rest = [_node(f"r{i}", 0.1, None) for i in range(4)]
    whole = 4 * 0.1**2 + 0.003**2
    for share, bits in ((0.9, 8), (1.1, 16)):
        head = _node("lm_head", 0.003, (share * activation_bits.BUDGET * whole) ** 0.5, 10**8)
        assert _bits([*rest, head], alone=True)["lm_head"] == bits
        assert _bits([*rest, head])["lm_head"] == 16
    assert _bits([*rest, head], 8, alone=True)["lm_head"] == 8
    assert _bits([*rest, head], 16, alone=True)["lm_head"] == 16
    assert set(_bits(rest, alone=True).values()) == {16}, "nothing was measured"


def test_the_choice_is_written_and_reported(bench: Any) -> None:
    report = bench.compile(bench.save(tiny_decoder()), "pack")
    bits = {error.node: error.activation_bits for error in report.nodes}
    assert all(error.int8_error is not None and 0 < error.int8_error < 0.05 for error in report.nodes)
    assert bits["lm_head"] == 16
    assert set(bits.values()) == {8, 16}
    model = load_model(bench.folder / "out" / "model.onnx")
    assert {n.name: n.attributes["activation_bits"].as_int() for n in model.graph if is_product(n)} == bits


def _nodes(bench: Any) -> dict[str, ir.Node]:
    return {node.name or "": node for node in load_model(bench.folder / "out" / "model.onnx").graph}


def _levels(bench: Any) -> dict[str, int]:
    """accuracy_level of every MatMulNBits by name, 0 where it has none."""
    found = {name: node for name, node in _nodes(bench).items() if node.op_type == "MatMulNBits"}
    return {name: node.attributes.get_int("accuracy_level", 0) for name, node in found.items()}


def test_target_qdq_has_neither_attribute(bench: Any) -> None:
    report = bench.compile(bench.save(tiny_decoder()), "pack", target="qdq")
    assert {(error.int8_error, error.activation_bits) for error in report.nodes} == {(None, 16)}
    assert not any({"activation_bits", "accuracy_level"} & set(node.attributes) for node in _nodes(bench).values())


@pytest.mark.parametrize("target", ["qdq", "matmulnbits"])
def test_activations_of_8_bits_need_kernels(target: str) -> None:
    with pytest.raises(UserError, match=f"activations 8 needs target qcompile: the operators of {target}"):
        Recipe(activations=8, target=target)


def _bytes(bench: Any) -> list[bytes]:
    return [path.read_bytes() for path in sorted((bench.folder / "out").iterdir()) if path.suffix == ".data"]


def test_matmulnbits_has_a_level_by_node(bench: Any) -> None:
    """Level 4 where int8 was measured to do no harm, none elsewhere; the file is checked without levels, too."""
    source = bench.save(tiny_decoder())
    reports, levels, weights = {}, {}, {}
    for level in (None, 0, 4):
        reports[level] = bench.compile(source, "pack", target="matmulnbits", accuracy_level=level)
        levels[level], weights[level] = _levels(bench), _bytes(bench)
        assert {e.node: 4 if e.activation_bits == 8 else 0 for e in reports[level].nodes} == levels[level]
        assert reports[level].reload_error < 1e-5
    assert set(levels[None].values()) == {0, 4}
    assert levels[None]["lm_head"] == 4, "8 bits: nothing else is fast"
    assert set(levels[0].values()) == {0}
    assert set(levels[4].values()) == {4}
    assert weights[None] == weights[0] == weights[4]
    assert {e.int8_error for e in reports[0].nodes} == {None}, "settled, so not measured"
    assert all(0 < e.int8_error < 0.05 for level in (None, 4) for e in reports[level].nodes)
    own = [reports[level].outputs[0].relative for level in (0, None, 4)]
    assert len(set(own)) == 3, "outputs are those of the file, with its int8"
    assert max(own) < 1.1 * min(own)


def test_a_whole_model_of_8_bits_stays_exact_and_is_told_to_be_slow(bench: Any) -> None:
    """Its weights are as exact as int8 activations at best: only the user can say which counts."""
    source = bench.save(tiny_decoder())
    for level, slow in ((None, True), (4, False)):
        report = bench.compile(source, "pack", target="matmulnbits", bits=8, accuracy_level=level)
        zeros = sum(not own for own in _levels(bench).values())
        assert bool(zeros) == slow
        console = Console(file=io.StringIO(), width=200)
        print_report(report, console)
        told = f"slow      {zeros} nodes of 8-bit weights at accuracy level 0"
        assert (told in console.file.getvalue()) == slow  # type: ignore[attr-defined]


def test_other_operators_of_the_target_have_no_level(bench: Any) -> None:
    """MatMulBnb4 computes in floats, whatever is asked for."""
    bench.compile(
        bench.save(tiny_decoder()), "pack", target="matmulnbits", weights=Step("nf4", {"group": 32}), accuracy_level=4
    )
    assert _levels(bench) == {"lm_head": 4}
    others = [node for node in _nodes(bench).values() if node.op_type == "MatMulBnb4"]
    assert others
    assert not any("accuracy_level" in node.attributes for node in others)


def test_an_error_in_a_node_of_level_4_is_found(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding to int8 hides nothing: the check runs the file in floats."""
    whole = nbits._rows

    def wrong(*given: Any) -> Any:
        blob, scales, zeros = whole(*given)
        return blob, scales * np.float32(1.001), zeros

    monkeypatch.setattr(nbits, "_rows", wrong)
    monkeypatch.setattr(Report, "rounding", property(lambda _: 0.0, lambda *_: None), raising=False)
    with pytest.raises(UserError, match="the saved file differs from the verified graph"):
        bench.compile(bench.save(tiny_decoder()), "pack", target="matmulnbits", accuracy_level=4)


@pytest.mark.parametrize("level", [0, 4])
def test_a_level_needs_the_target_that_has_it(level: int) -> None:
    for target in ("qcompile", "qdq"):
        with pytest.raises(UserError, match=f"accuracy_level {level} needs target matmulnbits: {target} has no such"):
            build(Recipe(accuracy_level=level, target=target))
    build(Recipe(accuracy_level=level, target="matmulnbits"))
    build(Recipe(parse_passes("pack(target=matmulnbits)"), accuracy_level=level))
    with pytest.raises(UserError, match=f"accuracy_level {level} is for the MatMulNBits of pack"):
        build(Recipe(parse_passes("qdq"), accuracy_level=level, target="matmulnbits"))
    with pytest.raises(UserError, match="accuracy_level takes 0, 4 or auto, got 2"):
        Recipe(accuracy_level=2, target="matmulnbits")


def test_files_of_other_targets_do_not_name_the_level() -> None:
    assert "accuracy_level" not in Recipe().to_dict()
    assert Recipe(target="matmulnbits").to_dict()["accuracy_level"] == "auto"


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
