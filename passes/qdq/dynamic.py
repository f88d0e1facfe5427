"""Dynamic INT8: activations on the range of each batch, found when the model runs."""

from collections.abc import Mapping, Set
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import IntegerNodes, IntegerPass, Reason, Region
from qcompile.passes.contract import Fact
from qcompile.passes.formats.base import drop_weight
from qcompile.passes.formats.columns import Columns
from qcompile.passes.graph import add_initializer, insert_before
from qcompile.passes.inner import int8, quantize_inner
from qcompile.passes.joined_names import INTEGER
from qcompile.passes.linears import Linear, constant, find_linears, vocabulary_size
from qcompile.passes.policy import Policy
from qcompile.passes.qdq.columns import split_weight, told
from qcompile.passes.qdq.embeddings import quantize_embeddings
from qcompile.passes.qdq.providers import RULES, Rule, rule_of
from qcompile.passes.qdq.selection import is_head, products
from qcompile.passes.qdq.weights import Stored, WeightGrid, WeightStore, refused_codes
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.state import node_state, remember, set_node


class Dynamic(IntegerPass):
    """Compute linears in int8 on activation ranges found when the model runs: no calibration.

    Case 1: a MatMul with a constant weight: DynamicQuantizeLinear (uint8, one scale for the whole tensor),
            MatMulInteger, and a product with both scales. ONNX Runtime's CPU provider fuses them. Readers of one value
            share its DynamicQuantizeLinear.
    Case 2: other products (Conv): the weight alone, decoded before its reader. ONNX Runtime's ConvInteger takes several
            times as long as its float Conv.
    Case 3: a linear that `outlier` marked: its outliers are set to zero before the DynamicQuantizeLinear, and a float
            product of them alone is added.
    Case 4: tables of embeddings become int8, too, shared with a tied lm_head.
    Case 5: weights in bodies of If, Loop and Scan, of LSTM, GRU and RNN: int8, decoded before their reader.
    weights: one scale a channel, or one a tensor. lm_head: "weights" leaves the input of a decoder's head in float.
    """

    name: ClassVar[str] = "dynamic"
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.INTEGER})
    unserved: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("tensorrt", "qnn"), "has no DynamicQuantizeLinear and MatMulInteger, choose qdq"
    )

    def __init__(
        self,
        policy: Policy,
        *,
        weights: Literal["channel", "tensor"] = "channel",
        reduce_range: bool = False,
        lm_head: Literal["weights", "dynamic"] = "weights",
    ) -> None:
        super().__init__()
        self.heads = lm_head == "dynamic"
        self.policy, self.grid = policy, WeightGrid(weights == "channel", reduce_range)

    @property
    def activation_grid(self) -> ActivationSpec:
        """That of DynamicQuantizeLinear."""
        return ActivationSpec()

    def refuses_codes(self, linear: Linear) -> str:
        """Those of another grid, of tables, and of linears with outliers."""
        return refused_codes(linear, self.grid)

    def integer_nodes(self, model: ir.Model, policy: Policy) -> IntegerNodes:
        """Linears, Case 1."""
        linears = {linear.node for linear in find_linears(model.graph)}
        return IntegerNodes([node for node in products(model, policy)[0] if node in linears])

    def call(self, region: Region) -> None:
        """Rewrite the whole graph in place."""
        model, store = region.model, WeightStore(region.model, self.grid, dry=self.dry)
        chosen, kept = products(model, self.policy)
        linears = {linear.node: linear for linear in find_linears(model.graph)}
        vocabulary = vocabulary_size(model)
        codes: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}
        for node in chosen:
            if node not in linears:
                self._other(node, store)  # Case 2
                continue
            linear = linears[node]
            if (dtype := constant(linear.weight).dtype) not in _FLOATS:
                reason = f"no kernel takes {dtype.name.lower()}"
                size = int(np.prod(linear.shape))
                self.decide(linear.name, "skipped", reason, kind="MatMul", weights=size, weight=linear.weight.name)
                continue
            if linear.name in self.policy.weights_only or (not self.heads and is_head(node, vocabulary)):
                self._weight_alone(node, store, RULES["MatMul"])
                continue
            remember(node)
            form = f"{self.grid} dynamic, uint8 asym"
            columns = Columns.of(linear, form)
            set_node(node, outliers=None)
            x = linear.activation if columns is None else columns.masked(model, linear)
            if x not in codes:
                codes[x] = _quantize(node, x, constant(linear.weight).dtype)
            if columns is not None:  # Case 3
                stored, outlying = split_weight(model, linear, columns, self.grid)
                _replace(model, linear, stored, codes[x])
                columns.add(model, linear, outlying)
                told(linear, stored, outlying, columns, self.decide)
                continue
            stored = store.store(linear.weight, linear.read(), 1, transposed=linear.transposed)
            self._told(node, stored, form)
            _replace(model, linear, stored, codes[x])
        for node, reason in kept.items():
            self.decide(node.name or "", "kept", reason, kind=node.op_type, weights=0, weight=node.name)
        quantize_inner(model, self.policy, store, int8(model, self.policy, store), self.decide)  # Case 5
        quantize_embeddings(model, self.policy, store, self.decide)  # Case 4
        region.nodes = list(model.graph)

    def _other(self, node: ir.Node, store: WeightStore) -> None:
        """A product that is no linear: its weight alone, or why not."""
        left = node_state(node).left
        reason = left or rule_of(node)
        if isinstance(reason, Rule):
            self._weight_alone(node, store, reason)
        else:
            self.decide(node.name or "", "skipped", reason, kind=node.op_type, weights=0, computed=bool(left))

    def _weight_alone(self, node: ir.Node, store: WeightStore, rule: Rule) -> None:
        remember(node, weights_only=True)
        why = self.policy.weights_only.get(str(node.name), "")
        self._told(node, store.dequantized(node, rule), Reason(f"{self.grid}, weights only", why))

    def _told(self, node: ir.Node, stored: Stored, reason: str) -> None:
        size = stored.quantized.codes.size
        self.decide(
            node.name or "",
            "quantized",
            reason,
            kind=node.op_type,
            weights=size,
            weight=stored.codes.name,
            bytes=stored.nbytes,
            bits_per_weight=8 * stored.nbytes / max(size, 1),
        )


