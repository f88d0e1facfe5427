"""Folding what is computed from constants alone into constants, lazily, and never into a model much larger.

What other nodes read of such computations becomes initializers, where all of these hold:

1. What comes of one set of large constants takes no more than those of them that then go (64 KiB apart). Twice as much
   is taken for weights that products alone read, which a quantizer makes small: halves behind a Cast. A constant that
   others still read as it is does not go: a tied embedding keeps its one copy and its Transpose.
2. Together they add no more than the model's own size.
3. A result costs no more than reading it some dozens of times.
4. A weight of a product has not twice as many elements as what it is computed from has bytes: a filter bank scattered
   into zeros, a window of two axes. Not even 4-bit codes would be smaller, and what is computed is exact.

Everything else stays as it is, with its reason. A changed shape costs nothing: equal bytes are stored once.
Large results are computed when they are read, small ones at once.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir

from qcompile.passes.bodies import bodies
from qcompile.passes.graph import MICROSOFT, Decide, add_initializer, decided, is_constant
from qcompile.passes.prepare.constant_ops import made_of
from qcompile.passes.prepare.constant_types import Array, Made, Operand
from qcompile.passes.state import node_state, set_node
from qcompile.passes.tensors import computed, read

# A second copy of less than this may be made; above, a weight exists once.
_SMALL = 1 << 16
# Results of less than this are computed when they are found, so that a long chain of them costs nothing later.
_TINY = 1 << 12
# Numbers touched for a result that do not matter, and how many times its own size may be.
_WORK, _TIMES = 1 << 31, 32
# What a model of few constants may grow by.
_ROOM = 1 << 20
# Model meta: the bytes that it may still grow by.
_BUDGET = "qcompile.folding_budget"
# Weights of fewer elements are folded whatever they are made of.
_LEAST = 1024
# Constants that a value is computed from are remembered up to this number, so that long chains cost no more.
_SOURCES = 16
_COMPACT = "the {} bytes that it is computed from are fewer than its codes would be"
ALREADY = "the weight is already quantized"
# Operators of ONNX and ONNX Runtime that read a weight as codes, and as which input.
_CODES = {
    "DequantizeLinear": 0, "GatherBlockQuantized": 0, "MatMulInteger": 1, "ConvInteger": 1, "MatMulNBits": 1,
    "DynamicQuantizeMatMul": 1, "MatMulIntegerToFloat": 1, "QAttention": 1, "DynamicQuantizeLSTM": 1, "QMoE": 2,
    "QLinearMatMul": 3, "QLinearConv": 3, "QGemm": 3,
}  # fmt: skip
_WEIGHTS = {"MatMul": (0, 1), "Gemm": (0, 1), "Einsum": range(64), "Conv": (1,), "ConvTranspose": (1,)}
_MOVES = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Flatten", "Slice", "Split"}
_PRODUCTS = {"MatMul", "Gemm", "Einsum", "Gather", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN"}


@dataclass(eq=False)
class _Known:
    """A value that constants alone decide.

    key: equal for values that are computed alike. leaves: the initializers over 4 KiB under it. tensor: of a constant.
    node, made, position, inputs: what computes it otherwise. work: numbers touched to compute it.
    sources: all initializers under it; None where they are many.
    """

    value: ir.Value
    operand: Operand
    key: Hashable
    leaves: frozenset[ir.Value]
    tensor: ir.TensorProtocol | None = None
    node: ir.Node | None = None
    made: Made | None = None
    position: int = 0
    inputs: Sequence["_Known"] = ()
    work: int = 0
    sources: frozenset["_Known"] | None = None

    @property
    def compact(self) -> bool:
        """Whether what it is computed from takes less than 4-bit codes of it would."""
        size = prod(self.operand.shape)
        return self.node is not None and size >= _LEAST and self.sources is not None and size > 2 * self.stored

    @property
    def stored(self) -> int:
        """Bytes of what it is computed from."""
        return sum(source.operand.nbytes for source in self.sources or ())

    @property
    def root(self) -> "_Known":
        """The value whose very bytes it holds in another shape."""
        known = self
        while known.made is not None and known.made.same_bytes:
            known = known.inputs[0]
        return known

    @property
    def nbytes(self) -> int:
        """What it would take in the file beyond what is there."""
        return 0 if self.root.tensor is not None else self.operand.nbytes

    def array(self) -> Array:
        """Its content; every step is computed once, and forgotten when the last one that needs it is done."""
        order = list(_order(self))
        left = Counter(source for known in order for source in known.inputs)
        done: dict[_Known, Array] = {}
        for known in order:
            if known.operand.content is not None:
                done[known] = known.operand.content
            elif known.tensor is not None:
                done[known] = read(known.tensor)
            else:
                assert known.made is not None
                done[known] = known.made.function([done[source] for source in known.inputs])[known.position]
            left.subtract(known.inputs)
            for source in known.inputs:
                if not left[source]:
                    done.pop(source, None)
        return done[self]


def _order(wanted: _Known) -> Iterator[_Known]:
    """What has to be computed for a value, each behind its inputs."""
    seen: set[_Known] = set()
    waiting = [(wanted, False)]
    while waiting:
        known, ready = waiting.pop()
        if ready:
            yield known
        elif known not in seen:
            seen.add(known)
            waiting.append((known, True))
            if known.operand.content is None:
                waiting += [(source, False) for source in known.inputs]


@dataclass(eq=False)
class _Plan:
    """known: all values that constants alone decide. keys: the first one of each key. refused: values, or large
    constants whose results stay computed, and why. replaced: what becomes an initializer. kept: nodes that stay."""

    known: dict[ir.Value, _Known] = field(default_factory=dict)
    keys: dict[Hashable, _Known] = field(default_factory=dict)
    refused: dict[ir.Value, str] = field(default_factory=dict)
    replaced: list[_Known] = field(default_factory=list)
    kept: dict[ir.Node, str] = field(default_factory=dict)
    spared: set[ir.Value] = field(default_factory=set)

    def enter(self, known: _Known) -> None:
        """One more value."""
        self.known[known.value] = known
        self.keys.setdefault(known.key, known)


def fold_constants(model: ir.Model, decide: Decide) -> None:
    """Make initializers of what the model's nodes, those in bodies too, compute from constants alone."""
    nodes, plan = list(model.graph.all_nodes()), _Plan()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if is_constant(value) and value.const_value is not None:
                plan.enter(_leaf(value, value.const_value))
    slow = dict(_find(nodes, plan))
    _choose(nodes, plan)
    size = sum(known.operand.nbytes for known in plan.known.values() if known.tensor is not None)
    budget = model.meta.setdefault(_BUDGET, size + _ROOM)
    while (grown := _refuse(plan, nodes, budget)) is None:
        _choose(nodes, plan)
    model.meta[_BUDGET] = budget - grown
    _replace(model, plan, decide)
    for node in reversed(nodes):
        computed_here = any(output in plan.known and plan.known[output].node is not None for output in node.outputs)
        if computed_here and node.graph is not None and not any(output.uses() for output in node.outputs):
            node.graph.remove(node, safe=True)
    for node, reason in (slow | plan.kept).items():
        if node.graph is not None and node_state(node).left != reason:
            set_node(node, left=reason)
            decide(node.name or "", "kept", reason)


