"""`qcompile export --keep-quantized`: the quantized tensors of a GGUF file as they are, in the graph exported from it.

Invariant: what is stored decodes to the weight that the graph had, bit for bit (-0 as 0); a weight of which that does
not hold stays in float, and the record says why. Codes, block scales, their factors and minima are the file's own.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.compiler.files.save import save_beside
from qcompile.models.gguf_blocks import KINDS, Blocks, Kind, unpack
from qcompile.models.gguf_file import GGUFFile
from qcompile.passes.affine import Array, QParams, Quantized
from qcompile.passes.bit_fields import pack_fields
from qcompile.passes.formats import OTHERS, functions, named
from qcompile.passes.formats.base import DOMAIN, EMBEDDING, PRODUCT, Format, become, drop_unused, drop_weight
from qcompile.passes.formats.block_scales import add_offsets
from qcompile.passes.formats.half_scales import HALF_SCALES, BlockScales, are_half, halve
from qcompile.passes.formats.lower import lower
from qcompile.passes.graph import Names, add_initializer, insert_before, take_over
from qcompile.passes.linears import Embedding, Linear, constant, find_embeddings, find_linears
from qcompile.passes.prepare.gemm import split_gemms
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.state import Tensors
from qcompile.passes.tensors import read

# Columns that are decoded together, to be compared.
_AT_ONCE = 4096
_LEAST = 1024


@dataclass(frozen=True)
class KeptWeight:
    """A weight of the graph. type: of the file's tensor; form: how it is stored; both "" where it is left in float, and
    reason says why. bytes: as stored, what it shares with another one not counted.
    """

    weight: str
    type: str = ""
    form: str = ""
    bytes: int = 0
    reason: str = ""


@dataclass(frozen=True, eq=False)
class _Stored:
    """A weight's initializers. own: its format. offsets: what the operators that add them read behind the scale;
    none where codes alone say all. groups: of a column.
    """

    own: Format
    quantized: Quantized
    tensors: Tensors
    kind: Kind
    offsets: tuple[ir.Value, ...]
    middle: int
    groups: int


class Keeper:
    """Puts the tensors of a file into graphs, and writes them. weights: what became of each weight."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.weights = file, list[KeptWeight]()
        self._unranked = set[ir.Value]()

    def save(self, model: ir.Model, path: Path) -> None:
        """Keep what can be kept of a float graph, in place, and write it to `path` and `path`.data."""
        self._keep(model)
        lower(model, "qcompile")
        model.meta[HALF_SCALES] = True
        halve(model)
        save_beside(model, path)

    def record(self) -> dict[str, Any]:
        """For export.json."""
        return {
            "file_bytes": self.file.path.stat().st_size,
            "types": {kind: {"tensors": count, "bytes": size} for kind, (count, size) in self.file.types.items()},
            "weights": [asdict(own) for own in self.weights],
        }

    def _keep(self, model: ir.Model) -> None:
        split_gemms(model, lambda *told, **detail: None)
        names, nodes, float_before = Names(model), list(model.graph), set(model.graph.initializers.values())
        lookups, linears = find_embeddings(nodes), find_linears(nodes)
        tables = {own.table for own in lookups}
        self._unranked = {own.weight for own in linears if own.activation.shape is None}
        made: dict[tuple[ir.Value, bool], _Stored | None] = {}  # whether its rows are those of the file
        sums: dict[tuple[ir.Value, int], ir.Value] = {}
        readers: list[Linear | Embedding] = [*lookups, *linears]
        for own in readers:
            weight = own.table if isinstance(own, Embedding) else own.weight
            turned = isinstance(own, Embedding) or own.transposed
            if (weight, turned) not in made:
                title = names.fresh(f"{weight.name}.columns") if (weight, not turned) in made else str(weight.name)
                made[weight, turned] = self._store(model, weight, title, turned=turned, table=weight in tables)
            stored = made[weight, turned]
            if stored is None:
                continue
            if isinstance(own, Embedding):
                _look_up(model, own, stored, names)
            else:
                _multiply(model, own, stored, names, sums)
        read = {weight for weight, _ in made}
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or len(tensor.shape) < 2 or tensor.size < _LEAST or not tensor.dtype.is_floating_point():
                continue
            if value in float_before and value not in read:
                by = sorted({use.node.op_type for use in value.uses()})
                self._leave(value, f"read by {', '.join(by)}, not a product or a lookup of rows")

    def _leave(self, weight: ir.Value, reason: str) -> None:
        self.weights.append(KeptWeight(str(weight.name), reason=reason))

    def _store(self, model: ir.Model, weight: ir.Value, title: str, *, turned: bool, table: bool) -> _Stored | None:
        """A weight as the file has it, under a title. turned: the file's rows are its rows, else its columns."""
        assert weight.const_value is not None
        rows = np.asarray(read(weight.const_value), np.float32)
        rows = rows if turned else rows.T
        found = self.file.find(rows)
        if isinstance(found, str):
            self._leave(weight, found)
            return None
        kind = KINDS[found.kind]
        blocks = unpack(kind, found.data)
        if blocks.minimum is not None and weight in self._unranked:
            self._leave(weight, f"the rank of its input is not known, whose sums the offsets of {found.kind} are times")
            return None
        for centred in (True, False) if blocks.minimum is not None else (True,):
            quantized, offsets = _decoded(kind, blocks, table=table and turned, centred=centred)
            if _equal(quantized, offsets, rows):
                break
        else:
            self._leave(weight, f"blocks of {found.kind} whose numbers are rounded otherwise")
            return None
        middle = (1 << (kind.bits - 1)) * centred
        stored = _put(model, title, kind, blocks, quantized, middle)
        form = f"{quantized.spec}{', offsets' if stored.offsets else ''}"
        size = sum(_bytes(value) for value in (*stored.tensors.values(), *stored.offsets))
        self.weights.append(KeptWeight(str(weight.name), found.kind, form, size))
        return stored


