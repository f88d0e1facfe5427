"""Which nodes compute in 8 bits, and which values therefore need a Q and a DQ."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Literal

import onnx_ir as ir

from qcompile.passes.graph import is_constant
from qcompile.passes.linears import as_linear, constant, dimensions, is_float_constant, is_lm_head, vocabulary_size
from qcompile.passes.masks import masked
from qcompile.passes.policy import Policy
from qcompile.passes.qdq.biases import bias_behind
from qcompile.passes.qdq.providers import Provider, Rule, rule_of
from qcompile.passes.state import node_state

Operators = Literal["auto", "weights", "all"]
# Operators with a weight.
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")
MASKED = "it may hold the fill of an attention mask (-1e4, -inf), which no 8-bit grid serves"
# Types whose values have a QuantizeLinear.
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
# What a QuantizeLinear may stand behind, instead of right behind the product: both vanish into the product.
_CLAMPS = ("Relu", "Clip")
# Inputs that are int32 codes for QNN.
_QNN_BIAS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
# What moves a looked up matrix.
_MOVES = ("Gather", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")


@dataclass
class Selection:
    """What is to be quantized.

    nodes: by node, its rule. values: activations that get a Q and a DQ. whole: those of them that all readers take
    from the DQ, since their producer is fused only then. heads: products whose weight alone is quantized. kept: nodes
    with a weight left in float: what is said of them ("kept" by the user's choice, "skipped" for want of a kernel), and
    the reason.
    """

    nodes: dict[ir.Node, Rule] = field(default_factory=dict)
    values: dict[ir.Value, None] = field(default_factory=dict)
    whole: set[ir.Value] = field(default_factory=set)
    heads: dict[ir.Node, Rule] = field(default_factory=dict)
    kept: dict[ir.Node, tuple[str, str]] = field(default_factory=dict)


def select(
    model: ir.Model, policy: Policy, provider: Provider, operators: Operators, *, slower: bool, heads: bool = True
) -> Selection:
    """What to quantize in the main graph.

    Case 1: a product with a constant weight, unless the policy keeps it, or the provider computes it in float. Without
            `heads` that of a decoder's lm_head is quantized, but not its input; so are those the policy names, and
            that of a ConvTranspose which the provider computes in float.
    Case 2: operators "all": every other operator that the provider computes in integers, products of two activations
            among them; those that are slower in integers only with `slower`.
    Case 3: operators "auto": such an operator between two integer ones, so that codes need not become floats.
    Case 4: none of these operators where it reads or gives what may hold the fill of a mask, see `masks`: a grid that
            spans -1e4 has no room for anything else.
    What the user excludes is in none of them, with a weight or without.
    """
    found = Selection()
    vocabulary = vocabulary_size(model)
    chosen, kept = products(model, policy)
    found.kept = {node: ("kept", reason) for node, reason in kept.items()}
    named = [node for node in model.graph if node.name in policy.kept and node.op_type != "Gather"]
    found.kept |= {node: ("kept", policy.kept[str(node.name)]) for node in named}
    for node in chosen:  # Case 1
        rule, known = _rule(node, provider), rule_of(node)
        if isinstance(rule, str) and node.op_type == "ConvTranspose" and isinstance(known, Rule):
            found.heads[node] = known
        elif isinstance(rule, str):
            found.kept[node] = ("skipped", rule)
        elif node.name in policy.weights_only or (not heads and is_head(node, vocabulary)):
            found.heads[node] = rule
        else:
            found.nodes[node] = rule
    masks = masked(model)
    for node in model.graph if operators == "all" else ():  # Case 2
        rule = _rule(node, provider)
        if (
            node not in found.nodes
            and node not in found.heads
            and node not in found.kept
            and isinstance(rule, Rule)
            and _usable(node, rule, slower, constants=provider == "qnn")
            and not _excluded(node, policy, found)
        ):
            if _touches(node, rule, masks):  # Case 4
                found.kept[node] = ("skipped", MASKED)
            else:
                found.nodes[node] = rule
    _add_values(found, provider)
    if operators == "auto":
        _add_between(model, found, policy, provider, slower, masks)  # Case 3
    return found


def products(model: ir.Model, policy: Policy) -> tuple[list[ir.Node], dict[ir.Node, str]]:
    """(nodes with a constant weight that are to be quantized, those that the user keeps in float and why)."""
    vocabulary = vocabulary_size(model)
    weighted = [n for n in model.graph if n.op_type in PRODUCTS and n.domain == "" and weight_position(n) is not None]
    refused = {node: _refusal(node, policy, vocabulary) for node in weighted}
    return [n for n, reason in refused.items() if not reason], {n: reason for n, reason in refused.items() if reason}


def is_head(node: ir.Node, vocabulary: int | None) -> bool:
    """Whether a product gives a decoder's logits."""
    linear = as_linear(node) if node.op_type == "MatMul" else ""
    return not isinstance(linear, str) and is_lm_head(linear, vocabulary)


def weight_position(node: ir.Node) -> int | None:
    """The input of a product that is a constant weight; None where there is none."""
    if node.op_type not in PRODUCTS:
        return None
    if node.op_type == "MatMul":
        return None if isinstance(as_linear(node), str) else 1
    value = node.inputs[1] if len(node.inputs) > 1 else None
    return 1 if is_constant(value) and value is not None and constant(value).dtype.is_floating_point() else None


def inputs_of(node: ir.Node, rule: Rule) -> Iterator[int]:
    """Positions of the inputs that must come out of a DequantizeLinear, the weight left out; none of a node with
    outliers, which rounds its input itself.
    """
    if node_state(node).outliers is not None:
        return
    positions = range(len(node.inputs)) if rule.activations == "all" else rule.activations
    weight = weight_position(node)
    yield from (i for i in positions if i < len(node.inputs) and node.inputs[i] is not None and i != weight)


def quantized_output(node: ir.Node) -> ir.Value:
    """The value that the Q of a node's output stands behind: that of a Relu or Clip which reads the node alone."""
    value = node.outputs[0]
    uses = list(value.uses())
    if node.op_type in (*PRODUCTS, "Add") and len(uses) == 1 and not value.is_graph_output():
        reader = uses[0].node
        if reader.op_type in _CLAMPS and reader.domain == "" and uses[0].idx == 0:
            return reader.outputs[0]
    return value


def is_half_concat(node: ir.Node) -> bool:
    """Whether a node is a Concat of float16. ONNX Runtime 1.32 makes a QLinearConcat of it where it stands between
    DequantizeLinears and a QuantizeLinear of 8 bits, and then refuses that for its scales.
    """
    return (node.op_type, node.domain) == ("Concat", "") and node.outputs[0].dtype == ir.DataType.FLOAT16


def _rule(node: ir.Node, provider: Provider) -> Rule | str:
    rule = rule_of(node)
    if isinstance(rule, str):
        return rule
    dtype = node.outputs[0].dtype
    if dtype not in _FLOATS:
        kind = "a type that is not known" if dtype is None else dtype.name.lower()
        return f"{node.op_type} of {kind}: no integer kernel takes it"
    if is_half_concat(node):
        return "Concat of float16: QLinearConcat, which ONNX Runtime would make of it, takes float32 alone"
    if provider == "qnn":  # which lists all operators that have a row
        return replace(rule, output="same" if rule.output == "same" else "required", bias=_QNN_BIAS.get(node.op_type))
    computed = rule.cpu if provider == "cpu" else getattr(rule, provider)
    # The CUDA provider has no integer kernels: its Q and DQ only say where the rounding is, as for products.
    if computed == "float" and not (provider == "cuda" and node.op_type in PRODUCTS):
        return f"{node.op_type} has no integer kernel on {provider}"
    return rule


def _refusal(node: ir.Node, policy: Policy, vocabulary: int | None) -> str:
    if node.op_type == "MatMul":
        linear = as_linear(node)
        assert not isinstance(linear, str)
        if is_lm_head(linear, vocabulary) and policy.lm_head is None:
            return "lm_head is kept in float"
        return policy.refusal(node, linear.weight)
    return policy.refusal(node, node.inputs[1])


def _usable(node: ir.Node, rule: Rule, slower: bool, *, constants: bool = False) -> bool:
    """Whether a node without a weight can compute in integers; `constants`: with codes of some of its inputs, too."""
    if (rule.slower and not slower) or node.op_type in ("Gemm", "Conv", "ConvTranspose"):
        return False
    if node.op_type in PRODUCTS and node_state(node).left:
        return False  # of a weight that is computed or chosen from constants: no activation, and it keeps its reason
    values = [node.inputs[i] for i in inputs_of(node, rule)]
    return not all(map(is_constant, values)) and not any(
        v is None or (is_constant(v) and not constants) or v.dtype not in _FLOATS or _is_looked_up(v) for v in values
    )


def _is_looked_up(value: ir.Value) -> bool:
    """Whether a value is a part of a constant, chosen by index: a matrix of an expert, whose weights have codes."""
    node = value.producer()
    for _ in range(8):
        if node is None or node.domain != "" or node.op_type not in _MOVES or node.inputs[0] is None:
            return False
        if is_float_constant(node.inputs[0]):
            return node.op_type == "Gather" and len(dimensions(node.inputs[0])) > 2
        node = node.inputs[0].producer()
    return False


def _add_values(found: Selection, provider: Provider) -> None:
    """The inputs of the nodes, and the outputs without whose Q they would be float."""
    for node, rule in found.nodes.items():
        for i in inputs_of(node, rule):
            value = node.inputs[i]
            assert value is not None
            found.values[value] = None
        value = _output_with_a_grid(node, rule, provider)
        if value is not None:
            found.values[value] = None
            found.whole.add(value)


def _output_with_a_grid(node: ir.Node, rule: Rule, provider: Provider) -> ir.Value | None:
    """The output behind which a Q must stand.

    TensorRT wants Q and DQ before what it computes in int8, and none behind: an output has a grid where an integer node
    reads it, and where the operator only moves codes. Nodes that compute in float read its float form.
    """
    if provider == "tensorrt" and rule.output != "same":
        return None
    if rule.output != "optional":  # for QNN of all
        return quantized_output(node)
    return _clamped(node) if provider == "cpu" else None


def _clamped(node: ir.Node) -> ir.Value | None:
    """The output of a Relu or Clip behind a product, with its bias where that makes a Gemm; None where there is none.

    ONNX Runtime's CPU provider leaves such a product in float, unless a Q follows.
    """
    if node.op_type not in PRODUCTS or node_state(node).outliers is not None:
        return None
    found, shape = bias_behind(node), node.outputs[0].shape
    end = found[0] if found is not None and shape is not None and len(shape) == 2 else node
    value = quantized_output(end)
    return None if value is end.outputs[0] else value


def _excluded(node: ir.Node, policy: Policy, found: Selection) -> bool:
    """Whether the user excludes a node without a weight; noted, if so."""
    reason = policy.exclusion(node)
    if reason:
        found.kept[node] = ("kept", reason)
    return bool(reason)


def _touches(node: ir.Node, rule: Rule, masks: Set[ir.Value]) -> bool:
    values = [*(node.inputs[i] for i in inputs_of(node, rule)), *node.outputs]
    return any(value in masks for value in values)


def _add_between(
    model: ir.Model, found: Selection, policy: Policy, provider: Provider, slower: bool, masks: Set[ir.Value]
) -> None:
    """Case 3: operators whose inputs are quantized anyway, and whose output an integer operator reads."""
    candidates = {}
    for node in model.graph:
        if node not in found.nodes and node not in found.heads and node not in found.kept:
            rule = _rule(node, provider)
            if isinstance(rule, str) or not _usable(node, rule, slower) or _excluded(node, policy, found):
                continue
            if not _touches(node, rule, masks):
                candidates[node] = rule
    wanted = _wanted(found, candidates)
    for node, rule in candidates.items():
        ready = all(node.inputs[i] in found.values for i in inputs_of(node, rule))
        if ready and node in wanted:
            found.nodes[node] = rule
            value = quantized_output(node)
            found.values[value] = None
            if provider != "tensorrt" or rule.output == "same":
                found.whole.add(value)


def _wanted(found: Selection, candidates: Mapping[ir.Node, Rule]) -> set[ir.Node]:
    """Candidates whose output goes, through other candidates perhaps, into an integer operator."""
    wanted: set[ir.Node] = set()
    integer = {node for node in found.nodes if node_state(node).outliers is None}
    for node in reversed(list(candidates)):
        readers = {use.node for use in quantized_output(node).uses()}
        if readers & integer or readers & wanted:
            wanted.add(node)
    return wanted
