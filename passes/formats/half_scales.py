"""Scales of float32 weights as float16 in the file, each behind a Cast that ONNX Runtime folds when it loads.

Scales of GGUF's blocks are float16 numbers times small integers: behind a BlockScales instead (`block_scales`).
In memory a model has them as float32 always: `widen` takes these nodes out of a file that was read, and marks the
model; `halve` puts them into a marked one before it is written, so that what is compiled again or packaged keeps them.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.passes.affine import Array
from qcompile.passes.bit_fields import unpack_fields
from qcompile.passes.errors import UserError
from qcompile.passes.formats import by_operator
from qcompile.passes.formats.base import DOMAIN, drop_unused
from qcompile.passes.formats.block_scales import BLOCK_OPERATORS, adds_offsets, block_scales, is_block_scales, misfit
from qcompile.passes.formats.functions import register
from qcompile.passes.graph import MICROSOFT, Names, add_initializer, insert_before
from qcompile.passes.linears import constant

# Key of `ir.Model.meta`: its scales are to be float16 in the file, wherever they are float16 numbers.
HALF_SCALES = "qcompile.half_scales"
# Where com.microsoft's operators and ONNX's DequantizeLinear read scales; those of the domain at _OWN.
_SLOTS = {(MICROSOFT, name): 2 for name in ("MatMulNBits", "GatherBlockQuantized", "MatMulBnb4")}
_SLOTS[("", "DequantizeLinear")] = 1
_OWN = 2
# Elements of scales from which two bytes each are worth a node.
LEAST_HALVED = 512
# Ends the name of the float32 numbers that a node makes; in memory they have the name before it.
_WIDENED = ".widened"


def halve(model: ir.Model) -> int:
    """Store the scales of a marked model as float16, in place, where that changes no number; returns how many tensors.

    Only what the main graph's nodes read as scales and nothing else does: ONNX Runtime loads no constant of a body from
    outside. A model for other runtimes, without operators of the domain, has block scales as float32.
    """
    if not model.meta.get(HALF_SCALES):
        return 0
    names, done = Names(model), 0
    shared = _Shared()
    for value in list(model.graph.initializers.values()):
        outer = value.is_graph_input() or value.is_graph_output()
        if value.const_value is None or outer or not _only_scales(model, value):
            continue
        tensor, name = value.const_value, names.fresh(f"{value.name}{_WIDENED}")
        if isinstance(tensor, BlockScales) and DOMAIN in model.graph.opset_imports:
            kind, domain, attributes = (
                block_scales(tensor.bits),
                DOMAIN,
                {"groups": tensor.groups, "middle": tensor.middle},
            )
            given = {"half": tensor.scale, "factors": tensor.factors}
            register(model, kind)
        elif are_half(value):
            kind, domain, attributes = "Cast", "", {"to": int(ir.DataType.FLOAT)}
            given = {"half": shared.half(np.asarray(tensor.numpy()))}
        else:
            continue
        stored = [add_initializer(model.graph, names.fresh(f"{value.name}.{end}"), own) for end, own in given.items()]
        wide = insert_before(model.graph[0], kind, stored, attributes, name=name, output=name, domain=domain)
        wide.type, wide.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(tensor.shape.numpy())
        ir.convenience.replace_all_uses_with(value, wide)
        drop_unused(model, value)
        done += 1
    return done


class _Shared:
    """float16 numbers that are one tensor where the float32 ones are the same array, as a dry run counts bytes."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Callable[[], object], ir.TensorProtocol]] = {}

    def half(self, numbers: Array) -> ir.TensorProtocol:
        """Those of numbers (G, N)."""
        owner = numbers if numbers.base is None else numbers.base
        place = numbers.__array_interface__["data"][0], numbers.shape, numbers.strides
        alive, known = self._made.get(place, (lambda: None, None))
        if known is not None and alive() is owner:
            return known
        half = ir.tensor(numbers.astype(np.float16))
        if isinstance(owner, np.ndarray):
            self._made[place] = weakref.ref(owner), half
        return half


def widen(model: ir.Model) -> None:
    """Turn Casts of constant float16 scales, and block scales, into float32 constants, in place; they are read when
    they are asked for. UserError for an operator of blocks whose constants do not fit it.
    """
    for node in model.graph.all_nodes():
        if node.domain == DOMAIN and node.op_type in BLOCK_OPERATORS and (told := misfit(node)):
            raise UserError(f"node {node.name!r}, {node.op_type}: {told}; export or compile the model again")
    names = Names(model)
    for node in list(model.graph):
        value = node.outputs[0] if node.outputs else None
        if value is None or value.is_graph_output() or not _stored_inputs(node) or not _only_scales(model, value):
            continue
        name = names.fresh(str(value.name).removesuffix(_WIDENED))
        made = add_initializer(model.graph, name, _in_memory(node, name))
        ir.convenience.replace_all_uses_with(value, made)
        inputs = [own for own in node.inputs if own is not None]
        model.graph.remove(node, safe=True)
        for own in inputs:
            drop_unused(model, own)
        model.meta[HALF_SCALES] = True


