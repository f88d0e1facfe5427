"""The weights of a model as they stand, in all its graphs: quantized in one of the known ways or not, and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qcompile.compiler.facts.census import INTEGER_OPERATORS, LEAST, Family, FloatConstant, census, family_of
from qcompile.compiler.plan import ensuring
from qcompile.compiler.results.report import PRODUCTS
from qcompile.passes import bit_fields
from qcompile.passes.contract import Fact
from qcompile.passes.formats import BY_NAME, OTHERS, by_operator
from qcompile.passes.formats.base import DOMAIN, EMBEDDING, LOOKUP, PRODUCT, Format, Operators, grouped_by
from qcompile.passes.formats.block_scales import adds_offsets
from qcompile.passes.graph import MICROSOFT
from qcompile.passes.linears import CONVOLUTIONS, as_linear, find_embeddings, on_a_grid, stored

# Quantized products of ONNX itself: slots of (codes, scale, zero point), -1 where there is none.
_INTEGER_PRODUCTS = {"MatMulInteger": (1, -1, 3), "QLinearMatMul": (3, 4, 5), "DynamicQuantizeMatMul": (1, 2, 3)}
_INTEGERCONVOLUTIONS = {"ConvInteger": (1, -1, 3), "QLinearConv": (3, 4, 5)}
# Operators that make codes or scales of stored ones, and how many of their inputs these may be.
_MOVED = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity", "Slice", "Split", "QuantizeLinear",
    "DequantizeLinear"}  # fmt: skip
_REMADE = {"Cast": 1, "CastLike": 1, "Sub": 2, "Pow": 2, "Mul": 2, "Gather": 2, "Expand": 1}
# What takes codes out of the fields of bytes, or puts them together.
_UNPACKING = {"Cast", "Identity", "Slice", "Flatten", "Gather", "BitShift", "BitwiseAnd", "BitwiseOr", "Transpose"}
_UNPACKING |= {"Split", "Concat"}  # of whole blocks of rows
_RECURRENT = ("LSTM", "GRU", "RNN")
# By family, what `Weight.kind` says.
KINDS: Mapping[Family, tuple[str, ...]] = {"MatMul": ("linear", "weight"), "Conv": ("conv",), "Gather": ("embedding",)}
# What `Weight.kind` calls the census's families where it has no closer word.
_KINDS: Mapping[Family, str] = {"MatMul": "weight", "Conv": "conv", "Gather": "embedding", "other": "constant"}


@dataclass(frozen=True, eq=False)
class Weight:
    """One use of a weight by a node.

    kind: "linear", "embedding", "conv", "weight" of another operator that multiplies by it (LSTM, Attention),
    "constant" for other large floats, or "product" for a MatMul without weight. shape: (K, N) of a linear, (V, K) of
    an embedding, the stored one of all others. form: what the node computes with, such as "uint4 g64 asym", or
    the element type of a float weight. quantized: whether codes are stored. reason: why it is not quantized.
    tensors: its initializers, the codes or the float weight first.
    """

    node: str
    operator: str
    kind: str
    shape: tuple[int, ...]
    form: str
    quantized: bool
    reason: str
    tensors: tuple[ir.TensorProtocol, ...]

    @property
    def size(self) -> int:
        """Number of weights; 0 for a product."""
        count = 1 if self.shape else 0
        for dim in self.shape:
            count *= dim
        return count


def all_weights(model: ir.Model) -> list[Weight]:
    """Those of `find_weights`, then all other codes, then every other float constant of 1,024 elements or more.

    Invariant: no codes that a DequantizeLinear, an operator of the domain or one for integers reads are left out.
    """
    found = find_weights(model.graph)
    found += _other_codes(model.graph, {id(tensor) for weight in found for tensor in weight.tensors})
    known = {id(tensor) for weight in found for tensor in weight.tensors}
    return found + [_left(constant) for constant in census(model) if id(stored(constant.value)) not in known]


def shares(weights: Sequence[Weight]) -> dict[str, float | None]:
    """Quantized share of the elements of MatMul-like and of convolutions' weights, each stored weight once."""
    found: dict[str, float | None] = {}
    for family, kinds in ((own, KINDS[own]) for own in PRODUCTS):
        own = {id(w.tensors[0]): w for w in weights if w.kind in kinds and w.tensors}.values()
        total = sum(weight.size for weight in own)
        found[family] = sum(weight.size for weight in own if weight.quantized) / total if total else None
    return found