def report_quantized(model: ir.Model, decide: Decide) -> None:
    """One decision for each node that reads a weight which comes as codes: it stays as it is."""
    for node in model.graph.all_nodes():
        place = _CODES.get(node.op_type)
        if node.domain in ("", MICROSOFT) and place is not None and len(node.inputs) > place:
            value = node.inputs[place]
            tensor = value.const_value if value is not None and is_constant(value) else None
            if tensor is not None and tensor.size > 1 and tensor.dtype.bitwidth <= 8:  # biases have 32 bits
                decide(node.name or "", "skipped", ALREADY)


def note_computed(model: ir.Model) -> None:
    """Note at every product whose weight is computed from constants, or chosen from them, and stays so, why that is."""
    fixed, parts = decided(model), dict[ir.Value, str]()
    for node in model.graph.all_nodes():
        _note_choice(node, fixed, parts)
        if (
            node.op_type not in _PRODUCTS
            or node.domain != ""
            or fixed.issuperset(node.outputs)
            or node_state(node).left
        ):
            continue
        for value in node.inputs:
            if value in parts:
                set_node(node, left=parts[value])
            elif value is not None and value in fixed and value.producer() is not None:
                set_node(node, left=_why_computed(value))
            if node_state(node).left:
                break


def _note_choice(node: ir.Node, fixed: set[ir.Value], parts: dict[ir.Value, str]) -> None:
    """Enter what an If between constants gives, a Slice of one by computed ends, and what only moves these."""
    first = node.inputs[0] if node.inputs else None
    if node.domain != "" or fixed.issuperset(node.outputs):
        return
    if node.op_type == "If":
        for output, *given in zip(node.outputs, *(body.outputs for body in bodies(node)), strict=False):
            if all(value in fixed or value in parts for value in given):
                parts[output] = f"its weight is chosen by If {node.name} when the model runs"
    elif node.op_type == "Slice" and first in fixed:
        parts[node.outputs[0]] = f"its weight is a part of a constant that Slice {node.name} takes when the model runs"
    elif node.op_type in _MOVES and first is not None and first in parts:
        parts.update(dict.fromkeys(node.outputs, parts[first]))


