"""Rotary position embeddings as exporters write them out (Su et al. 2021, arXiv:2104.09864)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.contrib.inputs import Inputs
from qcompile.passes.contrib.probing import Array, ancestors, evaluate
from qcompile.passes.graph import is_constant
from qcompile.passes.prepare.sizes import named_sizes

_BATCH, _ROWS, _PAST = 2, 3, 4  # at which a rotation is looked at
_NEAR = 60  # values that are looked at before a query or key


@dataclass(frozen=True, eq=False)
class Rotated:
    """What turns x (batch, heads, rows, width) by the position of a row.

    cos, sin: (…, rows, size) of the rows' positions, of which row r has pairs' cosines at `columns`.
    Without rotation cos and sin are None.
    """

    x: ir.Value
    cos: ir.Value | None = None
    sin: ir.Value | None = None
    interleaved: bool = False
    pairs: int = 0


def rotated(y: ir.Value, inputs: Inputs) -> Rotated | str:
    """What a query or key is before it is turned by its position; itself, where it is not turned.

    The nearest value before it, of its own heads and width, from which cosines and sines alone make it.
    """
    if not _near_tables(y):
        return Rotated(y)
    reason = "no rotation by cosines and sines is found before its scores"
    for x in _before(y):
        found = _turned_from(x, y, inputs)
        if isinstance(found, Rotated):
            return found
        reason = found or reason
    return reason


def _near_tables(y: ir.Value) -> bool:
    """Whether cosines or sines lie before y, with no product, norm or Transpose of heads between."""
    waiting, seen = [y], {y}
    for value in waiting:  # it grows
        node = value.producer()
        if node is not None and node.op_type in ("Cos", "Sin"):
            return True
        if node is None or node.op_type in ("MatMul", "Gemm", "Transpose") or len(waiting) > _NEAR:
            continue
        onward = [own for own in node.inputs if own is not None and own not in seen]
        seen.update(onward)
        waiting += onward
    return False


def _before(y: ir.Value) -> Iterator[ir.Value]:
    """Values before y of its own sizes, the nearest first."""
    waiting, seen = [y], {y}
    for value in waiting:  # it grows
        if value is not y and len(value.shape or ()) == 4 and named_sizes(value)[1::2] == named_sizes(y)[1::2]:
            yield value
        node = value.producer()
        if node is None or len(waiting) > _NEAR:
            continue
        onward = [own for own in node.inputs if own is not None and own not in seen and not is_constant(own)]
        seen.update(onward)
        waiting += onward


def _turned_from(x: ir.Value, y: ir.Value, inputs: Inputs) -> Rotated | str:
    """The rotation that makes y of x; why there is none, empty where x is but a part of it."""
    nodes = ancestors(y, frozenset({x}))
    tables = _tables(nodes, x) if nodes is not None else None
    heads, _, width = named_sizes(x)[1:]
    if tables is None or not isinstance(heads, int) or not isinstance(width, int):
        return ""
    cos, sin = tables
    kind = (x.dtype or ir.DataType.FLOAT).numpy()
    probe = np.random.default_rng(0).standard_normal((_BATCH, heads, _ROWS, width)).astype(kind)
    found = evaluate([y, cos, sin], {**inputs.at(_BATCH, _ROWS, _PAST), x: probe})
    if found is None:
        return ""
    turned, c, s = found
    for interleaved in (False, True):
        expected = _turn(probe, c, s, interleaved=interleaved)
        if expected is not None and np.allclose(expected, turned, atol=1e-5 if kind == np.float32 else 5e-3):
            return Rotated(x, cos, sin, interleaved, c.shape[-1] // 2)
    return "it is turned in none of the two usual ways"


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


def _turn(x: Array, cos: Array, sin: Array, *, interleaved: bool) -> Array | None:
    """x turned by tables whose pairs are given twice, signs of the sines or not."""
    size = cos.shape[-1]
    if size % 2 or sin.shape[-1] != size or size > x.shape[-1] or cos.ndim > 4:
        return None
    c, s = (halves(table, interleaved=interleaved) for table in (cos, sin))
    part, rest = x[..., :size], x[..., size:]
    first, second = (part[..., ::2], part[..., 1::2]) if interleaved else np.split(part, 2, -1)
    try:
        ends = first * c - second * s, second * c + first * s
    except ValueError:
        return None
    turned = np.stack(ends, -1).reshape(part.shape) if interleaved else np.concatenate(ends, -1)
    return np.concatenate([turned, rest], -1)


def halves(table: Array, *, interleaved: bool) -> Array:
    """Of a table that holds every pair twice, the second one of each, where sines with signs are positive."""
    return table[..., 1::2] if interleaved else table[..., table.shape[-1] // 2 :]
