"""files/well_formed.py, tensor_protos.py, memory.py: damaged models, by kind, are one line from every command."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs.table import Graph
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from said import complaints

from qcompile.compiler import cli
from qcompile.compiler.data import npz
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.files.load import load_model
from qcompile.compiler.files.tensor_protos import check_tensor
from qcompile.passes.errors import UserError

Damage = Callable[[onnx.ModelProto], None]
CASES: dict[str, tuple[Damage, str]] = {}


def damage(message: str) -> Callable[[Damage], Damage]:
    """Enter a way to damage the model of `_model`, with what must be said."""

    def enter(change: Damage) -> Damage:
        CASES[change.__name__] = (change, message)
        return change

    return enter


def _model() -> onnx.ModelProto:
    """Nodes: 0 Gemm, 1 Relu, 2 MatMul, 3 Transpose, 4 If, 5 call of a function, 6 MatMul; tensor 0 is the Gemm's."""
    make = Graph()
    x = make.input("b", 16)
    h = make.one("Relu", make.one("Gemm", x, make.floats(16, 16), make.floats(16), transB=1))
    h = make.one("Transpose", make.one("MatMul", h, make.floats(16, 16)), perm=[0, 1])
    info = helper.make_tensor_value_info
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("MatMul", [h, f"{name}_w"], [f"{name}_y"], f"{name}_node")],
            name,
            [],
            [info(f"{name}_y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.ones((16, 16), np.float32), f"{name}_w")],
        )
        for name in ("then", "else")
    }
    h = make.one("If", make.constant(np.array([True])), **branches)
    call = helper.make_node("MatMul", ["a", "w"], ["t"])
    softmax = helper.make_node("Softmax", ["t"], ["c"])
    softmax.attribute.append(onnx.AttributeProto(name="axis", ref_attr_name="axis", type=onnx.AttributeProto.INT))
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    make.functions.append(helper.make_function("local", "F", ["a", "w"], ["c"], [call, softmax], imports, ["axis"]))
    h = make.one("F", h, make.floats(16, 16), domain="local", axis=-1)
    make.output(make.linear(h, 8, 16))
    return make.model()


def _branch(model: onnx.ModelProto) -> onnx.GraphProto:
    return model.graph.node[4].attribute[0].g


@damage(r"tensor 'w2' is FLOAT \[16, 16\], which takes 1024 bytes, and holds 1020")
def data_too_short(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[4:]


@damage(r"tensor 'w2' is FLOAT \[16, 16\], which takes 1024 bytes, and holds 1028")
def data_too_long(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].raw_data += bytes(4)


@damage(r"tensor 'w2' .* takes 1024 bytes, and holds 0")
def no_data(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].ClearField("raw_data")


@damage(r"tensor 'w2' is FLOAT and holds int64_data")
def data_in_a_field_of_another_type(model: onnx.ModelProto) -> None:
    no_data(model)
    model.graph.initializer[0].int64_data.extend([1] * 256)


@damage(r"tensor 'w2' is FLOAT and holds float_data, raw_data")
def data_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].float_data.extend([1] * 256)


@damage(r"takes 256 entries, and holds 255")
def typed_data_too_short(model: onnx.ModelProto) -> None:
    no_data(model)
    model.graph.initializer[0].float_data.extend([1] * 255)


@damage(r"tensor 'w2' has no known element type \(number 0\)")
def undefined_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = TensorProto.UNDEFINED


@damage(r"tensor 'w2' has no known element type \(number 999\)")
def unknown_type(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].data_type = 999