def _why_computed(value: ir.Value) -> str:
    """The reason that a computation of constants has left behind, or which operator no step folds.

    That is the last one found that reads nothing but constants: what is behind it would be folded with it.
    """
    waiting: list[ir.Value | None] = [value]
    culprit = value.producer()
    for current in waiting:  # grows while it is walked
        node = current.producer() if current is not None else None
        if node is None or node.op_type == "Constant" or len(waiting) > 64:
            continue
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            return f"its weight is quantized already, to {node.inputs[0].dtype}"
        if left := node_state(node).left:
            return f"its weight is computed from constants: {left}"
        if all(read is None or read.producer() is None for read in node.inputs):
            culprit = node
        waiting += node.inputs
    assert culprit is not None
    return f"its weight is computed from constants by {culprit.op_type} {culprit.name}"


def _leaf(value: ir.Value, tensor: ir.TensorProtocol) -> _Known:
    text = tensor.dtype == ir.DataType.STRING
    content = None if text or tensor.nbytes >= _TINY else np.asarray(read(tensor))
    operand = Operand(tuple(int(size) for size in tensor.shape.numpy()), tensor.dtype, content)
    leaves = frozenset([value] if content is None and not text else [])
    known = _Known(value, operand, _content(operand) or value, leaves, tensor)
    known.sources = frozenset([known])
    return known


def _content(operand: Operand) -> Hashable | None:
    """A small constant is known by its content."""
    array = operand.content
    return None if array is None else (str(operand.dtype), array.shape, array.tobytes())


def _find(nodes: Iterable[ir.Node], plan: _Plan) -> Iterator[tuple[ir.Node, str]]:
    """Enter every value that constants alone decide; the nodes that would, but take too long, and that they do."""
    for node in nodes:
        if node.op_type == "Constant" and node.domain == "":  # one that nobody lifted
            tensor = ir.convenience.get_const_tensor(node.outputs[0])
            if tensor is not None and tensor.dtype != ir.DataType.STRING and tensor.nbytes < _TINY:
                plan.enter(_leaf(node.outputs[0], tensor))
            continue
        inputs = [plan.known.get(value) for value in node.inputs if value is not None]
        known = [one for one in inputs if one is not None]
        if not known or len(known) < len(inputs) or any(output.is_graph_output() for output in node.outputs):
            continue
        made = made_of(node, [None if value is None else plan.known[value].operand for value in node.inputs])
        if made is None:
            continue
        work = made.work + sum(one.work for one in known)
        if work > max(_WORK, _TIMES * sum(prod(shape) for shape in made.shapes)):
            yield node, "what it computes from constants takes too long to be computed whenever it is read"
        else:
            _enter_outputs(node, made, known, work, plan)


