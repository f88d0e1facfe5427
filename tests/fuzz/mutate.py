"""Damage, decided by a random generator alone: fields and structure of a model, bytes, JSON, words of a recipe."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import TensorProto, helper

from fuzz.seeds import ARRAYS, DATA, MODEL, RECIPE, TOKENIZER, Seed, packed_arrays

Random = np.random.Generator


def _words(text: str) -> list[str]:
    return text.split()


_NUMBERS = (0, 1, -1, 2, 3, 7, 127, 255, 2**31 - 1, 2**31, -(2**31), 2**63 - 1, -(2**63), 10**6, 10**9, 10**12)
_FLOATS = (0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e38, 1e-38, 0.5)
_TEXTS = ("", "x", "\x1b[31mr\x07", "\u202egnp", "a" * 3000, "..", "/dev/null", "\x00", "nan", "日本", "n\nm", "%s{}")
_OPERATORS = _words(
    """
Relu Add Mul Sub Div MatMul Gemm Conv ConvTranspose Gather Reshape Transpose Concat Split Slice
Squeeze Unsqueeze Identity Cast Shape ConstantOfShape Expand Tile Range Where Softmax
LayerNormalization BatchNormalization Einsum Dropout Clip HardSwish ReduceMean ReduceSum Pad Resize
TopK If Loop Scan Constant DequantizeLinear QuantizeLinear DynamicQuantizeLinear MatMulInteger LSTM
Reciprocal Neg IsNaN Equal Flatten GlobalAveragePool Upsample Size
"""
)
_WORDS = _words(
    """
