"""Bias correction: what quantization moves on average goes off the biases (Nagel et al. 2019, the empirical form)."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.base import Decision, Region, WalksAgain
from qcompile.passes.contract import Fact
from qcompile.passes.formats.base import drop_unused
from qcompile.passes.graph import Names, add_initializer, float_type, is_constant, take_over
from qcompile.passes.held import NOT_CONFIRMED
from qcompile.passes.linears import CONVOLUTIONS, constant
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.mean import Mean
from qcompile.passes.qdq.biases import bias_behind, channel_bias, has_endless_bias
from qcompile.passes.qdq.selection import PRODUCTS, weight_position
from qcompile.passes.state import node_state, set_node

Floats = npt.NDArray[np.float64]
_LIMIT = 2**31 - 1
# The parts of the data (see Mean) whose shifts must agree: of all of it, and of what the rest is held aside to judge.
_ALL_PARTS, _FITTED = ((0, 2), (1, 3)), ((0,), (2,))
# The share of a shift from which on it is called all of it.
_ALL = 0.99


class BiasCorrection(WalksAgain):
    """Take the mean shift of every integer product, measured on the calibration data, off its bias.

    The shift is that of the quantized graph's outputs, by channel, against the float graph's: what rounding and
    clipping here and in all products before change on average. Products are corrected in the order of the graph, each
    behind those that it depends on, so that a shift is taken off once. What two halves of the data do not agree about
    is chance and stays; see `confirmed_share`. That every product is nearer to its float means does not make the
    outputs better: what reads them may have lived by two shifts that cancelled, and few pictures tell it by luck. So
    corrections are made by half of the data first, and none is kept where the other half's outputs do not confirm them.
    Case 1: int32 codes behind a DequantizeLinear: the nearest number of codes is taken off.
    Case 2: a float bias of the node, or a constant that an Add puts on its output: the shift is taken off.
    Case 3: a convolution without a bias gets one, which costs its kernels nothing.
    Case 4: a MatMul without a bias gets an Add with `insert`; that costs time, so not by default.
    Case 5: nothing where the product is one of rank 2: with a float bias ONNX Runtime leaves it in float.
    """

    name: ClassVar[str] = "bias_correction"
    needs: ClassVar[Set[Fact]] = frozenset({Fact.STATIC})

    def __init__(self, *, insert: bool = False) -> None:
        super().__init__()
        self.insert = insert
        self._means: dict[ir.Value, Mean] = {}
        self._done: set[ir.Node] = set()
        self._halves: Sequence[Sequence[int]] = _ALL_PARTS
        self._every = 1
        self._tried: dict[str, Decision] = {}
        self._refused = "it was not measured: no calibration data"
        self._names: Names | None = None  # collected once: for each Add that would take the model's size each time

    def observed_in(self, region: Region) -> Mapping[ir.Value, Observer]:
        """The means of the products' outputs, in float still, and behind an Add that `qdq` may make a Gemm of."""
        found: dict[ir.Value, Mean] = {}
        for node in region.live_nodes():
            if node.op_type in PRODUCTS and node.domain == "" and weight_position(node) is not None:
                behind = bias_behind(node) if not has_endless_bias(node) else None
                for value in (node.outputs[0], *(behind[0].outputs if behind is not None else ())):
                    found[value] = _mean(value, node.op_type)
        self._means |= found
        return found

    def walk_again(self, region: Region) -> Iterator[Mapping[ir.Value, Observer]]:
        """The means of the integer products' outputs, those first on which no other depends."""
        for nodes in levels(region.nodes):
            types = {node: twin.proto.op_type for node in nodes if (twin := node_state(node).twin) is not None}
            measured = {node: _mean(node.outputs[0], own, self._every) for node, own in types.items()}
            yield {node.outputs[0]: mean for node, mean in measured.items()}
            for node, mean in measured.items():
                self._measured(region, node, mean)

    def on_copy(self, values: Mapping[str | None, ir.Value]) -> Self:
        """The pass for a copy of the model; the means in float are shared."""
        made = super().on_copy(values)
        made._means = {values[v.name]: mean for v, mean in self._means.items() if v.name in values}
        made._done, made._names = set(), None
        return made

    def hold_aside(self, every: int) -> None:
        """Fit to the parts of the data that are not held aside."""
        self._halves, self._every = _FITTED, every

    def refuse(self, reason: str, tried: Sequence[Decision]) -> None:
        """Correct nothing."""
        self._refused = reason
        self._tried = {own.node: own for own in tried}

    def call(self, region: Region) -> None:
        """Say what was not corrected where nothing was."""
        for node in region.live_nodes():
            if not _is_integer(node) or node in self._done:
                continue
            own = self._tried.get(node.name or "") or Decision(node.name or "", "", "")
            taken_back = replace(own, action="skipped", reason=self._refused)
            self.decisions.append(own if own.action == "skipped" else taken_back)

    def _measured(self, region: Region, node: ir.Node, quantized: Mean) -> None:
        original, name = self._means.get(node.outputs[0]), node.name or ""
        self._done.add(node)
        fitted = sorted(part for half in self._halves for part in half)
        means = [own.means(fitted) if own is not None else None for own in (original, quantized)]
        if original is None or means[0] is None or means[1] is None:
            self.decide(name, "skipped", "its output in float was not measured")
            return
        shift = (means[1] - means[0])[0]
        share = confirmed_share(shift, original.means(*self._halves), quantized.means(*self._halves))
        size = float(np.linalg.norm(shift) / max(float(np.linalg.norm(means[0])), 1e-30))
        reason = self._correct(region, node, share * shift) if share > 0 else NOT_CONFIRMED
        if reason:
            self.decide(name, "skipped", reason, shift=size, share=share)
        else:
            told = "" if share > _ALL else f", of which {share:.0%} is more than chance"
            self.decide(name, "corrected", f"its mean had moved by {size:.1%}{told}", shift=size, share=share)

    def _correct(self, region: Region, node: ir.Node, mean: Floats) -> str:
        """Why nothing was done, or an empty string."""
        if node.op_type in (*CONVOLUTIONS, "Gemm"):
            return _own_bias(region.model, node, mean)
        found, shape = _added(node, len(mean)), node.outputs[0].shape
        flat = node.op_type == "MatMul" and (shape is None or len(shape) < 3)
        bias = found[0].inputs[found[1]] if found is not None else None
        if bias is not None and flat and bias.shape is not None and len(bias.shape) == 0:  # Case 5
            return "a product of rank 2 with a float bias would be computed in float"
        if found is not None:
            _replace(region.model, *found, mean)  # Case 2
            return ""
        if not self.insert:
            return "it has no bias, insert=true would add one"
        if flat:  # Case 5
            return "a product of rank 2 with a float bias would be computed in float"
        self._names = self._names or Names(region.model)
        self._done.add(_insert(region.model, node, mean, self._names))  # Case 4
        return ""


