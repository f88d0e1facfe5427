"""Fewer, wider packed products: a bias joins its product, products of one input become one."""

from collections.abc import Sequence, Set
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from qcompile.passes.base import Pass, Region
from qcompile.passes.caches import has_caches
from qcompile.passes.contract import Added, Fact, Stage
from qcompile.passes.contrib.cuts import feed_whole
from qcompile.passes.formats import by_operator, format_of, functions
from qcompile.passes.formats.base import (
    ACTIVATION_BITS,
    BIASED,
    COLUMNS_AT_8,
    DOMAIN,
    PRODUCT,
    add_codes,
    drop_unused,
    element_type,
    operands,
)
from qcompile.passes.formats.block_scales import adds_offsets
from qcompile.passes.formats.half_scales import form_of, joined_scales
from qcompile.passes.gates import fuse_gates, gates, in_gate
from qcompile.passes.graph import Names, add_initializer, take_over
from qcompile.passes.joined_names import joined_name
from qcompile.passes.linears import constant, dimensions


class Fuse(Pass):
    """Join packed products of one input along N, and biases with their products; after `pack`.

    Case 1 (bias): a MatMulInt… whose only reader is an Add of a constant (N,) becomes a MatMulAddInt….
    Case 2 (inputs): products that read one value, of the same operator, group size, code type, scale type and kind of
    zero points become one node whose weights are concatenated along N, and a Split into the outputs they had; `_kind`
    says all that they must have in common, so that what is joined is stored as its parts were. Columns
    take activations at the bits that they had (COLUMNS_AT_8): kernels compute the same bit for bit, where what takes 8
    fills whole panels. A gate and what it gates stay apart from several others. Offsets of groups behind them
    (`block_scales`) become one node, too.
    Case 3: a product whose weight another node reads too keeps its own copy: it joins no other.
    Case 4 (gates): silu(a) b becomes a SwiGLU where a and b are the halves that a Split makes of one value, such as the
    product that Case 2 made of them, and nothing else reads a half (`gates`). For that a gate is joined before others.
    Case 5: a GroupQueryAttention whose queries, keys and values are cut out of one product reads that whole.
    faster: only what is known to save time is done: in decoders with caches.
    Names of values stay; a joined node is named after those it replaces.
    """

    name: ClassVar[str] = "fuse"
    stage: ClassVar[Stage] = Stage.BEHIND
    needs: ClassVar[Set[Fact]] = frozenset({Fact.PACKED})
    added: ClassVar[Added | None] = Added("attention", "fused", Fact.PACKED, frozenset({"qcompile"}), {"faster": True})

    def __init__(self, *, bias: bool = True, inputs: bool = True, gates: bool = True, faster: bool = False) -> None:
        super().__init__()
        self.bias, self.inputs, self.gates, self.faster = bias, inputs, gates, faster

    def call(self, region: Region) -> None:
        """Fuse what can be fused, in place."""
        if self.faster and not has_caches(region.model.graph):
            return
        names = Names(region.model)
        if self.bias:
            for node in _products(region.model):
                self._add_bias(region.model, node, names)
        if self.inputs:
            self._join_all(region.model, names)
            feed_whole(region.model.graph)
        if self.gates:
            fuse_gates(region.model, names, self.decide)

    def _add_bias(self, model: ir.Model, node: ir.Node, names: Names) -> None:  # Case 1
        add = _only_reader(node)
        if isinstance(add, str):
            self.decide(_name(node), "kept", add)
            return
        bias = add.inputs[1 if add.inputs[0] is node.outputs[0] else 0]
        refusal = _unfit_bias(bias, node)
        if bias is None or refusal:
            self.decide(_name(node), "kept", refusal)
            return
        own = operands(node)
        inputs = [node.inputs[0], own.codes, own.scale, bias, *([own.zero_point] if own.zero_point else [])]
        made = self._made(model, node.op_type.replace(PRODUCT, BIASED, 1), inputs, [node], _name(node), before=node)
        self.decide(_name(node), "fused", f"with its bias, {_name(add)}", operator=made.op_type)
        take_over(add.outputs[0], made.outputs[0], names)
        model.graph.remove(add, safe=True)
        model.graph.remove(node, safe=True)

    def _join_all(self, model: ir.Model, names: Names) -> None:  # Case 2
        readers: dict[ir.Value | None, list[ir.Node]] = {}
        for node in _products(model):
            readers.setdefault(node.inputs[0], []).append(node)
        for nodes in readers.values():
            if len(nodes) == 1:
                self.decide(_name(nodes[0]), "kept", "no other packed product reads its input")
                continue
            alike: dict[str, list[ir.Node]] = {}
            for node in nodes:
                if len(operands(node).codes.uses()) > 1:  # Case 3
                    self.decide(_name(node), "kept", "its weight is shared with another node")
                else:
                    alike.setdefault(_kind(node), []).append(node)
            for kind, group in alike.items():
                if len(group) > 1:
                    for part in _apart(group):
                        self._join(model, part, names)
                else:
                    others = " and ".join(sorted(set(alike) - {kind})) or "shared weights"
                    self.decide(_name(group[0]), "kept", f"it is {kind}, beside {others}")

    def _join(self, model: ir.Model, group: Sequence[ir.Node], names: Names) -> None:
        nodes = sorted(group, key=lambda node: not gates(_result(node)))
        parts, name = [operands(node) for node in nodes], joined_name([_name(node) for node in nodes])
        own = by_operator(nodes[0].op_type)
        assert own is not None, "a packed product is that of a format"
        end = f"{name}.{own.name}"
        inputs = [nodes[0].inputs[0], _joined_codes(model, end, [part.codes for part in parts])]
        for what in ("scale", "bias", "zero_point"):
            values = [value for part in parts if (value := getattr(part, what)) is not None]
            if what == "zero_point" and values:
                inputs.append(_joined_codes(model, f"{end}.zero_point", values))
            elif values:
                inputs.append(_joined(model, f"{end}.{what}", values))
        made = self._made(model, nodes[0].op_type, inputs, nodes, name, before=group[0])
        self.decide(name, "fused", ", ".join(_name(node) for node in nodes), operator=made.op_type)
        whole = made.outputs[0]
        widths = np.array([dimensions(part.codes)[1] for part in parts], np.int64)
        like = nodes[0].outputs[0]
        whole.name, whole.type = name, like.type
        whole.shape = None if like.shape is None else ir.Shape([*list(like.shape)[:-1], int(widths.sum())])
        ends, read = [_offsets(node) or node for node in nodes], {value for part in parts for value in part.values()}
        if ends[0] is not nodes[0]:
            read |= {value for node in ends for value in node.inputs[3:] if value is not None}
            whole = _joined_offsets(model, name, whole, made.inputs[2], ends)
        sizes = add_initializer(model.graph, f"{name}.split", ir.tensor(widths))
        split = ir.node("Split", [whole, sizes], {"axis": -1}, num_outputs=len(nodes), name=f"{name}.split")
        whole_node = whole.producer()
        assert whole_node is not None
        whole_node.append(split)
        for node, last, output in zip(nodes, ends, split.outputs, strict=True):
            take_over(last.outputs[0], output, names)
            for done in dict.fromkeys((last, node)):
                model.graph.remove(done, safe=True)
        for value in read:
            drop_unused(model, value)

    def _made(
        self,
        model: ir.Model,
        operator: str,
        inputs: Sequence[ir.Value | None],
        nodes: Sequence[ir.Node],
        name: str,
        *,
        before: ir.Node,
    ) -> ir.Node:
        """The node that stands for the products `nodes`, in the order of their columns. before: the first in the graph,
        so that what reads any of them stays behind it.
        """
        bits = {_bits(node) for node in nodes}
        columns = [] if bits == {8} else _columns_at_8(nodes)
        zero_points = operands(nodes[0]).zero_point is not None
        k = nodes[0].attributes.get_int("K", 1)
        functions.register(model, operator, zero_points=zero_points, columns=bool(columns), k=k)
        own = (ACTIVATION_BITS, COLUMNS_AT_8)
        attributes: dict[str, Any] = {name: a.as_int() for name, a in nodes[0].attributes.items() if name not in own}
        attributes |= {} if bits == {None} else {ACTIVATION_BITS: 8 if bits == {8} else 16}
        attributes |= {COLUMNS_AT_8: columns} if columns else {}
        made = ir.node(operator, inputs, attributes, domain=DOMAIN, name=name)
        before.prepend(made)
        return made