def _enter_outputs(node: ir.Node, made: Made, inputs: Sequence[_Known], work: int, plan: _Plan) -> None:
    contents: Sequence[Array | None] = [None] * len(made.shapes)
    size = sum(prod(shape) for shape in made.shapes) * made.dtype.bitwidth // 8
    if made.by_shape:  # so no constant is held by it
        contents, inputs, work = made.function([]), (), 0
    elif size < _TINY and all(known.operand.content is not None for known in inputs):
        contents, work = made.function([known.array() for known in inputs]), 0
    leaves = frozenset[ir.Value]().union(*(known.leaves for known in inputs))
    sources = _sources(inputs)
    alike = (node.op_type, _attributes(node, inputs), tuple(id(plan.keys[known.key]) for known in inputs))
    for position, (output, shape, content) in enumerate(zip(node.outputs, made.shapes, contents, strict=True)):
        operand = Operand(shape, made.dtype, None if content is None else np.asarray(content, order="C"))
        key = _content(operand) if made.by_shape else (alike, position)
        plan.enter(_Known(output, operand, key, leaves, None, node, made, position, inputs, work, sources))


def _sources(inputs: Sequence[_Known]) -> frozenset[_Known] | None:
    """The initializers under what a node reads, unless they are many."""
    if any(known.sources is None for known in inputs):
        return None
    joined = frozenset[_Known]().union(*(known.sources or () for known in inputs))
    return joined if len(joined) <= _SOURCES else None


def _attributes(node: ir.Node, inputs: Sequence[_Known]) -> str:
    """Equal for nodes that do the same; the axes of a Transpose may be left out where they are turned round."""
    told = {name: str(attribute.value) for name, attribute in node.attributes.items()}
    if node.op_type == "Transpose":
        rank = len(inputs[0].operand.shape)
        told["perm"] = str(list(node.attributes.get_ints("perm") or reversed(range(rank))))
    positions = [value is not None for value in node.inputs]
    return str((sorted(told.items()), positions))


def _choose(nodes: Sequence[ir.Node], plan: _Plan) -> None:
    """Decide which values become initializers, and which nodes stay: backwards, from what reads them."""
    plan.replaced, plan.kept, plan.spared = [], {}, set()
    needed: set[ir.Value] = set()
    for node in reversed(nodes):
        outputs = [plan.known[output] for output in node.outputs if output in plan.known]
        stays = not outputs or outputs[0].node is None
        for known in outputs:
            if stays or known.value not in needed:
                continue
            reason = _refusal(known, plan)
            if reason:
                plan.kept[node] = reason
                plan.spared.update(value for value in node.inputs if value is not None and known.compact)
            else:
                plan.replaced.append(known)
        if stays or node in plan.kept:
            needed.update(value for value in node.inputs if value is not None)


def _refusal(known: _Known, plan: _Plan) -> str:
    """Why a value stays computed; an empty string for one that becomes an initializer."""
    if known.value in plan.refused:
        return plan.refused[known.value]
    if known.compact and (known.value in plan.spared or _is_weight(known.value)):
        return _COMPACT.format(known.stored)
    if known.nbytes < _SMALL:
        return ""
    return next(
        (plan.refused[leaf].format(known.node and known.node.op_type) for leaf in known.leaves if leaf in plan.refused),
        "",
    )


