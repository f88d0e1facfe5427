"""Which constants can absorb a factor of a value's channels: the walk back from the value to its producer."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.channel_map import Indices, refusal, selects, step
from qcompile.passes.graph import MICROSOFT, is_constant
from qcompile.passes.linears import Linear, as_linear, constant

# Operators that end in gamma (and beta), by the positions of these inputs. The bias of the Skip forms is added before
# the normalization, so it stays.
_NORMS = {
    "LayerNormalization": (1, 2),
    "SimplifiedLayerNormalization": (1,),
    "RMSNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
_SHAPE_ONLY = ("Shape", "Size")
# Operators that are walked back through at most: attention takes a dozen, and so all walks together are linear.
_FAR = 100


@dataclass(frozen=True, eq=False)
class Absorber:
    """Input `position` of `node`, a constant to be divided by factor[index]; index broadcasts against the constant."""

    node: ir.Node
    position: int
    index: Indices

    @property
    def constant(self) -> ir.Value:
        """The initializer as it is now."""
        value = self.node.inputs[self.position]
        assert value is not None
        return value


@dataclass(frozen=True, eq=False)
class Trace:
    """How a value follows from constants that can absorb its factor.

    index: the index array of the value (see channel_map). path: the operators walked, the producer first.
    siblings: channels that other consumers take from a value on the way; the factor must not touch them.
    """

    index: Indices
    absorbers: tuple[Absorber, ...]
    path: tuple[ir.Node, ...]
    siblings: tuple[tuple[str, Indices], ...] = ()

    def conflict(self) -> str:
        """Why the factor would leak into another consumer, or an empty string."""
        touched = np.unique(self.index)
        return next((f"{name} reads the same channels" for name, i in self.siblings if np.isin(i, touched).any()), "")


def trace(value: ir.Value, most: int = _FAR) -> Trace | str:
    """How `value` (…, K) can be divided by a factor of its channels by changing constants only, or why it cannot.

    Case 1: value = x * gamma or x * gamma + beta, the end of a decomposed normalization (any x).
    Case 2: a normalization operator with constant gamma and beta.
    Case 3: a * b, where one of the operands is linear in a Linear and used only here (up_proj behind its gate).
    Case 4: a Linear seen through reshapes, transposes, head repetition and probabilities @ values (v_proj).
    Case 5: a Linear, with a constant added, through positively homogeneous operators (Relu).
    No more than `most` operators are walked through.
    """
    node = value.producer()
    if node is None:
        return f"{value.name} has no producer"
    if node.domain in ("", MICROSOFT) and node.op_type in _NORMS:
        return _norm(node, value)
    reason = refusal(node)
    if reason:
        return reason
    if most <= 0:
        return f"more than {_FAR} operators lie between it and a constant that could absorb the factor"
    if node.op_type in ("Mul", "Add"):
        return _binary(node, value, most)
    if node.op_type == "MatMul":
        linear = as_linear(node)
        return _linear(linear) if isinstance(linear, Linear) else _through(node, 1, value, most)
    if node.op_type == "Cast" and (value.dtype is None or not value.dtype.is_floating_point()):
        return f"Cast {node.name} does not give a float"
    return _through(node, 2 if node.op_type == "Attention" else 0, value, most)


def other_consumers(value: ir.Value, node: ir.Node, position: int) -> list[ir.Node]:
    """The consumers of a value beside one input of one node; those that only ask for its shape do not count."""
    return [
        use.node
        for use in value.uses()
        if not (use.node is node and use.idx == position) and use.node.op_type not in _SHAPE_ONLY
    ]


def _norm(node: ir.Node, value: ir.Value) -> Trace | str:
    """Case 2."""
    if value is not node.outputs[0]:
        return f"it is a side output of {node.op_type} {node.name}"
    if node.attributes.get_int("axis", -1) not in (-1, len(value.shape or ()) - 1):
        return f"{node.op_type} {node.name} normalizes more than the last axis"
    positions = [i for i in _NORMS[node.op_type] if i < len(node.inputs) and node.inputs[i] is not None]
    if not positions or not all(is_constant(node.inputs[i]) for i in positions):
        return f"gamma or beta of {node.op_type} {node.name} is not constant"
    index = np.arange(_width(node.inputs[positions[0]]))
    return Trace(index, tuple(Absorber(node, i, index) for i in positions), (node,))


def _width(value: ir.Value | None) -> int:
    """The last size of a constant, 1 for a scalar."""
    assert value is not None
    shape = constant(value).numpy().shape
    return shape[-1] if shape else 1


def weight_users(weight: ir.Value) -> list[ir.Node]:
    """The nodes that read a weight, seen through Transposes."""
    users: list[ir.Node] = []
    for use in weight.uses():
        turned = use.node.op_type == "Transpose"
        users += [then.node for then in use.node.outputs[0].uses()] if turned else [use.node]
    return users


def _linear(linear: Linear) -> Trace | str:
    """Case 5, and the end of Cases 3 and 4: the columns of the weight."""
    if len(weight_users(linear.weight)) > 1 or linear.weight.is_graph_output():
        return f"the weight of {linear.name} has other users"
    index = np.arange(linear.shape[1])
    if not linear.transposed:
        return Trace(index, (Absorber(linear.node, 1, index),), (linear.node,))
    return Trace(index, (Absorber(next(iter(linear.weight.uses())).node, 0, index[:, None]),), (linear.node,))


def _binary(node: ir.Node, value: ir.Value, most: int) -> Trace | str:
    """Cases 1 and 3, and the constant added in any case."""
    constants = [position for position, operand in enumerate(node.inputs) if is_constant(operand)]
    if len(constants) == 1:
        position = constants[0]
        width = _width(node.inputs[position])
        if node.op_type == "Mul" and width > 1:
            index = np.arange(width)
            return Trace(index, (Absorber(node, position, index),), (node,))
        before = _through(node, 1 - position, value, most)
        if isinstance(before, str) or node.op_type == "Mul":
            return before
        absorbers = (*before.absorbers, Absorber(node, position, before.index))
        return Trace(before.index, absorbers, before.path, before.siblings)
    if node.op_type == "Add":
        return f"{value.name} is a sum of two activations"
    traces = [_through(node, position, value, most) for position in (0, 1)]
    usable = [found for found in traces if isinstance(found, Trace)]
    if usable:
        return min(usable, key=lambda found: len(found.path))
    return " and ".join(dict.fromkeys(str(reason) for reason in traces))


def _through(node: ir.Node, position: int, value: ir.Value, most: int) -> Trace | str:
    """Walk on to input `position`, which nobody but this node may see changed, and carry its index array here."""
    operand = node.inputs[position] if position < len(node.inputs) else None
    if operand is None:
        return f"{node.op_type} {node.name} has no input to follow"
    if operand.is_graph_output():
        return f"{operand.name} is a graph output (a cache)"
    siblings: list[ir.Node] = []
    for other in other_consumers(operand, node, position):
        if other is node or not (selects(node) and selects(other)):
            return f"{operand.name} is also used by {other.op_type} {other.name}"
        siblings.append(other)
    before = trace(operand, most - 1)
    if isinstance(before, str):
        return before
    index = step(before.index, node, position, value)
    if isinstance(index, str):
        return index
    taken = list(before.siblings)
    for other in siblings:
        for output in other.outputs:
            indices = step(before.index, other, 0, output)
            if isinstance(indices, str):
                return indices
            taken.append((f"{other.op_type} {other.name}", indices))
    return Trace(index, before.absorbers, (*before.path, node), tuple(taken))
