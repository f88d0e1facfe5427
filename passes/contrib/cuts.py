"""Values that are cut out of one, side by side."""

import itertools
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from qcompile.passes.caches import is_group_query
from qcompile.passes.graph import small_array
from qcompile.passes.prepare.sizes import named_sizes


def packed(parts: Sequence[ir.Value], widths: Sequence[int]) -> ir.Value | None:
    """The value that is `parts`, of these widths and in this order, side by side, where they are cut out of one."""
    found = [_cut(part) for part in parts]
    starts = np.cumsum([0, *widths])
    if any(own is None for own in found):
        return None
    whole = {own[0] for own in found if own is not None}
    ends = [own[1:] for own in found if own is not None]
    if len(whole) != 1 or ends != list(itertools.pairwise(starts.tolist())):
        return None
    value = whole.pop()
    return value if named_sizes(value)[-1:] == [int(starts[-1])] else None


def feed_whole(graph: ir.Graph) -> None:
    """Give a GroupQueryAttention undivided what its queries, keys and values are cut out of, in this order."""
    for node in list(graph):
        parts = [value for value in node.inputs[:3] if value is not None]
        if not is_group_query(node) or len(parts) != 3:
            continue
        widths = [named_sizes(part)[-1:] for part in parts]
        sizes = [own[0] for own in widths if own and isinstance(own[0], int)]
        whole = packed(parts, sizes) if len(sizes) == 3 else None
        if whole is None:
            continue
        for i, value in enumerate((whole, None, None)):
            node.replace_input_with(i, value)
        for cut in {part.producer() for part in parts}:
            if cut is not None and not any(own.uses() or own.is_graph_output() for own in cut.outputs):
                graph.remove(cut, safe=True)


def _cut(part: ir.Value) -> tuple[ir.Value, int, int] | None:
    """(whole, first, end) of what Split or Slice cuts out of the last axis of (batch, rows, width)."""
    node = part.producer()
    whole = node.inputs[0] if node is not None and node.domain == "" and node.inputs else None
    if node is None or whole is None or len(whole.shape or ()) != 3:
        return None
    if node.op_type == "Split" and node.attributes.get_int("axis", 0) in (2, -1):
        widths = [named_sizes(output)[-1] for output in node.outputs]
        if not all(isinstance(width, int) for width in widths):
            return None
        ends = np.cumsum([0, *widths]).tolist()
        place = list(node.outputs).index(part)
        return whole, ends[place], ends[place + 1]
    if node.op_type == "Slice":
        numbers = [small_array(value, 1) for value in node.inputs[1:]]
        width = named_sizes(whole)[-1]
        if any(n is None for n in numbers) or len(numbers) < 3 or not isinstance(width, int):
            return None
        first, end, axis, step = [int(n.reshape(-1)[0]) for n in numbers if n is not None] + [1] * (4 - len(numbers))
        fits = axis in (2, -1) and step == 1 and 0 <= first < end
        return (whole, first, min(end, width)) if fits else None
    return None
