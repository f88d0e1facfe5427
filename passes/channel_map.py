"""Where the channels of a value go: index arrays carried through the operators that only move or mix positions.

An index array says which channel of a producer each entry of a value comes from. It has at most the value's rank and is
aligned on the right, as in broadcasting; an axis along which the channel does not depend on the position (batch,
sequence, every symbolic size) has size 1. Starting from ``arange(channels)`` behind a linear, the array that arrives at
the next linear is the channel map between the two, whatever reshapes, transposes and head repetitions lie between.
"""

import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Indices = npt.NDArray[np.int64]
Size = int | str | None

# Elementwise, with f(x / s) = f(x) / s for every s > 0 (Add: where the other operand is divided as well).
_HOMOGENEOUS = {"Identity", "Cast", "Relu", "LeakyRelu", "Mul", "Div", "Add"}
# Named in reasons, because users will look for them.
_CURVED = {"Gelu", "FastGelu", "QuickGelu", "BiasGelu", "Erf", "Tanh", "Sigmoid", "HardSigmoid", "HardSwish", "Elu"}
_CURVED |= {"Softmax", "Softplus", "Exp", "Pow", "Sqrt", "Mish", "Swish", "Clip", "Selu", "Celu"}


def sizes(value: ir.Value | None) -> list[Size] | None:
    """The sizes of a value: an int, a symbol's name, or None for an unknown size; None altogether without a rank."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def step(index: Indices, node: ir.Node, position: int, output: ir.Value) -> Indices | str:
    """The index array of `output`, given the one of input `position` of a followed node, or why it cannot be told."""
    operator = node.op_type
    if operator in _HOMOGENEOUS:
        return index
    rule = _RULES[operator]
    source, target = sizes(node.inputs[position]), sizes(output)
    if source is None or target is None:
        return f"a shape at {operator} {node.name} is unknown"
    try:
        full = np.broadcast_to(index, _ones(source))
        return rule(full, node, position, output)
    except (ValueError, IndexError, TypeError) as error:
        return f"{operator} {node.name} cannot be followed: {error}"


def refusal(node: ir.Node) -> str:
    """Why no factor can be followed through this operator, or an empty string."""
    if node.op_type in _CURVED:
        return f"{node.op_type} {node.name} is not homogeneous"
    if node.domain != "" or not (node.op_type in _HOMOGENEOUS or node.op_type in _RULES):
        return f"{node.op_type} {node.name} is not followed"
    return ""


def selects(node: ir.Node) -> bool:
    """Whether the node only picks some of the channels of its input, so that several such nodes may share it."""
    return node.domain == "" and node.op_type in ("Slice", "Split", "Gather")


def last_axis(index: Indices, k: int) -> Indices | str:
    """The index array of a value (…, k) as (k,), or why its channels depend on the position."""
    if index.shape[-1] != k:
        return f"{index.shape[-1]} channels arrive where {k} are expected"
    rows = index.reshape(-1, k)
    if (rows != rows[:1]).any():
        return "the channel depends on the position"
    return np.array(rows[0])


def _ones(shape: list[Size]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else 1 for size in shape)


def _runs(shape: list[Size]) -> list[int | tuple[Size, ...]]:
    """The shape as alternating runs: the product of neighbouring static sizes, the names of neighbouring others."""
    runs: list[int | tuple[Size, ...]] = []
    for static, group in itertools.groupby((size for size in shape if size != 1), lambda size: isinstance(size, int)):
        members = tuple(group)
        runs.append(int(np.prod([size for size in members if isinstance(size, int)])) if static else members)
    return runs


def _reshape(index: Indices, node: ir.Node, position: int, output: ir.Value) -> Indices:
    """Row-major order is kept, so runs of static sizes may be regrouped; data never crosses a symbolic axis."""
    if position != 0:
        raise ValueError("it is the shape operand")
    source, target = sizes(node.inputs[0]) or [], sizes(output) or []
    before, after = _runs(source), _runs(target)
    if [run if isinstance(run, int) else None for run in before] != [r if isinstance(r, int) else None for r in after]:
        raise ValueError(f"{source} to {target} mixes static and symbolic axes")
    symbolic = [(a, b) for a, b in zip(before, after, strict=True) if not isinstance(a, int)]
    unequal = sum(a != b or None in a for a, b in symbolic)
    if len(symbolic) > 1 and unequal > 1:  # one unknown run follows from the total; two could trade places
        raise ValueError(f"{source} to {target} has too many unknown sizes")
    return index.reshape(_ones(target))


def _transpose(index: Indices, node: ir.Node, position: int, output: ir.Value) -> Indices:
    perm = node.attributes.get("perm")
    return index.transpose(None if perm is None else list(perm.as_ints()))


def _expand(index: Indices, node: ir.Node, position: int, output: ir.Value) -> Indices:
    return np.broadcast_to(index, _ones(sizes(output) or []))


def _matmul(index: Indices, node: ir.Node, position: int, output: ir.Value) -> Indices:
    """Probabilities times values: rows are mixed, so all of them must hold the same channels."""
    if position != 1:
        raise ValueError("a product over the channels")
    if (index != index[..., :1, :]).any():
        raise ValueError("it mixes rows of different channels")
    return np.broadcast_to(index[..., :1, :], _ones(sizes(output) or []))


def _slice(index: Indices, node: ir.Node, position: int, output: ir.Value) -> Indices:
    starts, ends = _ints(node, 1), _ints(node, 2)
    axes = _ints(node, 3, list(range(len(starts))))
    steps = _ints(node, 4, [1] * len(starts))
    for start, end, axis, stride in zip(starts, ends, axes, steps, strict=True):
        if index.shape[axis] == 1:
            continue  # symbolic, or nothing to choose from
        if stride < 1:
            raise ValueError("a backward step")
        cut = [slice(None)] * index.ndim
        cut[axis] = slice(start, end, stride)
        index = index[tuple(cut)]
    return index


def _split(index: Indices, node: ir.Node, position: int, output: ir.Value) -> Indices:
    axis = node.attributes.get_int("axis", 0)
    if index.shape[axis] == 1:
        return index
    widths = [(sizes(value) or [])[axis] for value in node.outputs]
    known = [width for width in widths if isinstance(width, int)]
    if len(known) != len(widths) or sum(known) != index.shape[axis]:
        raise ValueError("the parts' sizes are unknown")
    place = next(i for i, value in enumerate(node.outputs) if value is output)
    begin = sum(known[:place])
    return np.take(index, np.arange(begin, begin + known[place]), axis)


def _gather(index: Indices, node: ir.Node, position: int, output: ir.Value) -> Indices:
    chosen = node.inputs[1]
    if position != 0 or chosen is None or chosen.const_value is None:
        raise ValueError("the indices are not constant")
    axis = node.attributes.get_int("axis", 0)
    numbers = chosen.const_value.numpy()
    return np.take(index, numbers if index.shape[axis] > 1 else np.zeros_like(numbers), axis)


def _attention(index: Indices, node: ir.Node, position: int, output: ir.Value) -> Indices:
    """Query head h attends with value head h // (heads / value heads), as ONNX's Attention (opset 23) repeats them."""
    if position != 2 or output is not node.outputs[0]:
        raise ValueError("only its value operand reaches the output linearly")
    if len(node.inputs) > 5 and node.inputs[5] is not None:
        raise ValueError("it also reads a cache")
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise ValueError("it also writes a cache")
    target = _ones(sizes(output) or [])
    if index.ndim == 4:  # (batch, value heads, rows, width) to (batch, heads, rows, width)
        return _matmul(np.repeat(index, target[1] // index.shape[1], axis=1), node, 1, output)
    heads, value_heads = (node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads"))
    rows = index[:, :1]
    if not heads or not value_heads or (index != rows).any():
        raise ValueError("its heads are unknown")
    split = rows.reshape(rows.shape[0], 1, value_heads, -1)
    return np.repeat(split, heads // value_heads, axis=2).reshape(rows.shape[0], 1, -1)


def _ints(node: ir.Node, position: int, default: list[int] | None = None) -> list[int]:
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None and default is not None:
        return default
    if value is None or value.const_value is None:
        raise ValueError("its parameters are not constant")
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


_RULES: dict[str, Callable[[Indices, ir.Node, int, ir.Value], Indices]] = {
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Unsqueeze": _reshape,
    "Squeeze": _reshape,
    "Transpose": _transpose,
    "Expand": _expand,
    "MatMul": _matmul,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Attention": _attention,
}
