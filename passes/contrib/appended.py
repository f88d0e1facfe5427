"""Caches that a Concat lengthens: in codes, by standard operators alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.passes.contrib.codes import CacheCodes, codes_of
from qcompile.passes.contrib.inputs import Inputs
from qcompile.passes.contrib.rotary import rotated
from qcompile.passes.contrib.written import Written, written
from qcompile.passes.graph import Names, add_initializer
from qcompile.passes.observers.caches import CachePeaks
from qcompile.passes.prepare.sizes import named_sizes
from qcompile.passes.state import node_state, set_node

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True, eq=False)
class Appended:
    """present = Concat(past, new) along the rows of a cache (batch, heads, rows, width), input and output of the graph.

    pairs, interleaved: how `new` was turned by its position, as `CachePeaks` has it.
    """

    node: ir.Node
    past: ir.Value
    new: ir.Value
    pairs: int = 0
    interleaved: bool = False

    @classmethod
    def of(cls, node: ir.Node, inputs: Inputs | str) -> "Appended | str":
        """Of a Concat along the rows whose first operand is a cache (`is_cache`), or why that stays in floats."""
        present = node.outputs[0]
        past, new = (*node.inputs, None, None)[:2]
        if past is None or new is None or len(node.inputs) != 2 or not present.is_graph_output():
            return "what the graph gives back is not the cache and the rows of a run"
        sizes = named_sizes(new)
        known = len(sizes) == 4 and isinstance(sizes[1], int) and isinstance(sizes[3], int)
        if not known:
            return "how many heads it has, and how wide they are, is not known"
        if codes_of(past) is not None or past.dtype not in FLOATS or new.dtype != past.dtype:
            return "it holds no floats"
        others = [use.node.op_type for use in past.uses() if use.node is not node and use.node.op_type != "Shape"]
        if others or past.is_graph_output():
            return f"{'a ' + others[0] if others else 'the graph'} reads it, too"
        turned = rotated(new, inputs)
        return turned if isinstance(turned, str) else cls(node, past, new, turned.pairs, turned.interleaved)

    @property
    def presents(self) -> tuple[str]:
        """The name of the graph output."""
        return (str(self.node.outputs[0].name),)

    @property
    def observers(self) -> list[CachePeaks]:
        """Of what the graph gives back."""
        width = named_sizes(self.new)[3]
        assert isinstance(width, int)
        return [CachePeaks(self.presents[0], width, self.pairs, interleaved=self.interleaved)]


class Between:
    """Puts caches of one graph between standard operators: new rows become codes, and what reads them floats again.

    New rows are divided by their scales, which are few, and quantized in steps of 1; the whole cache is cast to floats.
    What these miss is multiplied where that is little: of keys the queries, q (s k) = (s q) k, of values what attention
    gives of them. Where something else reads the cache, all of it is multiplied.
    No DequantizeLinear: ONNX Runtime 1.32 would put pairs of Q and DQ behind the reshapes that read it, and fails to
    load some of these (output_dtype INT8, zero point uint8). Nor blocks along the rows, which have scales of channels:
    it moves Transposes through them, and leaves the axes of the scales behind.
    used: whether it has; the graph needs to be sorted then.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph, self.names, self.used = model.graph, Names(model), False
        self._found = [own for own in written(model.graph) if isinstance(own, Written)]
        self._twins: dict[ir.Value, list[ir.Node]] = {}
        for node in model.graph:
            for value in twin.activations if (twin := node_state(node).twin) is not None else ():
                self._twins.setdefault(value, []).append(node)
        self._steps: dict[ir.DataType, list[ir.Value]] = {}

    def store(self, own: Appended, codes: CacheCodes) -> None:
        """Have past, present and what is appended be codes."""
        self.used = True
        present, name, kind = own.node.outputs[0], own.presents[0], own.past.dtype or ir.DataType.FLOAT
        readers = [use for use in present.uses() if use.node.op_type != "Shape"]
        scale = self._constant(f"{name}.scale", codes.tensor if codes.scale.ndim else codes.scale, kind)
        divided = self._op("Div", [own.new, scale], f"{name}.steps", like=own.new)
        rows = self._op("QuantizeLinear", [divided, *self._step(kind, codes)], f"{name}.codes", like=own.new)
        own.node.replace_input_with(1, rows)
        rows.type = own.past.type = present.type = ir.TensorType(codes.dtype)
        if readers:
            decoded = self._floats(present, kind)
            if len(readers) > 1 or not self._beside(present, codes, kind):
                decoded = self._op("Mul", [decoded, scale], f"{name}.scaled", like=decoded)
            self._read(present, decoded, readers)

    def decode(self, present: ir.Value, codes: CacheCodes, kind: ir.DataType) -> None:
        """Have what reads a cache that an operator has made codes read floats of a type, as it did."""
        readers = [use for use in present.uses() if use.node.op_type != "Shape"]
        if readers:
            self.used = True
            scale = self._constant(f"{present.name}.scale_of_readers", codes.tensor, kind)
            decoded = self._floats(present, kind)
            self._read(present, self._op("Mul", [decoded, scale], f"{present.name}.scaled", like=decoded), readers)

    def _floats(self, present: ir.Value, kind: ir.DataType) -> ir.Value:
        """The codes of a cache in floats."""
        decoded = self._op("Cast", [present], f"{present.name}.floats", like=present, to=int(kind))
        decoded.type = ir.TensorType(kind)
        return decoded

    def _read(self, old: ir.Value, new: ir.Value, readers: Sequence[Any]) -> None:
        """Have readers of one value, and the float nodes that integer ones stand for, read another."""
        for use in readers:
            use.node.replace_input_with(use.idx, new)
        for node in self._twins.pop(old, ()):
            twin = node_state(node).twin
            assert twin is not None
            set_node(node, twin=replace(twin, inputs=tuple(new if value is old else value for value in twin.inputs)))
            self._twins.setdefault(new, []).append(node)

    def _step(self, kind: ir.DataType, codes: CacheCodes) -> list[ir.Value]:
        """Scale 1 and zero point 0."""
        if kind not in self._steps:
            zero = add_initializer(self.graph, "caches.zero_point", ir.tensor(np.zeros((), codes.dtype.numpy())))
            self._steps[kind] = [self._constant("caches.step", np.ones(()), kind), zero]
        return self._steps[kind]

    def _beside(self, present: ir.Value, codes: CacheCodes, kind: ir.DataType) -> bool:
        """Multiply what meets the channels of a cache, instead of these; whether that can be done."""
        found = next((own for own in self._found if present in (own.k, own.v)), None)
        heads = named_sizes(found.q)[1] if found is not None else None
        groups = len(codes.scale) if codes.scale.ndim else 1
        if found is None or not found.alone or not isinstance(heads, int) or heads % groups:
            return False
        each = np.repeat(codes.scale, heads // groups, axis=0) if codes.scale.ndim else codes.scale
        if present is found.v:
            x, scales = found.result, each.reshape(-1) if each.ndim else each  # heads side by side
        else:
            x, scales = found.q, each[None, :, None] if each.ndim else each
            if sum(use.node.op_type != "Shape" for use in x.uses()) != 1:
                return False
        if x.is_graph_output():
            return False
        kind = x.dtype or kind  # of a decoder in half precision queries may be of single
        self._scaled(x, self._constant(f"{present.name}.scale_of_heads", scales, kind))
        return True

    def _scaled(self, x: ir.Value, scales: ir.Value) -> None:
        """Have what reads x, but for its shape, read x times the scales."""
        readers = [use for use in x.uses() if use.node.op_type != "Shape"]
        made = self._op("Mul", [x, scales], f"{x.name}.scaled", like=x)
        self._read(x, made, readers)

    def _constant(self, name: str, array: npt.NDArray[np.floating], kind: ir.DataType) -> ir.Value:
        return add_initializer(self.graph, name, ir.tensor(np.asarray(array, kind.numpy())))

    def _op(
        self, op_type: str, operands: Sequence[ir.Value], name: str, *, like: ir.Value, **attributes: int
    ) -> ir.Value:
        """The output of a new node, of the shape and type of a value."""
        node = ir.node(op_type, operands, attributes, name=self.names.fresh(name))
        node.outputs[0].name = node.name
        node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
        self.graph.append(node)
        return node.outputs[0]
