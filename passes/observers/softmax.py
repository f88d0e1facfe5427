"""What candidate ranges do to a softmax: nodes that try them on a sample of a batch's rows."""

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from qcompile.passes.affine import range_qparams
from qcompile.passes.observers.builder import Builder
from qcompile.passes.spec import ActivationSpec

# The grids that candidates are tried with, by bits.
GRIDS = {8: ActivationSpec(ir.DataType.UINT8), 16: ActivationSpec(ir.DataType.UINT16)}
# Ends of candidate ranges, in nats: softmax has a unit, so they need not follow the data. Half octaves up to 1024, and
# eighths for the few symmetric ranges.
_ENDS = (0.0, *(2.0 ** (step / 2) for step in range(21)))
_SYMMETRIC = tuple(2.0 ** (step / 8) for step in range(81))
# Numbers of a batch that the candidates are tried on, and rows of them at least.
_NUMBERS, _ROWS = 1 << 14, 4


def candidates() -> npt.NDArray[np.float32]:
    """(candidates, 2): low and high, widest first, so that ties keep the wider range."""
    pairs = {(-low, high) for low in _ENDS for high in _ENDS if low or high} | {(-end, end) for end in _SYMMETRIC}
    return np.array(sorted(pairs, key=lambda ends: (ends[0] - ends[1], ends)), np.float32)


def append_losses(graph: onnx.GraphProto, prefix: str, rows: str, spec: ActivationSpec) -> None:
    """Append `prefix`.losses, float32 (candidates,), Σ KL(softmax(x) ‖ softmax(Q(x))) over a sample of the rows (n, K)
    for each candidate's grid, and `prefix`.rows, int64 (1,), how many they are.

    The candidates are taken in turn, by a Loop, so that no more than the sample is in memory.
    """
    build = Builder(graph, prefix)
    sample = _sample(build, rows)
    build.node("Shape", [sample], "rows", end=1)
    build.node("Softmax", [sample], "p", axis=-1)
    build.node("LogSoftmax", [sample], "log", axis=-1)
    count = build.node("Squeeze", [build.long(len(candidates()))], "candidates")
    build.node("Loop", [count, ""], "losses", body=_body(prefix, spec))


def _sample(build: Builder, rows: str) -> str:
    """Every n-th row, n odd, so that a period of the rows is not followed."""
    count, width = build.node("Shape", [rows], "all", end=1), build.node("Shape", [rows], "width", start=1)
    wanted = build.node("Max", [build.node("Div", [build.long(_NUMBERS), width], "fit"), build.long(_ROWS)], "wanted")
    step = build.node("BitwiseOr", [build.node("Div", [count, wanted], "every"), build.long(1)], "step")
    first, last = build.long(0), build.long(np.iinfo(np.int64).max)
    return build.node("Slice", [rows, first, last, first, step], "sample")


def _body(prefix: str, spec: ActivationSpec) -> onnx.GraphProto:
    """The loss of candidate number `i`: codes as QuantizeLinear rounds, softmax, divergence."""
    ends = candidates()
    qparams = range_qparams(ends[:, 0], ends[:, 1], spec)
    tables = {
        "scales": qparams.scale,
        "firsts": spec.qmin - qparams.zero_point,
        "lasts": spec.qmax - qparams.zero_point,
    }
    names = {name: f"{prefix}.body.{name}" for name in tables}
    number, go_on, more = (f"{prefix}.body.{end}" for end in ("i", "go_on", "more"))
    body = helper.make_graph(
        [],
        "candidate",
        [_scalar_info(number, TensorProto.INT64), _scalar_info(go_on, TensorProto.BOOL)],
        [],
        [numpy_helper.from_array(table.astype(np.float32), names[name]) for name, table in tables.items()],
    )
    build = Builder(body, f"{prefix}.body")
    scale, first, last = (build.node("Gather", [names[name], number], name[:-1]) for name in tables)
    codes = build.node("Round", [build.node("Div", [f"{prefix}.sample", scale], "steps")], "codes")
    values = build.node("Mul", [build.node("Clip", [codes, first, last], "clipped"), scale], "values")
    lost = build.node("Sub", [f"{prefix}.log", build.node("LogSoftmax", [values], "log", axis=-1)], "lost")
    weighed = build.node("Mul", [f"{prefix}.p", lost], "weighed")
    loss = build.node("ReduceSum", [weighed], "loss", keepdims=0)
    build.node("Identity", [go_on], "more")
    body.output.extend([_scalar_info(more, TensorProto.BOOL), _scalar_info(loss, TensorProto.FLOAT)])
    return body


def _scalar_info(name: str, element_type: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, [])
