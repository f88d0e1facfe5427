"""What a computed shape holds, piece by piece; and what follows from it."""

import numpy as np
import onnx_ir as ir

from qcompile.passes.caches import is_cache
from qcompile.passes.graph import Decide, Names, add_initializer, insert_before, is_constant, small_array, take_over

# A number, what all caches call a dimension, or one dimension of a value.
Size = int | str | tuple[ir.Value, int]
_SAME = {"Squeeze", "Unsqueeze", "Identity"}
_SHAPING = {"Shape", "Concat", "Slice", "Gather", "Reshape"} | _SAME
_LOOKS = 500  # values behind one shape: an exporter's are a dozen
_KNOWN = "qcompile.cache"
# What some exporters call every dimension that they do not know.
_UNNAMED = {"", "?", "None", "-1", "unknown", "dynamic"}


def named_sizes(value: ir.Value) -> list[int | str | None]:
    """The sizes of a value, symbols by name; None for one that has none. Empty without a shape."""
    return [size if isinstance(size, int) else _name(size) for size in value.shape or ()]


def _name(size: ir.SymbolicDim) -> str | None:
    return None if size.value in _UNNAMED else size.value


def dimension(value: ir.Value, axis: int) -> Size:
    """One dimension of a value of known rank.

    Sizes of two caches are the same where an axis has the same name in both. Elsewhere names prove nothing: exporters
    call the length of a query and that of a passage "sequence", and what runs the model takes any sizes.
    """
    assert value.shape is not None
    size = value.shape[axis]
    if isinstance(size, int):
        return size
    name = _name(size) if value.is_graph_input() and _of_cache(value) else None
    return (value, axis) if name is None else f"{name} of caches, axis {axis}"


def _of_cache(value: ir.Value) -> bool:
    """Whether a graph input is a cache; looked for once, since thousands of nodes may ask for its sizes."""
    if _KNOWN not in value.meta:
        value.meta[_KNOWN] = is_cache(value)
    return bool(value.meta[_KNOWN])


def sizes(value: ir.Value | None, budget: list[int] | None = None) -> tuple[Size, ...] | None:
    """The content of a shape or of one of its numbers (a scalar has one entry); None if it cannot be told.

    budget: how many values the whole call may still look at: forty Concats of a value with itself ask for 2^40.
    """
    budget = [_LOOKS] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0:
        return None
    array = small_array(value)
    if array is not None:
        return tuple(array.reshape(-1).tolist()) if array.ndim < 2 and array.dtype.kind == "i" else None
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or value is None or value.shape is None or len(value.shape) > 1:
        return None
    if node.op_type == "Shape":
        return _shape(node)
    if node.op_type == "ConstantOfShape":
        return _repeated(node, budget)
    if node.op_type == "Concat":
        parts = [sizes(part, budget) for part in node.inputs]
        return tuple(size for part in parts if part for size in part) if None not in parts else None
    content = sizes(node.inputs[0], budget) if node.op_type in {"Slice", "Gather", "Reshape"} | _SAME else None
    if content is None or node.op_type in _SAME:
        return content
    if node.op_type == "Reshape":
        return content if len(content) == 1 else None
    operands = [sizes(operand, budget) for operand in node.inputs[1:]]
    if any(operand is None or not all(isinstance(number, int) for number in operand) for operand in operands):
        return None
    return _picked(node, content, [[int(n) for n in operand or () if isinstance(n, int)] for operand in operands])


def _shape(node: ir.Node) -> tuple[Size, ...] | None:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return None
    whole = [dimension(value, axis) for axis in range(len(value.shape))]
    return tuple(whole[node.attributes.get_int("start", 0) : node.attributes.get_int("end", None)])


def _repeated(node: ir.Node, budget: list[int]) -> tuple[Size, ...] | None:
    """A vector of equal integers, of a length that is known."""
    given = node.attributes.get("value")
    number = given.as_tensor().numpy().reshape(-1)[0] if given is not None else np.float32(0)
    length = sizes(node.inputs[0], budget)
    if length is None or len(length) != 1 or not isinstance(length[0], int) or number.dtype.kind != "i":
        return None
    return (int(number),) * length[0] if 0 <= length[0] <= _LOOKS else None


def _picked(node: ir.Node, content: tuple[Size, ...], operands: list[list[int]]) -> tuple[Size, ...] | None:
    """What Slice or Gather, with these constants, takes of a shape."""
    if node.op_type == "Gather":
        fits = all(-len(content) <= i < len(content) for i in operands[0])
        return tuple(content[i] for i in operands[0]) if fits else None
    starts, ends, _, steps = [*operands, *[[0], [1]][len(operands) - 2 :]]
    return content[starts[0] : ends[0]] if steps == [1] else None


def _stated(node: ir.Node) -> list[Size | None] | None:
    """The sizes of what Tile, Expand or Transpose gives, None for one that cannot be told; None for other nodes.

    onnx infers nothing behind a Tile or an Expand by numbers of which one is not known: a batch, say.
    """
    x = node.inputs[0] if node.domain == "" and node.inputs else None
    if x is None or x.shape is None or node.op_type not in ("Tile", "Expand", "Transpose"):
        return None
    own = [dimension(x, axis) for axis in range(len(x.shape))]
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", list(reversed(range(len(own)))))
        return [own[axis] for axis in order] if sorted(order) == list(range(len(own))) else None
    by = sizes(node.inputs[1])
    if by is None:
        return None
    if node.op_type == "Tile":
        return [_times(size, n) for size, n in zip(own, by, strict=True)] if len(by) == len(own) else None
    rank = max(len(own), len(by))
    pairs = zip([1] * (rank - len(own)) + own, (1,) * (rank - len(by)) + by, strict=True)
    return [_broadcast(size, n) for size, n in pairs]


