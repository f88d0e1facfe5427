"""Gated units of decoders, silu(gate) up, as one operator that reads both halves of a joined product (SwiGLU).

Shazeer 2020, arXiv:2002.05202.
"""

from collections.abc import Iterator

import onnx_ir as ir

from qcompile.passes.formats import functions
from qcompile.passes.formats.base import DOMAIN, drop_unused
from qcompile.passes.formats.gated import SWIGLU
from qcompile.passes.graph import Decide, Names, small_array, take_over

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def fuse_gates(model: ir.Model, names: Names, decide: Decide) -> None:
    """Put a SwiGLU for every silu(a) b where a Split cuts one value into a and b, in this order, and nothing else.

    Invariant: the operator computes of that value what the nodes computed that it replaces, and no value is lost that
    anything else reads.
    """
    for node in list(model.graph):
        own = _gated(node)
        if own is None:
            continue
        gate, up, between = own
        split = _halves(gate, up)
        if split is None:
            decide(node.name or "", "kept", "what gates and what is gated are not the halves of one value")
        elif gate.dtype not in _TYPES:
            decide(node.name or "", "kept", f"{SWIGLU} computes in float and float16, not {gate.dtype}")
        elif any(_escapes(value, [node, *between]) for value in (gate, up, *(one.outputs[0] for one in between))):
            decide(node.name or "", "kept", "something else reads a part of it")
        else:
            given = [value for value in split.inputs if value is not None]
            _replace(model, node, split, names)
            for used in (node, *between, split):
                model.graph.remove(used, safe=True)
            for value in given[1:]:
                drop_unused(model, value)
            decide(node.name or "", "fused", SWIGLU)


def gates(value: ir.Value) -> bool:
    """Whether a value gates another: it is a of silu(a) b."""
    readers = [use.node for use in value.uses()]
    silus = [out for reader in readers for out in reader.outputs if _silu_of(out) is not None]
    return any(_silu_of(out) is value and _gated(use.node) is not None for out in silus for use in out.uses())


def in_gate(value: ir.Value) -> bool:
    """Whether a value is a or b of silu(a) b."""
    return gates(value) or any((own := _gated(use.node)) is not None and own[1] is value for use in value.uses())


def _gated(node: ir.Node) -> tuple[ir.Value, ir.Value, list[ir.Node]] | None:
    """(a, b, the nodes of silu(a)) of a node silu(a) b."""
    for first, second in _factors(node):
        gate = _silu_of(first)
        if gate is not None:
            return gate, second, _between(first, gate)
    return None


def _silu_of(value: ir.Value) -> ir.Value | None:
    """a of a value a · sigmoid(a)."""
    node = value.producer()
    for first, second in _factors(node) if node is not None else ():
        sigmoid = second.producer()
        if sigmoid is not None and (sigmoid.op_type, sigmoid.domain) == ("Sigmoid", "") and sigmoid.inputs[0] is first:
            return first
    return None


def _between(silu: ir.Value, gate: ir.Value) -> list[ir.Node]:
    """The nodes from a to silu(a), the last first."""
    product = silu.producer()
    assert product is not None
    sigmoid = next(v.producer() for v in product.inputs if v is not None and v is not gate)
    return [product, sigmoid] if sigmoid is not None else [product]


def _factors(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Both factors of a product, in both orders."""
    if (node.op_type, node.domain) == ("Mul", "") and len(node.inputs) == 2:
        a, b = node.inputs
        if a is not None and b is not None:
            yield from ((a, b), (b, a))


def _halves(gate: ir.Value, up: ir.Value) -> ir.Node | None:
    """The Split along the last axis that makes equal halves of one value, the first of them `gate`."""
    node = gate.producer()
    if node is None or (node.op_type, node.domain) != ("Split", "") or list(node.outputs) != [gate, up]:
        return None
    whole, rank = node.inputs[0], len(gate.shape or ())
    last = node.attributes.get_int("axis", 0) in (-1, rank - 1) if rank else node.attributes.get_int("axis", 0) == -1
    sizes = small_array(node.inputs[1], 2) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if sizes is not None:
        equal = sizes.shape == (2,) and sizes[0] == sizes[1]
    else:  # without sizes, an odd one is cut into unequal parts
        size = whole.shape[-1] if whole is not None and whole.shape is not None and len(whole.shape) else None
        equal = len(node.inputs) == 1 and isinstance(size, int) and size % 2 == 0
    return node if last and equal and node.graph is not None else None


def _escapes(value: ir.Value, own: list[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in own for use in value.uses())


def _replace(model: ir.Model, node: ir.Node, split: ir.Node, names: Names) -> None:
    functions.register(model, SWIGLU)
    made = ir.node(SWIGLU, [split.inputs[0]], domain=DOMAIN, name=node.name)
    split.prepend(made)
    take_over(node.outputs[0], made.outputs[0], names)
