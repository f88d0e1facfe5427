"""What a weight format is: a row of `FORMATS` (formats/__init__.py), made in a file of its own."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.passes.affine import Codes, Grid, Quantized
from qcompile.passes.graph import add_initializer
from qcompile.passes.linears import constant, dimensions, stored
from qcompile.passes.state import Tensors

DOMAIN = "qcompile"
VERSION = 1
# Attribute of the products that have native kernels: bits that these give each activation, 16 or 8.
ACTIVATION_BITS = "activation_bits"
# Pairs of 4-bit codes that are joined at once, in a core's own cache.
_PAIRS = 1 << 16
# Of those at 16: ranges of columns, begins and ends, that take activations at 8. Declared where a node has some.
COLUMNS_AT_8 = "columns_at_8"
# What operators do: how their names begin. The format's own word follows.
PRODUCT, BIASED, EMBEDDING, LOOKUP = "MatMul", "MatMulAdd", "Embedding", "Gather"


def scripted(name: str) -> onnx.FunctionProto:
    """The body of an operator that is written as an onnxscript function (`scripts`)."""
    scripts = import_module("qcompile.passes.formats.scripts")
    proto: onnx.FunctionProto = getattr(scripts, name).to_function_proto()
    return proto


@dataclass(frozen=True, eq=False)
class Operands:
    """The constants of a packed product, as functions.py's table has them; None where the node gives none."""

    codes: ir.Value
    scale: ir.Value
    bias: ir.Value | None
    zero_point: ir.Value | None

    def values(self) -> list[ir.Value]:
        """Those that are there, in the operator's order."""
        return [value for value in (self.codes, self.scale, self.bias, self.zero_point) if value is not None]


@dataclass(frozen=True)
class Stored:
    """The weight that an operator of a format reads. shape: (K, N). form: in words, such as "uint4 g64 asym"."""

    shape: tuple[int, int]
    form: str
    values: Sequence[ir.Value]


# Weights that are in the form of com.microsoft's operators already, by their codes and a word of the format's own.
Cache = dict[tuple[ir.Value, str], list[ir.Value]]


class Operators(ABC):
    """Operators of the domain that read weights of one form, and what becomes of them for other runtimes.

    name: of the form. kinds, words: the names of the operators begin with the one and end in the other. native: the
    words whose products the kernel library has, where it has a row for them (runtime/kernels/formats.h); of the others
    the bodies run.
    foreign: operators of com.microsoft that `lower` makes of its products and that no other format is read from.
    leveled: whether it makes MatMulNBits of them, whose accuracy_level says what `ACTIVATION_BITS` says.
    """

    name: ClassVar[str]
    words: ClassVar[Sequence[str]]
    native: ClassVar[Sequence[str]] = ()
    kinds: ClassVar[Sequence[str]] = (PRODUCT, BIASED, EMBEDDING)
    foreign: ClassVar[Sequence[str]] = ()
    leveled: ClassVar[bool] = False

    @abstractmethod
    def body(self, kind: str, word: str) -> onnx.FunctionProto:
        """The ONNX function of standard operators that is the specification of an operator."""

    def without_zero_points(self, kind: str, word: str) -> onnx.FunctionProto:
        """The body for nodes that give none: what reads them does without."""
        proto = self.body(kind, word)
        if "zero_point" in proto.input:
            proto.input.remove("zero_point")
            for node in proto.node:
                if "zero_point" in node.input:
                    node.input.remove("zero_point")
        return proto

    @property
    def whole_rows(self) -> int:
        """Of a weight of a multiple of so many rows `body_of_whole` is the body of products; 0: there is none."""
        return 0

    def body_of_whole(self, kind: str, word: str, *, zero_points: bool) -> onnx.FunctionProto:
        """The body for weights of whole blocks of `whole_rows`: the same numbers with less to fold."""
        raise NotImplementedError

    def middle_points(self, codes: ir.Value, scale: ir.Value) -> ir.TensorProtocol:
        """Explicit zero points of codes that are stored without: the integer that stands for 0, for each scale."""
        return coded(np.zeros(dimensions(scale), np.int8), constant(codes).dtype)

    @property
    def operators(self) -> dict[str, tuple[str, str]]:
        """(kind, word) of its operators by name."""
        return {kind + word: (kind, word) for word in self.words for kind in self.kinds}

    @abstractmethod
    def lower(self, model: ir.Model, node: ir.Node, cache: Cache) -> None:
        """Make com.microsoft's operators of one of its nodes; a node left as it is has its body inlined."""

    @abstractmethod
    def read(self, node: ir.Node) -> Stored | None:
        """The weight of a node of its own operators, or of a foreign one; None where it is no constant."""


