"""Following edges between the graph's inputs, its tables and its outputs: token ids, caches, logits."""

from collections.abc import Iterator

import onnx_ir as ir

from qcompile.passes.caches import ATTENTION, HALF_ATTENTION, MICROSOFT_ATTENTION, is_group_query
from qcompile.passes.contrib.codes import codes_of
from qcompile.passes.graph import small_array

_INTEGERS = {ir.DataType.INT32, ir.DataType.INT64}
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
# What may stand between the ids and the lookup without making other numbers of them.
_TRANSPARENT = {
    "Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Clip", "Max", "Min", "Where", "Expand",
}  # fmt: skip
# What may stand between a table's constant and its lookup.
_DECODING = {"Cast", "Transpose", "DequantizeLinear", "Identity", "Constant"}
# (domain, op_type): input slot of each past, output slot of its present, axis that grows.
_CACHE_SLOTS: dict[tuple[str, str], list[tuple[int, int, int]]] = {
    **{own: [(3, 1, 2), (4, 2, 2)] for own in (MICROSOFT_ATTENTION, ATTENTION, HALF_ATTENTION)},
    ("com.microsoft", "MultiHeadAttention"): [(6, 1, 2), (7, 2, 2)],
    ("com.microsoft", "Attention"): [(4, 1, 3)],
    ("", "Attention"): [(4, 1, 2), (5, 2, 2)],
}


def token_ids(graph: ir.Graph) -> tuple[ir.Value | None, int | None]:
    """The integer input that indexes the largest constant table, and that table's number of rows."""
    best: tuple[int, ir.Value, int] | None = None
    for node in graph:
        lookup = _lookup(node)
        if lookup is None:
            continue
        indices, rows, size = lookup
        source = _source(indices)
        if source is not None and (best is None or size > best[0]):
            best = (size, source, rows)
    return (best[1], best[2]) if best else (None, None)


def _lookup(node: ir.Node) -> tuple[ir.Value, int, int] | None:
    """(indices, rows, size) of a lookup in a constant table: a Gather, or an embedding operator."""
    if node.domain == "qcompile" and node.op_type.startswith("Embedding"):
        table, indices, axis = node.inputs[2], node.inputs[0], 1  # scales (G, V): codes may be two a byte
    elif node.op_type == "GatherBlockQuantized" or (node.op_type == "Gather" and node.domain == ""):
        table, indices = node.inputs[0], node.inputs[1]
        name = "gather_axis" if node.op_type == "GatherBlockQuantized" else "axis"
        axis = node.attributes.get_int(name, 0)
    else:
        return None
    shape = _constant_shape(table)
    if shape is None or len(shape) != 2 or indices is None:
        return None
    return indices, shape[axis], shape[0] * shape[1]


def _constant_shape(value: ir.Value | None) -> list[int] | None:
    """The shape of a value that comes from constants alone, through at most a Cast, Transpose or DequantizeLinear."""
    swap = False
    for _ in range(4):
        if value is None or value.is_graph_input():
            return None
        if value.const_value is not None:
            shape = list(value.const_value.shape.numpy())
            return shape[::-1] if swap else shape
        producer = value.producer()
        if producer is None or producer.op_type not in _DECODING:
            return None
        if producer.op_type == "Constant":
            tensor = producer.attributes.get("value")
            return list(tensor.as_tensor().shape.numpy()) if tensor is not None else None
        swap ^= producer.op_type == "Transpose"
        value = producer.inputs[0]
    return None


def _source(value: ir.Value | None) -> ir.Value | None:
    """The integer graph input that `value` carries, through operators that leave the numbers as they are."""
    for _ in range(12):
        if value is None:
            return None
        if value.is_graph_input() and not value.is_initializer():
            return value if value.dtype in _INTEGERS else None
        producer = value.producer()
        if producer is None or producer.op_type not in _TRANSPARENT:
            return None
        value = producer.inputs[1 if producer.op_type == "Where" else 0]
    return None


def caches(graph: ir.Graph) -> Iterator[tuple[ir.Value, str, int]]:
    """(past input, name of the present output, axis that grows) of every cache."""
    outputs = set(graph.outputs)
    for value in graph.inputs:
        floats = value.dtype in _FLOATS or codes_of(value) is not None
        if floats and value.shape is not None and not value.is_initializer():
            found = _grown_output(value, len(value.shape), outputs)
            if found is not None:
                yield value, *found


