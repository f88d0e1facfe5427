"""Small graphs through `prepare`: parsed, run before and after, compared."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort

from qcompile.passes.base import Decision, Region
from qcompile.passes.prepare import Prepare

Arrays = dict[str, npt.NDArray[Any]]


def parse(body: str, inputs: str, outputs: str, *, opset: int = 21, **weights: npt.ArrayLike) -> ir.Model:
    """A model from ONNX text, with arrays for its weights."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(a), name) for name, a in weights.items())
    return ir.from_proto(proto)


def run(model: ir.Model, feeds: Arrays) -> list[npt.NDArray[Any]]:
    """What ONNX Runtime computes, node by node as the model says."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def prepare(model: ir.Model) -> list[Decision]:
    """The decisions of `prepare`; the model is valid behind it, and a second run finds nothing to do."""
    first, second = Prepare(), Prepare()
    first.call(Region.whole(model))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    second.call(Region.whole(model))
    assert not [d for d in second.decisions if d.action not in ("kept", "skipped")]
    return first.decisions


def check(model: ir.Model, feeds: Arrays, *, tolerance: float = 1e-5) -> list[Decision]:
    """Prepare the model: outputs within `tolerance` of the largest before, inputs and outputs named as before."""
    before = run(model, feeds)
    signature = _signature(model)
    decisions = prepare(model)
    assert _signature(model) == signature
    for old, new in zip(before, run(model, feeds), strict=True):
        assert old.dtype == new.dtype
        assert np.isfinite(old).all()
        np.testing.assert_allclose(new, old, rtol=0, atol=tolerance * np.abs(old).max())
    return decisions


def _signature(model: ir.Model) -> list[list[tuple[Any, ...]]]:
    return [[(v.name, v.type, v.shape) for v in values] for values in (model.graph.inputs, model.graph.outputs)]


def operators(model: ir.Model) -> list[str]:
    """The operators of the main graph, in its order."""
    return [node.op_type for node in model.graph]


def reasons(decisions: list[Decision], action: str) -> list[str]:
    """Why this was done."""
    return [decision.reason for decision in decisions if decision.action == action]
