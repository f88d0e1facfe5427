"""What operators make of constants: shape and type of the result without reading any, and how to compute it.

A table, one line an operator: moves of any element type, arithmetic on floats, reductions, products. An operator that
is not in it, or a form of one that its line does not cover, folds nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.passes.errors import UserError
from qcompile.passes.prepare.constant_norms import batch_norm, instance_norm, layer_norm
from qcompile.passes.prepare.constant_types import FLOATS, HALVES, INTEGERS, Array, Made, Operand, Rule, Shape, axis_of


def made_of(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    """What the node makes of these operands (None where it has none at a position); None: it is not folded."""
    rule = _RULES.get(node.op_type) if node.domain == "" else None
    attributes = node.attributes.values()
    if rule is None or not operands or operands[0] is None or any(attribute.is_ref() for attribute in attributes):
        return None
    if any(operand is not None and operand.dtype == ir.DataType.STRING for operand in operands):
        return None
    try:
        return rule(node, operands)
    except (
        ValueError,
        IndexError,
        TypeError,
        ZeroDivisionError,
    ):  # operands that do not fit: for the runtime to refuse
        return None


def _one(operand: Operand, shape: Shape, function: Callable[[Array], Array], **more: Any) -> Made:
    """A node with one output that depends on the content of its first operand alone."""
    return Made((shape,), operand.dtype, lambda arrays: [function(arrays[0])], **{"work": prod(shape), **more})


def _first(operands: Sequence[Operand | None]) -> Operand:
    assert operands[0] is not None
    return operands[0]


def _numbers(operands: Sequence[Operand | None], position: int) -> list[int] | None:
    """The integers of a small operand; None where there is none. ValueError where its content is not known."""
    operand = operands[position] if position < len(operands) else None
    if operand is None:
        return None
    if operand.content is None:
        raise ValueError("unknown content")
    return [int(number) for number in operand.content.reshape(-1)]


def _reshape(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source, wanted = _first(operands), _numbers(operands, 1)
    if wanted is None:
        return None
    if not node.attributes.get_int("allowzero", 0):
        wanted = [source.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    if wanted.count(-1) > 1:
        return None
    known = prod(size for size in wanted if size != -1)
    shape = tuple(prod(source.shape) // known if size == -1 else size for size in wanted)
    return _shaped(source, shape)


def _shaped(source: Operand, shape: Shape) -> Made | None:
    if prod(shape) != prod(source.shape) or min(shape, default=0) < 0:
        return None
    return _one(source, shape, lambda array: array.reshape(shape), same_bytes=True)


def _squeeze(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source, axes = _first(operands), _numbers(operands, 1)
    if "axes" in node.attributes:  # before opset 13
        return None
    rank = len(source.shape)
    gone = [axis_of(axis, rank) for axis in axes] if axes else [i for i, n in enumerate(source.shape) if n == 1]
    return _shaped(source, tuple(size for i, size in enumerate(source.shape) if i not in gone))


def _unsqueeze(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source, axes = _first(operands), _numbers(operands, 1)
    if axes is None:
        return None
    rank = len(source.shape) + len(axes)
    new, left = {axis_of(axis, rank) for axis in axes}, iter(source.shape)
    if len(new) < len(axes):
        return None
    return _shaped(source, tuple(1 if i in new else next(left) for i in range(rank)))


def _flatten(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source, axis = _first(operands), node.attributes.get_int("axis", 1) or 0
    if abs(axis) > len(source.shape):
        return None
    axis = axis % len(source.shape) if axis < 0 else axis
    return _shaped(source, (prod(source.shape[:axis]), prod(source.shape[axis:])))


def _identity(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    return _shaped(_first(operands), _first(operands).shape)


def _transpose(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source = _first(operands)
    wanted = node.attributes.get_ints("perm")
    order = tuple(reversed(range(len(source.shape)))) if wanted is None else tuple(wanted)
    shape = tuple(source.shape[axis] for axis in order)
    moved = [axis for axis in order if source.shape[axis] != 1]
    return _one(source, shape, lambda array: array.transpose(order), same_bytes=moved == sorted(moved))


def _shape(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    dims = _first(operands).shape
    bounds = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims)))
    found = np.array(dims if node.op_type == "Shape" else prod(dims), np.int64)
    found = found[bounds] if node.op_type == "Shape" else found
    return Made((found.shape,), ir.DataType.INT64, lambda _: [found], by_shape=True)


def _cast(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    """Between floats, and of masks: what is stored as integers is smaller than any float of it. Of small ones all."""
    source, target = _first(operands), ir.DataType(node.attributes["to"].as_int())
    numbers = source.content is not None and {source.dtype, target} <= FLOATS | INTEGERS | {ir.DataType.BOOL}
    if (source.dtype not in FLOATS | {ir.DataType.BOOL} or target not in FLOATS) and not numbers:
        return None
    kind, shape = target.numpy(), source.shape

    def converted(arrays: Sequence[Array]) -> Sequence[Array]:
        with np.errstate(over="ignore"):
            return [arrays[0].astype(kind)]

    return Made((shape,), target, converted, same_bytes=target == source.dtype, work=prod(shape))


def _slice(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source = _first(operands)
    starts, ends, axes, steps = (_numbers(operands, position) for position in (1, 2, 3, 4))
    if starts is None or ends is None:
        return None
    axes = list(range(len(starts))) if axes is None else [axis_of(axis, len(source.shape)) for axis in axes]
    cut = [slice(None)] * len(source.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * len(starts), strict=True):
        size = source.shape[axis]
        if step < 0:  # Python would take a start before the first element for no element
            start = min(start, size - 1) if start >= 0 else max(start + size, 0)
            stop = end + size if end < 0 else end
            cut[axis] = slice(start, None if stop < 0 else stop, step) if size else slice(0, 0)
        else:
            cut[axis] = slice(start, end, step)
    taken = tuple(cut)
    shape = tuple(len(range(size)[one]) for size, one in zip(source.shape, taken, strict=True))
    return _one(source, shape, lambda array: array[taken])


def _split(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source, sizes = _first(operands), _numbers(operands, 1)
    if "split" in node.attributes:  # before opset 13
        return None
    axis = axis_of(node.attributes.get_int("axis", 0) or 0, len(source.shape))
    if sizes is None:
        part = -(-source.shape[axis] // len(node.outputs))
        sizes = [part] * (len(node.outputs) - 1)
        sizes.append(source.shape[axis] - sum(sizes))
    if len(sizes) != len(node.outputs) or sum(sizes) != source.shape[axis] or min(sizes) < 0:
        return None
    shapes = tuple((*source.shape[:axis], size, *source.shape[axis + 1 :]) for size in sizes)
    ends = np.cumsum(sizes)[:-1].tolist()
    return Made(shapes, source.dtype, lambda arrays: np.split(arrays[0], ends, axis), work=prod(source.shape))


def _gather(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source, indices = _first(operands), operands[1]
    if indices is None or indices.content is None:
        return None
    axis = axis_of(node.attributes.get_int("axis", 0) or 0, len(source.shape))
    places = indices.content
    if not _within(places, source.shape[axis]):
        return None
    shape = (*source.shape[:axis], *places.shape, *source.shape[axis + 1 :])
    return _one(source, shape, lambda array: np.take(array, places, axis))


def _within(places: Array, limit: int) -> bool:
    """Whether all indices, from the end where negative, lie within an axis of so many elements."""
    return not places.size or bool(-limit <= places.min() <= places.max() < limit)


def _gather_elements(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    """Also by indices too many to be looked at before: UserError when it is read where one is out of range."""
    source, indices = _first(operands), operands[1]
    axis = axis_of(node.attributes.get_int("axis", 0) or 0, len(source.shape))
    if indices is None or len(indices.shape) != len(source.shape):
        return None
    fits = [n <= size for i, (n, size) in enumerate(zip(indices.shape, source.shape, strict=True)) if i != axis]
    if not all(fits):
        return None
    shape, within = indices.shape, tuple(slice(n) for n in indices.shape[:axis])
    behind, name = tuple(slice(n) for n in indices.shape[axis + 1 :]), repr(node.name or "")

    def taken(arrays: Sequence[Array]) -> Sequence[Array]:
        limit, places = source.shape[axis], arrays[1]
        if not _within(places, limit):
            raise UserError(
                f"node {name} (GatherElements) reads beyond the {limit} elements of its table: a damaged model"
            )
        return [np.take_along_axis(arrays[0][(*within, slice(None), *behind)], places, axis)]

    return Made((shape,), source.dtype, taken, work=prod(shape))


def _scatter_nd(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    """What torch exports `w[:, ::2] = 0` as; places out of range are for the runtime to refuse."""
    source, places, updates = _first(operands), operands[1], operands[2]
    if places is None or updates is None or node.attributes.get_string("reduction", "none") != "none":
        return None
    depth = places.shape[-1] if places.shape else 0
    fits = depth <= len(source.shape) and updates.shape == (*places.shape[:-1], *source.shape[depth:])
    if not depth or not fits or places.content is None or updates.dtype != source.dtype:
        return None
    limits = np.array(source.shape[:depth])
    if ((places.content < -limits) | (places.content >= limits)).any():
        return None

    def scattered(arrays: Sequence[Array]) -> Sequence[Array]:
        made = np.array(arrays[0])
        made[tuple(np.moveaxis(arrays[1], -1, 0))] = arrays[2]
        return [made]

    return Made((source.shape,), source.dtype, scattered, work=prod(source.shape))


def _concat(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    known = [operand for operand in operands if operand is not None]
    axis = axis_of(node.attributes["axis"].as_int(), len(known[0].shape))
    rests = {(*operand.shape[:axis], *operand.shape[axis + 1 :]) for operand in known}
    if len(known) != len(operands) or len(rests) != 1:
        return None
    size = sum(operand.shape[axis] for operand in known)
    shape = (*known[0].shape[:axis], size, *known[0].shape[axis + 1 :])
    return Made((shape,), known[0].dtype, lambda arrays: [np.concatenate(list(arrays), axis)], work=prod(shape))


def _expand(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source, wanted = _first(operands), _numbers(operands, 1)
    if wanted is None:
        return None
    shape = np.broadcast_shapes(source.shape, tuple(wanted))
    return _one(source, shape, lambda array: np.broadcast_to(array, shape))


def _tile(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source, repeats = _first(operands), _numbers(operands, 1)
    if repeats is None or len(repeats) != len(source.shape) or min(repeats, default=1) < 0:
        return None
    shape = tuple(size * times for size, times in zip(source.shape, repeats, strict=True))
    return _one(source, shape, lambda array: np.tile(array, repeats))


def _pad(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    """With a constant; negative sizes, which cut off, are left to the runtime."""
    source, sizes, axes = _first(operands), _numbers(operands, 1), _numbers(operands, 3)
    value = operands[2] if len(operands) > 2 else None
    if sizes is None or node.attributes.get_string("mode", "constant") != "constant" or min(sizes, default=0) < 0:
        return None
    if value is not None and (value.content is None or value.content.size != 1 or value.dtype != source.dtype):
        return None
    rank, filler = len(source.shape), 0 if value is None or value.content is None else value.content.reshape(())
    places = range(rank) if axes is None else [axis_of(axis, rank) for axis in axes]
    around = [(0, 0)] * rank
    for axis, before, behind in zip(places, sizes[: len(places)], sizes[len(places) :], strict=True):
        around[axis] = (before, behind)
    shape = tuple(before + size + behind for size, (before, behind) in zip(source.shape, around, strict=True))
    return _one(source, shape, lambda array: np.pad(array, around, constant_values=filler))


def _clip(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source, ends = _first(operands), [*operands[1:3], None, None][:2]
    if source.dtype not in FLOATS or any(end is not None and (end.content is None or end.shape) for end in ends):
        return None
    low, high = (None if end is None else end.content for end in ends)

    def clipped(array: Array) -> Array:
        above = array if low is None else np.maximum(array, low)
        return np.asarray(above if high is None else np.minimum(above, high))

    return _one(source, source.shape, clipped)


def _softmax(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source = _first(operands)
    axis, kind = axis_of(node.attributes.get_int("axis", -1) or 0, len(source.shape)), source.dtype.numpy()
    if source.dtype not in FLOATS:
        return None

    def shares(array: Array) -> Array:
        wide = array.astype(np.float32) if source.dtype in HALVES else array
        powers = np.exp(wide - wide.max(axis=axis, keepdims=True))
        return np.asarray(powers / powers.sum(axis=axis, keepdims=True)).astype(kind)

    return _one(source, source.shape, shares, work=4 * prod(source.shape))


def _triangle(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    source, upper, offset = _first(operands), node.attributes.get_int("upper", 1), _numbers(operands, 1)
    if len(source.shape) < 2:
        return None
    function, k = np.triu if upper else np.tril, offset[0] if offset else 0
    return _one(source, source.shape, lambda array: np.asarray(function(array, k)))


def _elementwise(function: Callable[..., Array], on_integers: Callable[..., Array] | None = None) -> Rule:
    """Numbers of one type in, the same type out; shapes broadcast. Integers: small ones, of which sizes are made."""

    def rule(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
        known = [operand for operand in operands if operand is not None]
        dtype = _first(operands).dtype
        if len(known) != len(operands) or any(operand.dtype != dtype for operand in known):
            return None
        if dtype in INTEGERS and on_integers is not None and all(operand.content is not None for operand in known):
            return rule_of(on_integers, known)
        return rule_of(function, known) if dtype in FLOATS else None

    def rule_of(function: Callable[..., Array], known: Sequence[Operand]) -> Made:
        dtype = known[0].dtype
        shape, kind = np.broadcast_shapes(*(operand.shape for operand in known)), dtype.numpy()

        def computed(arrays: Sequence[Array]) -> Sequence[Array]:
            with np.errstate(all="ignore"):  # the runtime gives Inf and NaN in silence, too
                return [np.asarray(function(*arrays)).astype(kind, copy=False)]

        return Made((shape,), dtype, computed, work=prod(shape))

    return rule


def _where(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    test, a, b = operands
    if test is None or a is None or b is None or a.dtype != b.dtype:
        return None
    shape = np.broadcast_shapes(test.shape, a.shape, b.shape)
    return Made((shape,), a.dtype, lambda arrays: [np.where(*arrays)], work=prod(shape))


def _reduction(function: Callable[..., Array]) -> Rule:
    """function(array, axis=…, keepdims=True), computed in float32 for halves."""

    def rule(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
        source, axes = _first(operands), _numbers(operands, 1)
        if source.dtype not in FLOATS or "axes" in node.attributes:
            return None
        if not axes and node.attributes.get_int("noop_with_empty_axes", 0) == 1:
            return None
        rank = len(source.shape)
        over = {axis_of(axis, rank) for axis in axes} if axes else set(range(rank))
        kept = bool(node.attributes.get_int("keepdims", 1))
        shape = tuple(1 if i in over else n for i, n in enumerate(source.shape) if kept or i not in over)
        kind, order = source.dtype.numpy(), tuple(sorted(over))

        def reduced(array: Array) -> Array:
            with np.errstate(all="ignore"):
                wide = array.astype(np.float32) if source.dtype in HALVES else array
                return np.asarray(function(wide, axis=order, keepdims=True)).reshape(shape).astype(kind)

        return _one(source, shape, reduced, work=prod(source.shape))

    return rule


def _matmul(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    a, b = operands
    if a is None or b is None or a.dtype not in FLOATS or a.dtype != b.dtype or not a.shape or not b.shape:
        return None
    rows, columns = a.shape[-2:-1], b.shape[-1:] if len(b.shape) > 1 else ()
    if a.shape[-1] != b.shape[-2 if len(b.shape) > 1 else 0]:
        return None
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), *rows, *columns)
    return Made((shape,), a.dtype, _wide(np.matmul, a.dtype), work=prod(shape) * a.shape[-1] // 8)


def _gemm(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    a, b = operands[0], operands[1]
    known = [operand for operand in operands if operand is not None]
    if a is None or b is None or a.dtype not in FLOATS or any(operand.dtype != a.dtype for operand in known):
        return None
    flips = [node.attributes.get_int(name, 0) == 1 for name in ("transA", "transB")]
    (m, k), (k2, n) = (shape[::-1] if flip else shape for shape, flip in zip((a.shape, b.shape), flips, strict=True))
    alpha, beta = (np.float32(node.attributes.get_float(name, 1.0)) for name in ("alpha", "beta"))
    if k != k2 or len(known) < len(operands):
        return None

    def computed(a: Array, b: Array, c: Array | None = None) -> Array:
        product = alpha * np.matmul(a.T if flips[0] else a, b.T if flips[1] else b)
        return np.asarray(product if c is None or not beta else product + beta * c)

    return Made(((m, n),), a.dtype, _wide(computed, a.dtype), work=m * n * k // 8)


def _einsum(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    known = [operand for operand in operands if operand is not None]
    dtype, equation = known[0].dtype, node.attributes["equation"].as_string().replace(" ", "")
    if dtype not in FLOATS or len(known) < len(operands) or "..." in equation:
        return None
    terms, _, result = equation.partition("->")
    letters: dict[str, int] = {}
    for term, operand in zip(terms.split(","), known, strict=True):
        for letter, size in zip(term, operand.shape, strict=True):
            known_size = letters.get(letter, 1)
            if size != known_size and 1 not in (size, known_size):
                return None
            letters[letter] = size if known_size == 1 else known_size  # ones are repeated, as by the runtime
    if "->" not in equation:
        result = "".join(sorted(letter for letter in letters if terms.count(letter) == 1))
    sizes = [[letters[letter] for letter in term] for term in terms.split(",")]
    plain = all(list(operand.shape) == own for operand, own in zip(known, sizes, strict=True))
    optimize = len(known) > 1 and plain  # which repeats none
    function = _wide(lambda *arrays: np.einsum(f"{terms}->{result}", *arrays, optimize=optimize), dtype)
    return Made((tuple(letters[letter] for letter in result),), dtype, function, work=prod(letters.values()) // 8)


def _wide(function: Callable[..., Array], dtype: ir.DataType) -> Callable[[Sequence[Array]], Sequence[Array]]:
    """The function, computed in float32 for halves and rounded once."""
    kind = dtype.numpy()

    def computed(arrays: Sequence[Array]) -> Sequence[Array]:
        with np.errstate(all="ignore"):
            wide = [array.astype(np.float32) if dtype in HALVES else array for array in arrays]
            return [np.asarray(function(*wide)).astype(kind, copy=False)]

    return computed


def _quantize(node: ir.Node, operands: Sequence[Operand | None]) -> Made | None:
    """Codes of a constant, which training with fake quantization leaves to be computed: smaller than what they read."""
    source, scale = _first(operands), operands[1]
    zero = operands[2] if len(operands) > 2 else None
    if scale is None or zero is None or {source.dtype, scale.dtype} != {ir.DataType.FLOAT}:
        return None
    if zero.dtype not in (ir.DataType.INT8, ir.DataType.UINT8) or "block_size" in node.attributes:
        return None
    place = [1] * len(source.shape)
    if scale.shape not in ((), (1,)):
        axis = axis_of(node.attributes.get_int("axis", 1) or 0, len(source.shape))
        if scale.shape != (source.shape[axis],):
            return None
        place[axis] = scale.shape[0]
    limits, kind = np.iinfo(zero.dtype.numpy()), zero.dtype.numpy()

    def codes(arrays: Sequence[Array]) -> Sequence[Array]:
        x, s, z = arrays[0], arrays[1].reshape(place), arrays[2].reshape(place).astype(np.float32)
        with np.errstate(all="ignore"):
            return [np.clip(np.rint(x / s) + z, limits.min, limits.max).astype(kind)]

    return Made((source.shape,), zero.dtype, codes, work=prod(source.shape))


def _two_norm(array: Array, **where: Any) -> Array:
    return np.asarray(np.sqrt(np.square(array).sum(**where)))


def _square_sum(array: Array, **where: Any) -> Array:
    return np.asarray(np.square(array).sum(**where))


def _summed(*arrays: Array) -> Array:
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return total


def _divided(a: Array, b: Array) -> Array:
    """Integers, toward zero; ValueError by zero, for the runtime to refuse."""
    if not b.all():
        raise ValueError("division by zero")
    return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)))


def _largest(*arrays: Array) -> Array:
    return functools.reduce(np.maximum, arrays)


def _smallest(*arrays: Array) -> Array:
    return functools.reduce(np.minimum, arrays)


def _softplus(array: Array) -> Array:
    return np.asarray(np.logaddexp(array.dtype.type(0), array))


def _positive(array: Array) -> Array:
    return np.asarray(np.maximum(array, array.dtype.type(0)))


def _logistic(array: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-array)))


_MOVES: Mapping[str, Rule] = {
    "Identity": _identity,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Cast": _cast,
    "Shape": _shape,
    "Size": _shape,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "ScatterND": _scatter_nd,
    "Concat": _concat,
    "Expand": _expand,
    "Where": _where,
    "Trilu": _triangle,
    "Clip": _clip,
    "Softmax": _softmax,
    "Tile": _tile,
    "Pad": _pad,
    "QuantizeLinear": _quantize,
}
# No Sin and Cos: what they make of constants is a table of a transform, not a weight, and means to be exact.
_ARITHMETIC: Mapping[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Sum": _summed,
    "Neg": np.negative,
    "Abs": np.abs,
    "Sqrt": np.sqrt,
    "Exp": np.exp,
    "Log": np.log,
    "Tanh": np.tanh,
    "Sigmoid": _logistic,
    "Reciprocal": np.reciprocal,
    "Round": np.rint,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Sign": np.sign,
    "Relu": _positive,
    "Softplus": _softplus,
    "Max": _largest,
    "Min": _smallest,
}
_ON_INTEGERS: Mapping[str, Callable[..., Array]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": _divided,
}
_REDUCTIONS: Mapping[str, Callable[..., Array]] = {
    "ReduceSum": np.sum,
    "ReduceMean": np.mean,
    "ReduceMax": np.max,
    "ReduceMin": np.min,
    "ReduceL2": _two_norm,
    "ReduceSumSquare": _square_sum,
}
_RULES: Mapping[str, Rule] = {
    **_MOVES,
    **{name: _elementwise(function, _ON_INTEGERS.get(name)) for name, function in _ARITHMETIC.items()},
    **{name: _reduction(function) for name, function in _REDUCTIONS.items()},
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Einsum": _einsum,
    "BatchNormalization": batch_norm,
    "InstanceNormalization": instance_norm,
    "LayerNormalization": layer_norm,
}
