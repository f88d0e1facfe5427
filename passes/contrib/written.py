"""Attention as exporters write it out, operator by operator."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import onnx_ir as ir

from qcompile.passes.graph import small_array
from qcompile.passes.masks import FILL
from qcompile.passes.prepare.attention import repetition
from qcompile.passes.prepare.sizes import named_sizes

_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16}
_SWAP = ((0, 1, 3, 2), (0, 1, 2, 4, 3))
_MERGE = ((0, 2, 1, 3), (0, 3, 1, 2, 4))


@dataclass(frozen=True, eq=False)
class Written:
    """result = Softmax(cap(scale q kᵀ) + mask) v, heads side by side.

    q: (batch, heads, rows, width). k, v: (batch, groups of heads, positions, width).
    result: (batch, rows, heads width) or (batch rows, heads width). mask: added to the scores, or False where they are
    replaced by its fill; hides: True there. alone: whether nothing else reads k and v.
    guarded: whether rows that nothing is let through to have a result of zeros.
    """

    name: str
    q: ir.Value
    k: ir.Value
    v: ir.Value
    scale: float
    softcap: float
    mask: ir.Value | None
    hides: bool
    result: ir.Value
    alone: bool
    guarded: bool


def written(graph: ir.Graph) -> Iterator[Written | tuple[str, str]]:
    """Every attention of a graph in order, or (name, why it cannot be told) for a Softmax over scores that is none."""
    for node in list(graph):
        if (node.op_type, node.domain) == ("Softmax", ""):
            found = _around(node)
            if found is not None:
                yield (node.name or "", found) if isinstance(found, str) else found


@dataclass(frozen=True)
class _Operand:
    value: ir.Value
    scale: float = 1.0
    swaps: int = 0


def _around(softmax: ir.Node) -> Written | str | None:
    """The attention of a Softmax; None where no product is before or behind it."""
    whole = _guarded(softmax.outputs[0])
    weights = _narrowed(whole)
    last = _only_reader(weights, "MatMul")
    if last is None or last.inputs[0] is not weights:
        return None if softmax.outputs[0].shape and len(softmax.outputs[0].shape) < 4 else _told_of(weights)
    before = _scores(uncast(softmax.inputs[0]))
    if before is None:
        return "what makes its scores is not known"
    product = before.product
    q, k, v = (_stripped(value) for value in (product.inputs[0], product.inputs[1], last.inputs[1]))
    if q is None or k is None or v is None:
        return "an operand of its products is missing"
    if q.swaps or v.swaps or k.swaps != 1 or v.scale != 1:
        return "its keys are not transposed once"
    rank = len(softmax.outputs[0].shape or ())
    if softmax.attributes.get_int("axis", -1) not in (-1, rank - 1):
        return "its Softmax is not over the positions"
    merged = _only_reader(_in_heads(last.outputs[0], q.value), "Transpose")
    if merged is None or tuple(merged.attributes.get_ints("perm", ())) not in _MERGE:
        return "its heads are not put side by side"
    joined = _only_reader(merged.outputs[0], "Reshape")
    if joined is None or not _side_by_side(merged.outputs[0], joined.outputs[0]):
        return "its heads are not put side by side"
    scale = before.scale * q.scale * k.scale
    return Written(
        softmax.name or "", q.value, k.value, v.value, scale, before.softcap, before.mask, before.hides,
        joined.outputs[0], _alone(k.value, product) and _alone(v.value, last), whole is not softmax.outputs[0],
    )  # fmt: skip


def _told_of(weights: ir.Value) -> str:
    """Why nothing but a product may read them."""
    return "its probabilities are an output" if weights.is_graph_output() else "no product reads its probabilities"


def _side_by_side(heads: ir.Value, joined: ir.Value) -> bool:
    """Whether a value is (batch, rows, heads width) or (batch rows, heads width) of heads (batch, rows, …, width)."""
    width, sizes = named_sizes(joined)[-1:], named_sizes(heads)[2:]
    known = [size for size in (*width, *sizes) if isinstance(size, int)]
    if len(joined.shape or ()) not in (2, 3):
        return False
    return len(known) < len(sizes) + 1 or known[0] == math.prod(known[1:])


def _alone(value: ir.Value, product: ir.Node) -> bool:
    """Whether a value goes to one product only; its shape may be read too."""
    while True:
        readers = [use.node for use in value.uses() if use.node.op_type != "Shape"]
        if len(readers) != 1 or readers[0] is product:
            return len(readers) == 1
        value = readers[0].outputs[0]


def _guarded(weights: ir.Value) -> ir.Value:
    """Probabilities behind Where(IsNaN(p), 0, p), which makes zeros of rows that nothing is let through to."""
    readers = [use.node for use in weights.uses()]
    where = next((node for node in readers if (node.op_type, node.domain) == ("Where", "")), None)
    test = next((node for node in readers if (node.op_type, node.domain) == ("IsNaN", "")), None)
    if where is None or test is None or len(readers) != 2 or where.inputs[2] is not weights:
        return weights
    zero = small_array(where.inputs[1], 1)
    guards = where.inputs[0] is test.outputs[0] and zero is not None and not zero.any()
    return where.outputs[0] if guards else weights


def _narrowed(weights: ir.Value) -> ir.Value:
    """Probabilities behind a Cast: in half precision many compute a Softmax in single."""
    cast = _only_reader(weights, "Cast")
    return cast.outputs[0] if cast is not None and uncast(cast.outputs[0]) is weights else weights


def uncast(value: ir.Value | None) -> ir.Value | None:
    """What a value is before a Cast between float and float16; itself, where it is none."""
    node = value.producer() if value is not None else None
    given = node.inputs[0] if node is not None and (node.op_type, node.domain) == ("Cast", "") else None
    return given if given is not None and {given.dtype, value and value.dtype} <= _FLOATS else value


@dataclass(frozen=True, eq=False)
class _Scores:
    """What a Softmax reads: cap(scale product) and a mask, see `Written`."""

    product: ir.Node
    scale: float
    softcap: float
    mask: ir.Value | None = None
    hides: bool = False


def _scores(value: ir.Value | None) -> _Scores | None:
    """None where no product is found."""
    node = value.producer() if value is not None else None
    if node is not None and (node.op_type, node.domain) == ("Add", ""):
        sides = [own for own in node.inputs if own is not None]
        found = [_scores_of(own) for own in sides]
        if (found[0] is None) == (found[-1] is None):
            return None
        i = 0 if found[0] is not None else 1
        own = found[i]
        return replace(own, mask=_unwidened(sides[1 - i])) if own is not None else None
    if node is None or (node.op_type, node.domain) != ("Where", ""):
        return _scores_of(value)
    for i in (1, 2):
        fill, own = small_array(node.inputs[3 - i], 1), _scores_of(node.inputs[i])
        if own is not None and node.inputs[0] is not None and fill is not None and (fill.reshape(-1) <= -FILL).all():
            return replace(own, mask=_unwidened(node.inputs[0]), hides=i == 2)
    return None


def _scores_of(value: ir.Value | None) -> _Scores | None:
    """Of a value cap(scale · product), without a mask."""
    scale, softcap = 1.0, 0.0
    for _ in range(8):
        node = value.producer() if value is not None else None
        if value is None or node is None or node.domain != "" or len(value.uses()) != 1 or value.is_graph_output():
            return None
        if node.op_type == "MatMul":
            return _Scores(node, scale, softcap)
        if (before := uncast(value)) is not value:
            value = before
            continue
        if node.op_type == "Tanh" and softcap == 0 and scale > 0:
            value, softcap = node.inputs[0], scale  # cap tanh(x / cap): what is inside makes up the rest of the scale
            continue
        step = _scaled(node)
        if step is None:
            return None
        value, scale = step[0], scale * step[1]
    return None


def _scaled(node: ir.Node) -> tuple[ir.Value, float] | None:
    """(x, c) of a node x · c, c a number."""
    if node.op_type not in ("Mul", "Div") or node.domain != "":
        return None
    for i in (1, 0) if node.op_type == "Mul" else (1,):
        number, other = small_array(node.inputs[i], 1), node.inputs[1 - i]
        if number is not None and other is not None and number.dtype.kind == "f" and number.size == 1:
            c = float(number.reshape(-1)[0])
            return other, c if node.op_type == "Mul" else 1 / c
    return None


def _stripped(value: ir.Value | None) -> _Operand | None:
    """What an operand of a product is before it is scaled, grouped, repeated and turned."""
    own = _Operand(value) if value is not None else None
    while own is not None and (node := own.value.producer()) is not None and node.domain == "":
        single = _single(own.value)
        if single is not None:
            own = replace(own, value=single)
            continue
        given, rank = (node.inputs[0] if node.inputs else None), len(own.value.shape or ())
        step = _scaled(node)
        if step is not None:
            own = replace(own, value=step[0], scale=own.scale * step[1])
        elif given is None:
            break
        elif node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) in _SWAP:
            own = replace(own, value=given, swaps=own.swaps + 1)
        elif (
            node.op_type == "Identity"
            or uncast(own.value) is not own.value
            or (node.op_type in ("Unsqueeze", "Reshape") and (len(given.shape or ()), rank) == (4, 5))
        ):
            own = replace(own, value=given)
        else:
            break
    return own


def _single(value: ir.Value) -> ir.Value | None:
    """(batch, groups, rows, width) of which value is Reshape(Expand(Unsqueeze(…, 2))): each head so many times."""
    made = repetition(value)
    if made is None:
        return None
    joined, wide, single = (named_sizes(own) for own in made)
    if (len(joined), len(wide), len(single)) != (4, 5, 5) or single[2] != 1 or joined[3] != wide[4]:
        return None
    heads, groups, unsqueeze = joined[1], wide[1], made[2].producer()
    counted = isinstance(heads, int) and isinstance(groups, int) and groups == single[1]
    if unsqueeze is None or not counted or int(heads or 0) % int(groups or 1):
        return None
    return unsqueeze.inputs[0]


def _in_heads(value: ir.Value, q: ir.Value) -> ir.Value:
    """The product with the values, behind what gives it the heads that the query has."""
    while (join := _only_reader(value, "Reshape")) is not None:
        sizes, heads = named_sizes(join.outputs[0]), named_sizes(q)
        if len(sizes) != 4 or len(heads) != 4 or sizes[1] != heads[1] or sizes[3] != named_sizes(value)[-1]:
            break
        value = join.outputs[0]
    return value


def _unwidened(mask: ir.Value) -> ir.Value:
    """A mask without the axis that groups of heads gave it."""
    node = mask.producer()
    if node is not None and node.op_type == "Unsqueeze" and len(mask.shape or ()) == 5 and node.inputs[0] is not None:
        return node.inputs[0]
    return mask


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that alone reads what a value holds; its shape may be read too."""
    readers = [use.node for use in value.uses() if use.node.op_type != "Shape"]
    fits = (
        len(readers) == 1 and not value.is_graph_output() and (readers[0].op_type, readers[0].domain) == (op_type, "")
    )
    return readers[0] if fits else None