def find_weights(graph: ir.Graph) -> list[Weight]:
    """Every linear, embedding, convolution and recurrent weight of a graph and the bodies in it, in order."""
    lookups = {embedding.node: embedding for embedding in find_embeddings(graph.all_nodes())}
    found: list[Weight] = []
    for node in graph.all_nodes():
        if node in lookups:
            table = lookups[node].table
            found.append(_float(node, "embedding", table, lookups[node].shape, "kept in float"))
        else:
            found.extend(_weights(node))
    return found


def _weights(node: ir.Node) -> Iterator[Weight]:
    """The weight that a node uses, if any."""
    own = by_operator(node.op_type) if node.domain in (DOMAIN, MICROSOFT) else None
    if own is not None and node.op_type.startswith((PRODUCT, EMBEDDING)):
        yield _own(node, own)
    elif node.op_type == "MatMulNBits":
        yield _nbits(node)
    elif node.op_type == "GatherBlockQuantized":
        yield _block_gather(node)
    elif node.op_type in _INTEGER_PRODUCTS:
        yield from _integer_product(node, "linear", _INTEGER_PRODUCTS[node.op_type])
    elif node.op_type in _INTEGERCONVOLUTIONS:
        yield from _integer_product(node, "conv", _INTEGERCONVOLUTIONS[node.op_type])
    elif node.domain == "" and node.op_type in ("MatMul", "Gemm"):
        yield _product(node)
    elif node.domain == "" and node.op_type == "Gather":
        yield from _gathered_codes(node)
    elif node.domain == "" and node.op_type in CONVOLUTIONS:
        yield from _operand(node, 1, "conv", f"float: `{ensuring(Fact.STATIC)}` quantizes convolutions")
    elif node.domain == "" and node.op_type in _RECURRENT:
        for position in (1, 2):
            yield from _operand(node, position, "weight", "kept in float")


def _operand(node: ir.Node, position: int, kind: str, reason: str) -> Iterator[Weight]:
    """A weight with its own shape: dequantized codes, or a float."""
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None:
        return
    if (decoded := dequantized(value)) is not None:
        tensors = decoded.tensors
        axes = "per channel" if len(tensors[1].shape) else "per tensor"
        form, operator = f"{decoded.codes} {axes}", f"DequantizeLinear + {node.op_type}"
        yield Weight(node.name or "", operator, kind, _dims(tensors[0]), form, True, "", tensors)
    elif (tensor := stored(value)) is not None and tensor.dtype.is_floating_point():
        yield _float(node, kind, value, _dims(tensor), reason)


def _other_codes(graph: ir.Graph, known: set[int]) -> Iterator[Weight]:
    """Codes of other places: experts, recurrent layers of other runtimes, what bodies and operators without a word here
    read.
    """
    for node in graph.all_nodes():
        decodes = node.op_type == "DequantizeLinear"
        if not (decodes or node.op_type in INTEGER_OPERATORS or node.domain == DOMAIN) or adds_offsets(node):
            continue  # offsets are of the weight before them
        tensors = [t for v in node.inputs if v is not None and (t := stored(v)) is not None]
        if not tensors or tensors[0].dtype.bitwidth > 8 or tensors[0].size < LEAST or id(tensors[0]) in known:
            continue
        known.add(id(tensors[0]))
        reader = _reader(node) if decodes else node
        family = family_of(reader.op_type)
        looked_up = node.op_type.startswith(LOOKUP) or family == "Gather"
        kind = "embedding" if looked_up else _KINDS[family] if decodes and family != "MatMul" else "weight"
        operator = f"DequantizeLinear + {reader.op_type}" if decodes else node.op_type
        shape, codes, own = _dims(tensors[0]), tensors[0].dtype.name.lower(), by_operator(node.op_type)
        if not decodes and tensors[0].dtype.bitwidth == 8 and getattr(own, "bits", 8) == 4:  # two a byte
            shape, codes = (*shape[:-1], 2 * shape[-1]), "int4"
        yield Weight(reader.name or "", operator, kind, shape, codes, True, "", tuple(tensors))


