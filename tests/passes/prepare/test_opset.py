"""Models from opset 7 up compute the same at opset 21, or say what stopped them."""

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.prepare import Prepare
from qcompile.passes.prepare.opset_rules import RULES

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 3, 4, 6)).astype(np.float32)
B = np.array([1, 2, 3], np.float32)

# Opset, body on x (2, 3, 4, 6) with b (3,) = 1 2 3, operators afterwards. Together they meet every rule.
CASES = {
    "softmax last": (11, "y = Softmax <axis = 3> (x)", "Softmax"),
    "softmax inner": (11, "y = Softmax <axis = 2> (x)", "Shape Flatten Softmax Reshape"),
    "softmax default": (12, "y = Softmax(x)", "Shape Flatten Softmax Reshape"),
    "softmax negative": (12, "y = Softmax <axis = -2> (x)", "Shape Flatten Softmax Reshape"),
    "softmax unknown rank": (
        11,
        "r = Reshape(x, s) y = Softmax <axis = 1> (r)",
        "Reshape Shape Flatten Softmax Reshape",
    ),
    "logsoftmax": (11, "y = LogSoftmax <axis = 1> (x)", "Shape Flatten LogSoftmax Reshape"),
    "hardmax": (11, "y = Hardmax <axis = 3> (x)", "Hardmax"),
    "squeeze": (11, "u = Unsqueeze <axes = [0, 2]> (x) y = Squeeze <axes = [2]> (u)", "Unsqueeze Squeeze"),
    "squeeze all": (11, "u = Unsqueeze <axes = [0]> (x) y = Squeeze(u)", "Unsqueeze Squeeze"),
    "reducesum": (11, "y = ReduceSum <axes = [1, -1], keepdims = 0> (x)", "ReduceSum"),
    "reducesum all": (12, "y = ReduceSum(x)", "ReduceSum"),
    "reducemean": (17, "y = ReduceMean <axes = [1]> (x)", "ReduceMean"),
    "reducel2": (13, "y = ReduceL2 <axes = [1]> (x)", "ReduceL2"),
    "split": (11, "y, z = Split <axis = 3, split = [2, 4]> (x)", "Split"),
    "split equal": (12, "y, z = Split <axis = 3> (x)", "Split"),
    "split input": (13, "y, z = Split <axis = 3> (x)", "Split"),
    "dropout": (10, "d = Dropout <ratio = 0.3> (x) y = Relu(d)", "Relu"),
    "batchnorm": (11, "y = BatchNormalization(x, b, b, b, b)", "BatchNormalization"),
    "batchnorm spatial": (8, "y = BatchNormalization(x, b, b, b, b)", "BatchNormalization"),
    "clip": (10, "y = Clip <min = -0.5, max = 0.5> (x)", "Clip"),
    "clip one side": (7, "y = Clip <max = 0.5> (x)", "Clip"),
    "pad": (10, "y = Pad <pads = [0,0,1,1,0,0,2,0], value = 3.0> (x)", "Pad"),
    "pad reflect": (9, 'y = Pad <mode = "reflect", pads = [0,0,1,1,0,0,2,0]> (x)', "Pad"),
    "slice": (9, "y = Slice <axes = [2], starts = [1], ends = [3]> (x)", "Slice"),
    "slice no axes": (7, "y = Slice <starts = [0, 1], ends = [1, 3]> (x)", "Slice"),
    "topk": (9, "y, z = TopK <k = 2> (x)", "TopK"),
    "upsample 7": (8, "y = Upsample <scales = [1.0, 1.0, 2.0, 2.0]> (x)", "Resize"),
    "upsample linear": (9, 'y = Upsample <mode = "linear"> (x, scales)', "Resize"),
    "resize 10": (10, "y = Resize(x, scales)", "Resize"),
    "resize 11": (11, 'y = Resize <mode = "linear"> (x, none, scales)', "Resize"),
    "resize sizes": (11, 'y = Resize <mode = "cubic"> (x, none, none, sizes)', "Resize"),
    "scatter": (10, "y = Scatter <axis = 3> (x, where, x0)", "ScatterElements"),
    "gridsample": (16, 'y = GridSample <mode = "bicubic"> (x, grid)', "GridSample"),
    "gridsample default": (19, "y = GridSample(x, grid)", "GridSample"),
    "roialign": (11, "y = RoiAlign <output_height = 2, output_width = 2> (x, rois, batch)", "RoiAlign"),
    "dft": (18, "u = Unsqueeze(x, last) y = DFT <axis = 2> (u)", "Unsqueeze DFT"),
    "dft default": (19, "u = Unsqueeze(x, last) y = DFT(u)", "Unsqueeze DFT"),
}
CONSTANTS = {
    "b": B,
    "s": np.array([2, 3, 24], np.int64),
    "scales": np.array([1, 1, 2, 3], np.float32),
    "sizes": np.array([2, 3, 8, 9], np.int64),
    "none": np.zeros(0, np.float32),
    "where": np.zeros((2, 3, 4, 1), np.int64),
    "x0": np.ones((2, 3, 4, 1), np.float32),
    "grid": RNG.uniform(-1, 1, (2, 5, 5, 2)).astype(np.float32),
    "rois": np.array([[0, 0, 3, 3], [1, 1, 5, 3]], np.float32),
    "batch": np.array([0, 1], np.int64),
    "last": np.array([-1], np.int64),
}


