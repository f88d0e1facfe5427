"""What int8 products with integer activations make of `Columns`: codes of a weight, and the operator of fixed grids."""

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import STATIC
from qcompile.passes.errors import UserError
from qcompile.passes.formats.base import DOMAIN, PRODUCT, become, drop_weight
from qcompile.passes.formats.columns import Columns, once
from qcompile.passes.formats.functions import register
from qcompile.passes.formats.static_columns import StaticColumns
from qcompile.passes.graph import Decide, add_initializer
from qcompile.passes.linears import Linear, as_linear, constant
from qcompile.passes.observers.base import Observer
from qcompile.passes.qdq.ranges import grid_of
from qcompile.passes.qdq.weights import Stored, WeightGrid, quantize_weight
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.state import Outliers, node_state, set_node

_OPERATOR = f"{PRODUCT}{StaticColumns.words[0]}"


def replace_static(model: ir.Model, node: ir.Node, grid: WeightGrid, spec: ActivationSpec, decide: Decide) -> None:
    """Turn a marked MatMul into MatMulInt8Outlier, in place: its output stays the same value.

    UserError where the channels that stay were never observed.
    """
    linear, own = as_linear(node), node_state(node).outliers
    set_node(node, outliers=None)
    assert isinstance(linear, Linear)
    assert isinstance(own, Outliers)
    assert own.rest is not None
    columns, read = Columns(f"{grid} static, {spec}", own.channels), node.inputs[1]
    stored, outlying = split_weight(model, linear, columns, grid)
    inputs = [linear.activation, stored.codes, stored.scale, *_grid(model, linear, own.rest, spec)]
    register(model, _OPERATOR)
    become(node, _OPERATOR, [*inputs, columns.listed(model, linear), outlying], {}, domain=DOMAIN)
    drop_weight(model, linear.weight, read)
    told(linear, stored, outlying, columns, decide, STATIC)


def told(
    linear: Linear, stored: Stored, outlying: ir.Value, columns: Columns, decide: Decide, format: str = ""
) -> None:
    """Decide that the linear is quantized, its float rows counted among the bytes."""
    size, nbytes = max(stored.quantized.codes.size, 1), stored.nbytes + constant(outlying).nbytes
    detail = {"kind": "MatMul", "weights": size, "weight": stored.codes.name, "bytes": nbytes}
    decide(linear.name, "quantized", str(columns), format=format, **detail, bits_per_weight=8 * nbytes / size)


def split_weight(model: ir.Model, linear: Linear, columns: Columns, grid: WeightGrid) -> tuple[Stored, ir.Value]:
    """(codes of the weight with zeros in the rows of the outliers, those rows in float (C, N))."""
    name, dtype = f"{linear.weight.name}.int8.rest", constant(linear.weight).dtype.numpy()
    half = np.float16 if dtype == np.float16 else np.float32
    quantized = quantize_weight(columns.rest(linear), 1, grid, scale_dtype=half)
    codes = add_initializer(model.graph, name, ir.tensor(quantized.codes))
    scale = add_initializer(model.graph, f"{name}.scale", ir.tensor(quantized.scale.astype(dtype)))
    return Stored(quantized, codes, scale), columns.outlying(model, linear)


def _grid(model: ir.Model, linear: Linear, rest: Observer, spec: ActivationSpec) -> list[ir.Value]:
    """Scale and zero point of the channels that stay; ONNX Runtime then rounds the activation once for all linears."""
    x = linear.activation
    if not rest.state():
        raise UserError(
            f"qdq: the channels of {x.name} that `outlier` leaves were never seen on calibration data: "
            "compile with data, not with saved statistics"
        )
    dtype = constant(linear.weight).dtype.numpy()
    qparams = grid_of([rest.expected(spec)], spec, scale_dtype=dtype)
    scale = once(model, f"{x.name}.rest.scale", qparams.scale.astype(dtype))
    return [scale, once(model, f"{x.name}.rest.zero_point", qparams.zero_point.astype(spec.dtype.numpy()))]