0 -1 1e400 .nan .inf 99999999999999999999 true null ~ [] {} [[]] keep nan pack qdq smooth(alpha=nan)
awq(grid=-1) awq(grid=1e9) gptq(damping=-3) pack(clip=maybe) qdq(provider=x) *a &a !!python/none
2001-99-99 0x10 1_0 '' "*" x[
"""
)


def mutated(seed: Seed, random: Random) -> dict[str, bytes]:
    """The files of a seed, one of them damaged in one to four places."""
    files = dict(seed.files)
    target = _pick(random, [MODEL] * 12 + [name for name in (DATA, ARRAYS, RECIPE, TOKENIZER) if name in files] * 2)
    for _ in range(1 + int(random.geometric(0.6)) % 4):
        files[target] = _DAMAGE[target](files[target], random)
    return files


def _pick(random: Random, choices: Any) -> Any:
    return choices[int(random.integers(len(choices)))]


def _bytes(content: bytes, random: Random) -> bytes:
    """A byte changed, a piece removed, repeated, moved, or the end cut off."""
    data, at = bytearray(content), int(random.integers(max(1, len(content))))
    end = at + 1 + int(random.integers(1, 64))
    kind = int(random.integers(6))
    if kind == 0 and data:
        data[at] ^= 1 << int(random.integers(8))
    elif kind == 1 and data:
        data[at] = int(random.integers(256))
    elif kind == 2:
        del data[at:end]
    elif kind == 3:
        data[at:at] = data[at:end]
    elif kind == 4:
        del data[at:]
    else:
        data[at:at] = bytes(random.integers(0, 256, int(random.integers(1, 9)), np.uint8))
    return bytes(data)


def _model(content: bytes, random: Random) -> bytes:
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception:  # damaged before
        return _bytes(content, random)
    if random.random() < 0.1:
        return _bytes(content, random)
    change = _pick(random, _CHANGES)
    try:
        change(proto, random)
        return proto.SerializeToString()
    except (UnicodeError, ValueError, TypeError):  # a name that was damaged, a field that takes no such value
        return _bytes(content, random)


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from _messages(inner)


def _field(proto: onnx.ModelProto, random: Random) -> None:
    """Any field that is set, of any message: another value, none, or one more, one less, another order."""
    message = _pick(random, list(_messages(proto)))
    fields = message.ListFields()
    if not fields or random.random() < 0.1:
        _unset(message, random)
        return
    field, value = _pick(random, fields)
    if field.is_repeated:
        _repeated(message, field, value, random)
    elif field.message_type is not None or random.random() < 0.15:
        message.ClearField(field.name)
    else:
        setattr(message, field.name, _scalar(field, value, random))


def _unset(message: Message, random: Random) -> None:
    field = _pick(random, message.DESCRIPTOR.fields)
    if field.is_repeated:
        if field.message_type is None:
            getattr(message, field.name).append(_scalar(field, 0, random))
        else:
            getattr(message, field.name).add()
    elif field.message_type is None:
        setattr(message, field.name, _scalar(field, 0, random))
    else:
        getattr(message, field.name).SetInParent()


def _repeated(message: Message, field: Any, values: Any, random: Random) -> None:
    kind, at = int(random.integers(5)), int(random.integers(len(values)))
    if kind == 0:
        del values[at]
    elif kind == 1:
        values.append(copy.deepcopy(values[at]))
    elif kind == 2:
        message.ClearField(field.name)
    elif field.message_type is None:
        values[at] = _scalar(field, values[at], random)
    else:
        other = copy.deepcopy(values[int(random.integers(len(values)))])
        values[at].CopyFrom(other)


def _scalar(field: Any, old: Any, random: Random) -> Any:
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return _pick(random, _FLOATS)
    if field.type == field.TYPE_STRING:
        return _pick(random, _TEXTS)
    if field.type == field.TYPE_BYTES:
        return _bytes(old or b"abc", random)
    if field.type == field.TYPE_ENUM:
        return _pick(random, [value.number for value in field.enum_type.values])
    near = [old + 1, old - 1, -old] if isinstance(old, int) else []
    number = int(_pick(random, [*_NUMBERS, *near, int(random.integers(0, 30))]))
    bits = 64 if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else 32
    if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64):
        return number % 2**bits
    return (number + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def _all_graphs(proto: onnx.ModelProto) -> list[Any]:
    return [m for m in _messages(proto) if isinstance(m, (onnx.GraphProto, onnx.FunctionProto))]


def _names(graph: Any) -> list[str]:
    named = [value if isinstance(value, str) else value.name for value in graph.input]
    named += [tensor.name for tensor in getattr(graph, "initializer", ())]
    return [*named, *(name for node in graph.node for name in node.output), ""]


def _nodes(proto: onnx.ModelProto) -> list[tuple[Any, onnx.NodeProto]]:
    return [(graph, node) for graph in _all_graphs(proto) for node in graph.node]


def _rewire(proto: onnx.ModelProto, random: Random) -> None:
    """Another value where a node reads one, or one more that it reads: cycles, wrong ranks and types, dead ends."""
    graph, node = _pick(random, _nodes(proto))
    name = _pick(random, _names(graph) + _names(proto.graph))
    if node.input and random.random() < 0.85:
        node.input[int(random.integers(len(node.input)))] = name
    else:
        node.input.append(name)


def _operator(proto: onnx.ModelProto, random: Random) -> None:
    _, node = _pick(random, _nodes(proto))
    node.op_type = _pick(random, _OPERATORS)
    if random.random() < 0.5:
        del node.attribute[:]
    if random.random() < 0.1:
        node.domain = _pick(random, ["", "com.microsoft", "ai.onnx", "qcompile", "local"])


def _insert(proto: onnx.ModelProto, random: Random) -> None:
    """A node between a value and all its readers."""
    graph = _pick(random, _all_graphs(proto))
    name = _pick(random, _names(graph))
    inputs = [name, *(_pick(random, _names(graph)) for _ in range(int(random.integers(3))))]
    made = helper.make_node(_pick(random, _OPERATORS), inputs, [f"{name}_f{random.integers(100)}"], "inserted")
    for attribute in ("axis", "perm", "to", "axes"):
        if random.random() < 0.15:
            number = int(_pick(random, (0, 1, -1, 2, 5, 10, -7)))
            made.attribute.append(
                helper.make_attribute(attribute, [number, 0] if attribute in ("perm", "axes") else number)
            )
    for node in graph.node:
        for i, read in enumerate(node.input):
            if read == name:
                node.input[i] = made.output[0]
    graph.node.append(made)


def _tensors(proto: onnx.ModelProto) -> list[TensorProto]:
    return [message for message in _messages(proto) if isinstance(message, TensorProto)]


def _another_tensor(proto: onnx.ModelProto, random: Random) -> None:
    """A tensor of another shape or type, in itself well formed: what no check of the file alone can refuse."""
    found = _tensors(proto)
    if not found:
        return
    tensor = _pick(random, found)
    dims = [int(_pick(random, (0, 1, 1, 2, 3, 5, 16, 40))) for _ in range(int(random.integers(0, 5)))]
    kind = _pick(random, (1, 1, 1, 10, 11, 7, 6, 2, 3, 9, 16, 14, 22, 8))
    count = int(np.prod(dims))
    values: Any = (random.standard_normal(count) * _pick(random, (0, 1, 1, 1e30))).tolist()
    if kind in (7, 6, 2, 3, 9, 22):
        values = random.integers(0, 2 if kind == 9 else 8, count).tolist()
    if kind == 8:
        values = [b"s"] * count
    with np.errstate(over="ignore"):
        tensor.CopyFrom(helper.make_tensor(tensor.name, kind, dims, values))


def _sizes(proto: onnx.ModelProto, random: Random) -> None:
    """The declared shape of an input, output or value: free, fixed, huge, negative, of another rank."""
    values = [m for m in _messages(proto) if isinstance(m, onnx.ValueInfoProto)]
    if not values:
        return
    given = _pick(random, values)
    sizes = [
        _pick(random, (None, "b", "s", 0, 1, 2, 3, 8, 16, 17, -1, 10**5, 2**40)) for _ in range(random.integers(5))
    ]
    kind = _pick(random, (1, 1, 1, 7, 10, 9, 8, 11, 6))
    given.CopyFrom(helper.make_tensor_value_info(given.name, kind, _pick(random, (sizes, sizes, sizes, None))))


def _versions(proto: onnx.ModelProto, random: Random) -> None:
    entry = _pick(random, proto.opset_import) if proto.opset_import else proto.opset_import.add()
    entry.version = int(_pick(random, [*range(28), -1, 10**6]))
    if random.random() < 0.2:
        entry.domain = _pick(random, ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "local", "nobody"))


def _mixed(proto: onnx.ModelProto, random: Random) -> None:
    """A message in place of another one of its type, from anywhere in the model: graphs in themselves, say."""
    messages = list(_messages(proto))
    target = _pick(random, messages)
    same = [message for message in messages if message.DESCRIPTOR is target.DESCRIPTOR]
    chosen = copy.deepcopy(_pick(random, same))
    if chosen.ByteSize() < 200_000:
        target.CopyFrom(chosen)


_CHANGES: tuple[Callable[[onnx.ModelProto, Random], None], ...] = (
    (_field,) * 8 + (_rewire,) * 3 + (_operator, _insert, _another_tensor, _another_tensor, _sizes, _versions, _mixed)
)


def _arrays(content: bytes, random: Random) -> bytes:
    if random.random() < 0.5:
        return _bytes(content, random)
    shape = [int(n) for n in random.integers(0, 9, int(random.integers(0, 5)))]
    kinds = ("f4", "f8", "f2", "i8", "i4", "u1", "?", "c8", "U3", "M8[s]", "O")
    array = np.zeros(shape, _pick(random, kinds)) if random.random() < 0.8 else np.full(shape, np.nan, "f4")
    return packed_arrays(
        **{_pick(random, ("x1", "x1", "input_ids", "y", "\ud800".encode("utf-8", "replace").decode())): array}
    )


def _recipe(content: bytes, random: Random) -> bytes:
    lines = content.decode("utf-8", "replace").splitlines() or [""]
    at = int(random.integers(len(lines)))
    kind = int(random.integers(5))
    if kind < 3:
        lines[at] = lines[at].split(":")[0] + ": " + _pick(random, _WORDS)
    elif kind == 3:
        lines.insert(at, _pick(random, _WORDS))
    else:
        return _bytes(content, random)
    return "\n".join(lines).encode()


def _json(content: bytes, random: Random) -> bytes:
    """Anywhere in a JSON tree: another number, word, list, or nothing."""
    try:
        tree = json.loads(content)
    except ValueError:
        return _bytes(content, random)
    if random.random() < 0.1:
        return _bytes(content, random)
    places = list(_places(tree))
    if not places:
        return _bytes(content, random)
    holder, key = _pick(random, places)
    if random.random() < 0.2:
        del holder[key]
    else:
        choices = [
            None,
            0,
            -1,
            1,
            2**32,
            2**64,
            0.5,
            "",
            "##",
            "é",
            [],
            {},
            True,
            "Precompiled",
            "Unigram",
            "WordPiece",
        ]
        holder[key] = _pick(random, [*choices, copy.deepcopy(_pick(random, places)[0])])
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


_DAMAGE: dict[str, Callable[[bytes, Random], bytes]] = {
    MODEL: _model,
    DATA: _bytes,
    ARRAYS: _arrays,
    RECIPE: _recipe,
    TOKENIZER: _json,
}