def _refuse(plan: _Plan, nodes: Sequence[ir.Node], budget: int) -> int | None:
    """Refuse what would make the model larger (1 and 2): None where anything was, else the bytes added by the rest."""
    stay = _staying(plan, nodes)
    before, grown = len(plan.refused), 0
    for group in _groups(plan.replaced):
        leaves = {leaf for known in group for leaf in known.leaves}
        new = sum({known.key: known.nbytes for known in group}.values())
        gone = sum(leaf.const_value.nbytes for leaf in leaves - stay if leaf.const_value is not None)
        limit = max(_SMALL, gone if all(_for_products(known) for known in group) else 0)
        extra = new - gone
        if extra <= limit and (extra <= 0 or grown + extra <= budget):
            grown += max(extra, 0)
            continue
        for known in group if not leaves or extra <= limit else ():
            plan.refused[known.value] = f"as a constant it would make the model larger by {extra} bytes"
        for leaf in leaves if extra > limit else ():
            plan.refused[leaf] = _told(leaf, group, stay)
    return grown if len(plan.refused) == before else None


def _staying(plan: _Plan, nodes: Iterable[ir.Node]) -> set[ir.Value]:
    """Large constants that are read, or stored, as they are whatever is folded."""
    stay = {known.root.value for known in plan.replaced}
    for node in nodes:
        first = plan.known.get(node.outputs[0]) if node.outputs else None
        if first is None or first.node is None or node in plan.kept:
            stay.update(value for value in node.inputs if value is not None)
    return stay | {known.value for known in plan.known.values() if known.value.is_graph_output()}


def _groups(replaced: Iterable[_Known]) -> list[list[_Known]]:
    """Values with a size of their own, those together that come of the same large constants."""
    group_of: dict[Hashable, list[_Known]] = {}
    for known in replaced:
        if not known.nbytes:
            continue
        small = known.nbytes < _SMALL or not known.leaves
        keys: set[Hashable] = {known.key} if small else set(known.leaves)
        joined = [known]
        for group in {id(group_of[key]): group_of[key] for key in keys if key in group_of}.values():
            joined = group + joined if len(group) > len(joined) else joined + group
            keys.update(leaf for one in group for leaf in one.leaves)
        group_of.update(dict.fromkeys(keys, joined))
    return list({id(group): group for group in group_of.values()}.values())


def _for_products(known: _Known) -> bool:
    """Whether products alone read a value."""
    return all(use.node.op_type in _PRODUCTS for use in known.value.uses())


def _is_weight(value: ir.Value) -> bool:
    """Whether a product reads the value for its weight."""
    return any(use.idx in _WEIGHTS.get(use.node.op_type, ()) and use.node.domain == "" for use in value.uses())


def _told(leaf: ir.Value, group: Sequence[_Known], stay: set[ir.Value]) -> str:
    """Why results of a large constant stay computed; {} stands for the operator."""
    name = str(leaf.name).replace("{", "{{").replace("}", "}}")
    if leaf in stay:
        return f"{name} is also used without this {{}}; one copy of it is kept"
    wide, narrow = max(known.operand.dtype.bitwidth for known in group), leaf.dtype.bitwidth if leaf.dtype else 0
    if wide > narrow:
        kind = next(known.operand.dtype.name for known in group if known.operand.dtype.bitwidth == wide)
        return f"as {kind} {name} would take {wide} bits instead of {narrow}"
    return f"what is computed from {name} takes more than {name} itself"


def _replace(model: ir.Model, plan: _Plan, decide: Decide) -> None:
    """Initializers of the main graph, one for each key, in place of the chosen values."""
    made: dict[Hashable, ir.Value] = {}
    for known in reversed(plan.replaced):
        node = known.node
        assert node is not None
        if known.key not in made:
            made[known.key] = add_initializer(model.graph, str(known.value.name), _tensor(known))
        ir.convenience.replace_all_uses_with(known.value, made[known.key])
        sources = [str(value.name) for value in node.inputs if value is not None]
        decide(node.name or "", "folded", f"{node.op_type} of the constant {', '.join(sources[:2])}")


def _tensor(known: _Known) -> ir.TensorProtocol:
    operand = known.operand
    if operand.nbytes < _SMALL:
        return ir.Tensor(np.asarray(known.array(), order="C"), operand.dtype)
    return computed(known.array, shape=operand.shape, dtype=operand.dtype)