def confirmed_share(shift: Floats, original: Floats | None, quantized: Floats | None) -> float:
    """The share of a shift (channels,) to take off, 0 … 1: what two halves of the data (2, channels) agree about.

    The product of the halves' shifts is the square of what they share, since chance is independent in them; over the
    square of the whole shift it is the factor of least expected error (James and Stein). 0 where a half is empty.
    """
    if original is None or quantized is None:
        return 0.0
    first, second = quantized - original
    power = float(shift @ shift)
    return min(1.0, max(0.0, float(first @ second) / power)) if power > 0 else 0.0


def levels(nodes: Sequence[ir.Node]) -> list[list[ir.Node]]:
    """The integer products among nodes in graph order, in groups: each depends on products of earlier groups alone."""
    depth: dict[ir.Value, int] = {}
    groups: list[list[ir.Node]] = []
    for node in nodes:
        own = max((depth.get(value, 0) for value in node.inputs if value is not None), default=0)
        if _is_integer(node):
            groups += [[]] * (own + 1 - len(groups))
            groups[own] = [*groups[own], node]
            own += 1
        depth.update((value, own) for value in node.outputs)
    return [group for group in groups if group]


def _is_integer(node: ir.Node) -> bool:
    twin = node_state(node).twin
    return twin is not None and bool(twin.weights)