def _reader(node: ir.Node, steps: int = 8) -> ir.Node:
    """The first node that computes with what a DequantizeLinear gives; the last one that moves it, without any."""
    for _ in range(steps):
        readers = [use.node for use in node.outputs[0].uses()]
        if not readers:
            return node
        node = next((own for own in readers if own.op_type not in _MOVED), readers[0])
        if node.op_type not in _MOVED:
            return node
    return node


def _left(constant: FloatConstant) -> Weight:
    """What the census found beside the weights known here."""
    reader = constant.readers[0]
    operator = f"{reader.node.domain}.{reader.node.op_type}" if reader.node.domain else reader.node.op_type
    place = f", in the body of {reader.owner.op_type} {reader.owner.name}" if reader.owner is not None else ""
    tensor = stored(constant.value)
    assert tensor is not None
    reason, kind = f"read by {operator}{place}", _KINDS[constant.family]
    form = tensor.dtype.name.lower()
    return Weight(reader.name, reader.node.op_type, kind, _dims(tensor), form, False, reason, (tensor,))


def _own(node: ir.Node, own: Operators) -> Weight:
    """The weight of an operator of a format: of qcompile's, or one of com.microsoft that only it is lowered to."""
    weight, linear = own.read(node), node.op_type.startswith(PRODUCT)
    if weight is None:
        return Weight(node.name or "", node.op_type, "product", (), "", False, "its codes or scales are computed", ())
    offsets = next((use.node for use in node.outputs[0].uses() if adds_offsets(use.node)), None)
    values = [*weight.values, *(offsets.inputs[3:] if offsets is not None else ())]
    tensors = tuple(tensor for value in values if value is not None and (tensor := stored(value)) is not None)
    shape, kind = (weight.shape, "linear") if linear else (weight.shape[::-1], "embedding")
    form = f"{weight.form}{' with offsets' if offsets is not None else ''}"
    return Weight(node.name or "", node.op_type, kind, shape, form, True, "", tensors)


def _nbits(node: ir.Node) -> Weight:
    shape = (node.attributes.get_int("K", 0), node.attributes.get_int("N", 0))
    operands = [node.inputs[i] if i < len(node.inputs) else None for i in (1, 2, 3)]
    tensors = tuple(t for v in operands if v is not None and (t := stored(v)) is not None)
    form = _form(
        f"int{node.attributes.get_int('bits', 4)}",
        node.attributes.get_int("block_size", 0),
        shape[0],
        symmetric=len(node.inputs) < 4 or node.inputs[3] is None,
    )
    return Weight(node.name or "", node.op_type, "linear", shape, form, True, "", tensors)


def _block_gather(node: ir.Node) -> Weight:
    tensors = tuple(t for v in node.inputs if v is not None and (t := stored(v)) is not None)
    bits, codes = node.attributes.get_int("bits", 4), _dims(tensors[0])
    per_byte = 8 // bits if tensors[0].dtype.bitwidth == 8 else 1
    shape = (codes[0], codes[-1] * per_byte)
    form = _form(f"int{bits}", node.attributes.get_int("block_size", 128), shape[1], symmetric=len(tensors) < 3)
    return Weight(node.name or "", node.op_type, "embedding", shape, form, True, "", tensors)


def _integer_product(node: ir.Node, kind: str, positions: Sequence[int]) -> Iterator[Weight]:
    slots = [slot for slot in positions if 0 <= slot < len(node.inputs)]
    values = [node.inputs[slot] for slot in slots]
    tensors = tuple(t for v in values if v is not None and (t := stored(v)) is not None)
    tensors += _scales_behind(node)
    if tensors and (len(tensors[0].shape) == 2 or kind == "conv"):
        form = f"{tensors[0].dtype.name.lower()} with integer activations"
        yield Weight(node.name or "", node.op_type, kind, _dims(tensors[0]), form, True, "", tensors)