def _offsets(node: ir.Node) -> ir.Node | None:
    """The node that adds constant offsets to a product, by the product's own scales, and alone reads it."""
    output, uses = node.outputs[0], list(node.outputs[0].uses())
    if len(uses) != 1 or uses[0].idx != 0 or output.is_graph_output() or not adds_offsets(uses[0].node):
        return None
    after = uses[0].node
    fixed = all(value is not None and value.const_value is not None for value in after.inputs[3:])
    return after if fixed and after.inputs[2] is node.inputs[2] else None


def _result(node: ir.Node) -> ir.Value:
    """A product with its offsets, if there are any."""
    return (_offsets(node) or node).outputs[0]


def _joined_offsets(
    model: ir.Model, name: str, whole: ir.Value, scale: ir.Value | None, parts: Sequence[ir.Node]
) -> ir.Value:
    """The offsets of several products added to the joined one."""
    stored = list(zip(*(node.inputs[3:] for node in parts), strict=True))
    ends = [
        _joined(model, f"{name}.offsets.{i}", [value for value in own if value is not None])
        for i, own in enumerate(stored)
    ]
    attributes = {key: own.as_int() for key, own in parts[0].attributes.items()}
    inputs = [whole, parts[0].inputs[1], scale, *ends]
    made = ir.node(parts[0].op_type, inputs, attributes, domain=DOMAIN, name=f"{name}.offsets")
    producer = whole.producer()
    assert producer is not None
    producer.append(made)
    made.outputs[0].name, made.outputs[0].type, made.outputs[0].shape = f"{whole.name}.offsets", whole.type, whole.shape
    return made.outputs[0]