def in_one_buffer(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether a cache and what becomes of it may share a buffer with room behind what is filled.

    So where a GroupQueryAttention alone reads the cache, and hands it to an output that no node reads: its lengths,
    and all else, come from other inputs. Not where what is filled slides (`cache_window`).
    """
    uses = tuple(value.uses())
    if len(uses) != 1 or value in graph.outputs:
        return False
    node, slot = uses[0].node, uses[0].idx
    if not is_group_query(node) or slot not in (3, 4):
        return False
    if cache_window(value):
        return False
    present = node.outputs[slot - 2] if slot - 2 < len(node.outputs) else None
    while present is not None and present not in graph.outputs:
        readers = [use.node for use in present.uses()]
        present = readers[0].outputs[0] if [reader.op_type for reader in readers] == ["Identity"] else None
    return present is not None and not present.uses()


def cache_window(value: ir.Value) -> int:
    """Tokens that a cache must have room for from the first run on: those of a window that slides over it, whose
    GroupQueryAttention drops the oldest where it is full; 0 for caches that grow.
    """
    windows = (
        use.node.attributes.get_int("local_window_size", 0)
        for use in value.uses()
        if use.node.domain == "com.microsoft" and use.node.attributes.get_int("sliding_window_cache", 0) == 1
    )
    return max(0, *windows, 0)


def cache_sizes(value: ir.Value) -> dict[int, int]:
    """Sizes, by axis, of a cache that follow from what its readers do with it, whatever the graph calls them: heads and
    width from an attention operator's attributes and query, all but what grows from what a Concat appends.
    """
    found: dict[int, int] = {}
    for use in value.uses():
        found |= _of_attention(use.node) or _of_appended(use.node, value)
    return found


def _of_appended(node: ir.Node, cache: ir.Value) -> dict[int, int]:
    if node.op_type != "Concat" or node.domain != "":
        return {}
    others = [_uncoded(own).shape for own in node.inputs if own is not None and own is not cache]
    shapes = [shape for shape in others if shape is not None]
    axis = node.attributes.get_int("axis", 0)
    return {
        i: dim for shape in shapes for i, dim in enumerate(shape) if isinstance(dim, int) and i != axis % len(shape)
    }


def _uncoded(value: ir.Value) -> ir.Value:
    """What codes are made of: files state no shape of the codes that a QuantizeLinear gives."""
    node = value.producer()
    made = node.inputs[0] if node is not None and (node.op_type, node.domain) == ("QuantizeLinear", "") else None
    return value if made is None else made


def _of_attention(node: ir.Node) -> dict[int, int]:
    heads = node.attributes.get_int("num_heads", 0)
    grouped = is_group_query(node)
    if not grouped and (node.domain, node.op_type) != ("com.microsoft", "MultiHeadAttention"):
        return {}
    cached = node.attributes.get_int("kv_num_heads", heads)
    query = node.inputs[0]
    wide = query.shape[-1] if query is not None and query.shape is not None and len(query.shape) == 3 else None
    packed = grouped and node.inputs[1] is None
    if not heads or not isinstance(wide, int):
        return {}
    return {1: cached, 3: wide // (heads + 2 * cached if packed else heads)}


def _grown_output(value: ir.Value, rank: int, outputs: set[ir.Value]) -> tuple[str, int] | None:
    """(graph output, axis) that a Concat or an attention operator makes of a float input, longer along the axis."""
    frontier: list[tuple[ir.Value, list[int]]] = [(value, list(range(rank)))]
    for _ in range(8):  # a few Cast, Identity or Transpose at most
        following: list[tuple[ir.Value, list[int]]] = []
        for current, axes in frontier:
            for use in current.uses():
                node = use.node
                step = _moved(node, axes)
                if step is not None:
                    following.append((node.outputs[0], step))
                    continue
                for grown, axis in _growth(node, use.idx, axes):
                    present = _reached_output(grown, outputs)
                    if present is not None:
                        return present, axis
        frontier = following
    return None


def _growth(node: ir.Node, slot: int, axes: list[int]) -> Iterator[tuple[ir.Value, int]]:
    """(grown value, axis of the graph input) where the node lengthens its input number `slot`."""
    if node.op_type == "Concat" and node.domain == "" and slot == 0:
        axis = node.attributes.get_int("axis", 0)
        yield node.outputs[0], axes[axis]
    for past, present, axis in _CACHE_SLOTS.get((node.domain, node.op_type), ()):
        if past == slot and present < len(node.outputs):
            yield node.outputs[present], axes[axis]


def _reached_output(value: ir.Value, outputs: set[ir.Value]) -> str | None:
    """The graph output that `value` is, or becomes through Cast, Identity or Transpose, or as the first of a pair."""
    frontier = [value]
    for _ in range(4):
        for current in frontier:
            if current in outputs:
                return current.name
        uses = [use for value in frontier for use in value.uses()]
        frontier = [use.node.outputs[0] for use in uses if _moved(use.node, []) is not None or _pairs(*use)]
    return None


def _pairs(node: ir.Node, slot: int) -> bool:
    """Whether a value gets an axis, or is the first of those joined along a new one: keys and values as one cache."""
    if node.op_type == "Unsqueeze" and node.domain == "":
        return True
    before = node.inputs[slot]
    producer = before.producer() if before is not None else None
    return node.op_type == "Concat" and slot == 0 and producer is not None and producer.op_type == "Unsqueeze"


def _moved(node: ir.Node, axes: list[int]) -> list[int] | None:
    """Where the axes lie after a node that only moves or casts; None for any other node."""
    if node.op_type in {"Cast", "Identity"} or (node.op_type == "Split" and axes):
        return axes
    if node.op_type == "Squeeze" and axes and len(node.inputs) > 1:
        gone = small_array(node.inputs[1])
        places = set() if gone is None else {int(axis) % len(axes) for axis in gone.reshape(-1)}
        return [axis for i, axis in enumerate(axes) if i not in places] if places else None
    if node.op_type != "Transpose":
        return None
    order = node.attributes.get("perm")
    return [axes[i] for i in order.as_ints()] if order is not None and axes else axes[::-1]


def logits_output(graph: ir.Graph, presents: set[str], vocabulary: int | None) -> str | None:
    """The output (batch, sequence, vocabulary)."""
    candidates = [v for v in graph.outputs if v.name not in presents and v.shape is not None and len(v.shape) == 3]
    for value in candidates:
        last = value.shape[-1] if value.shape is not None else None
        # A head may be padded, or a little narrower than the table.
        if vocabulary and isinstance(last, int) and abs(last - vocabulary) <= vocabulary // 20:
            return value.name
    return next((v.name for v in candidates if v.name == "logits"), None)
