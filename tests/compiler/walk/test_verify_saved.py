"""walk/verify_saved.py: a saved file is the graph in memory, node by node and byte by byte, or it is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler.files.load import load_model, save_model
from qcompile.compiler.walk import verify
from qcompile.compiler.walk.verify_saved import check_saved
from qcompile.models.tiny import tiny_decoder, tiny_encoder, tiny_mlp
from qcompile.passes.errors import UserError

DIFFERS = r"the saved file differs from the verified graph in {}.*nothing was kept"


def _branches() -> ir.Model:
    """An If with constants of its own, a Constant node, an optional input left out, a function, texts and an -inf."""
    branches = []
    for name, number in (("then", 1.5), ("else", -np.inf)):
        made = numpy_helper.from_array(np.full((3,), number, np.float32), f"{name}.c")
        out = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, None)
        node = helper.make_node("Mul", ["x", f"{name}.c"], [f"{name}.y"])
        branches.append(helper.make_graph([node], name, [], [out], [made]))
    nodes = [
        helper.make_node("If", ["c"], ["a"], name="choice", then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Constant", [], ["k"], name="k", value=numpy_helper.from_array(np.arange(3, dtype="f"), "v")),
        helper.make_node("Clip", ["a", "", "k0"], ["b"], name="clip"),
        helper.make_node("twice", ["b"], ["d"], name="call", domain="own"),
        helper.make_node("LeakyRelu", ["d"], ["e"], name="leaky", alpha=0.1),
        helper.make_node("Add", ["e", "k"], ["y"], name="sum"),
    ]
    function = helper.make_function(
        "own", "twice", ["p"], ["q"], [helper.make_node("Add", ["p", "p"], ["q"])], [helper.make_opsetid("", 17)]
    )
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", 3)),
        helper.make_tensor_value_info("c", TensorProto.BOOL, ()),
    ]
    constants = [
        numpy_helper.from_array(np.float32(7), "k0"),
        helper.make_tensor("t", TensorProto.STRING, (2,), ["a", "b"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=9))


MODELS: dict[str, Callable[[], ir.Model]] = {
    "decoder": tiny_decoder,
    "encoder": tiny_encoder,
    "mlp": tiny_mlp,
    "branches": _branches,
}


@pytest.mark.parametrize("name", MODELS)
def test_an_intact_file_is_the_model(tmp_path: Path, name: str) -> None:
    """Whatever the graph has in it; and the model is the same behind the check, weights in memory or on disk."""
    model = MODELS[name]()
    save_model(model, tmp_path / "m.onnx", metadata={"qcompile": "told"})
    before = {value.name: value.const_value for value in model.graph.initializers.values()}
    check_saved(tmp_path / "m.onnx", model)
    assert all(value.const_value is before[value.name] for value in model.graph.initializers.values())
    again = load_model(tmp_path / "m.onnx")
    save_model(again, tmp_path / "n.onnx")
    check_saved(tmp_path / "n.onnx", again)
    check_saved(tmp_path / "n.onnx", model)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_bit_of_a_weight(tmp_path: Path, where: float, bit: int) -> None:
    """Bytes between the tensors mean nothing; any other bit is noticed, however little it would change."""
    model = tiny_mlp()
    save_model(model, tmp_path / "m.onnx")
    (data,) = tmp_path.glob("*.data")
    content = bytearray(data.read_bytes())
    place = int(where * len(content))
    content[place] ^= 1 << bit
    data.write_bytes(content)
    placed = [value.const_value for value in load_model(tmp_path / "m.onnx").graph.initializers.values()]
    inside = any(
        isinstance(t, ir.ExternalTensor) and (t.offset or 0) <= place < (t.offset or 0) + t.nbytes for t in placed
    )
    if inside:
        with pytest.raises(UserError, match=DIFFERS.format("tensor")):
            check_saved(tmp_path / "m.onnx", model)
    else:
        check_saved(tmp_path / "m.onnx", model)
    for file in tmp_path.iterdir():
        file.unlink()


def _swap(proto: onnx.ModelProto) -> None:
    """Two tensors of one size change places."""
    placed = [t for t in proto.graph.initializer if t.external_data]
    a, b = next((a, b) for a in placed for b in placed if a is not b and list(a.dims) == list(b.dims))
    first, second = ([(e.key, e.value) for e in t.external_data] for t in (a, b))
    for tensor, entries in ((a, second), (b, first)):
        del tensor.external_data[:]
        for key, value in entries:
            tensor.external_data.add(key=key, value=value)


def _rewire(proto: onnx.ModelProto) -> None:
    node = next(n for n in proto.graph.node if n.op_type == "Add" and len(set(n.input)) == 2)
    node.input[0], node.input[1] = node.input[1], node.input[0]


def _drop(proto: onnx.ModelProto) -> None:
    del proto.graph.node[0]


def _reshape(proto: onnx.ModelProto) -> None:
    tensor = next(t for t in proto.graph.initializer if len(t.dims) == 2 and t.dims[0] != t.dims[1])
    tensor.dims[0], tensor.dims[1] = tensor.dims[1], tensor.dims[0]


@pytest.mark.parametrize(
    ("fault", "words"), [(_swap, "tensor"), (_rewire, "node"), (_drop, "the number of its nodes"), (_reshape, "tensor")]
)
def test_faults_of_the_model_file(tmp_path: Path, fault: Callable[[onnx.ModelProto], None], words: str) -> None:
    model = tiny_decoder()
    save_model(model, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    fault(proto)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match=DIFFERS.format(words)):
        check_saved(tmp_path / "m.onnx", model)


def test_a_file_that_cannot_be_read_back(tmp_path: Path) -> None:
    model = tiny_mlp()
    save_model(model, tmp_path / "m.onnx")
    (tmp_path / "m.onnx").write_bytes((tmp_path / "m.onnx").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"the saved file cannot be read back \(.*nothing was kept"):
        check_saved(tmp_path / "m.onnx", model)
    save_model(model, tmp_path / "m.onnx")
    (data,) = tmp_path.glob("*.data")
    data.write_bytes(data.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"became shorter|differs"):
        check_saved(tmp_path / "m.onnx", model)


def _attribute(proto: onnx.ModelProto) -> None:
    next(n for n in proto.graph.node if n.name == "leaky").attribute[0].f += 1e-7


def _constant(proto: onnx.ModelProto) -> None:
    value = next(n for n in proto.graph.node if n.name == "k").attribute[0].t
    value.CopyFrom(numpy_helper.from_array(np.array([0, 1, 2.0000002], "f"), value.name))


def _branch(proto: onnx.ModelProto) -> None:
    tensor = next(a for a in proto.graph.node[0].attribute if a.name == "else_branch").g.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(np.array([-np.inf, -np.inf, 0], "f"), tensor.name))


def _function(proto: onnx.ModelProto) -> None:
    proto.functions[0].node[0].op_type = "Mul"


def _opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version -= 1


def _text(proto: onnx.ModelProto) -> None:
    next(t for t in proto.graph.initializer if t.name == "t").string_data[1] = b"c"


def _output(proto: onnx.ModelProto) -> None:
    proto.graph.output[0].name = "e"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (_attribute, "node leaky"),
        (_constant, "node k"),
        (_branch, "node choice"),
        (_function, "function twice"),
        (_opset, "its opsets"),
        (_text, "tensor t"),
        (_output, "its outputs"),
    ],
)
def test_faults_in_every_corner(tmp_path: Path, fault: Callable[[onnx.ModelProto], None], words: str) -> None:
    model = _branches()
    save_model(model, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    fault(proto)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(UserError, match=DIFFERS.format(words)):
        check_saved(tmp_path / "m.onnx", model)


@pytest.mark.parametrize("passes", ["pack", "smooth,qdq", "dynamic"])
def test_a_compile_notices_a_bit_that_hardly_counts(bench: Any, monkeypatch: pytest.MonkeyPatch, passes: str) -> None:
    """The file is damaged when it has run already: the check reads what will be published."""
    source, run_file = bench.save(tiny_decoder()), verify.run_file

    def damaged(path: Path, *rest: Any, **named: Any) -> Any:
        outputs = run_file(path, *rest, **named)
        (data,) = path.parent.glob("*.data")
        content = bytearray(data.read_bytes())
        content[-1] ^= 1
        data.write_bytes(content)
        return outputs

    monkeypatch.setattr("qcompile.compiler.walk.saved_run.run_file", damaged)
    (bench.folder / "out").mkdir()
    before = bench.snapshot()
    with pytest.raises(UserError, match=DIFFERS.format("tensor")):
        bench.compile(source, passes)
    assert bench.snapshot() == before