def _scales_behind(node: ir.Node) -> tuple[ir.TensorProtocol, ...]:
    """The scales of a weight in an integer product: what its sums are multiplied by, a Cast and a Mul behind it."""
    readers = [use.node for use in node.outputs[0].uses()]
    readers += [use.node for own in readers if own.op_type == "Cast" for use in own.outputs[0].uses()]
    for product in (own for own in readers if own.op_type == "Mul"):
        for value in product.inputs:
            producer = value.producer() if value is not None else None
            found = [value, *(producer.inputs if producer is not None and producer.op_type == "Mul" else ())]
            tensors = [t for v in found if v is not None and (t := stored(v)) is not None]
            if tensors:
                return (tensors[0],)
    return ()


def _product(node: ir.Node) -> Weight:
    """A MatMul or Gemm: of dequantized codes, of a float weight, or of two activations."""
    weight = node.inputs[1]
    decoded = dequantized(weight) if weight is not None else None
    name = node.name or ""
    if decoded is not None:
        tensors, codes = decoded.tensors, _dims(decoded.tensors[0])
        codes = (decoded.rows, *codes[1:]) if decoded.rows else codes
        flipped = node.attributes.get_int("transB", 0) != (_behind_transpose(weight) is not None)
        shape = codes[::-1] if flipped and len(codes) == 2 else codes
        form = _form(decoded.codes, decoded.block, shape[0], symmetric=len(tensors) < 3)
        if decoded.looked_up:
            form = f"{decoded.codes} {grouped_by(decoded.block, shape[0])}"
        name = tensors[0].name or name  # inlined nodes are numbered, their weights keep their names
        return Weight(name, f"DequantizeLinear + {node.op_type}", "linear", shape, form, True, "", tensors)
    if node.op_type == "Gemm":
        tensor = stored(weight) if weight is not None else None
        if tensor is None or weight is None or len(tensor.shape) != 2:
            return Weight(name, node.op_type, "product", (), "", False, "no constant 2-D weight", ())
        shape = _dims(tensor)[::-1] if node.attributes.get_int("transB", 0) else _dims(tensor)
        return _float(
            node, "linear", weight, shape, f"a Gemm: the pass `{ensuring(Fact.CANONICAL)}` makes a MatMul of it"
        )
    linear = as_linear(node)
    if not isinstance(linear, str):
        return _float(node, "linear", linear.weight, linear.shape, "kept in float")
    tensor = stored(weight) if weight is not None else None
    if tensor is not None and weight is not None:
        lifted = f"in a Constant node: the pass `{ensuring(Fact.CANONICAL)}` lifts it"
        return _float(node, "linear", weight, _dims(tensor), lifted if weight.const_value is None else linear)
    return Weight(name, node.op_type, "product", (), "", False, linear, ())


def _gathered_codes(node: ir.Node) -> Iterator[Weight]:
    """A lookup of codes that are dequantized behind it: Gather of an integer table, then DequantizeLinear."""
    table = node.inputs[0]
    tensor = stored(table) if table is not None else None
    if tensor is None or len(tensor.shape) != 2 or tensor.dtype.bitwidth > 8 or tensor.dtype.is_floating_point():
        return
    if on_a_grid(node.outputs[0]):
        return
    axis, readers = node.attributes.get_int("axis", 0), [use.node for use in node.outputs[0].uses()]
    rows, columns = _dims(tensor)
    codes = _unpacked_behind(node) if axis == 1 else None
    if codes is not None and (fields := _fields(codes)) is not None:
        decoder = next(use.node for use in codes.uses())
        zero = decoder.inputs[2] if len(decoder.inputs) > 2 else None
        block, symmetric = decoder.attributes.get_int("block_size", 0), zero is None or _fields(zero) is None
        form = fields.form(block, symmetric=symmetric)
        shape, operator = (columns, fields.rows), "Gather + DequantizeLinear"
        yield Weight(node.name or "", operator, "embedding", shape, form, True, "", (tensor,))
        return
    for reader in readers:
        if reader.op_type == "DequantizeLinear" and reader.inputs[0] is node.outputs[0]:
            shape = (columns, rows) if axis == 1 else (rows, columns)
            block = reader.attributes.get_int("block_size", 0)
            form = _form(tensor.dtype.name.lower(), block, shape[1], symmetric=len(reader.inputs) < 3)
            yield Weight(node.name or "", "Gather + DequantizeLinear", "embedding", shape, form, True, "", (tensor,))
        elif reader.op_type == "BitShift" and axis == 1 and rows > 1:  # columns of two codes a byte, (K, V / 2)
            shape, operator = (2 * columns, rows), "Gather + BitShift"
            form = _looked_up_behind(reader) or "uint4"
            yield Weight(node.name or "", operator, "embedding", shape, form, True, "", (tensor,))