@damage(r"tensor 'w2' has impossible dimensions \[-16, 16\]")
def negative_dimension(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -16


@damage(r"tensor 'w2' has impossible dimensions \[4611686018427387904, 16\]")
def dimensions_that_overflow(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = 2**62


@damage(r"impossible dimensions \[16, 16, 1, .* 102 of them\]")
def a_hundred_dimensions(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims.extend([1] * 100)


@damage(r"cannot load it: .*Gemm")
def weight_of_rank_one(model: onnx.ModelProto) -> None:
    del model.graph.initializer[0].dims[1:]
    model.graph.initializer[0].dims[0] = 256


@damage(r"stored in segments")
def segments(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].segment.end = 4


@damage(r"unknown place|export the model again")
def data_in_an_unknown_place(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].MergeFromString(b"\x70\x07")  # field 14, an enum, 7
    model.graph.initializer[0].dims[0] = 3


@damage(r"external data file 'w\.data' is missing")
def external_data_without_a_file(model: onnx.ModelProto) -> None:
    _external(model, location="w.data")


@damage(r"the offset of its data in 'w\.data' is no number: 'ten'")
def external_data_at_no_number(model: onnx.ModelProto) -> None:
    _external(model, location="w.data", offset="ten")


@damage(r"file of an impossible name")
def external_data_of_an_impossible_name(model: onnx.ModelProto) -> None:
    _external(model, location="w\0.data")


@damage(r"lies outside")
def external_data_nowhere(model: onnx.ModelProto) -> None:
    _external(model)


def _external(model: onnx.ModelProto, **entries: str) -> None:
    no_data(model)
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    for key, value in entries.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)


@damage(r"tensor 'w2' is given twice")
def tensor_twice(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(model.graph.initializer[0])


@damage(r"tensor has no name")
def tensor_without_a_name(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].name = ""


@damage(r"input 'x1' is given twice")
def input_twice(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


@damage(r"value 'Gemm4' is defined twice, by Relu 'n_Relu5' too")
def value_twice(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "Gemm4"


@damage(r"value 'w2' is defined twice")
def value_named_like_a_tensor(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "w2"


@damage(r"node Relu 'n_Relu5' reads 'nobody', which nothing defines")
def dangling_input(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[0] = "nobody"


@damage(r"node MatMul '(then|else)_node' reads '(then|else)_w', which nothing defines")
def value_of_another_branch(model: onnx.ModelProto) -> None:
    _branch(model).node[0].input[1] = "else_w" if model.graph.node[4].attribute[0].name == "then_branch" else "then_w"


@damage(r"the graph has a cycle")
def cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[2].output[0]


@damage(r"the graph has a cycle")
def cycle_through_a_branch(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = model.graph.node[4].output[0]


@damage(r"no nodes or no outputs")
def no_outputs(model: onnx.ModelProto) -> None:
    del model.graph.output[:]


@damage(r"output 'gone' is computed by no node of it")
def output_of_nobody(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "gone"


@damage(r"node Relu '\w+' has no outputs")
def node_without_outputs(model: onnx.ModelProto) -> None:
    model.graph.node.add(op_type="Relu", name="idle", input=["x1"])


@damage(r"a node 'n_Relu5' has no operator")
def node_without_an_operator(model: onnx.ModelProto) -> None:
    model.graph.node[1].op_type = ""


@damage(r"node MatMul 'n_MatMul7' has 1 inputs, MatMul of opset 17 takes 2 to 2")
def missing_operand(model: onnx.ModelProto) -> None:
    del model.graph.node[2].input[1]


@damage(r"node MatMul 'n_MatMul7' lacks its input 'B'")
def empty_operand(model: onnx.ModelProto) -> None:
    model.graph.node[2].input[1] = ""


@damage(r"attribute 'perm' is FLOAT, it must be INTS")
def attribute_of_a_wrong_type(model: onnx.ModelProto) -> None:
    model.graph.node[3].attribute[0].CopyFrom(helper.make_attribute("perm", 1.5))


@damage(r"node Cast 'n_Transpose8' lacks its attribute 'to'")
def missing_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[3].op_type = "Cast"
    del model.graph.node[3].attribute[:]


@damage(r"Transpose of opset 17 has no attribute 'axis'")
def unknown_attribute(model: onnx.ModelProto) -> None:
    model.graph.node[3].attribute.append(helper.make_attribute("axis", 1))


@damage(r"attribute 'perm' is given twice")
def attribute_twice(model: onnx.ModelProto) -> None:
    model.graph.node[3].attribute.append(model.graph.node[3].attribute[0])


@damage(r"attribute 'perm' has no known type")
def attribute_without_a_type(model: onnx.ModelProto) -> None:
    model.graph.node[3].attribute[0].ClearField("type")


@damage(r"attribute 'then_branch' is empty|attribute 'else_branch' is empty")
def branch_without_a_graph(model: onnx.ModelProto) -> None:
    model.graph.node[4].attribute[0].ClearField("g")


@damage(r"output '(then|else)_y' is computed by no node of it")
def empty_branch(model: onnx.ModelProto) -> None:
    del _branch(model).node[:]


@damage(r"tensor '(then|else)_w' .* takes 1024 bytes, and holds 7")
def tensor_of_a_branch(model: onnx.ModelProto) -> None:
    _branch(model).initializer[0].raw_data = bytes(7)


@damage(r"stands for 'way', which no function around it has")
def parameter_outside_of_a_function(model: onnx.ModelProto) -> None:
    model.graph.node[3].attribute[0].ref_attr_name = "way"


@damage(r"cannot load it: .*Transpose.*perm")
def permutation_that_is_none(model: onnx.ModelProto) -> None:
    """Of a constant; that it does not fit an operator is known to ONNX Runtime, which a dry run does not ask."""
    model.graph.node[3].input[0] = "w2"
    model.graph.node[3].attribute[0].ints[:] = [5, 7]


@damage(r"function local\.F calls itself")
def recursive_function(model: onnx.ModelProto) -> None:
    model.functions[0].node[0].op_type, model.functions[0].node[0].domain = "F", "local"


@damage(r"function local\.\w calls itself")
def functions_that_call_each_other(model: onnx.ModelProto) -> None:
    model.functions.append(model.functions[0])
    model.functions[1].name = "G"
    for function, callee in zip(model.functions, "GF", strict=True):
        function.node[0].op_type, function.node[0].domain = callee, "local"


@damage(r"its functions, put in place of their calls, make \d+ nodes of \d+")
def functions_that_blow_up(model: onnx.ModelProto) -> None:
    for level in range(50):
        function = model.functions.add()
        function.CopyFrom(model.functions[0])
        function.name = f"F{level}"
        del function.node[:], function.attribute[:]
        names = ["a", "t", "c"]
        for i in range(2):
            callee = f"F{level - 1}" if level else "F"
            node = helper.make_node(callee, [names[i], "w"], [names[i + 1]], domain="local")
            if not level:
                node.attribute.append(helper.make_attribute("axis", 1))
            function.node.append(node)
    model.graph.node[5].op_type = "F49"
    del model.graph.node[5].attribute[:]


@damage(r"function local\.F is defined twice or has no name")
def function_twice(model: onnx.ModelProto) -> None:
    model.functions.append(model.functions[0])


@damage(r"node F 'n_F\d+' leaves out what its function needs, 'B' of MatMul")
def call_without_an_operand(model: onnx.ModelProto) -> None:
    del model.graph.node[5].input[1]


@damage(r"node F 'n_F\d+' has 3 inputs and 1 outputs, its function has 2 and 1")
def call_with_too_many_operands(model: onnx.ModelProto) -> None:
    model.graph.node[5].input.append("x1")


@damage(r"function local\.F is of version 9 of operator set 'ai\.onnx', the model of 17")
def function_of_another_opset(model: onnx.ModelProto) -> None:
    model.functions[0].opset_import[0].version = 9


@damage(r"imports two versions of operator set 'ai\.onnx'")
def two_opsets(model: onnx.ModelProto) -> None:
    model.opset_import.add(domain="ai.onnx", version=12)


@damage(r"imports version 0 of 'ai\.onnx', which there is not")
def opset_nought(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 0


@damage(r"names no opset, which says what Gemm does")
def no_opset_of_onnx(model: onnx.ModelProto) -> None:
    del model.opset_import[0]


@damage(r"tensor 'w2' is no sparse tensor: dimensions \[256\], values of rank 2")
def sparse(model: onnx.ModelProto) -> None:
    indices = numpy_helper.from_array(np.arange(256), "i")
    made = helper.make_sparse_tensor(model.graph.initializer[0], indices, [256])
    model.graph.sparse_initializer.append(made)
    del model.graph.initializer[0]


@damage(r"input 'x1' has no known element type \(number 0\)")
def input_without_a_type(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 0


@damage(r"value 'x1' has no known element type \(number 77\)")
def input_of_an_unknown_type(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = 77


@damage(r"input 'x1' \[10000000000, 16\] takes 640\.0 GB, .* GB of memory are free")
def input_beyond_all_memory(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 10**10


@damage(r"node ConstantOfShape '\w+': 'big' \[1000000, 1000000\] takes 4000\.0 GB")
def constant_beyond_all_memory(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([10**6, 10**6]), "size"))
    model.graph.node.append(helper.make_node("ConstantOfShape", ["size"], ["big"]))
    model.graph.node.append(helper.make_node("ReduceSum", ["big"], ["sum"]))
    model.graph.output.append(helper.make_tensor_value_info("sum", TensorProto.FLOAT, None))


@damage(r"node Concat '\w+': 'd\d+' \[\d+\] takes \d+\.\d GB")
def value_doubled_forty_times(model: onnx.ModelProto) -> None:
    """Following it as data took onnx's shape inference all memory there is."""
    model.graph.node.append(helper.make_node("Shape", ["x1"], ["d0"]))
    for i in range(40):
        model.graph.node.append(helper.make_node("Concat", [f"d{i}"] * 2, [f"d{i + 1}"], axis=0))
    model.graph.output.append(helper.make_tensor_value_info("d40", TensorProto.INT64, None))


@damage(r"node ConvTranspose 'up': attribute 'group' is 0, and must be 1 at least")
def no_groups(model: onnx.ModelProto) -> None:
    """Found by fuzzing: ONNX Runtime died of the division."""
    model.graph.initializer.append(numpy_helper.from_array(np.ones((8, 4, 3, 3), np.float32), "kernel"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 8, 5, 5), np.float32), "picture"))
    model.graph.node.append(helper.make_node("ConvTranspose", ["picture", "kernel"], ["wide"], name="up", group=0))
    model.graph.output.append(helper.make_tensor_value_info("wide", TensorProto.FLOAT, None))


@damage(r"node MaxPool 'down': attribute 'strides' is -1, and must be 1 at least")
def backward_strides(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 8, 5, 5), np.float32), "picture"))
    model.graph.node.append(
        helper.make_node("MaxPool", ["picture"], ["few"], name="down", kernel_shape=[2, 2], strides=[2, -1])
    )
    model.graph.output.append(helper.make_tensor_value_info("few", TensorProto.FLOAT, None))


@damage(r"node If 'n_If\d+': input 'c9' is empty, and must hold a number")
def condition_of_no_element(model: onnx.ModelProto) -> None:
    """Found by fuzzing: ONNX Runtime died of an empty trip count of a Loop."""
    name = model.graph.node[4].input[0]
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(0, bool), name))


def _one_line(capsys: Any, command: list[str], message: str, *, code: int = 2) -> None:
    assert cli.main(command) == code
    told = complaints(capsys.readouterr().err)
    assert told.count("\n") == 1, told
    assert told.startswith("qcompile: error: "), told
    assert re.search(message, told), told


@pytest.mark.parametrize("name", CASES)
def test_one_line(capsys: Any, tmp_path: Path, name: str) -> None:
    change, message = CASES[name]
    model = _model()
    change(model)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    (tmp_path / "out").mkdir()
    command = [str(path), "--passes", "pack", "-o", str(tmp_path / "out" / "model.onnx")]
    _one_line(capsys, command, message)
    if "cannot load" not in message:  # what only running meets
        _one_line(capsys, [*command, "--dry-run"], message)
    if "cannot load" not in message and " GB" not in message:
        _one_line(capsys, ["inspect", str(path)], message)
    assert not list((tmp_path / "out").iterdir())


def test_the_model_without_damage_compiles(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_model().SerializeToString())
    options = ["--passes", "pack", "--min-coverage", "0", "-o", str(tmp_path / "o.onnx")]
    assert cli.main([str(path), *options]) == 0, capsys.readouterr().err
    assert cli.main(["inspect", str(path)]) == 0


def test_a_name_that_is_no_utf8(capsys: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(_model().SerializeToString().replace(b"n_Relu5", b"n_\xff\xfelu5"))
    _one_line(capsys, ["inspect", str(path)], "a name in it is not UTF-8")


def test_names_are_shown_with_their_control_characters(capsys: Any, tmp_path: Path) -> None:
    model, path = _model(), tmp_path / "model.onnx"
    model.graph.node[1].name = model.producer_name = "\x1b[2Jevil\n\u202e"
    path.write_bytes(model.SerializeToString())
    assert cli.main(["inspect", str(path), "--all"]) == 0
    shown = capsys.readouterr().out
    assert "made by \\u001b[2Jevil\\u000a\\u202e" in shown
    assert not set("\x1b\u202e") & set(shown)


def test_a_backwards_slice_of_nothing(tmp_path: Path) -> None:
    """onnx 1.23 aborts the process that infers its shape."""
    make = Graph()
    x = make.input(0, 16)
    names = [make.constant(np.array([number])) for number in (3, -9, 0, -1)]
    make.output(make.linear(make.one("Slice", x, *names), 8, 16))
    path = tmp_path / "model.onnx"
    path.write_bytes(make.model().SerializeToString())
    assert cli.main([str(path), "--passes", "pack", "--dry-run"]) == 0


def test_strings_beside_weights(tmp_path: Path) -> None:
    make = Graph()
    h = make.linear(make.input("b", 16), 16, 16)
    make.constants.append(helper.make_tensor("words", TensorProto.STRING, [2], [b"a", b"\xff"]))
    make.output(make.linear(h, 8, 16))
    make.output("words", dtype=object)
    path = tmp_path / "model.onnx"
    path.write_bytes(make.model().SerializeToString())
    assert load_model(path).graph.initializers["words"].const_value.nbytes == 2


_KINDS = [kind for kind in TensorProto.DataType.values() if kind not in (0, 8, 27, 28)]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(_KINDS), st.lists(st.integers(0, 5), max_size=4), st.booleans(), st.integers(-3, 3))
def test_data_is_of_the_size_that_type_and_dimensions_say(kind: int, dims: list[int], raw: bool, off: int) -> None:
    tensor = helper.make_tensor("t", kind, dims, np.zeros(int(np.prod(dims)), np.float32))
    if raw:
        tensor = numpy_helper.from_array(numpy_helper.to_array(tensor), "t")
        tensor.data_type = kind
    check_tensor(tensor, "t")
    if off:
        stored = "raw_data" if raw else next((f.name for f, v in tensor.ListFields() if f.name.endswith("_data")), "")
        if not stored:
            return
        values = getattr(tensor, stored)
        if raw:
            tensor.raw_data = values[:off] if off < 0 else values + bytes(off)
        else:
            del values[: -off if off < 0 else 0]
            values.extend([0] * max(0, off))
        changed = len(getattr(tensor, stored))
        if changed:
            with pytest.raises(UserError, match=r"t is \w+ \[.*\], which takes \d+ (bytes|entries), and holds \d+"):
                check_tensor(tensor, "t")


def test_an_archive_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(_model().SerializeToString())
    np.savez_compressed(tmp_path / "x.npz", x1=np.zeros((10_000, 16), np.float32))
    plan = input_plan(load_model(model))
    monkeypatch.setattr(npz, "available", lambda: 600_000)
    with pytest.raises(UserError, match=r"x\.npz holds 0\.0 GB of arrays, 0\.0 GB of memory are free"):
        npz.read_arrays(plan, [tmp_path / "x.npz"])


def test_a_linear_without_elements_is_shown(capsys: Any, tmp_path: Path) -> None:
    """Found by fuzzing: bits per weight of no weights."""
    make = Graph()
    make.output(make.one("MatMul", make.input("b", 0), make.constant(np.zeros((0, 8), np.float32))))
    path = tmp_path / "model.onnx"
    path.write_bytes(make.model().SerializeToString())
    assert cli.main(["inspect", str(path)]) == 0


def test_an_activation_that_a_loop_makes_a_scalar(capsys: Any, tmp_path: Path) -> None:
    """Found by fuzzing: its shape is known only when it runs."""
    make = Graph()
    x = make.input("b", 16)
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("ReduceMean", ["l"], ["m"], keepdims=0)]
    inputs = [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, [1]), info("l", TensorProto.FLOAT, None)]
    outputs = [info("on", TensorProto.BOOL, [1]), info("m", TensorProto.FLOAT, None)]
    body = helper.make_graph(nodes, "body", inputs, outputs)
    h = make.one("Loop", make.constant(np.array([1])), make.constant(np.array([True])), x, body=body)
    make.output(make.linear(h, 8, 16))
    path = tmp_path / "model.onnx"
    path.write_bytes(make.model().SerializeToString())
    np.savez(tmp_path / "x.npz", **make.feeds(0))
    options = ["--passes", "gptq,pack", "--calibration", str(tmp_path / "x.npz"), "-o", str(tmp_path / "o.onnx")]
    _one_line(capsys, [str(path), *options], "activation Loop.* has no axes when the model runs|ONNX Runtime")


def test_an_archive_of_a_version_to_come(tmp_path: Path) -> None:
    """Found by fuzzing: zipfile raises NotImplementedError."""
    model = tmp_path / "model.onnx"
    model.write_bytes(_model().SerializeToString())
    np.savez(tmp_path / "x.npz", x1=np.zeros((4, 16), np.float32))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[content.index(b"PK\x01\x02") + 6] = 173  # "version needed to extract" of the central directory
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz is not a readable \.npz file: zip file version 17\.3"):
        npz.read_arrays(input_plan(load_model(model)), [tmp_path / "x.npz"])
