"""What the attentions of a model read beside queries, keys and values: lengths, padding, tables of rotations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.contrib.inputs import Inputs
from qcompile.passes.contrib.rotary import Rotated
from qcompile.passes.graph import Names, add_initializer
from qcompile.passes.prepare.sizes import named_sizes

_INT32, _INT64, _BOOL = (kind.value for kind in (ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL))


@dataclass
class Around:
    """Nodes that several attentions read, each made once, before the first one that does.

    padding: see `attention.FuseAttention`. place: before it nodes are put.
    moved: by the name of a norm, the one that is taken elsewhere in its place; it has that name once the other is gone.
    """

    graph: ir.Graph
    inputs: Inputs
    names: Names
    padding: bool
    place: ir.Node = field(init=False)
    moved: dict[str, ir.Node | None] = field(default_factory=dict)
    _made: dict[object, ir.Value] = field(default_factory=dict)

    def op(self, op_type: str, operands: Sequence[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """The output of a new node, both of a fresh name."""
        node = ir.node(op_type, operands, attributes, name=self.names.fresh(name))
        node.outputs[0].name = node.name
        self.place.prepend(node)
        return node.outputs[0]

    def constant(self, numbers: float | Sequence[float], kind: npt.DTypeLike = np.int64) -> ir.Value:
        """A small constant of integers, or of another type."""
        array = np.array(numbers, kind)
        told = "_".join(str(number) for number in array.reshape(-1).tolist())
        return self._once(
            ("constant", array.tobytes(), array.shape, array.dtype.str),
            lambda: add_initializer(self.graph, self.names.fresh(f"attention.{told}"), ir.tensor(array)),
        )

    def _once(self, key: object, make: Callable[[], ir.Value]) -> ir.Value:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    # Queries, keys and values

    def flat(self, x: ir.Value, width: int) -> ir.Value:
        """Heads (batch, heads, rows, …) side by side, (batch, rows, width): as they were before a Transpose."""
        return self._once(("flat", x), lambda: self._flat(x, width))

    def _flat(self, x: ir.Value, width: int) -> ir.Value:
        apart = self._turned_back(x)
        node = apart.producer()
        before = node.inputs[0] if node is not None and node.op_type == "Reshape" else None
        if before is not None and before.shape is not None and list(before.shape)[2:] == [width]:
            return before
        return self.op("Reshape", [apart, self.constant([0, 0, width])], f"{x.name}.flat")

    def _turned_back(self, x: ir.Value) -> ir.Value:
        """Heads (batch, rows, heads, width). A norm of the width is taken before the Transpose."""
        before = _before_turn(x)
        if before is not None:
            return before
        node = x.producer()
        normed = node is not None and node.op_type == "SimplifiedLayerNormalization"
        before = _before_turn(node.inputs[0]) if node is not None and normed else None
        if node is None or before is None:
            return self.op("Transpose", [x], f"{x.name}.rows", perm=[0, 2, 1, 3])
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        made = self.op(node.op_type, [before, *node.inputs[1:]], f"{x.name}.normed", **attributes)
        self.moved[str(node.name)] = made.producer()
        return made

    # Lengths

    @property
    def total(self) -> ir.Value:
        """(1,): how many positions the caches will hold."""
        if self.inputs.mask is not None:
            return self._once("total", lambda: self.op("Shape", [self.inputs.mask], "attention.total", start=1, end=2))
        cached = self._once(
            "cached", lambda: self.op("Shape", [self.inputs.pasts[0]], "attention.cached", start=2, end=3)
        )
        return self._once("total", lambda: self.op("Add", [cached, self.rows], "attention.total"))

    @property
    def rows(self) -> ir.Value:
        """(1,): rows of this run."""
        tokens = self.inputs.tokens[0]
        return self._once("rows", lambda: self.op("Shape", [tokens], "attention.rows", start=1, end=2))

    @property
    def past(self) -> ir.Value:
        """(1,): how many positions they hold now."""
        return self._once("past", lambda: self.op("Sub", [self.total, self.rows], "attention.past"))

    @property
    def first(self) -> ir.Value:
        """(1,): the first position that a row of this run may have.

        GroupQueryAttention counts a sequence's positions by `seqlens`. Where those end apart, the next rows of the
        shortest one stand before `past`; a first prompt has all of its positions, padded or not.
        """
        if self._ends_together:
            return self.past
        return self._once("first", self._first)

    def _first(self) -> ir.Value:
        shortest = self.op("ReduceMin", [self._lengths], "attention.shortest", keepdims=1)
        before = self.op("Sub", [shortest, self.rows], "attention.before_rows")
        return self.op("Max", [before, self.constant([0])], "attention.first")

    @property
    def _ends_together(self) -> bool:
        """Whether all sequences of a batch count as equally long."""
        return self.padding or self.inputs.mask is None

    @property
    def _lengths(self) -> ir.Value:
        """(batch,): positions of each sequence, where its mask says them."""
        return self._once("lengths", self._summed)

    def _summed(self) -> ir.Value:
        mask = self.inputs.mask
        if mask is not None and mask.dtype != ir.DataType.INT64:
            mask = self.op("Cast", [mask], "attention.mask", to=_INT64)
        return self.op("ReduceSum", [mask, self.constant([1])], "attention.lengths", keepdims=0)

    @property
    def length(self) -> ir.Value:
        """total_sequence_length: a number, int32."""
        number = self._once("number", lambda: self.op("Squeeze", [self.total], "attention.total_number"))
        return self._once("length", lambda: self.op("Cast", [number], "attention.total_length", to=_INT32))

    @property
    def seqlens(self) -> ir.Value:
        """seqlens_k, (batch,), int32: the last position of each sequence."""
        return self._once("seqlens", self._seqlens)

    def _seqlens(self) -> ir.Value:
        one = self.constant([1])
        if self._ends_together:
            batch = self.op("Shape", [self.inputs.tokens[0]], "attention.batch", start=0, end=1)
            last = self.op("Sub", [self.total, one], "attention.last")
            ends = self.op("Expand", [last, batch], "attention.ends")
        else:
            ends = self.op("Sub", [self._lengths, one], "attention.ends")
        return self.op("Cast", [ends], "attention.seqlens_k", to=_INT32)

    # Padding

    def bias(self, kind: ir.DataType) -> ir.Value | None:
        """attention_bias, (batch, 1, rows, total): the lowest number where a position is padding, else 0."""
        if not self.padding or self.inputs.mask is None:
            return None
        return self._once(("bias", kind), lambda: self._bias(kind))

    def _bias(self, kind: ir.DataType) -> ir.Value:
        seen = self.op("Cast", [self.inputs.mask], "attention.seen", to=_BOOL)
        wide = self.op("Unsqueeze", [seen, self.constant([1, 2])], "attention.seen_wide")
        zero, low = (self.constant(n, kind.numpy()) for n in (0.0, float(np.finfo(kind.numpy()).min)))
        own = self.op("Where", [wide, zero, low], "attention.padding")
        one = self.constant([1])
        shape = self.op("Concat", [one, one, self.rows, one], "attention.bias_shape", axis=0)
        return self.op("Expand", [own, shape], "attention.bias")

    # Rotations

    @property
    def _told(self) -> bool:
        """Whether position_ids are looked at."""
        return self.padding and self.inputs.positions is not None

    def tables(self, turned: Rotated) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
        """cos_cache, sin_cache (at least total, pairs) and position_ids: which of their rows a row of this run takes.

        They hold the rows from the first one of this run, and zeros for others, which are never read: a table of all
        positions that a model may meet would be long, and its end is not in the graph.
        """
        if turned.cos is None or turned.sin is None:
            return None, None, None
        cos, sin = (self._table(value, turned) for value in (turned.cos, turned.sin))
        return cos, sin, self._once("picked", self._picked) if self._told else None

    def _table(self, value: ir.Value, turned: Rotated) -> ir.Value:
        return self._once(("table", value, turned.first, turned.x.dtype), lambda: self._made_table(value, turned))

    def _made_table(self, value: ir.Value, turned: Rotated) -> ir.Value:
        own, name, pairs = self._copied(value), f"attention.{value.name}", turned.pairs
        kind = turned.x.dtype or ir.DataType.FLOAT
        if value.dtype not in (None, kind):
            own = self.op("Cast", [own], f"{name}.cast", to=kind.value)
        ends = [self.constant([number]) for number in (turned.first, 2**31 - 1, -1, turned.step)]
        rows = self.op("Reshape", [self.op("Slice", [own, *ends], f"{name}.pairs"), self.constant([-1, pairs])], name)
        count = self.total if self._told else self.first
        shape = self.op("Concat", [count, self.constant([pairs])], f"{name}.rest_shape", axis=0)
        zero = ir.tensor(np.zeros(1, kind.numpy()))
        rest = self.op("ConstantOfShape", [shape], f"{name}.rest", value=zero)
        return self.op("Concat", [rows, rest] if self._told else [rest, rows], f"{name}.cache", axis=0)

    def _picked(self) -> ir.Value:
        """(batch, rows): the numbers of the first rows of `_table`, one after the other."""
        shape = self.op("Shape", [self.positions], "attention.tokens_shape")
        count = self.op("ReduceProd", [shape], "attention.tokens", keepdims=0)
        flat = self.op("Range", [self.constant(0), count, self.constant(1)], "attention.token_numbers")
        return self.op("Reshape", [flat, shape], "attention.picked")

    @property
    def positions(self) -> ir.Value:
        """By which rows are turned, (batch or 1, rows).

        GroupQueryAttention turns all sequences of a first prompt alike: row r by the r-th entry of the first one. So
        positions count padding in front of a sequence, which position_ids leave out, or count as well; what else these
        leave out or add stays. Scores depend on differences alone: they are the same.
        """
        return self._once("positions", self._positions)

    def _positions(self) -> ir.Value:
        given, mask = self.inputs.positions, self.inputs.mask
        if self._told and given is not None and mask is None:
            return given
        ends = [self.op("Squeeze", [own], "attention.end") for own in (self.first, self.total)]
        counted = self.op("Range", [*ends, self.constant(1)], "attention.counted")
        counted = self.op("Unsqueeze", [counted, self.constant([0])], "attention.counted_rows")
        if not self._told or given is None:
            return counted
        seen = self.op("Cast", [mask], "attention.seen_number", to=_INT64)
        lead = self.op("ArgMax", [seen], "attention.lead", axis=1, keepdims=1)
        moved = self.op("Add", [given, lead], "attention.moved")
        padded = self.op("Cast", [lead], "attention.padded_in_front", to=_BOOL)
        least = self.op("Min", [moved, counted], "attention.moved_at_most")
        moved = self.op("Where", [padded, least, moved], "attention.moved_by")
        new = self.op("Slice", [seen, self.past, self.total, self.constant([1])], "attention.seen_rows")
        real = self.op("Cast", [new], "attention.real", to=_BOOL)
        return self.op("Where", [real, moved, counted], "attention.turned_by")

    def _copied(self, value: ir.Value) -> ir.Value:
        """What a value would be if position_ids were `positions`."""
        if value is self.inputs.positions:
            return self.positions
        node = value.producer()
        return value if node is None else self._once(("copy", value), lambda: self._copy(node, value))

    def _copy(self, node: ir.Node, value: ir.Value) -> ir.Value:
        operands = [self._copied(own) if own is not None else None for own in node.inputs]
        if all(new is old for new, old in zip(operands, node.inputs, strict=True)):
            return value
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        return self.op(node.op_type, operands, f"attention.{value.name}", **attributes)


def _before_turn(x: ir.Value | None) -> ir.Value | None:
    """(batch, rows, heads, width) of which x is the Transpose (batch, heads, rows, width)."""
    node = x.producer() if x is not None else None
    if node is None or node.op_type != "Transpose" or tuple(node.attributes.get_ints("perm", ())) != (0, 2, 1, 3):
        return None
    return node.inputs[0]


def heads_of(x: ir.Value, width: int | str | None) -> int | None:
    """How many heads (batch, heads, rows, width) has, by its shape or by that of what is cut into them."""
    told = named_sizes(x)[1]
    if isinstance(told, int):
        return told
    apart = _before_turn(x)
    node = apart.producer() if apart is not None else None
    if node is not None and node.op_type == "SimplifiedLayerNormalization" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    whole = named_sizes(node.inputs[0]) if node is not None and node.op_type == "Reshape" and node.inputs[0] else []
    if len(whole) != 3 or not isinstance(whole[2], int) or not isinstance(width, int) or whole[2] % width:
        return None
    return whole[2] // width