@dataclass(frozen=True)
class Decoded:
    """What a DequantizeLinear decodes. tensors: codes, scale, zero point if any, as they are stored. block: its size.

    codes: in a word, their type or the format whose table they are looked up in. rows: K, where they are fields of
    bytes.
    """

    tensors: tuple[ir.TensorProtocol, ...]
    block: int
    codes: str
    looked_up: bool = False
    rows: int = 0


@dataclass(frozen=True)
class _Fields:
    """Codes in fields of bytes, as a body unpacks them. packed: (bytes, N). rows: K. looked_up: in a codebook, with a
    scale for each column.
    """

    packed: ir.TensorProtocol
    format: str
    rows: int
    looked_up: bool

    def form(self, block: int, *, symmetric: bool) -> str:
        """The format and its groups, in words."""
        if self.looked_up:
            return f"{self.format} {grouped_by(0, self.rows)}"
        return _form(self.format, block, self.rows, symmetric=symmetric)


def _fields(value: ir.Value) -> _Fields | None:
    """The bytes that a value is unpacked of, if it is."""
    packed: ir.TensorProtocol | None = None
    rows, shifts, found, book, bits, lanes = 0, [], [value], None, 0, 0
    for current in found:  # grows while it is walked
        own, producer = stored(current), current.producer()
        packed = own if own is not None and len(own.shape) == 2 else packed
        if own is not None or producer is None or producer.op_type not in _UNPACKING:
            continue
        amounts = stored(producer.inputs[1]) if producer.op_type == "BitShift" and producer.inputs[1] else None
        if amounts is not None and len(amounts.shape) == 3:
            shifts.append(sorted(int(n) for n in amounts.numpy().reshape(-1)))
        if producer.op_type == "Slice" and not rows:
            rows = _given(producer.inputs[2])
        if producer.op_type == "Split":
            bits = producer.attributes.get_int("num_outputs", 0)
        lanes = max(lanes, len(producer.inputs) if producer.op_type == "Concat" else 0)
        taken = producer.inputs[: {"BitwiseOr": 2, "Concat": None}.get(producer.op_type, 1)]
        if producer.op_type == "Gather" and (table := _codebook(producer)) is not None:
            book, taken = table, producer.inputs[1:]
        found += [v for v in taken if v is not None and v not in found]
    if bits in bit_fields.ALL_FIELDS and lanes == 8 and packed is not None:  # whole blocks of rows
        shifts, rows = bit_fields.shifts(bits), 8 * _dims(packed)[0] // bits * (1 if book is None else 2)
    unpacking = [own for own in BY_NAME.usable() if shifts and sorted(own.shifts()) == sorted(shifts)]
    named = (own.name for own in unpacking if (own.rows_per_code == 1 if book is None else own.looks_up(book.numpy())))
    name = next(named, "")
    return _Fields(packed, name, rows, book is not None) if packed is not None and name else None


def _codebook(node: ir.Node) -> ir.TensorProtocol | None:
    """The numbers of several rows by their code, that a Gather looks codes up in; None of a table of codes."""
    table = stored(node.inputs[0]) if node.inputs[0] is not None else None
    if table is None or len(table.shape) != 2 or node.attributes.get_int("axis", 0) != 0:
        return None
    return table