class Format(Operators):
    """A weight format that a recipe names: its grid, what is stored, and its operators.

    `word` says the end of whose names a grid has. bits: of a weight, rounded up. rows_per_code: rows of a column that a
    code stands for. apart: attributes that products must have in common to be joined into one.
    """

    bits: ClassVar[int]
    rows_per_code: ClassVar[int] = 1
    apart: ClassVar[Sequence[str]] = ()

    @abstractmethod
    def grid(self, target: str) -> Grid:
        """The grid of the keyword-only parameters that a recipe gives, as a target's operators have it.

        UserError for values without a meaning.
        """

    def word(self, spec: Grid) -> str:
        """The end of the names of the operators that read codes of a grid."""
        return self.words[0]

    def attributes(self, spec: Grid, block_size: int, k: int) -> dict[str, int]:
        """The attributes of an operator that reads codes (k, N) of a grid."""
        return {"block_size": block_size}

    @abstractmethod
    def store(self, model: ir.Model, name: str, quantized: Quantized) -> Tensors:
        """Add the initializers of a quantized weight to the model, named after the float weight."""

    @abstractmethod
    def lookup(self, model: ir.Model, tensors: Tensors) -> list[ir.Value]:
        """What an embedding operator reads behind its indices: other names of the same tensors."""

    def codes(self, value: ir.Value, k: int) -> npt.NDArray[Any]:
        """The codes (k, N) of a tensor that `store` made, unsigned where the format adds to signed ones."""
        return np.asarray(constant(value).numpy())

    def refusal(self, target: str, spec: Grid, k: int) -> str:
        """Why a target has no operator for the products of a (k, N) weight, and what to do; empty where it has one."""
        return ""

    def looks_up(self, levels: npt.NDArray[Any]) -> bool:
        """Whether its bodies look codes up in this table."""
        return False

    def shifts(self) -> list[list[int]]:
        """By how many bits its bodies shift bytes to the right, by field; none where codes are no fields of bytes."""
        return []


def grouped_by(block_size: int, k: int) -> str:
    """How rows of a (k, N) weight share scales, in a word."""
    return f"g{block_size}" if 0 < block_size < k else "per-column"


def measured(codes: ir.Value, scale: ir.Value) -> tuple[int, int] | None:
    """(K, N) of a weight by its codes (K, …) and scales (G, N); None where one of them is computed."""
    tensors = stored(codes), stored(scale)
    if tensors[0] is None or tensors[1] is None or len(tensors[1].shape) != 2:
        return None
    return int(tensors[0].shape.numpy()[0]), int(tensors[1].shape.numpy()[1])


def role(op_type: str) -> str:
    """What an operator of the domain does: PRODUCT, BIASED, EMBEDDING or LOOKUP."""
    return next(own for own in (BIASED, PRODUCT, EMBEDDING, LOOKUP) if op_type.startswith(own))


def operands(node: ir.Node) -> Operands:
    """The operands of a packed product behind its activation."""
    codes, scale, *rest = node.inputs[1:]
    if codes is None or scale is None:
        raise TypeError(f"node {node.name}: {node.op_type} without codes or scales")
    bias = rest.pop(0) if node.op_type.startswith(BIASED) else None
    return Operands(codes, scale, bias, rest[0] if rest else None)


def weight_operands(node: ir.Node) -> list[ir.Value]:
    """What a packed product or lookup has of its weight: codes, scale, and the zero point if there is one."""
    if role(node.op_type) == EMBEDDING:
        return [value for value in node.inputs[1:] if value is not None]
    own = operands(node)
    return [value for value in (own.codes, own.scale, own.zero_point) if value is not None]


def element_type(node: ir.Node) -> ir.DataType | None:
    """The type that a packed product computes in: that of its scales, or of x where they are no floats."""
    scale, x = constant(operands(node).scale).dtype, node.inputs[0]
    return scale if scale.is_floating_point() or x is None else x.dtype


