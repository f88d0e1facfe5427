"""Bodies for weights of whole blocks of rows: the numbers of the others, from fewer bytes."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, inliner

from qcompile.passes.bit_fields import byte_rows
from qcompile.passes.formats import BY_NAME, FORMATS, functions, named
from qcompile.passes.formats.base import BIASED, DOMAIN, PRODUCT

_FORMATS = [own.name for own in FORMATS if own.whole_rows]
N = 24


def _model(name: str, kind: str, k: int, *, zero_points: bool, whole: bool) -> onnx.ModelProto:
    """x (rows, k) times a random weight of the format."""
    own, random = named(name), np.random.default_rng(k)
    proto = ir.serde.serialize_function(functions.body(f"{kind}{own.words[0]}", zero_points=zero_points, whole=whole))
    groups = 1 if own.rows_per_code > 1 else k // 8
    bits = getattr(own, "code_bits", own.bits)
    arrays = {
        "w": random.integers(0, 256, (bits * k // own.rows_per_code // 8, N)).astype(np.uint8),
        "scale": random.uniform(0.5, 2, (groups, N)).astype(np.float32),
        "bias": random.standard_normal(N).astype(np.float32),
        "zero_point": random.integers(0, 256, (sum(byte_rows(groups, bits)), N)).astype(np.uint8),
    }
    given = [value for value in proto.input if value != "x"]
    node = helper.make_node(proto.name, ["x", *given], ["y"], domain=DOMAIN, block_size=8 if groups > 1 else k, K=k)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", k])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["rows", N])],
        [onnx.numpy_helper.from_array(arrays[name], name) for name in given],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(graph, functions=[proto], opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return inliner.inline_local_functions(model)


def _outputs(model: onnx.ModelProto, k: int) -> dict[str, np.ndarray]:
    """Every value of integers and floats that nodes give; ONNX Runtime hands out none of 4 bits."""
    names = [out for node in model.graph.node if node.op_type != "Cast" for out in node.output]
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options)
    x = np.random.default_rng(0).standard_normal((3, k)).astype(np.float32)
    return dict(zip(names, session.run(None, {"x": x}), strict=True))


_CASES = [(name, points) for name in _FORMATS for points in (True, False) if not points or name.startswith("int")]


@pytest.mark.parametrize("kind", [PRODUCT, BIASED])
@pytest.mark.parametrize(("name", "zero_points"), _CASES)
def test_both_bodies_compute_the_same(name: str, kind: str, zero_points: bool) -> None:
    k = 5 * named(name).whole_rows
    found = [_outputs(_model(name, kind, k, zero_points=zero_points, whole=own), k)["y"] for own in (True, False)]
    assert np.array_equal(*found)


_MOST = {"int2": 2.7, "int3": 4.2, "int5": 7.2, "int6": 7.2, "pairs3": 7.0}


@pytest.mark.parametrize(("name", "most"), _MOST.items())
def test_few_bytes_are_made_of_a_weight(name: str, most: float) -> None:
    """ONNX Runtime keeps all of them until every weight is folded: 10 bytes a weight of int3 before."""
    k = 256

    def folded(*, whole: bool) -> float:
        found = _outputs(_model(name, PRODUCT, k, zero_points=False, whole=whole), k)
        return sum(own.nbytes for own in found.values() if own.dtype.itemsize == 1 and own.size >= k) / k / N

    assert folded(whole=True) <= most
    assert folded(whole=False) > 1.3 * folded(whole=True)


def test_a_model_has_the_body_that_serves_all_of_its_weights() -> None:
    name, model = f"{PRODUCT}Int3", ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)

    def known() -> tuple[bool, bool]:
        own = model.functions[(DOMAIN, name, "")]
        return functions.WHOLE_ROWS in own.metadata_props, "zero_point" in [value.name for value in own.inputs]

    functions.register(model, name, zero_points=False, k=64)
    assert known() == (True, False)
    functions.register(model, name, zero_points=True, k=64)
    assert known() == (True, True)
    functions.register(model, name, zero_points=False, k=64)
    assert known() == (True, True)
    functions.register(model, name, zero_points=False, k=100)
    assert known() == (False, True)
    functions.register(model, name, k=64)
    assert known() == (False, True)


def test_formats_without_fields_have_one_body() -> None:
    assert {own.name for own in FORMATS if not own.whole_rows} == set(BY_NAME) - set(_FORMATS)
    assert "int4" not in _FORMATS
    assert "nf4" not in _FORMATS
    with pytest.raises(NotImplementedError):
        named("int4").body_of_whole(PRODUCT, "Int4", zero_points=True)
