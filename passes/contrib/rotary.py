"""Rotary position embeddings as exporters write them out (Su et al. 2021, arXiv:2104.09864)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from qcompile.passes.contrib.inputs import Inputs
from qcompile.passes.contrib.probing import Array, Given, ancestors, evaluate
from qcompile.passes.contrib.written import uncast
from qcompile.passes.graph import is_constant
from qcompile.passes.prepare.sizes import named_sizes

_BATCH, _ROWS, _PAST = 2, 3, 4  # at which a rotation is looked at
_NEAR = 60  # values that are looked at before a query or key


@dataclass(frozen=True, eq=False)
class Rotated:
    """What turns x (batch, heads, rows, width) by the position of a row.

    cos, sin: (…, rows, size), of which each row has those of its pairs from column `first` on, in steps of `step`:
    tables hold each pair once, or twice, of which the second one has sines without signs. None without rotation.
    interleaved: neighbours are a pair, not the i-th of both halves.
    """

    x: ir.Value
    cos: ir.Value | None = None
    sin: ir.Value | None = None
    interleaved: bool = False
    pairs: int = 0
    first: int = 0
    step: int = 1


def rotated(y: ir.Value, inputs: Inputs | str) -> Rotated | str:
    """What a query or key is before it is turned by its position; itself, where it is not turned.

    The nearest value before it, of its own heads and width, from which cosines and sines alone make it.
    inputs: or why they cannot be told, which is the reason then.
    """
    if not _near_tables(y):
        return Rotated(y)
    if isinstance(inputs, str):
        return inputs
    reason = "no rotation by cosines and sines is found before its scores"
    for x in _before(y):
        found = _turned_from(x, y, inputs)
        if isinstance(found, Rotated):
            return found
        reason = found or reason
    return reason


def _near_tables(y: ir.Value) -> bool:
    """Whether cosines or sines lie before y, with no product, norm or Transpose of heads between."""
    makers = (value.producer() for value in _nearest(y, stop=("MatMul", "Gemm", "Transpose")))
    return any(node is not None and node.op_type in ("Cos", "Sin") for node in makers)


def _before(y: ir.Value) -> Iterator[ir.Value]:
    """Values before y of its own sizes, the nearest first."""
    return (value for value in _nearest(y) if value is not y and _alike(named_sizes(value), named_sizes(y)))


def _nearest(y: ir.Value, *, stop: Sequence[str] = ()) -> Iterator[ir.Value]:
    """y and the values before it, the nearest first; none behind what operators of `stop` read, or constants."""
    waiting, seen = [y], {y}
    for value in waiting:  # it grows
        yield value
        node = value.producer()
        if node is None or node.op_type in stop or len(waiting) > _NEAR:
            continue
        onward = [own for own in node.inputs if own is not None and own not in seen and not is_constant(own)]
        seen.update(onward)
        waiting += onward


def _alike(a: Sequence[int | str | None], b: Sequence[int | str | None]) -> bool:
    """Whether these may be the sizes of the same heads: as many where that is known, and as wide."""
    heads = [own[1] for own in (a, b) if len(own) == 4]
    counted = all(isinstance(count, int) for count in heads)
    return len(heads) == 2 and a[3] == b[3] and (heads[0] == heads[1] or not counted)


def _turned_from(x: ir.Value, y: ir.Value, inputs: Inputs) -> Rotated | str:
    """The rotation that makes y of x; why there is none, empty where x is but a part of it."""
    nodes = ancestors(y, frozenset({x}))
    tables = _tables(nodes, x) if nodes is not None else None
    heads, _, width = named_sizes(x)[1:]
    if tables is None or not isinstance(width, int):
        return ""
    cos, sin = tables
    kind = (x.dtype or ir.DataType.FLOAT).numpy()
    probe = np.random.default_rng(0).standard_normal((_BATCH, heads if isinstance(heads, int) else 1, _ROWS, width))
    probe = probe.astype(kind)
    found = evaluate([y, cos, sin], Given.of({**inputs.at(_BATCH, _ROWS, _PAST), x: probe}))
    if found is None:
        return ""
    turned, c, s = found
    tolerance = 1e-5 if kind == np.float32 else 5e-3
    for own in _layouts(Rotated(x, cos, sin), c.shape[-1]):
        expected = _turn(own, probe, c, s)
        if expected is not None and np.allclose(expected, turned, atol=tolerance):
            return replace(own, x=uncast(x) or x)
    return "it is turned in none of the two usual ways"


def _layouts(own: Rotated, size: int) -> Iterator[Rotated]:
    """Both ways to turn by tables of this size, with every pair in them once or twice."""
    for interleaved in (False, True):
        twice = (1, 2) if interleaved else (size // 2, 1)
        for pairs, first, step in ((size // 2, *twice), (size, 0, 1)):
            yield replace(own, interleaved=interleaved, pairs=pairs, first=first, step=step)


def _tables(nodes: list[ir.Node], x: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """The cosines and sines that meet x: what does not come from x and is read beside what does."""
    behind = {x}
    met: dict[ir.Value, None] = {}
    for node in nodes:
        if any(value in behind for value in node.inputs):
            behind.update(node.outputs)
            met |= dict.fromkeys(own for own in node.inputs if own is not None and own not in behind and own.producer())
    found: dict[str, list[ir.Value]] = {"Cos": [], "Sin": []}
    for value in met:
        kinds = {node.op_type for node in ancestors(value) or ()} & set(found)
        if len(kinds) == 1:
            found[kinds.pop()].append(value)
    return (found["Cos"][0], found["Sin"][0]) if len(found["Cos"]) == len(found["Sin"]) == 1 else None


def _turn(own: Rotated, x: Array, cos: Array, sin: Array) -> Array | None:
    """x turned as `own` says; None where it is too narrow."""
    size = 2 * own.pairs
    if not 0 < size <= x.shape[-1] or sin.shape[-1] != cos.shape[-1] or cos.ndim > 4:
        return None
    c, s = (table[..., own.first :: own.step] for table in (cos, sin))
    part, rest = x[..., :size], x[..., size:]
    left, right = (part[..., ::2], part[..., 1::2]) if own.interleaved else np.split(part, 2, -1)
    try:
        ends = left * c - right * s, right * c + left * s
    except ValueError:
        return None
    turned = np.stack(ends, -1).reshape(part.shape) if own.interleaved else np.concatenate(ends, -1)
    return np.concatenate([turned, rest], -1)
