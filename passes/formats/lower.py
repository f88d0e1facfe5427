"""From the operators of domain `qcompile` to what other runtimes know: plain ONNX (QDQ), or com.microsoft nodes."""

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from qcompile.passes.caches import ATTENTION
from qcompile.passes.errors import UserError
from qcompile.passes.formats import format_of
from qcompile.passes.formats.attention import to_native
from qcompile.passes.formats.base import (
    BIASED,
    DOMAIN,
    PRODUCT,
    Cache,
    become,
    drop_unused,
    operands,
)
from qcompile.passes.formats.decoded import sink
from qcompile.passes.formats.functions import register
from qcompile.passes.graph import MICROSOFT, Names, add_initializer, insert_before
from qcompile.passes.targets import TARGETS


def lower(model: ir.Model, target: str) -> None:
    """Rewrite the packed operators in place for `target`: as they are, as plain ONNX, or as com.microsoft's."""
    if target not in TARGETS:
        raise UserError(f"unknown target {target!r}")
    operators = TARGETS[target].operators
    for value in list(model.graph.initializers.values()):  # tables that are only looked up, under another name
        drop_unused(model, value)
    sink(model)
    if operators == "matmulnbits":
        if TARGETS[target].symmetric:
            _take_out_biases(model)
        to_microsoft(model)
    else:
        _complete_zero_points(model)
    if operators == "qcompile":
        if to_native(model):
            register(model, ATTENTION[1])
        _drop_unused_functions(model)
        return
    # Of matmulnbits, what com.microsoft has no operator for is left.
    names = {str(node.outputs[0].name): node.name for node in model.graph.all_nodes() if node.domain == DOMAIN}
    InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
    for node in model.graph.all_nodes():
        node.name = names.get(str(node.outputs[0].name), node.name)
    for key in [key for key in model.functions if key[0] == DOMAIN]:
        del model.functions[key]
    model.graph.opset_imports.pop(DOMAIN, None)


def _drop_unused_functions(model: ir.Model) -> None:
    used = {node.op_identifier() for node in model.graph.all_nodes()}
    for key in [key for key in model.functions if key[0] == DOMAIN and key not in used]:
        del model.functions[key]


def _take_out_biases(model: ir.Model) -> None:
    """Products and Adds for products with a bias: the MatMulNBits of these targets have none."""
    for node in [own for own in model.graph.all_nodes() if own.domain == DOMAIN and own.op_type.startswith(BIASED)]:
        own, names = operands(node), Names(model)
        inputs = [node.inputs[0], own.codes, own.scale, *([own.zero_point] if own.zero_point is not None else [])]
        attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
        product = node.op_type.replace(BIASED, PRODUCT, 1)
        output = names.fresh(f"{node.outputs[0].name}.product")
        value = insert_before(node, product, inputs, attributes, name=str(node.name), output=output, domain=DOMAIN)
        value.type, value.shape, node.name = node.outputs[0].type, node.outputs[0].shape, f"{node.name}.bias"
        become(node, "Add", [value, own.bias], {}, domain="")


def _complete_zero_points(model: ir.Model) -> None:
    """Give explicit zeros to symmetric nodes whose operator other nodes use with zero points.

    Both share one body; with its optional input left open ONNX Runtime would not fuse them (see `functions.body`).
    """
    for node in model.graph.all_nodes():
        function = model.functions.get(node.op_identifier())
        own = format_of(node)
        if own is None or function is None or len(node.inputs) == len(function.inputs):
            continue
        codes, scale, last = node.inputs[1], node.inputs[2], len(function.inputs) - 1
        assert codes is not None
        assert scale is not None
        points = add_initializer(model.graph, f"{codes.name}.zero_point", own.middle_points(codes, scale))
        node.resize_inputs(len(function.inputs))
        node.replace_input_with(last, points)


def to_microsoft(model: ir.Model) -> None:
    """Turn operators of the domain into those of com.microsoft, as their formats say; the others stay."""
    cache: Cache = {}
    for node in list(model.graph.all_nodes()):
        own = format_of(node)
        if own is not None:
            own.lower(model, node, cache)
    model.graph.opset_imports.setdefault(MICROSOFT, 1)
