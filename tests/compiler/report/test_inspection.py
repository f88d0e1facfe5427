"""report/inspection.py, sizes.py, stored_weights.py and `qcompile inspect`, on small graphs written out here."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler.cli import main
from qcompile.compiler.report.inspection import Summary, WeightGroup, inspect

K, N, V = 64, 8, 40


def _int4(name: str, shape: tuple[int, ...], kind: int = TensorProto.UINT4) -> Any:
    return helper.make_tensor(name, kind, shape, np.zeros(-(-int(np.prod(shape)) // 2), np.uint8).tobytes(), raw=True)


def _array(name: str, array: Any) -> Any:
    return numpy_helper.from_array(array, name)


def _save(path: Path, nodes: list[Any], tensors: list[Any], **metadata: str) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", K])]
    inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["b"]))
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qcompile", 1), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="me")
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def _only(summary: Summary) -> WeightGroup:
    (group,) = summary.weights
    return group


def test_own_linear_counts_scales_and_zero_points(tmp_path: Path) -> None:
    """4 bits of code, and 32 + 4 bits for every 16 of them: 6.25 bits a weight."""
    node = helper.make_node("MatMulInt4", ["x", "w", "s", "z"], ["y"], name="n", domain="qcompile", block_size=16)
    tensors = [_int4("w", (K, N)), _array("s", np.ones((4, N), "f")), _int4("z", (4, N))]
    summary = inspect(_save(tmp_path / "m.onnx", [node], tensors))
    group = _only(summary)
    assert (group.form, group.shape, group.kind, group.quantized) == ("uint4 g16 asym", (K, N), "linear", True)
    assert summary.linear_bits == pytest.approx(4 + 36 / 16)
    assert summary.parameters == K * N
    assert summary.file_bytes == (tmp_path / "m.onnx").stat().st_size
    assert {share.dtype: share.bytes for share in summary.types} == {"uint4": (K * N + 4 * N) // 2, "float": 16 * N}


def test_a_quantized_activation_is_no_weight(tmp_path: Path) -> None:
    """Attention with both operands behind Q and DQ: of the second, scale and zero point alone are constant."""
    grid = ["s", "z"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", *grid], ["q"]),
        helper.make_node("DequantizeLinear", ["q", *grid], ["d"]),
        helper.make_node("Transpose", ["d"], ["t"]),
        helper.make_node("MatMul", ["d", "t"], ["y"], name="n"),
    ]
    summary = inspect(_save(tmp_path / "m.onnx", nodes, [_array("s", np.float32(1)), _array("z", np.uint8(0))]))
    assert (_only(summary).kind, _only(summary).quantized) == ("product", False)


@pytest.mark.parametrize("parts", [2, 3, 4, 8, 12])
def test_a_split_weight_is_no_fields_of_bytes(tmp_path: Path, parts: int) -> None:
    """Heads cut out of one table of codes: as many as bits of a format, or as no format has."""
    heads = [f"w{i}" for i in range(parts)]
    nodes = [helper.make_node("Split", ["w"], heads, axis=1, num_outputs=parts)]
    nodes.append(helper.make_node("Concat", heads[::-1], ["turned"], axis=1))
    for name in ("turned", "w0"):
        nodes.append(helper.make_node("DequantizeLinear", [name, "s", "z"], [f"{name}.d"]))
        nodes.append(helper.make_node("MatMul", ["x", f"{name}.d"], [f"{name}.y"], name=name))
    arrays = {"w": np.zeros((K, 24), np.uint8), "s": np.float32(1), "z": np.uint8(0)}
    summary = inspect(_save(tmp_path / "m.onnx", nodes, [_array(name, own) for name, own in arrays.items()]))
    assert not any("int" in group.form and not group.form.startswith("uint8") for group in summary.weights)


def test_tied_embedding_is_counted_once(tmp_path: Path) -> None:
    """An lm_head and an embedding that read one table, as initializers shared by both nodes."""
    nodes = [
        helper.make_node("EmbeddingInt8", ["ids", "w", "s", "z"], ["e"], name="e", domain="qcompile", block_size=K),
        helper.make_node("MatMulInt8", ["e", "w", "s", "z"], ["y"], name="head", domain="qcompile", block_size=K),
    ]
    tensors = [
        _array("w", np.zeros((K, V), "u1")),
        _array("s", np.ones((1, V), "f")),
        _array("z", np.zeros((1, V), "u1")),
    ]
    summary = inspect(_save(tmp_path / "m.onnx", nodes, tensors))
    embedding, head = summary.weights
    assert (embedding.kind, embedding.shape, embedding.form) == ("embedding", (V, K), "uint8 per-column asym")
    assert (head.kind, head.shape) == ("linear", (K, V))
    assert summary.parameters == K * V
    assert "w is shared by e, head" in summary.ties


def test_a_four_bit_embedding_of_two_codes_a_byte(tmp_path: Path) -> None:
    node = helper.make_node("EmbeddingInt4", ["ids", "w", "s", "z"], ["y"], name="e", domain="qcompile", block_size=32)
    tensors = [_array("w", np.zeros((K, V // 2), "u1")), _array("s", np.ones((2, V), "f"))]
    summary = inspect(_save(tmp_path / "m.onnx", [node], [*tensors, _array("z", np.zeros((2, V // 2), "u1"))]))
    group = _only(summary)
    assert (group.shape, group.form, summary.parameters) == ((V, K), "uint4 g32 asym", V * K)


def test_matmulnbits(tmp_path: Path) -> None:
    attributes = {"K": K, "N": N, "bits": 4, "block_size": 32}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], name="n", domain="com.microsoft", **attributes)
    tensors = [_array("w", np.zeros((N, 2, 16), "u1")), _array("s", np.ones((N, 2), "f"))]
    summary = inspect(_save(tmp_path / "m.onnx", [node], tensors))
    assert (_only(summary).form, _only(summary).shape) == ("int4 g32 sym", (K, N))
    assert summary.linear_bits == pytest.approx(5)


@pytest.mark.parametrize("behind_transpose", [False, True])
def test_dequantized_matmul(tmp_path: Path, behind_transpose: bool) -> None:
    shape = (N, K) if behind_transpose else (K, N)
    axis = 1 if behind_transpose else 0
    scale = np.ones((N, 4) if behind_transpose else (4, N), "f")
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=axis, block_size=16)]
    nodes += [helper.make_node("Transpose", ["d"], ["t"], perm=[1, 0])] if behind_transpose else []
    nodes.append(helper.make_node("MatMul", ["x", "t" if behind_transpose else "d"], ["y"], name="n"))
    summary = inspect(_save(tmp_path / "m.onnx", nodes, [_int4("w", shape, TensorProto.INT4), _array("s", scale)]))
    group = _only(summary)
    assert (group.form, group.shape) == ("int4 g16 sym", (K, N))
    assert (group.quantized, group.operator) == (True, "DequantizeLinear + MatMul")


def test_what_is_not_quantized_has_a_reason(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"], name="float"),
        helper.make_node("Gemm", ["a", "g"], ["b"], name="gemm", transB=1),
        helper.make_node("Constant", [], ["c"], value=_array("c", np.ones((3, N), "f"))),
        helper.make_node("MatMul", ["b", "c"], ["d"], name="held"),
        helper.make_node("Transpose", ["d"], ["t"]),
        helper.make_node("MatMul", ["d", "t"], ["p"], name="product"),
        helper.make_node("MatMul", ["l", "p"], ["y"], name="left"),
    ]
    tensors = [_array("w", np.ones((K, N), "f")), _array("g", np.ones((3, N), "f")), _array("l", np.ones((2, 2), "f"))]
    summary = inspect(_save(tmp_path / "m.onnx", nodes, tensors))
    reasons = {group.pattern: (group.kind, group.reason) for group in summary.weights}
    assert reasons["float"] == ("linear", "kept in float")
    assert reasons["gemm"][1].startswith("a Gemm: the pass `prepare`")
    assert "Constant node" in reasons["held"][1]
    assert reasons["product"] == ("product", "no constant weight (a product of two activations)")
    assert reasons["left"][1] == "the constant is the left operand"
    assert summary.linear_bits == 32


def test_alike_weights_are_listed_together_unless_all_are_wanted(tmp_path: Path) -> None:
    def node(i: int) -> Any:
        return helper.make_node("MatMul", [f"v{i}", "w"], [f"v{i + 1}"], name=f"layers.{i}.up")

    nodes = [helper.make_node("Identity", ["x"], ["v0"]), *(node(i) for i in range(12))]
    path = _save(tmp_path / "m.onnx", nodes, [_array("w", np.ones((K, K), "f"))])
    summary = inspect(path)
    assert (_only(summary).pattern, _only(summary).count) == ("layers.*.up", 12)
    assert summary.ties == ["w is shared by layers.0.up, layers.1.up, layers.2.up, layers.3.up and 8 more"]
    assert len(inspect(path, every=True).weights) == 12
    assert summary.parameters == K * K


def test_convolutions_are_one_line(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x" if i == 0 else f"v{i}", f"w{i}"], [f"v{i + 1}"]) for i in range(3)]
    path = _save(tmp_path / "m.onnx", nodes, [_array(f"w{i}", np.ones((1, 1, i + 1), "f")) for i in range(3)])
    group = _only(inspect(path))
    assert (group.pattern, group.kind, group.count, group.quantized) == ("Conv", "conv", 3, False)
    assert group.reason == "float: `qdq` quantizes convolutions"


def test_shared_regions_of_external_data_are_ties(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "a"], ["u"]), helper.make_node("MatMul", ["u", "b"], ["y"])]
    tensors = [_array(name, np.ones((K, K), "f")) for name in "ab"]
    path = _save(tmp_path / "m.onnx", nodes, tensors)
    model = onnx.load(path)
    (tmp_path / "m.data").write_bytes(np.ones((K, K), "f").tobytes())
    for tensor in model.graph.initializer:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "m.data"), ("offset", "0"), ("length", str(4 * K * K))):
            tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    summary = inspect(path)
    assert summary.ties == ["stored once: a, b"]
    assert summary.parameters == K * K
    assert summary.file_bytes == path.stat().st_size + 4 * K * K
    assert summary.types[0].bytes == 4 * K * K


def test_inspect_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="a_linear_with_a_long_name_" + "x" * 80)
    recipe = '{"passes": ["smooth", "pack"]}'
    tensors = [_array("w", np.ones((K, N), "f"))]
    path = str(
        _save(
            tmp_path / "m.onnx",
            [node],
            tensors,
            **{"qcompile.recipe": recipe, "note": "text", "vocabulary": "a\n" * 999},
        )
    )
    assert main(["inspect", path]) == 0
    shown = capsys.readouterr().out
    for part in (
        node.name,
        "64 x 8",
        "no: kept in float",
        "0 of 1 linears",
        'qcompile.recipe: {"passes"',
        "note: text",
    ):
        assert part in shown
    assert main(["inspect", path, "--json"]) == 0
    loaded = json.loads(capsys.readouterr().out)
    assert loaded["metadata"]["qcompile.recipe"]["passes"] == ["smooth", "pack"]
    assert loaded["file_bits"] == 8 * Path(path).stat().st_size / (K * N)
    assert main(["inspect", str(tmp_path / "absent.onnx")]) == 2


def test_weights_of_other_operators_and_bodies_are_listed(tmp_path: Path) -> None:
    """An LSTM's, one in bodies of If, codes of a convolution, a norm's: each once, with the share of its kind."""
    body = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["b"], name="inside")], "body", [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )  # fmt: skip
    nodes = [
        helper.make_node("LSTM", ["x", "lw", "lr"], ["h"], name="lstm", hidden_size=32),
        helper.make_node("If", ["c"], ["i"], name="branch", then_branch=body, else_branch=body),
        helper.make_node("DequantizeLinear", ["q", "s"], ["d"], axis=0),
        helper.make_node("Conv", ["i", "d"], ["k"], name="conv"),
        helper.make_node("Mul", ["k", "gamma"], ["m"], name="norm"),
        helper.make_node("Attention", ["m", "aw"], ["y"], name="attention", domain="com.microsoft", num_heads=1),
    ]
    floats = {"lw": (1, 128, 32), "lr": (1, 128, 32), "inner": (32, 64), "gamma": (2048,), "aw": (32, 96)}
    tensors = [_array(name, np.ones(shape, "f")) for name, shape in floats.items()]
    tensors += [_array("c", np.array(True)), _array("q", np.ones((64, 16, 1), "i1")), _array("s", np.ones(64, "f"))]
    summary = inspect(_save(tmp_path / "m.onnx", nodes, tensors), every=True)
    told = {(w.pattern, w.operator, w.kind, w.shape, w.quantized) for w in summary.weights}
    assert told == {
        ("lstm", "LSTM", "weight", (1, 128, 32), False), ("inside", "MatMul", "linear", (32, 64), False),
        ("conv", "DequantizeLinear + Conv", "conv", (64, 16, 1), True), ("norm", "Mul", "constant", (2048,), False),
        ("attention", "Attention", "weight", (32, 96), False),
    }  # fmt: skip
    assert {w.pattern: w.count for w in summary.weights} == {
        "lstm": 2,
        "inside": 2,
        "conv": 1,
        "norm": 1,
        "attention": 1,
    }
    assert summary.shares == {"MatMul": 0.0, "Conv": 1.0}