def _bytes(value: ir.Value) -> int:
    """Of an initializer as `halve` will store it."""
    tensor = constant(value)
    if isinstance(tensor, BlockScales):
        return int(tensor.scale.nbytes + tensor.factors.nbytes)
    return int(tensor.nbytes // 2 if are_half(value) else tensor.nbytes)


def _format(kind: Kind) -> Format:
    """The format that has the codes of a type of GGUF."""
    other = [own for own in OTHERS if isinstance(own, Format) and own.name == kind.table]
    return other[0] if other else named(kind.table or f"int{kind.bits}")


def _decoded(kind: Kind, blocks: Blocks, *, table: bool, centred: bool) -> tuple[Quantized, Array | None]:
    """The codes (K, N) and their parameters; the offset (G, N) of each group, if there are any.

    Codes with minima stand for 0 in the middle where they are centred, which leaves small offsets, so that rounded
    activations cost less; else at 0, as in the file. Both give the same numbers but where offsets have too many bits.
    """
    own, groups = _format(kind), blocks.codes.shape[1] // kind.group
    if blocks.scale.dtype == np.uint8:
        scale = np.ldexp(np.float32(1), blocks.scale.astype(np.int32) - 128)
    else:
        scale = np.repeat(blocks.scale.astype(np.float32), groups // blocks.scale.shape[1], axis=1)
    if blocks.factors is not None:
        scale = scale * (blocks.factors.astype(np.float32) - np.float32(kind.factor_middle))
    scale, codes = np.ascontiguousarray(scale.T), np.ascontiguousarray(blocks.codes.T)
    if kind.table:
        spec = own.grid("qcompile")
        return Quantized(codes, QParams(scale, np.zeros_like(scale)), spec), None
    offsets, middle = None, kind.middle
    if blocks.minimum is not None:
        middle = (1 << (kind.bits - 1)) * centred
        minima = np.repeat(blocks.minimum.astype(np.float32), groups // blocks.minimum.shape[1], axis=1)
        if blocks.minimum_factors is not None:
            minima = minima * blocks.minimum_factors.astype(np.float32)
        offsets = scale * np.float32(middle) - minima.T
    # Lookups of 4 and 8 bits always have zero points.
    symmetric = middle > 0 and kind.bits != 8 and not (table and kind.bits == 4)
    spec = QuantSpec(kind.bits, PerGroup(kind.group), symmetric)
    if symmetric:
        return Quantized((codes - np.uint8(middle)).view(np.int8), QParams(scale, np.zeros_like(scale)), spec), offsets
    return Quantized(codes, QParams(scale, np.full_like(scale, middle)), spec), offsets


def _equal(quantized: Quantized, offsets: Array | None, rows: Array) -> bool:
    """Whether the numbers that are stored are the rows (N, K) of a weight, bit for bit."""
    size = quantized.spec.group_size(rows.shape[1])
    for start in range(0, len(rows), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        decoded = quantized.columns(part).dequantize()
        if offsets is not None:
            decoded = decoded + np.repeat(offsets[:, part], size, axis=0)
        if not np.array_equal(decoded.T, rows[part]):
            return False
    return True


def _put(model: ir.Model, name: str, kind: Kind, blocks: Blocks, quantized: Quantized, middle: int) -> _Stored:
    own, groups = _format(kind), blocks.codes.shape[1] // kind.group
    tensors = own.store(model, name, quantized)
    scale = ir.tensor(np.ascontiguousarray(blocks.scale.T))

    def packed(factors: Any) -> ir.TensorProtocol:
        return ir.tensor(pack_fields(np.ascontiguousarray(factors.T), kind.factor_bits))

    if blocks.factors is not None:
        title = f"{tensors.scale.name}"
        wide = BlockScales(scale, packed(blocks.factors), kind.factor_bits, groups, kind.factor_middle, name=title)
        tensors.scale.const_value = wide
    parts: dict[str, ir.TensorProtocol] = {}
    if blocks.minimum is not None:
        parts["minimum"] = ir.tensor(np.ascontiguousarray(blocks.minimum.T))
        if blocks.minimum_factors is not None:
            parts["factors"] = packed(blocks.minimum_factors)
    offsets = tuple(add_initializer(model.graph, f"{name}.offsets.{end}", own) for end, own in parts.items())
    return _Stored(own, quantized, tensors, kind, offsets, middle, groups)


def _multiply(
    model: ir.Model, linear: Linear, stored: _Stored, names: Names, sums: dict[tuple[ir.Value, int], ir.Value]
) -> None:
    """A product of codes, and what the offsets add to it: the sums of its activations, of the rows of each group."""
    node, source = linear.node, linear.node.inputs[1]
    inputs = [linear.activation, *stored.tensors.values()]
    _become(model, node, PRODUCT, stored, inputs, linear.shape[0])
    drop_weight(model, linear.weight, source)
    if not stored.offsets:
        return
    key = (linear.activation, stored.groups)
    if key not in sums:
        sums[key] = _sums(model, linear, stored.groups, names)
    _add(model, node, [sums[key]], stored, names, rows=False)


def _look_up(model: ir.Model, embedding: Embedding, stored: _Stored, names: Names) -> None:
    inputs = [embedding.indices, *stored.own.lookup(model, stored.tensors)]
    _become(model, embedding.node, EMBEDDING, stored, inputs, embedding.shape[1])
    drop_unused(model, embedding.table)
    if stored.offsets:
        _add(model, embedding.node, [embedding.indices], stored, names, rows=True)


def _become(model: ir.Model, node: ir.Node, role: str, stored: _Stored, inputs: list[ir.Value], k: int) -> None:
    own, spec = stored.own, stored.quantized.spec
    operator = f"{role}{own.word(spec)}"
    functions.register(model, operator, zero_points=stored.tensors.zero_point is not None, k=k)
    become(node, operator, inputs, own.attributes(spec, stored.tensors.block_size, k), domain=DOMAIN)


def _sums(model: ir.Model, linear: Linear, groups: int, names: Names) -> ir.Value:
    """The activation x (…, K), of known rank, summed over the rows of each group: (…, G)."""
    place, x, k = linear.node, linear.activation, linear.shape[0]
    assert x.shape is not None
    shape, title = [*[0] * (len(x.shape) - 1), groups, k // groups], f"{x.name}.sums"
    cut = _shared(model, f"qcompile.blocks.{'x'.join(map(str, shape))}", shape)
    title = names.fresh(title)
    inner, axes = names.fresh(f"{title}.blocks"), _shared(model, "qcompile.blocks.axes", [-1])
    blocks = insert_before(place, "Reshape", [x, cut], name=inner, output=inner)
    made = insert_before(place, "ReduceSum", [blocks, axes], {"keepdims": 0}, name=title, output=title)
    blocks.type = made.type = x.type
    leading = list(x.shape)[:-1]
    blocks.shape, made.shape = ir.Shape([*leading, groups, k // groups]), ir.Shape([*leading, groups])
    return made


def _shared(model: ir.Model, name: str, numbers: list[int]) -> ir.Value:
    known = model.graph.initializers.get(name)
    return known if known is not None else add_initializer(model.graph, name, ir.tensor(np.array(numbers, np.int64)))


def _add(model: ir.Model, node: ir.Node, given: list[ir.Value], stored: _Stored, names: Names, *, rows: bool) -> None:
    """Offsets behind a node: what read its output reads the sum."""
    operator, output = add_offsets(stored.kind.factor_bits, rows=rows), node.outputs[0]
    functions.register(model, operator)
    name = f"{node.name}.offsets"
    attributes = {"groups": stored.groups, "middle": stored.middle}
    inputs = [output, *given, node.inputs[2], *stored.offsets]
    made = ir.node(operator, inputs, attributes, domain=DOMAIN, name=name)
    node.append(made)
    take_over(output, made.outputs[0], names)
    made.replace_input_with(0, output)
    output.type, output.shape = made.outputs[0].type, made.outputs[0].shape


def summary(weights: Sequence[KeptWeight]) -> list[tuple[str, str, int, int]]:
    """(type, form, weights, bytes) of what was kept, in the order of the graph."""
    counts = Counter((own.type, own.form) for own in weights if own.type)
    sizes = Counter[tuple[str, str]]()
    for own in weights:
        sizes[own.type, own.form] += own.bytes
    return [(*key, count, sizes[key]) for key, count in counts.items()]