def _times(size: Size, n: Size) -> Size | None:
    if isinstance(size, int) and isinstance(n, int):
        return size * n
    return size if n == 1 else n if size == 1 else None


def _broadcast(a: Size, b: Size) -> Size | None:
    if a == 1:
        return b
    if b == 1 or a == b:
        return a
    numbers = [size for size in (a, b) if isinstance(size, int)]
    return numbers[0] if len(numbers) == 1 else None


def _state_sizes(model: ir.Model) -> None:
    """Numbers into the shapes of what Tile, Expand and Transpose give. Graph outputs keep what the file says."""
    for node in model.graph:
        stated = _stated(node)
        if stated is None or node.outputs[0].is_graph_output():
            continue
        value = node.outputs[0]
        known = list(value.shape) if value.shape is not None else [ir.SymbolicDim(None)] * len(stated)
        if len(known) == len(stated):
            pairs = zip(known, stated, strict=True)
            value.shape = ir.Shape(
                [new if isinstance(new, int) and not isinstance(old, int) else old for old, new in pairs]
            )


def number_sizes(model: ir.Model, decide: Decide) -> None:
    """Sizes that are numbers become constants; what is computed of them, an end of a Slice say, is folded with them."""
    _state_sizes(model)
    numbers = 0
    for node in list(model.graph):
        if node.op_type not in _SHAPING or node.domain != "" or is_constant(node.inputs[0]):
            continue
        value = node.outputs[0]
        if value.dtype != ir.DataType.INT64 or value.shape is None or value.is_graph_output() or not value.uses():
            continue
        known = [size for size in sizes(value) or () if isinstance(size, int)]
        if known and len(known) == len(sizes(value) or ()):
            array = np.array(known, np.int64).reshape(() if len(value.shape) == 0 else (-1,))
            ir.convenience.replace_all_uses_with(
                value, add_initializer(model.graph, f"{value.name}.number", ir.tensor(array))
            )
            numbers += 1
    if numbers:
        decide("", "folded", f"{numbers} sizes that are numbers", nodes=numbers)


def merge_sizes(model: ir.Model, decide: Decide) -> None:
    """Let every use of a size that was computed before go to the first one.

    The length of thirty caches is asked for once. Names like "?" are none.
    """
    first: dict[tuple[int, tuple[Size, ...]], ir.Value] = {}
    merged = 0
    for node in list(model.graph):
        if node.op_type not in _SHAPING or node.domain != "":
            continue
        value = node.outputs[0]
        if value.dtype != ir.DataType.INT64 or value.shape is None or value.is_graph_output():
            continue
        content = sizes(value)
        if content is None or all(isinstance(size, int) for size in content):
            continue
        known = first.setdefault((len(value.shape), content), value)
        if known is not value:
            ir.convenience.replace_all_uses_with(value, known)
            model.graph.remove(node, safe=True)
            merged += 1
    if merged:
        decide("", "merged", f"{merged} sizes that were computed before", nodes=merged)


def transpose_keys(model: ir.Model, decide: Decide) -> None:
    """Reshape(Transpose(Reshape(x, [-1, m, n]), (0, 2, 1)), [..., n, m]) of x (..., m, n) becomes one Transpose of x.

    The shapes are proved to be x's own. (The long form fails on empty x, where the Transpose does not.)
    """
    names = Names(model)
    replaced = 0
    for node in list(model.graph):
        source = _turned(node)
        if source is None:
            continue
        if isinstance(source, str):
            decide(node.name or "", "kept", source)
            continue
        rank = len(source.shape or ())
        output, name = node.outputs[0], node.name or ""
        order = [*range(rank - 2), rank - 1, rank - 2]
        turned = insert_before(
            node, "Transpose", [source], {"perm": order}, name=name, output=names.fresh(f"{name}_turned")
        )
        take_over(output, turned, names)
        if not turned.is_graph_output() and source.shape is not None:
            turned.shape = ir.Shape([source.shape[i] for i in order])
        model.graph.remove(node, safe=True)
        replaced += 1
    if replaced:
        decide("", "simplified", f"{replaced} Transposes between Reshapes became plain ones", nodes=replaced)


def _turned(node: ir.Node) -> ir.Value | str | None:
    """The x of the long form that ends in this node; why it is not the same as a Transpose; None for another form."""
    outer = _operand(node, "Reshape")
    transpose = outer.producer() if outer is not None else None
    inner = _operand(transpose, "Transpose")
    reshape = inner.producer() if inner is not None else None
    source = _operand(reshape, "Reshape")
    if source is None or transpose is None or reshape is None or source.shape is None or len(source.shape) < 3:
        return None
    perm = transpose.attributes.get("perm")
    if perm is None or tuple(perm.as_ints()) != (0, 2, 1):
        return None
    *lead, rows, columns = (dimension(source, axis) for axis in range(len(source.shape)))
    if sizes(reshape.inputs[1]) != (-1, rows, columns):
        return "the first shape is not (-1, and the last two sizes)"
    wanted = sizes(node.inputs[1])
    if wanted is None or len(wanted) != len(lead) + 2 or sum(size == -1 for size in wanted) > 1:
        return "the second shape cannot be told"
    if any(size not in (-1, real) for size, real in zip(wanted, (*lead, columns, rows), strict=True)):
        return "the second shape is another one than that of the Transpose"
    return source


def _operand(node: ir.Node | None, op_type: str) -> ir.Value | None:
    return node.inputs[0] if node is not None and (node.op_type, node.domain) == (op_type, "") else None