# Types of products that are computed in integers.
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def _quantize(place: ir.Node, value: ir.Value, dtype: ir.DataType) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(codes, float32 scale, zero point) of a value of the given type, by a DynamicQuantizeLinear, which takes float32,
    before the first node that reads them.
    """
    x = value
    if dtype != ir.DataType.FLOAT:
        name = f"{value.name}.dynamic.float"
        x = insert_before(place, "Cast", [value], {"to": int(ir.DataType.FLOAT)}, name=name, output=name)
        x.dtype, x.shape = ir.DataType.FLOAT, value.shape
    node = ir.node("DynamicQuantizeLinear", [x], num_outputs=3, name=f"{value.name}.dynamic")
    kinds = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
    for output, end, kind in zip(node.outputs, ("quantized", "scale", "zero_point"), kinds, strict=True):
        output.name, output.dtype = f"{value.name}.{end}", kind
        output.shape = value.shape if end == "quantized" else ir.Shape(())
    assert place.graph is not None
    place.graph.insert_before(place, node)
    return node.outputs[0], node.outputs[1], node.outputs[2]


def _replace(model: ir.Model, linear: Linear, stored: Stored, codes: tuple[ir.Value, ir.Value, ir.Value]) -> None:
    """Turn the MatMul into the Mul that ends the integer product, or into a Cast behind that where it is float16, in
    place: its output stays the same value.
    """
    node, (x, scale, zero_point) = linear.node, codes
    read, base = node.inputs[1], node.name
    zero = f"{stored.codes.name}.zero_point"
    point = model.graph.initializers.get(zero)
    if point is None:
        shape = stored.quantized.scale.shape
        point = add_initializer(model.graph, zero, ir.tensor(np.zeros(shape, stored.quantized.codes.dtype)))
    integer = ir.node("MatMulInteger", [x, stored.codes, zero_point, point], name=f"{base}{INTEGER}")
    cast = ir.node("Cast", [integer.outputs[0]], {"to": int(ir.DataType.FLOAT)}, name=f"{base}.cast")
    scales = ir.node("Mul", [scale, _float32(model, stored.scale)], name=f"{base}.scales")
    for made, kind in ((integer, ir.DataType.INT32), (cast, ir.DataType.FLOAT), (scales, ir.DataType.FLOAT)):
        made.outputs[0].name, made.outputs[0].dtype = str(made.name), kind
    integer.outputs[0].shape = cast.outputs[0].shape = node.outputs[0].shape
    assert node.graph is not None
    node.graph.insert_before(node, [integer, cast, scales])
    ends, dtype = [cast.outputs[0], scales.outputs[0]], constant(linear.weight).dtype
    if dtype == ir.DataType.FLOAT:
        node.op_type = "Mul"
    else:
        whole = insert_before(node, "Mul", ends, name=f"{base}.whole", output=f"{base}.whole")
        whole.dtype, whole.shape = ir.DataType.FLOAT, node.outputs[0].shape
        node.op_type, ends = "Cast", [whole]
        node.attributes["to"] = ir.AttrInt64("to", int(dtype))
    node.resize_inputs(len(ends))
    for i, value in enumerate(ends):
        node.replace_input_with(i, value)
    drop_weight(model, linear.weight, read)


def _float32(model: ir.Model, scale: ir.Value) -> ir.Value:
    """A constant scale in float32, made once."""
    if constant(scale).dtype == ir.DataType.FLOAT:
        return scale
    name = f"{scale.name}.float32"
    known = model.graph.initializers.get(name)
    array = np.asarray(constant(scale).numpy(), np.float32)
    return known if known is not None else add_initializer(model.graph, name, ir.tensor(array))