def _parse(body: str, opset: int, inputs: str = "float[2,3,4,6] x", outputs: str = "y") -> ir.Model:
    text = f'<ir_version: 7, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(CONSTANTS[name], name) for name in used & set(CONSTANTS)
    )
    return ir.from_proto(proto)


def _run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def _prepare(model: ir.Model, **options: int) -> Prepare:
    step = Prepare(**options)
    step.call(Region.whole(model))
    return step


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    opset, body, operators = CASES[name]
    outputs = "float[] y" if " z = " not in body else "float[] y, float[] z"
    model = _parse(body, opset, outputs=outputs.replace("float[] z", "int64[] z" if "TopK" in body else "float[] z"))
    for output in model.graph.outputs:
        output.shape = None
    before = _run(model, x=X)
    _prepare(model)
    assert model.opset_imports == {"": 21}
    assert model.ir_version == 10
    assert " ".join(node.op_type for node in model.graph) == operators
    for old, new in zip(before, _run(model, x=X), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_every_rule_is_met():
    bodies = " ".join(body for _, body, _ in CASES.values())
    tested_elsewhere = {"GroupNormalization", "Scan"}
    assert [
        op for op in RULES if f"{op}(" not in bodies and f"{op} <" not in bodies and not op.startswith("Reduce")
    ] == [op for op in RULES if op in tested_elsewhere]


def test_group_normalization_gets_a_scale_for_every_channel():
    inputs = "float[2,6,4] x, float[2] scale, float[2] bias"
    body = "y = GroupNormalization <num_groups = 2> (x, scale, bias)"
    model = _parse(body, 18, inputs, "float[2,6,4] y")
    x, s, b = X.reshape(2, 6, 12)[:, :, :4], np.array([2, 3], np.float32), np.array([0.5, -1], np.float32)
    told = _prepare(model).decisions
    assert "opset 18 to 21: 1 GroupNormalization rewritten" in [decision.reason for decision in told]
    grouped = x.reshape(2, 2, -1)
    normal = (grouped - grouped.mean(-1, keepdims=True)) / np.sqrt(grouped.var(-1, keepdims=True) + 1e-5)
    expected = (normal * s[:, None] + b[:, None]).reshape(x.shape)
    np.testing.assert_allclose(_run(model, x=x, scale=s, bias=b)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("opset", "body", "message"),
    [
        (8, "y = BatchNormalization <spatial = 0> (x, b, b, b, b)", "statistics are not those of whole channels"),
        (11, 'y = Resize <coordinate_transformation_mode = "tf_half_pixel_for_nn"> (x, none, scales)', "tf_half_pixel"),
        (11, "y, z, v, m, n = BatchNormalization(x, b, b, b, b) w = Relu(z)", "training mode"),
        (
            8,
            "y = Scan <num_scan_inputs = 1, body = t (float[4,6] i) => (float[4,6] o) { o = Relu(i) }> (none, x)",
            "batches",
        ),
        (6, "y = Relu(x)", "opset 6 is older than 7"),
    ],
)
def test_impossible(opset, body, message):
    model = _parse(body, opset, outputs="float[2,3,4,6] y" + (", float[3] w" if " w = " in body else ""))
    with pytest.raises(UserError, match=message) as caught:
        _prepare(model)
    assert "export the model again with opset 21" in str(caught.value)


@pytest.mark.parametrize("opset", [9, 14, 17, 20])
def test_operators_that_only_the_runtime_knows_stay(opset):
    """ONNX Runtime's optimizer writes SimplifiedLayerNormalization into ONNX's own domain."""
    model = _parse("n = SimplifiedLayerNormalization <axis = -1, epsilon = 0.01> (x, g) y = Relu(n)", opset)
    model.graph.outputs[0].shape = None
    value = ir.Value(name="g", const_value=ir.tensor(np.arange(1, 7, dtype=np.float32)))
    model.graph.register_initializer(value)
    model.graph[0].replace_input_with(1, value)
    before = _run(model, x=X)
    decisions = _prepare(model).decisions
    assert "ONNX knows no SimplifiedLayerNormalization: left to ONNX Runtime as it is" in [d.reason for d in decisions]
    assert model.opset_imports[""] == 21
    np.testing.assert_array_equal(_run(model, x=X)[0], before[0])


def test_subgraphs_are_converted():
    body = """y = If (c) <then_branch = t () => (float[2,3,4] a) { a = ReduceMean <axes = [3], keepdims = 0> (x) },
                          else_branch = e () => (float[2,3,4] b) { u = Softmax <axis = 1> (x)
                                                                  b = ReduceMean <axes = [3], keepdims = 0> (u) }>"""
    model = _parse(body, 11, "float[2,3,4,6] x, bool c", "float[2,3,4] y")
    before = [_run(model, x=X, c=np.array(flag)) for flag in (True, False)]
    _prepare(model)
    for flag, expected in zip((True, False), before, strict=True):
        np.testing.assert_allclose(_run(model, x=X, c=np.array(flag))[0], expected[0], rtol=0, atol=1e-5)


def test_half_precision_bounds():
    model = _parse("y = Clip <min = -0.5, max = 0.5> (x)", 10, "float16[4] x", "float16[4] y")
    _prepare(model)
    x = np.array([-1, 0, 0.25, 1], np.float16)
    np.testing.assert_array_equal(_run(model, x=x)[0], np.clip(x, -0.5, 0.5))


def test_newer_opsets_and_a_lower_target_stay():
    model = _parse("y = Relu(x)", 23, outputs="float[2,3,4,6] y")
    model.ir_version = 11
    assert "converted" not in [decision.action for decision in _prepare(model).decisions]
    assert (model.opset_imports[""], model.ir_version) == (23, 11)
    model = _parse("y = Softmax <axis = 2> (x)", 11, outputs="float[2,3,4,6] y")
    _prepare(model, opset=11)
    assert model.opset_imports[""] == 11


def test_decision_says_what_changed():
    model = _parse("u = Softmax <axis = 3> (x) y = ReduceMean <axes = [1]> (u)", 12, outputs="float[2,1,4,6] y")
    (reason,) = [decision.reason for decision in _prepare(model).decisions if decision.action == "converted"]
    assert reason == "opset 12 to 21: 1 ReduceMean, 1 Softmax rewritten"
