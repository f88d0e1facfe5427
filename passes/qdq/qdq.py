"""Static INT8: QuantizeLinear and DequantizeLinear around what integer kernels compute."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal, Self

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Array, QParams
from qcompile.passes.base import STATIC, IntegerNodes, IntegerPass, Reason, Region
from qcompile.passes.contract import WEIGHTS, Fact, Reads
from qcompile.passes.errors import UserError
from qcompile.passes.graph import Names, add_initializer, stem, take_over
from qcompile.passes.inner import int8, quantize_inner
from qcompile.passes.linears import CONVOLUTIONS, Linear
from qcompile.passes.observers import AUTO, OBSERVERS, CalibratorOrAuto
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.extremes import Extremes
from qcompile.passes.observers.mse import Mse
from qcompile.passes.observers.output_mse import OutputMse
from qcompile.passes.policy import Policy
from qcompile.passes.qdq.apart import Use, by_axis, stays_float
from qcompile.passes.qdq.biases import bias_behind, has_endless_bias, quantize_bias, settle_bias
from qcompile.passes.qdq.columns import replace_static
from qcompile.passes.qdq.embeddings import quantize_embeddings
from qcompile.passes.qdq.islands import coarse_islands
from qcompile.passes.qdq.providers import TYPES, Rule
from qcompile.passes.qdq.ranges import bounds_of, fixed_for_qnn, grid_of, shared
from qcompile.passes.qdq.selection import (
    Operators,
    Selection,
    inputs_of,
    is_half_concat,
    quantized_output,
    select,
    weight_position,
)
from qcompile.passes.qdq.weights import Stored, WeightGrid, WeightStore, importance, refused_codes
from qcompile.passes.spec import ActivationSpec
from qcompile.passes.state import node_state, remember

Readers = dict[ir.Value, list[tuple[ir.Node, int]]]
_STARVED = "no row of the calibration data reached it"
_ROUNDED_BIAS = "the scale of its int32 bias would be too small for float16"
_ENDLESS_BIAS = "its bias holds a number so large that codes leave no room for others"
_COARSE = "eight bits tell its output coarsely, and nothing else in integers reads it"
_TYPES = {"float8": ir.DataType.FLOAT8E4M3FN}


class Qdq(IntegerPass):
    """Insert QDQ: weights int8, activations on fixed ranges, so that runtimes compute products in 8 bits.

    Case 1: products with a constant weight (MatMul, Gemm, Conv), and what `operators` adds; see `selection`.
    Case 2: activations by the observed ranges ("auto": output-mse for what MatMuls alone read, mse for the rest);
            values that must share a scale share it.
    Case 3: biases become int32 where the provider takes them; others keep a form that does not hinder the fusion.
    Case 4: tables of embeddings become int8, too, shared with a tied lm_head.
    Case 5: weights in bodies of If, Loop and Scan, of LSTM, GRU and RNN: int8, decoded before their reader.
    Case 6: what no row of the calibration data reached (an expert without a token): weights alone.
    Case 7: 16-bit activations of a float16 product with a bias: weights alone. ONNX Runtime 1.32 makes an int32 bias of
            it, whose scale, the product of two small ones, float16 rounds to a few steps or to 0.
    Case 8: a product whose bias holds an infinity, or what is next to one: weights alone; see `has_endless_bias`.
    Case 9: products that stay in float read what ONNX Runtime takes for no input of an integer one; see `apart`.
    Case 10: a convolution of the graph's input whose rounding serves nothing else and costs much: weights alone; see
            `islands`.
    Case 11: a Concat of float16 reads the values as they are; see `is_half_concat`.
    lm_head: "weights" leaves its input in float: its error meets the logits as it is (SmolLM2: two fifths of the KL).
    provider: whose fusions and types are aimed at. operators: see `selection`; on qnn "auto" is "all".
    weights: one scale a channel, or one a tensor.
    activations: "auto" is what the provider wants; 16 bits and float8 run as Q, DQ and float operators on the CPU.
    """

    name: ClassVar[str] = "qdq"
    reads: Set[Reads] = frozenset({Reads.RANGES})
    needs: ClassVar[Set[Fact]] = WEIGHTS | {Fact.PARTS}  # it rounds the activations that it had observed in them
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.INTEGER, Fact.STATIC})

    def __init__(
        self,
        policy: Policy,
        *,
        observer: CalibratorOrAuto = AUTO,
        operators: Literal["auto", "weights", "all"] = "auto",
        provider: Literal["cpu", "cuda", "tensorrt", "qnn"] = "cpu",
        activations: Literal["auto", "uint8", "int8", "uint16", "int16", "float8"] = "auto",
        symmetric: bool | Literal["auto"] = "auto",
        weights: Literal["channel", "tensor"] = "channel",
        reduce_range: bool = False,
        share_sums: bool = False,
        slower: bool = False,
        lm_head: Literal["weights", "static"] = "weights",
    ) -> None:
        super().__init__()
        self.policy, self.observer, self.provider = policy, observer, provider
        self.operators: Operators = "all" if (provider, operators) == ("qnn", "auto") else operators
        self.spec = activation_spec(provider, activations, symmetric)
        self.grid = WeightGrid(weights == "channel", reduce_range, self.spec.is_float)
        self.share_sums, self.slower, self.heads = share_sums, slower or provider == "qnn", lm_head == "static"
        self.observers: dict[ir.Value, Observer] = {}
        self.grids: dict[ir.Value, QParams] = {}
        self._rules: dict[ir.Node, Rule] = {}

    @property
    def activation_grid(self) -> ActivationSpec:
        """That of all activations."""
        return self.spec

    def refuses_codes(self, linear: Linear) -> str:
        """Those of another grid, of tables, and of linears with outliers."""
        return refused_codes(linear, self.grid)

    @property
    def fused(self) -> bool:
        """Not where it is for TensorRT: ONNX Runtime's fusions for the CPU fail on some of its symmetric int8."""
        return self.provider != "tensorrt"

    @property
    def light(self) -> bool:
        """ONNX Runtime's CPU provider has a kernel for int8 weights alone."""
        return self.provider == "cpu"

    @property
    def chosen_ranges(self) -> dict[ir.Value, tuple[float, float]]:
        """The ends of each grid."""
        ends = (self.spec.qmin, self.spec.qmax)
        return {value: tuple(float((end - q.zero_point) * q.scale) for end in ends) for value, q in self.grids.items()}  # type: ignore[misc]

    def on_copy(self, values: Mapping[str | None, ir.Value]) -> Self:
        """The pass for a copy of the model: its observers are shared."""
        made = super().on_copy(values)
        made.observers = {values[v.name]: own for v, own in self.observers.items() if v.name in values}
        made.grids = {}
        return made

    def observed(self, model: ir.Model) -> dict[ir.Value, Observer]:
        """An observer for every activation that will be quantized."""
        selection = self._select(model)
        self._rules, readers = selection.nodes, _readers(selection)
        for value in selection.values:
            if value not in self.observers:
                self.observers[value] = self._observer(value, [node for node, _ in readers[value]])
        return {value: self.observers[value] for value in selection.values}

    def observed_in(self, region: Region) -> Mapping[ir.Value, Observer]:
        """Observers of what nodes that were chosen read now and did not read then."""
        readers: Readers = {}
        for node in region.live_nodes():
            for i in inputs_of(node, self._rules[node]) if node in self._rules else ():
                value = node.inputs[i]
                if value is not None and value not in self.observers:
                    readers.setdefault(value, []).append((node, i))
        found = {value: self._observer(value, [node for node, _ in own]) for value, own in readers.items()}
        self.observers |= found
        return found

    def _observer(self, value: ir.Value, readers: Sequence[ir.Node]) -> Observer:
        made = self._unbounded(value, readers)
        if isinstance(made, Extremes):
            made.bounds = bounds_of(value)
            made.channels_first = any(node.op_type in CONVOLUTIONS for node in (*readers, value.producer()) if node)
        return made

    def _unbounded(self, value: ir.Value, readers: Sequence[ir.Node]) -> Observer:
        name = self.observer
        if name == AUTO:  # Case 2
            name = OutputMse.name if all(node.op_type == "MatMul" for node in readers) and readers else Mse.name
        if name == OutputMse.name:
            return OutputMse(str(value.name), importance=partial(importance, readers))
        return OBSERVERS[name](str(value.name))

    def integer_nodes(self, model: ir.Model, policy: Policy) -> IntegerNodes:
        """What `selection` chooses, but for products whose weight alone is quantized."""
        selection = select(model, policy, self.provider, self.operators, slower=self.slower)
        moving = frozenset(node for node, rule in selection.nodes.items() if rule.output == "same")
        ends = {node: quantized_output(node) for node, rule in selection.nodes.items() if rule.output == "required"}
        return IntegerNodes(list(selection.nodes), selection.whole, moving, ends)

    def call(self, region: Region) -> None:
        """Rewrite the whole graph in place."""
        selection = self._seen(region.model)
        self.grids = grids = self._grids(selection)
        readers = _readers(selection)
        for node in selection.nodes:
            remember(node)
        for node in selection.heads:
            remember(node, weights_only=True)
        store = WeightStore(region.model, self.grid, dry=self.dry)  # not kept: it knows all weights
        scales = self._round_weights(region.model, store, selection, grids)
        self._insert(region.model, selection, readers, grids)
        if TYPES[self.provider].bias and not self.spec.is_float:
            for node, scale in scales.items():
                settle_bias(region.model, node, scale)
        coder = int8(region.model, self.policy, store)  # Case 5
        runtime = "TensorRT" if self.provider == "tensorrt" else ""
        quantize_inner(region.model, self.policy, store, coder, self.decide, runtime=runtime)
        quantize_embeddings(region.model, self.policy, store, self.decide, runtime=runtime)
        for node, reason in selection.kept.items():
            self._told(node, *reason)
        region.nodes = list(region.model.graph)

    def _select(self, model: ir.Model) -> Selection:
        return select(model, self.policy, self.provider, self.operators, slower=self.slower, heads=self.heads)

    def _seen(self, model: ir.Model) -> Selection:
        """What to quantize, as far as the calibration data reached: of the rest, the weights alone (Case 6).

        An expert that no token was sent to has no range, and may be asked later. UserError where nothing was seen.
        """
        selection = self._without_lost_biases(model, self._select(model))
        if self.dry:
            return selection
        while unknown := [value for value in selection.values if not self.observers[value].state()]:
            touching = _touching(selection, set(unknown))
            if len(unknown) == len(selection.values) or not touching:
                raise UserError(
                    f"qdq: activation {unknown[0].name} was never seen on the calibration data: is it empty?"
                )
            alone, kept = dict(self.policy.weights_only), dict(self.policy.kept)
            for node in touching:
                (kept if weight_position(node) is None else alone)[str(node.name)] = _STARVED
            self.policy = replace(self.policy, weights_only=alone, kept=kept)
            selection = self._select(model)
        if self.provider != "cpu" or self.spec.is_float:
            return selection
        coarse = {str(node.name): _COARSE for node in coarse_islands(selection, self.observers, self.spec)}  # Case 10
        self.policy = replace(self.policy, weights_only={**self.policy.weights_only, **coarse})
        return self._select(model) if coarse else selection

    def _without_lost_biases(self, model: ir.Model, selection: Selection) -> Selection:
        """Cases 7 and 8."""
        wide = not self.spec.is_float and self.spec.dtype.bitwidth > 8
        alone = {
            str(node.name): _ENDLESS_BIAS if endless else _ROUNDED_BIAS
            for node in selection.nodes
            if (endless := weight_position(node) is not None and has_endless_bias(node))
            or (wide and node.outputs[0].dtype == ir.DataType.FLOAT16 and _has_bias(node))
        }
        if not alone:
            return selection
        self.policy = replace(self.policy, weights_only={**self.policy.weights_only, **alone})
        return self._select(model)

    def _grids(self, selection: Selection) -> dict[ir.Value, QParams]:
        """Case 2."""
        if self.dry:
            return dict.fromkeys(selection.values, QParams(np.ones((), np.float32), np.zeros((), np.float32)))
        grids: dict[ir.Value, QParams] = {}
        ranges = {value: self.observers[value].expected(self.spec) for value in selection.values}
        for group in shared(selection.nodes, ranges, sums=self.share_sums):
            dtype = _float_type(group[0]).numpy()
            qparams = grid_of((ranges[value] for value in group), self.spec, scale_dtype=dtype)
            if self.provider == "qnn":
                qparams = next((own for value in group if (own := fixed_for_qnn(value, self.spec))), qparams)
            grids.update((value, qparams) for value in group)
        return grids

    def _round_weights(
        self, model: ir.Model, store: WeightStore, selection: Selection, grids: dict[ir.Value, QParams]
    ) -> dict[ir.Node, Array]:
        """Cases 1 and 3. Returns the scale of the integer sums of every product, () or (channels,)."""
        scales: dict[ir.Node, Array] = {}
        for node, rule in selection.nodes.items():
            x = node.inputs[0]
            if node_state(node).outliers is not None:
                replace_static(model, node, self.grid, self.spec, self.decide)
                continue
            if weight_position(node) is None or x is None:
                self.decide(
                    node.name or "", "quantized", f"static {self.spec}", format=STATIC, kind=node.op_type, weights=0
                )
                continue
            # For TensorRT as well, whose biases stay float: ONNX Runtime's CPU provider makes codes of them.
            stored = store.dequantized(node, rule, None if self.spec.is_float else grids[x].scale)
            scales[node] = np.asarray(grids[x].scale * stored.quantized.scale, np.float32)
            if rule.bias is not None and TYPES[self.provider].bias and not self.spec.is_float:
                quantize_bias(model, node, rule.bias, scales[node], _channels(stored))
            self._told(node, "quantized", f"{self.grid} static, {self.spec}", stored, format=STATIC)
        for node, rule in selection.heads.items():
            why = self.policy.weights_only.get(str(node.name))
            reason = Reason(f"{self.grid}, weights only", why or "")
            self._told(node, "quantized", reason, store.dequantized(node, rule))
        return scales

    def _insert(self, model: ir.Model, selection: Selection, readers: Readers, grids: dict[ir.Value, QParams]) -> None:
        names = Names(model)
        for value, wanting in readers.items():
            apart: list[Use] = []
            if value in selection.whole:
                uses = [(use.node, use.idx) for use in value.uses()]
                apart = [use for use in uses if use not in wanting and stays_float(*use)]
                wanting = [use for use in uses if use not in apart and not is_half_concat(use[0])]
            dequantized = self._pair(model, value, grids[value], names)
            for node, i in wanting:
                node.replace_input_with(i, dequantized)
            if apart and self.provider not in ("tensorrt", "qnn"):
                again = by_axis(model, value, dequantized.producer(), grids[value])  # type: ignore[arg-type]
                for node, i in apart if again is not None else ():
                    node.replace_input_with(i, again)
            if value in selection.whole and value.is_graph_output():
                quantize = dequantized.producer().inputs[0].producer()  # type: ignore[union-attr]
                take_over(value, dequantized, names)
                quantize.replace_input_with(0, value)  # type: ignore[union-attr]  # it reads the old value still

    def _pair(self, model: ir.Model, value: ir.Value, qparams: QParams, names: Names) -> ir.Value:
        """Q and DQ behind a value; returns the DQ's output."""
        dtype = _float_type(value)
        name = names.fresh(f"{stem(value.name)}.quantized")
        scale = add_initializer(model.graph, f"{name}.scale", ir.tensor(qparams.scale.astype(dtype.numpy())))
        grid, kind = [scale], {"output_dtype": int(self.spec.dtype)}
        if not self.spec.is_float or self.provider == "tensorrt":
            # Not for float8: ONNX Runtime 1.32 takes a zero point of 0 for the lowest code, and drops a Relu before it.
            zero = ir.tensor(qparams.zero_point.astype(self.spec.dtype.numpy()))
            grid, kind = [scale, add_initializer(model.graph, f"{name}.zero_point", zero)], {}
        quantize = ir.node("QuantizeLinear", [value, *grid], kind, name=name)
        dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *grid], name=f"{name}.back")
        quantize.outputs[0].name, dequantize.outputs[0].name = name, names.fresh(f"{stem(value.name)}.dequantized")
        for node, own in ((quantize, self.spec.dtype), (dequantize, dtype)):
            node.outputs[0].dtype, node.outputs[0].shape = own, value.shape
        producer, graph = value.producer(), model.graph
        if producer is not None:
            graph.insert_after(producer, [quantize, dequantize])
        else:
            graph.insert_before(graph[0], [quantize, dequantize])
        return dequantize.outputs[0]

    def _told(
        self,
        node: ir.Node,
        action: str,
        reason: str,
        stored: Stored | None = None,
        *,
        format: str = "",
    ) -> None:
        if stored is None:
            self.decide(node.name or "", action, reason, kind=node.op_type, weights=_elements(node), weight=node.name)
            return
        name, size = str(stored.codes.name), max(stored.quantized.codes.size, 1)
        bits = 8 * stored.nbytes / size
        detail = {"kind": node.op_type, "weights": size, "weight": name, "bytes": stored.nbytes}
        self.decide(node.name or "", action, reason, format=format, **detail, bits_per_weight=bits)