def _stored_inputs(node: ir.Node) -> bool:
    """Whether a node is a Cast of a constant float16 tensor to float32, or block scales of constants."""
    cast = (node.op_type, node.domain) == ("Cast", "") and node.attributes.get_int("to", 0) == ir.DataType.FLOAT
    if not cast and not (is_block_scales(node) and len(node.inputs) == 2):
        return False
    given = [value for value in node.inputs if value is not None and value.is_initializer()]
    fixed = [value for value in given if not value.is_graph_input() and value.const_value is not None]
    return bool(fixed) and len(fixed) == len(node.inputs) and constant(fixed[0]).dtype == ir.DataType.FLOAT16


def _in_memory(node: ir.Node, name: str) -> ir.TensorProtocol:
    """The float32 numbers that a node of `_stored_inputs` makes of its constants."""
    scale, *factors = (constant(value) for value in node.inputs if value is not None)
    if not factors:
        return _Widened(scale, name)
    _, bits = BLOCK_OPERATORS[node.op_type]
    groups, middle = (node.attributes.get_int(own, 0) for own in ("groups", "middle"))
    return BlockScales(scale, factors[0], bits, groups, middle, name=name)


def are_half(scale: ir.Value) -> bool:
    """Whether `halve` will store a float32 initializer as float16."""
    tensor = constant(scale)
    if tensor.dtype != ir.DataType.FLOAT or tensor.size < LEAST_HALVED:
        return False
    numbers = np.asarray(tensor.numpy())
    with np.errstate(over="ignore"):
        return np.array_equal(numbers.astype(np.float16).astype(np.float32), numbers)


class _Widened(ir.LazyTensor):
    """float32 numbers of a float16 tensor, which the file holds."""

    def __init__(self, stored: ir.TensorProtocol, name: str) -> None:
        self.stored, shape = stored, ir.Shape(stored.shape.numpy())
        super().__init__(self._read, dtype=ir.DataType.FLOAT, shape=shape, name=name)

    def _read(self) -> ir.TensorProtocol:
        return ir.tensor(np.asarray(self.stored.numpy()).astype(np.float32))


class BlockScales(ir.LazyTensor):
    """float32 numbers (G, N) that a file holds as float16 ones of S blocks, scale (S, N), times integers of G groups.

    factors: codes of so many bits in fields of bytes (`bit_fields`), from which `middle` is taken off.
    """

    def __init__(
        self, scale: ir.TensorProtocol, factors: ir.TensorProtocol, bits: int, groups: int, middle: int, *, name: str
    ) -> None:
        self.scale, self.factors, self.bits, self.groups, self.middle = scale, factors, bits, groups, middle
        shape = ir.Shape((groups, int(scale.shape.numpy()[1])))
        super().__init__(self._read, dtype=ir.DataType.FLOAT, shape=shape, name=name)

    @property
    def form(self) -> str:
        """What others must have alike to lie beside these."""
        taken = f" less {self.middle}" if self.middle else ""
        return f"block ({self.scale.shape.numpy()[0]} times {self.groups} of {self.bits} bits{taken})"

    def _read(self) -> ir.TensorProtocol:
        codes = unpack_fields(np.asarray(self.factors.numpy()), self.bits, self.groups)
        wide = np.asarray(self.scale.numpy()).astype(np.float32)
        blocks = codes.astype(np.float32).reshape(len(wide), -1, codes.shape[1]) - np.float32(self.middle)
        return ir.tensor((blocks * wide[:, None]).reshape(codes.shape))


def joined_scales(tensors: Sequence[ir.TensorProtocol], name: str) -> ir.TensorProtocol | None:
    """Block scales side by side, if all are such and of one form."""
    own = [tensor for tensor in tensors if isinstance(tensor, BlockScales)]
    if len(own) < len(tensors) or len({tensor.form for tensor in own}) > 1:
        return None
    scale, factors = (
        ir.tensor(np.concatenate([np.asarray(part.numpy()) for part in parts], axis=1))
        for parts in ([part.scale for part in own], [part.factors for part in own])
    )
    return BlockScales(scale, factors, own[0].bits, own[0].groups, own[0].middle, name=name)


def form_of(scale: ir.TensorProtocol) -> str:
    """The form of scales in a word: what side by side stays as small as it is apart."""
    return scale.form if isinstance(scale, BlockScales) else scale.dtype.name.lower()


def stored_as(tensor: ir.TensorProtocol) -> tuple[ir.TensorProtocol, ...]:
    """The tensor as the file that it was read from holds it: mostly itself."""
    if isinstance(tensor, BlockScales):
        return tensor.scale, tensor.factors
    return (tensor.stored,) if isinstance(tensor, _Widened) else (tensor,)


def _only_scales(model: ir.Model, value: ir.Value) -> bool:
    """Whether nodes of the main graph read a value, all of them as scales."""
    uses = list(value.uses())
    return any(_reads_scales(*use) for use in uses) and all(
        use.node.graph is model.graph and (_reads_scales(*use) or use.node.op_type == "Shape") for use in uses
    )


def _reads_scales(node: ir.Node, position: int) -> bool:
    """Whether an input of a node is scales; also of what looks up or repeats those of a DequantizeLinear."""
    if node.domain == DOMAIN:
        return position == _OWN and (by_operator(node.op_type) is not None or adds_offsets(node))
    if node.op_type in ("Gather", "Expand") and (node.domain, position) == ("", 0):
        readers = [use for use in node.outputs[0].uses() if use.node.op_type != "Shape"]
        return bool(readers) and all(_reads_scales(*use) for use in readers)
    return _SLOTS.get((node.domain, node.op_type)) == position