def _apart(group: Sequence[ir.Node]) -> list[Sequence[ir.Node]]:
    """Products that may be one, in graph order: all, or a gate and what it gates apart from others, as of attention
    that reads the same norm: each operator then reads what it wants of one product, without a Split.
    """
    gated = [node for node in group if in_gate(_result(node))]
    others = [node for node in group if node not in gated]
    return [gated, others] if len(gated) > 1 and len(others) > 1 else [group]


def _products(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if functions.is_product(node)]


def _name(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name)


def _bits(node: ir.Node) -> int | None:
    """The bits that a product says its kernel gives activations."""
    return node.attributes[ACTIVATION_BITS].as_int() if ACTIVATION_BITS in node.attributes else None


def _columns_at_8(nodes: Sequence[ir.Node]) -> list[int]:
    """Where what takes activations at 8 bits lies among the columns of all: begins and ends of ranges."""
    found: list[int] = []
    start = 0
    for node in nodes:
        n = dimensions(operands(node).codes)[1]
        own = [0, n] if _bits(node) == 8 else [int(at) for at in node.attributes.get_ints(COLUMNS_AT_8, [])]
        ends = [start + at for at in own]
        found = [*found[:-1], *ends[1:]] if found and ends and found[-1] == ends[0] else [*found, *ends]
        start += n
    return found


def _kind(node: ir.Node) -> str:
    """What products must have in common to be joined, as it is told: all that their joined node has once, and the form
    in which the file has scales and offsets.
    """
    own = operands(node)
    codes, scale = constant(own.codes).dtype.name.lower(), form_of(constant(own.scale))
    zeros = "with" if own.zero_point is not None else "without"
    block_size, form = node.attributes["block_size"].as_int(), format_of(node)
    told = [f", {name} {node.attributes.get_int(name, 0)}" for name in getattr(form, "apart", ())]
    text = f"{node.op_type} of {codes} in groups of {block_size}, {zeros} zero points, {scale} scales"
    if (after := _offsets(node)) is not None:
        sums = after.inputs[1]
        sizes = " and ".join(f"{constant(v).dtype.name.lower()} of {dimensions(v)[0]}" for v in after.inputs[3:] if v)
        settings = ", ".join(f"{name} {after.attributes.get_int(name, 0)}" for name in ("groups", "middle"))
        told += [f", {after.op_type} ({settings}; {sizes}) of {sums.name if sums is not None else ''}"]
    return "".join([text, *told])


def _only_reader(node: ir.Node) -> ir.Node | str:
    """The Add that alone reads the product, or why there is none."""
    output = node.outputs[0]
    if node.op_type.startswith(BIASED):
        return "it has a bias"
    if output.is_graph_output():
        return "its output is an output of the model"
    readers = [use.node for use in output.uses()]
    if len(readers) != 1:
        return "several nodes read its output" if readers else "nothing reads its output"
    if readers[0].op_type != "Add" or readers[0].domain or readers[0].graph is not node.graph:
        return "no Add follows it"
    return readers[0]


def _unfit_bias(bias: ir.Value | None, node: ir.Node) -> str:
    """Why a value cannot be the bias of a product; empty where it can."""
    own = operands(node)
    if bias is None or bias.const_value is None or not bias.is_initializer() or bias.is_graph_input():
        return "what is added is no constant"
    shape, n = dimensions(bias), dimensions(own.codes)[1]
    if shape != (n,):
        return f"the constant added has shape {shape}, not ({n},)"
    if bias.const_value.dtype != element_type(node):
        return f"the constant added is {bias.const_value.dtype}"
    return ""


def _joined(model: ir.Model, name: str, values: Sequence[ir.Value]) -> ir.Value:
    """Constants side by side; scales in the form that they are stored in."""
    tensors = [constant(value) for value in values]
    joined = joined_scales(tensors, name) or ir.tensor(np.concatenate([own.numpy() for own in tensors], axis=-1))
    return add_initializer(model.graph, name, joined)


def _joined_codes(model: ir.Model, name: str, values: Sequence[ir.Value]) -> ir.Value:
    dtype = constant(values[0]).dtype
    small = np.int8 if dtype in (ir.DataType.INT4, ir.DataType.INT8) else np.uint8
    codes = np.concatenate([constant(value).numpy().astype(small) for value in values], axis=1)
    return add_codes(model, name, codes, dtype)