def _given(value: ir.Value | None) -> int:
    """The integer attribute of an operator that its inlined body reads as a tensor (1,); 0 where it is none."""
    shaped = value.producer() if value is not None else None
    number = shaped.inputs[0].producer() if shaped is not None and shaped.inputs and shaped.inputs[0] else None
    return number.attributes.get_int("value_int", 0) if number is not None else 0


def _unpacked_behind(node: ir.Node) -> ir.Value | None:
    """The codes that a DequantizeLinear reads, unpacked of what a node gives."""
    nodes = [node]
    for current in nodes:  # grows while it is walked
        for use in current.outputs[0].uses():
            if use.node.op_type == "DequantizeLinear" and use.idx == 0:
                return current.outputs[0]
            nodes += [use.node] if use.node.op_type in _UNPACKING and use.idx < 2 and len(nodes) < 32 else []
    return None


def dequantized(value: ir.Value | None) -> Decoded | None:
    """What a DequantizeLinear makes of constants, if one does; None for an activation, of which scale and zero point
    alone are constant.
    """
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type in ("Transpose", "Cast", "Reshape"):
        return dequantized(producer.inputs[0])
    codes = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None
    if producer is None or codes is None:
        return None
    tensors = [t for v in producer.inputs[1:] if v is not None and (t := _origin(v)) is not None]
    block, lookup = producer.attributes.get_int("block_size", 0), codes.producer()
    if tensors and (own := stored(codes)) is not None:
        return Decoded((own, *tensors), block, own.dtype.name.lower())
    if (fields := _fields(codes)) is not None:
        tensors += [zero.packed for v in producer.inputs[2:] if v is not None and (zero := _fields(v)) is not None]
        block = 0 if fields.looked_up else block  # scales are repeated for it
        return Decoded((fields.packed, *tensors), block, fields.format, fields.looked_up, fields.rows)
    table, index = lookup.inputs[:2] if lookup is not None and lookup.op_type == "Gather" else (None, None)
    if not tensors or table is None or index is None or (levels := stored(table)) is None:
        return None
    return None if (own := _origin(index)) is None else Decoded((own, *tensors), block, _table(levels), looked_up=True)


def _origin(value: ir.Value, steps: int = 6) -> ir.TensorProtocol | None:
    """The constant of rank 2, or else any, that casts and powers of two make a value of: codes or scales."""
    producer, own = value.producer(), stored(value)
    if own is not None or producer is None or producer.op_type not in _REMADE or not steps:
        return own
    made = (_origin(v, steps - 1) for v in producer.inputs[: _REMADE[producer.op_type]] if v is not None)
    return max((tensor for tensor in made if tensor is not None), key=lambda own: len(own.shape), default=None)


def _table(levels: ir.TensorProtocol) -> str:
    """The format that looks its codes up in a table."""
    known = (own for own in (*BY_NAME.usable(), *OTHERS) if isinstance(own, Format))
    return next((own.name for own in known if own.looks_up(levels.numpy())), "table")


def _looked_up_behind(node: ir.Node) -> str:
    """The format of the codes that BitShift takes out of bytes, where a table says it."""
    nodes = [node]
    for current in nodes:  # grows while it is walked
        for use in current.outputs[0].uses():
            levels = stored(use.node.inputs[0]) if use.node.op_type == "Gather" and use.node.inputs[0] else None
            if use.idx == 1 and levels is not None:
                return _table(levels)
            nodes += [use.node] if use.node.op_type in ("BitwiseAnd", "Cast") and len(nodes) < 8 else []
    return ""


def _behind_transpose(value: ir.Value | None) -> ir.Node | None:
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == "Transpose" else None


def _float(node: ir.Node, kind: str, weight: ir.Value, shape: tuple[int, ...], reason: str) -> Weight:
    tensor = stored(weight)
    assert tensor is not None
    return Weight(node.name or "", node.op_type, kind, shape, tensor.dtype.name.lower(), False, reason, (tensor,))


def _form(codes: str, block: int, k: int, *, symmetric: bool) -> str:
    size = f"g{block}" if 0 < block < k else "per-column"
    return f"{codes} {size} {'sym' if symmetric else 'asym'}"


def _dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(dim) for dim in tensor.shape.numpy())
