"""Which packed products take int8 activations: chosen from what that would add to the error of their weights."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import onnx_ir as ir

from qcompile.compiler.results.errors import NodeError
from qcompile.passes.activations import Int8
from qcompile.passes.formats.base import ACTIVATION_BITS, COLUMNS_AT_8
from qcompile.passes.formats.functions import is_native
from qcompile.passes.formats.nbits import ACCURACY_LEVEL, INT8_LEVEL

# What int8 activations may add to the sum of squared weight errors: keeps the KL within 1 % of exact activations'.
# Six layers of SmolLM2, g128, two texts, simulated: KL +0.6 and +0.7 % at 0.005, +1.0 and +1.0 % at 0.01.
BUDGET = 0.005
# The same for each node by itself. It leaves out those whose 8-bit weights are nearly exact, such as a head: its error
# reaches the logits as it is, and int8 activations there alone cost 2 to 3 % of KL.
OWN_BUDGET = 0.05


def choose(errors: Sequence[NodeError], wanted: int | None, taking: Mapping[str, bool]) -> list[NodeError]:
    """The errors with `activation_bits` set.

    taking: of the nodes whose products take int8 activations, whether nothing else is fast (`Int8.alone`); others
    compute in floats, whatever is said.
    Case 1: the user said 8 or 16: all nodes that take them have that.
    Case 2: nothing was measured on real inputs: 16.
    Case 3: otherwise 8 where the node's own added error allows it, or nothing else is fast; those with most
    multiply-adds for their added error first, as long as the sum over all nodes stays within the budget.
    """
    if wanted is not None:  # Case 1
        return [replace(error, activation_bits=wanted if error.node in taking else 16) for error in errors]
    left = BUDGET * sum(error.error**2 for error in errors)
    known = [i for i, error in enumerate(errors) if error.node in taking and _added(error) < float("inf")]  # Case 2
    fit = [i for i in known if taking[errors[i].node] or _added(errors[i]) <= OWN_BUDGET * errors[i].error ** 2]
    chosen = set()
    for i in sorted(fit, key=lambda i: (_added(errors[i]) / errors[i].weights, i)):  # Case 3
        if _added(errors[i]) <= left:
            left -= _added(errors[i])
            chosen.add(i)
    return [replace(error, activation_bits=8 if i in chosen else 16) for i, error in enumerate(errors)]


def taking(model: ir.Model, int8: Int8) -> dict[str, bool]:
    """Of the packed products that take int8 activations, by name, whether nothing else is fast."""
    return {node.name or "": int8.alone(node) for node in model.graph if int8.takes(node)}


def write(model: ir.Model, errors: Sequence[NodeError], wanted: int | None) -> None:
    """Set the attribute of every packed product that has a kernel to what was chosen for it.

    One that came with the file has no error here: it keeps what it says, unless the user wants something else.
    """
    bits = {error.node: error.activation_bits for error in errors}
    for node in (own for own in model.graph if is_native(own)):
        if wanted:
            node.attributes.pop(COLUMNS_AT_8, None)
        before = wanted or node.attributes.get_int(ACTIVATION_BITS) or 16
        node.attributes[ACTIVATION_BITS] = ir.AttrInt64(ACTIVATION_BITS, bits.get(node.name or "", before))


def leveled(model: ir.Model) -> set[str]:
    """Names of the MatMulNBits that round activations to int8."""
    return {node.name or "" for node in model.graph if node.attributes.get_int(ACCURACY_LEVEL, 0) == INT8_LEVEL}


def _added(error: NodeError) -> float:
    return float("inf") if error.int8_error is None else error.int8_error**2