def activation_spec(provider: str, activations: str, symmetric: bool | str) -> ActivationSpec:
    """The grid that the parameters ask for; UserError where the provider does not take it."""
    wanted = TYPES[provider]  # type: ignore[index]
    dtype = wanted.activation if activations == "auto" else _TYPES.get(activations)
    if dtype is None:
        dtype = ir.DataType[activations.upper()]
    even = bool(symmetric) if symmetric != "auto" else wanted.symmetric or dtype == ir.DataType.FLOAT8E4M3FN
    if wanted.symmetric and not even:
        raise UserError(f"qdq: {provider} takes symmetric activations only, leave out symmetric=false")
    if provider == "qnn" and dtype == ir.DataType.FLOAT8E4M3FN:
        raise UserError("qdq: qnn takes activations of 8 and 16 bits, got float8")
    if provider == "tensorrt" and dtype not in (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN):
        raise UserError(f"qdq: tensorrt takes int8 and float8 activations, got {activations}")
    return ActivationSpec(dtype, even)


def _readers(selection: Selection) -> Readers:
    """By value, the inputs of nodes that are to read its DequantizeLinear."""
    readers: Readers = {value: [] for value in selection.values}
    for node, rule in selection.nodes.items():
        for i in inputs_of(node, rule):
            value = node.inputs[i]
            assert value is not None
            readers[value].append((node, i))
    return readers


