"""What a mask lets through, told by its numbers."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qcompile.passes.contrib.inputs import Inputs, filled
from qcompile.passes.contrib.probing import Array, Given, ancestors, evaluate
from qcompile.passes.contrib.written import Written
from qcompile.passes.graph import is_constant, small_array
from qcompile.passes.masks import FILL
from qcompile.passes.prepare.sizes import named_sizes

_FAR = 200_000  # cached positions at which a window shows, if there is one
# batch, rows, past: a prompt, a prompt behind another, one token.
_CASES = ((2, 5, 0), (2, 3, 4), (3, 1, 6))
# To what names of sizes are set, from the first one on, to see what follows from sizes alone.
_SIZES = (2, 5)
_HELD = 1 << 22  # elements of a mask that is a constant
_SHAPE = 8  # elements of a constant that is a shape, or axes
_UNIFORM = {"Shape", "Concat", "Gather", "Slice", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Identity"}
_UNIFORM |= {"Where", "And", "Or", "Not", "Cast", "ConstantOfShape", "Add", "Sub", "Mul", "Equal", "Max", "Min"}
_UNKNOWN = "its mask cannot be computed from the inputs' sizes and the padding mask"


@dataclass(frozen=True)
class Lets:
    """A mask lets position t through to row s: t <= s, t > s - window (0: all), and if `padding`, where t is none."""

    window: int
    padding: bool


def lets(own: Written, inputs: Inputs) -> Lets | str:
    """What the mask of an attention lets through, or why it is none of that kind."""
    if own.mask is None:
        return "it has no mask: every row sees all positions"
    mask = _Mask(own.mask, own.k, inputs, own.hides)
    far = mask.seen(1, 2, _FAR)
    if isinstance(far, str):
        return far
    counts = far.reshape(2, -1).sum(1)
    window = 0 if counts[1] == _FAR + 2 else int(counts[1])
    if not np.array_equal(far, _expected(1, 2, _FAR, window, None)):
        return "its mask is neither causal nor a window"
    for padding in (True, False):
        if all(mask.agrees(case, window, padding=padding) for case in _CASES):
            return Lets(window, padding)
    return "its mask is neither causal nor a window"


def hides_nothing(mask: ir.Value, graph: ir.Graph, *, hides: bool) -> bool:
    """Whether a mask lets every row see all positions, whatever the inputs hold: exporters write these out, too.

    It follows from the inputs' sizes alone then. What small sizes show holds for large ones where the mask's own are
    fixed, or where nothing before it tells positions apart, as a window would.
    """
    held = small_array(mask, _HELD)
    if held is not None:
        return _is_visible(held, hides=hides)
    nodes, sizes = ancestors(mask), named_sizes(mask)[-2:]
    fixed = len(sizes) == 2 and all(isinstance(size, int) for size in sizes)
    if nodes is None or not (fixed or all(_is_uniform(node) for node in nodes)):
        return False
    names = dict.fromkeys(n for value in graph.inputs for n in named_sizes(value) if isinstance(n, str))
    for first in _SIZES:
        found = evaluate([mask], Given({}, {name: first + i for i, name in enumerate(names)}))
        if found is None or not _is_visible(found[0], hides=hides):
            return False
    return True


def _is_visible(numbers: Array, *, hides: bool) -> bool:
    return bool((numbers != hides if numbers.dtype.kind == "b" else numbers == 0).all())


def _is_uniform(node: ir.Node) -> bool:
    """Whether what a node gives is alike at all positions if what it is given is: no counting, and no table."""
    tables = [value.const_value for value in node.inputs if value is not None and is_constant(value)]
    large = any(tensor is None or tensor.size > _SHAPE for tensor in tables)
    return node.op_type in _UNIFORM and not large


@dataclass(frozen=True, eq=False)
class _Mask:
    """keys: what it is long, (batch, heads, past and rows, width); some masks are cut to that."""

    value: ir.Value
    keys: ir.Value
    inputs: Inputs
    hides: bool

    def agrees(self, case: tuple[int, int, int], window: int, *, padding: bool) -> bool:
        """Whether it lets through what it should, with padding on the left, on the right, and in between, whatever the
        tokens are, and wherever their positions begin.
        """
        batch, rows, past = case
        padded = np.ones((batch, past + rows), bool)
        if self.inputs.mask is not None:
            padded[0, 0] = padded[1, -1] = padded[1, past // 2] = False
        found, other = (self.seen(batch, rows, past, padded, other=other) for other in (False, True))
        if isinstance(found, str) or isinstance(other, str):
            return False
        wanted = _expected(batch, rows, past, window, padded if padding else None)
        # A row that nothing is let through to is padding itself; what it holds does not matter.
        somewhere = wanted.any(-1)
        return all(np.array_equal(seen[somewhere], wanted[somewhere]) for seen in (found, other))

    def seen(
        self, batch: int, rows: int, past: int, padded: Array | None = None, *, other: bool = False
    ) -> Array | str:
        """What it lets through, (batch, rows, past + rows), or why that cannot be told. other: see `Inputs.at`."""
        keys = {self.keys: filled(self.keys, [batch, None, past + rows, None], 0)}
        given = evaluate([self.value], Given.of({**self.inputs.at(batch, rows, past, padded, other=other), **keys}))
        if given is None or given[0].ndim not in (2, 3, 4) or given[0].dtype.kind not in "fb":
            return _UNKNOWN
        numbers = given[0]
        seen = numbers != self.hides if numbers.dtype.kind == "b" else numbers == 0
        if numbers.dtype.kind == "f" and not (seen | (numbers <= -FILL)).all():
            return "its mask holds other numbers than zeros and a lowest one, as of relative positions"
        if seen.ndim == 4:
            if (seen != seen[:, :1]).any():
                return "its mask is another one for each head"
            seen = seen[:, 0]
        try:
            return np.broadcast_to(seen, (batch, rows, past + rows))
        except ValueError:
            return _UNKNOWN


def _expected(batch: int, rows: int, past: int, window: int, padded: Array | None) -> Array:
    row, position = np.arange(past, past + rows)[:, None], np.arange(past + rows)[None]
    causal = (position <= row) & ((position > row - window) if window else True)
    return np.broadcast_to(causal & (padded[:, None] if padded is not None else True), (batch, rows, past + rows))
