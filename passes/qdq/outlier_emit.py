"""MatMulInt8Outlier: a product in int8 but for a few input channels, which stay in float."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.base import STATIC
from qcompile.passes.errors import UserError
from qcompile.passes.formats.base import DOMAIN, drop_weight
from qcompile.passes.formats.functions import OUTLIER, register
from qcompile.passes.graph import Decide, add_initializer, insert_before
from qcompile.passes.linears import Linear, as_linear, constant
from qcompile.passes.qdq.ranges import grid_of
from qcompile.passes.qdq.weights import Stored, WeightGrid, quantize_weight
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.state import Outliers, node_state, set_node


def replace_outlier(model: ir.Model, node: ir.Node, grid: WeightGrid, spec: ActivationSpec, decide: Decide) -> None:
    """Turn a marked MatMul into MatMulInt8Outlier, in place: its output stays the same value.

    UserError where the channels that stay were never observed.
    """
    linear, own = as_linear(node), node_state(node).outliers
    set_node(node, outliers=None)
    assert isinstance(linear, Linear)
    assert isinstance(own, Outliers)
    stored, outlying = split_weight(model, linear, own, grid)
    inputs = [linear.activation, stored.codes, stored.scale, *_grid(model, linear, own, spec)]
    inputs += [channels(model, linear, own), outlying]
    read = node.inputs[1]
    register(model, OUTLIER)
    node.resize_inputs(len(inputs))
    for i, value in enumerate(inputs):
        node.replace_input_with(i, value)
    node.op_type, node.domain, node.overload = OUTLIER, DOMAIN, ""
    drop_weight(model, linear.weight, read)
    told(linear, stored, outlying, f"{grid} static, {spec}", decide, STATIC)


def told(linear: Linear, stored: Stored, outlying: ir.Value, form: str, decide: Decide, format: str = "") -> None:
    """Decide that the linear is quantized, its float rows counted among the bytes."""
    size, nbytes = max(stored.quantized.codes.size, 1), stored.nbytes + constant(outlying).nbytes
    detail = {"kind": "MatMul", "weights": size, "weight": stored.codes.name, "bytes": nbytes}
    bits = 8 * nbytes / size
    decide(linear.name, "quantized", f"{form}, outliers in float", format=format, **detail, bits_per_weight=bits)


def split_weight(model: ir.Model, linear: Linear, own: Outliers, grid: WeightGrid) -> tuple[Stored, ir.Value]:
    """(codes of the weight with zeros in the rows of the outliers, those rows in float (k, N))."""
    w, name, dtype = linear.read(), f"{linear.weight.name}.int8.rest", constant(linear.weight).dtype.numpy()
    rest = np.array(w)
    rest[own.channels] = 0
    quantized = quantize_weight(rest, 1, grid, scale_dtype=np.float16 if dtype == np.float16 else np.float32)
    codes = add_initializer(model.graph, name, ir.tensor(quantized.codes))
    scale = add_initializer(model.graph, f"{name}.scale", ir.tensor(quantized.scale.astype(dtype)))
    rows = np.ascontiguousarray(w[own.channels]).astype(dtype)
    outlying = add_initializer(model.graph, f"{linear.weight.name}.outliers", ir.tensor(rows))
    return Stored(quantized, codes, scale), outlying


def masked(model: ir.Model, linear: Linear, own: Outliers) -> ir.Value:
    """The activation with zeros in the outliers' channels; one for all linears that read it."""
    x, name = linear.activation, f"{linear.activation.name}.rest"
    known = [use.node.outputs[0] for use in x.uses() if use.node.name == name]
    if known:
        return known[0]
    row = np.ones(linear.shape[0], constant(linear.weight).dtype.numpy())
    row[own.channels] = 0
    mask = _shared(model, f"{name}.mask", row)
    value = insert_before(linear.node, "Mul", [x, mask], name=name, output=name)
    value.type, value.shape = x.type, x.shape
    return value


def add_outliers(model: ir.Model, linear: Linear, own: Outliers, outlying: ir.Value) -> None:
    """Turn the node that ends the product of the rest into its sum with the float product of the outliers."""
    node, base = linear.node, linear.name
    product = insert_before(
        node, node.op_type, list(node.inputs), dict(node.attributes), name=f"{base}.product", output=f"{base}.product"
    )
    taken = [linear.activation, channels(model, linear, own)]
    gathered = insert_before(node, "Gather", taken, {"axis": -1}, name=f"{base}.taken", output=f"{base}.taken")
    added = insert_before(node, "MatMul", [gathered, outlying], name=f"{base}.added", output=f"{base}.added")
    for value in (product, gathered, added):
        value.type = linear.activation.type
    product.shape = added.shape = node.outputs[0].shape
    node.op_type = "Add"
    node.attributes.clear()
    node.resize_inputs(2)
    node.replace_input_with(0, product)
    node.replace_input_with(1, added)


def channels(model: ir.Model, linear: Linear, own: Outliers) -> ir.Value:
    """The list of channels, int64 (k,); one for all linears that read the activation."""
    return _shared(model, f"{linear.activation.name}.outliers", own.channels)


def _grid(model: ir.Model, linear: Linear, own: Outliers, spec: ActivationSpec) -> list[ir.Value]:
    """Scale and zero point of the channels that stay; ONNX Runtime then rounds the activation once for all linears."""
    x = linear.activation
    if not own.rest.state():
        raise UserError(
            f"qdq: the channels of {x.name} that `outlier` leaves were never seen on calibration data: "
            "compile with data, not with saved statistics"
        )
    dtype = constant(linear.weight).dtype.numpy()
    qparams = grid_of([own.rest.expected(spec)], spec, scale_dtype=dtype)
    scale = _shared(model, f"{x.name}.rest.scale", qparams.scale.astype(dtype))
    return [scale, _shared(model, f"{x.name}.rest.zero_point", qparams.zero_point.astype(spec.dtype.numpy()))]


def _shared(model: ir.Model, name: str, array: npt.NDArray[Any]) -> ir.Value:
    known = model.graph.initializers.get(name)
    return known if known is not None else add_initializer(model.graph, name, ir.tensor(array))