def become(
    node: ir.Node, operator: str, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int], *, domain: str
) -> None:
    """Make another operator of a node, in place: its outputs stay the same values."""
    node.resize_inputs(len(inputs))
    for i, value in enumerate(inputs):
        node.replace_input_with(i, value)
    node.op_type, node.domain, node.overload = operator, domain, ""
    node.attributes.clear()
    for name, number in attributes.items():
        node.attributes[name] = ir.AttrInt64(name, number)


def pack_nibbles(codes: Codes) -> npt.NDArray[np.uint8]:
    """Codes in ONNX's 4-bit layout: flat, two a byte, the first in the low nibble; the last byte padded with zero.

    Blank ones (`rounding.blank`) take no memory.
    """
    if codes.size and not any(codes.strides):
        return np.broadcast_to(np.zeros((), np.uint8), (codes.size + 1) // 2)
    flat = np.ascontiguousarray(codes).reshape(-1).astype(np.uint8, copy=False)
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    pairs, packed = flat.view("<u2"), np.empty(flat.size // 2, np.uint8)  # the first code in the low byte
    for start in range(0, pairs.size, _PAIRS):
        two = pairs[start : start + _PAIRS]
        packed[start : start + _PAIRS] = (two & np.uint16(15)) | ((two >> np.uint16(4)) & np.uint16(240))
    return packed


def coded(codes: Codes, dtype: ir.DataType) -> ir.TensorProtocol:
    """A tensor of integers of 4 or 8 bits."""
    if dtype.bitwidth == 8:
        return ir.Tensor(codes, dtype=dtype)
    return ir.PackedTensor(pack_nibbles(codes), dtype, shape=ir.Shape(codes.shape))


def add_codes(model: ir.Model, name: str, codes: Codes, dtype: ir.DataType) -> ir.Value:
    """A new initializer of integers of 4 or 8 bits."""
    return add_initializer(model.graph, name, coded(codes, dtype))


def drop_unused(model: ir.Model, value: ir.Value) -> None:
    """Remove an initializer that nothing reads any more."""
    name = str(value.name)
    if not value.uses() and not value.is_graph_output() and name in model.graph.initializers:
        del model.graph.initializers[name]


def drop_weight(model: ir.Model, weight: ir.Value, read: ir.Value | None) -> None:
    """Remove a float weight, and the Transpose that it was read through, where neither is read, or an output."""
    producer = read.producer() if read is not None else None
    if read is not None and producer is not None and not read.uses() and not read.is_graph_output():
        assert producer.graph is not None
        producer.graph.remove(producer, safe=True)
    drop_unused(model, weight)


def alias(model: ir.Model, value: ir.Value) -> ir.Value:
    """A second initializer of the same tensor, stored once on disk.

    ONNX Runtime fuses a tied lm_head into one product only if nothing else reads its initializers.
    """
    name = f"{value.name}.lookup"
    known = model.graph.initializers.get(name)
    return known if known is not None else add_initializer(model.graph, name, constant(value))


def as_bytes(model: ir.Model, value: ir.Value) -> ir.Value:
    """A 4-bit tensor (R, V) as uint8 (R, ceil(V / 2)): with V even the very same bytes, stored once here, too."""
    name, tensor = f"{value.name}.bytes", constant(value)
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    rows, columns = dimensions(value)
    if columns % 2 == 0:
        raw = tensor.raw if isinstance(tensor, ir.PackedTensor) else np.frombuffer(tensor.tobytes(), np.uint8)
        packed = np.asarray(raw).view(np.uint8).reshape(rows, columns // 2)
    else:
        codes = np.asarray(tensor.numpy()).astype(np.uint8)
        packed = pack_nibbles(np.pad(codes, ((0, 0), (0, 1)))).reshape(rows, -1)
    return add_initializer(model.graph, name, ir.Tensor(packed))


def unpacked(value: ir.Value, n: int) -> npt.NDArray[np.generic]:
    """Codes (rows, n) of an integer tensor, or of the byte form of a 4-bit one."""
    tensor = constant(value)
    array = np.asarray(tensor.numpy())
    if tensor.dtype == ir.DataType.UINT8 and array.shape[1] != n:
        wide = np.stack([array & 15, array >> 4], axis=-1)
        return wide.reshape(array.shape[0], -1)[:, :n]
    return array.astype(np.int8 if tensor.dtype in (ir.DataType.INT4, ir.DataType.INT8) else np.uint8)