def _mean(value: ir.Value, operator: str, every: int = 1) -> Mean:
    return Mean(str(value.name), axis=1 if operator in CONVOLUTIONS else -1, every=every)


def _own_bias(model: ir.Model, node: ir.Node, mean: Floats) -> str:
    """Cases 1 to 3 for a node whose third input is the bias."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    producer = bias.producer() if bias is not None else None
    if producer is not None and producer.op_type == "DequantizeLinear":
        return _codes(model, producer, mean)  # Case 1
    if bias is not None and not is_constant(bias):
        return "its bias is no constant"
    if bias is not None and channel_bias(node, 2, len(mean)) is None:
        return "its bias differs from row to row"
    if bias is None and node.op_type == "Gemm":  # Case 5
        return "a product of rank 2 with a float bias would be computed in float"
    if bias is not None:
        _replace(model, node, 2, mean)  # Case 2
        return ""
    dtype = float_type(node)
    node.resize_inputs(3)  # Case 3
    made = ir.tensor((-mean).astype(dtype.numpy()))
    node.replace_input_with(2, add_initializer(model.graph, f"{node.name}.bias", made))
    return ""


def _codes(model: ir.Model, read: ir.Node, mean: Floats) -> str:
    codes, scale = read.inputs[0], read.inputs[1]
    assert codes is not None
    assert scale is not None
    moved = np.rint(mean / np.asarray(constant(scale).numpy(), np.float64))
    corrected = np.asarray(constant(codes).numpy(), np.float64) - moved
    if np.abs(corrected).max(initial=0) > _LIMIT:
        return "the corrected bias does not fit 32 bits"
    made = add_initializer(model.graph, f"{codes.name}.corrected", ir.tensor(corrected.astype(np.int32)))
    read.replace_input_with(0, made)
    drop_unused(model, codes)
    return ""


def _added(node: ir.Node, channels: int) -> tuple[ir.Node, int] | None:
    """(Add, position of the bias) where a constant of one number a channel is all that is done to the output."""
    value = node.outputs[0]
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    position = 1 - uses[0].idx
    bias = uses[0].node.inputs[position]
    if bias is None or not is_constant(bias):
        return None
    return (uses[0].node, position) if channel_bias(uses[0].node, position, channels) is not None else None


def _replace(model: ir.Model, node: ir.Node, position: int, mean: Floats) -> None:
    """Read a bias without the mean error, one number a channel; the old one may have other readers.

    It keeps its rank, on which the fusion of an Add hangs: one number becomes a row, one of rank 0 a (1, 1, N).
    """
    bias, own = node.inputs[position], channel_bias(node, position, len(mean))
    assert bias is not None
    assert own is not None
    old = constant(bias)
    rank = len(old.shape) or (3 if node.op_type == "Add" else 1)
    shape = (*[1] * (rank - 1), len(mean))
    corrected = (own - mean).astype(old.dtype.numpy()).reshape(shape)
    made = add_initializer(model.graph, f"{bias.name}.corrected", ir.tensor(corrected))
    node.replace_input_with(position, made)
    drop_unused(model, bias)


def _insert(model: ir.Model, node: ir.Node, mean: Floats, names: Names) -> ir.Node:
    """Case 4. Returns the Add, which stands for the product from now on.

    (1, 1, N): with a bias (N,) and known shapes ONNX Runtime would make a float Gemm of both.
    """
    value = node.outputs[0]
    dtype = float_type(node)
    bias = add_initializer(model.graph, f"{node.name}.bias", ir.tensor((-mean).astype(dtype.numpy()).reshape(1, 1, -1)))
    add = ir.node("Add", [value, bias], name=f"{node.name}.corrected")
    add.outputs[0].name = names.fresh(f"{value.name}.corrected")
    take_over(value, add.outputs[0], names)
    add.replace_input_with(0, value)
    node.append(add)
    set_node(add, twin=node_state(node).twin)
    set_node(node, twin=None)
    node.name, add.name = add.name, node.name
    return add