def _touching(selection: Selection, values: set[ir.Value]) -> list[ir.Node]:
    """The nodes that would be quantized and read one of the values, or give one behind a Q of their own."""
    return [
        node
        for node, rule in selection.nodes.items()
        if quantized_output(node) in values or any(node.inputs[i] in values for i in inputs_of(node, rule))
    ]


def _has_bias(node: ir.Node) -> bool:
    """Whether a product has a bias, or has one for ONNX Runtime, which makes a Gemm of MatMul and Add at rank 2."""
    if weight_position(node) is None:
        return False
    shape = node.outputs[0].shape
    own = len(node.inputs) > 2 and node.inputs[2] is not None
    return own or ((shape is None or len(shape) == 2) and bias_behind(node) is not None)


def _float_type(value: ir.Value) -> ir.DataType:
    """The element type of an activation and of its scale."""
    if value.dtype is None:
        raise TypeError(f"{value.name} has no type")
    return value.dtype


def _channels(stored: Stored) -> int:
    return int(stored.quantized.codes.shape[stored.quantized.axis])


def _elements(node: ir.Node) -> int:
    """Elements of the constant weight of a product; 0 of what has none."""
    if weight_position(node) is None:
        return 0
    value = node.inputs[1] if len(node.inputs) > 1 else None
    shape = value.shape if value is not None else None
    known = shape is not None and all(isinstance(size, int) for size in shape)
    return int(np.prod([int(size) for size in shape])) if known and shape is not None else 0  # type: ignore[arg-type]
