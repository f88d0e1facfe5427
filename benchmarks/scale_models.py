"""Decoders of real shapes with random weights, in half precision, written layer by layer: no model is ever in memory.

Weights are heavy-tailed (x + 0.15 x³ of a normal x, kurtosis 9); the embedding's rows lie mostly in a few directions,
and norms have a few gains of eight times the others, so that activations are correlated and have loud channels.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto, helper, save

Half = npt.NDArray[np.float16]
_CHUNK = 1 << 22  # elements of a weight that are drawn at a time
_ALIGN = 4096  # where weights begin in the file, so that they can be mapped
_DIRECTIONS = 64  # in which the embedding's rows mostly lie


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder of Llama's kind. tied: the head is the embedding, transposed."""

    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False
    layers: int = 1

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden // self.heads

    @property
    def products(self) -> list[tuple[int, int]]:
        """(K, N) of what each activation of a layer multiplies, side by side: q, k, v; o; gate, up; down."""
        narrow = self.kv_heads * self.head_dim
        return [
            (self.hidden, self.hidden + 2 * narrow),
            (self.hidden, self.hidden),
            (self.hidden, 2 * self.ffn),
            (self.ffn, self.hidden),
        ]

    @property
    def layer_weights(self) -> int:
        """Elements of one layer's products."""
        return sum(k * n for k, n in self.products)

    @property
    def weights(self) -> int:
        """Elements of all products and of the embedding."""
        return self.layers * self.layer_weights + (1 if self.tied else 2) * self.vocab * self.hidden


SHAPES = {
    "tiny": Shape(256, 704, 8, 4, 2048, tied=True),
    "small": Shape(1024, 2816, 16, 8, 8192, tied=True),
    "llama-3.2-1b": Shape(2048, 8192, 32, 8, 128256, tied=True),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32000),
    "llama-2-70b": Shape(8192, 28672, 64, 8, 32000),
    "llama-3.1-405b": Shape(16384, 53248, 128, 8, 128256),
}


class Writer:
    """A graph in half precision whose weights go to a file as they are named."""

    def __init__(self, path: Path) -> None:
        self.path, self.data = path, path.with_name(f"{path.name}.data").open("wb")
        self.nodes: list[object] = []
        self.weights: list[TensorProto] = []

    def weight(self, name: str, chunks: Iterator[Half], *dims: int) -> str:
        """A weight of these dimensions, written piece by piece."""
        self.data.write(bytes(-self.data.tell() % _ALIGN))
        start = self.data.tell()
        for chunk in chunks:
            self.data.write(memoryview(np.ascontiguousarray(chunk)).cast("B"))
        tensor = TensorProto(name=name, dims=dims, data_type=TensorProto.FLOAT16)
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": Path(self.data.name).name, "offset": start, "length": self.data.tell() - start}
        for key, entry in entries.items():
            tensor.external_data.add(key=key, value=str(entry))
        self.weights.append(tensor)
        return name

    def constant(self, array: object, dtype: npt.DTypeLike = np.int64) -> str:
        """A small constant, inside the file."""
        own, name = np.asarray(array, dtype), f"constant_{len(self.weights)}"
        kind = helper.np_dtype_to_tensor_dtype(own.dtype)
        self.weights.append(helper.make_tensor(name, kind, own.shape, own.tobytes(), raw=True))
        return name

    def node(self, operator: str, *inputs: str, name: str = "", **attributes: object) -> str:
        """The name of the node's output."""
        output = f"value_{len(self.nodes)}" if not name else f"{name}.output"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name or output, **attributes))
        return output

    def close(self, output: str, vocab: int) -> None:
        """Write the model file."""
        self.nodes.append(helper.make_node("Identity", [output], ["logits"], name="logits"))
        ids = [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"])]
        made = [helper.make_tensor_value_info("logits", TensorProto.FLOAT16, ["batch", "sequence", vocab])]
        graph = helper.make_graph(self.nodes, "scale", ids, made, self.weights)
        model: ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        self.data.close()
        save(model, self.path)


class Decoder:
    """Writes one."""

    def __init__(self, shape: Shape, path: Path) -> None:
        self.shape, self.out, self.random = shape, Writer(path), np.random.default_rng(0)

    def write(self) -> None:
        """input_ids (batch, sequence) to logits (batch, sequence, vocab)."""
        own, out = self.shape, self.out
        table = out.weight("model.embed_tokens.weight", self._table(), own.vocab, own.hidden)
        x = out.node("Gather", table, "input_ids", name="model.embed_tokens", axis=0)
        self._positions()
        for layer in range(own.layers):
            name = f"model.layers.{layer}"
            x = out.node("Add", x, self._attention(self._norm(x, f"{name}.input_layernorm"), f"{name}.self_attn"))
            x = out.node("Add", x, self._mlp(self._norm(x, f"{name}.post_attention_layernorm"), f"{name}.mlp"))
        x = self._norm(x, "model.norm")
        if own.tied:
            out.close(out.node("MatMul", x, out.node("Transpose", table, perm=[1, 0]), name="lm_head"), own.vocab)
        else:
            out.close(self._linear(x, "lm_head", own.hidden, own.vocab), own.vocab)

    def _table(self) -> Iterator[Half]:
        """Rows in few directions, whose strengths fall, and noise."""
        own, directions = self.shape, min(_DIRECTIONS, self.shape.hidden)
        basis = self.random.standard_normal((directions, own.hidden), np.float32)
        basis *= (np.arange(1, directions + 1, dtype=np.float32) ** -0.7)[:, None]
        for rows in _pieces(own.vocab, own.hidden):
            mixed = self.random.standard_normal((rows, directions), np.float32) @ basis
            mixed += 0.3 * self.random.standard_normal(mixed.shape, np.float32)
            yield (0.05 * mixed).astype(np.float16)

    def _drawn(self, k: int, n: int, gain: float) -> Iterator[Half]:
        for rows in _pieces(k, n):
            x = self.random.standard_normal((rows, n), np.float32)
            x *= (1 + 0.15 * x * x) * np.float32(gain / (1.62 * k**0.5))  # 1.62: the standard deviation of x + 0.15 x³
            yield x.astype(np.float16)

    def _linear(self, x: str, name: str, k: int, n: int, gain: float = 1.0) -> str:
        return self.out.node("MatMul", x, self.out.weight(f"{name}.weight", self._drawn(k, n, gain), k, n), name=name)

    def _norm(self, x: str, name: str) -> str:
        out, own = self.out, self.shape
        gains = np.exp(0.3 * self.random.standard_normal(own.hidden))
        gains[self.random.choice(own.hidden, max(own.hidden // 512, 1), replace=False)] *= 8
        wide = out.node("Cast", x, to=TensorProto.FLOAT)
        mean = out.node("ReduceMean", out.node("Mul", wide, wide), out.constant([-1]), keepdims=1)
        root = out.node("Sqrt", out.node("Add", mean, out.constant(1e-5, np.float32)))
        normed = out.node("Cast", out.node("Div", wide, root), to=TensorProto.FLOAT16)
        return out.node("Mul", normed, out.weight(f"{name}.weight", iter([gains.astype(np.float16)]), own.hidden))

    def _positions(self) -> None:
        """Tables of rotations (sequence, head_dim) and the causal mask (sequence, sequence), for all layers."""
        out, width = self.out, self.shape.head_dim
        length = out.node("Squeeze", out.node("Shape", "input_ids", start=1, end=2), out.constant([0]))
        rows = out.node("Range", out.constant(0), length, out.constant(1))
        steps = 10000.0 ** (-np.arange(0, width, 2) / width)
        rows_first = out.node("Unsqueeze", rows, out.constant([1]))
        angles = out.node("Cast", rows_first, to=TensorProto.FLOAT)
        angles = out.node("Mul", angles, out.constant(np.concatenate([steps, steps]), np.float32))
        self.cos, self.sin = (
            out.node("Cast", out.node(turn, angles), to=TensorProto.FLOAT16) for turn in ("Cos", "Sin")
        )
        seen = out.node("LessOrEqual", out.node("Unsqueeze", rows, out.constant([0])), rows_first)
        self.mask = out.node("Where", seen, out.constant(0, np.float16), out.constant(-6e4, np.float16))

    def _heads(self, x: str, count: int) -> str:
        shape = self.out.constant([0, 0, count, self.shape.head_dim])
        return self.out.node("Transpose", self.out.node("Reshape", x, shape), perm=[0, 2, 1, 3])

    def _turned(self, x: str) -> str:
        out, half = self.out, self.shape.head_dim // 2
        left, right = (out.node("Slice", x, *map(out.constant, ([start], [start + half], [3]))) for start in (0, half))
        other = out.node("Concat", out.node("Neg", right), left, axis=-1)
        return out.node("Add", out.node("Mul", x, self.cos), out.node("Mul", other, self.sin))

    def _repeated(self, x: str) -> str:
        own, out = self.shape, self.out
        if own.heads == own.kv_heads:
            return x
        wide = out.node("Unsqueeze", x, out.constant([2]))
        wide = out.node("Expand", wide, out.constant([1, 1, own.heads // own.kv_heads, 1, 1]))
        return out.node("Reshape", wide, out.constant([0, own.heads, -1, own.head_dim]))

    def _attention(self, x: str, name: str) -> str:
        own, out, narrow = self.shape, self.out, self.shape.kv_heads * self.shape.head_dim
        q = self._turned(self._heads(self._linear(x, f"{name}.q_proj", own.hidden, own.hidden), own.heads))
        k = self._turned(self._heads(self._linear(x, f"{name}.k_proj", own.hidden, narrow), own.kv_heads))
        v = self._heads(self._linear(x, f"{name}.v_proj", own.hidden, narrow), own.kv_heads)
        scores = out.node("MatMul", q, out.node("Transpose", self._repeated(k), perm=[0, 1, 3, 2]))
        scores = out.node("Mul", scores, out.constant(own.head_dim**-0.5, np.float16))
        weights = out.node("Softmax", out.node("Add", scores, self.mask), axis=-1)
        context = out.node("Transpose", out.node("MatMul", weights, self._repeated(v)), perm=[0, 2, 1, 3])
        merged = out.node("Reshape", context, out.constant([0, 0, own.hidden]))
        return self._linear(merged, f"{name}.o_proj", own.hidden, own.hidden, 0.05)

    def _mlp(self, x: str, name: str) -> str:
        own, out = self.shape, self.out
        gate = self._linear(x, f"{name}.gate_proj", own.hidden, own.ffn)
        up = self._linear(x, f"{name}.up_proj", own.hidden, own.ffn)
        active = out.node("Mul", out.node("Mul", gate, out.node("Sigmoid", gate)), up)
        return self._linear(active, f"{name}.down_proj", own.ffn, own.hidden, 0.05)


def _pieces(rows: int, width: int) -> Iterator[int]:
    """Numbers of rows that add up to all."""
    step = max(_CHUNK // width, 1)
    yield from (min(step, rows - start) for start in range(0, rows, step))


def decoder(shape: Shape, cache: Path) -> Path:
    """The model file of that shape, made in a folder of the cache unless it is there."""

    def write(folder: Path) -> None:
        Decoder(shape, folder / "model.onnx").write()
        (folder / "shape.json").write_text(json.dumps(asdict(shape)))

    name = "-".join(str(int(number)) for number in asdict(shape).values())
    return made(cache / f"decoder-{name}", write) / "model.onnx"


def tokens(shape: Shape, samples: int, context: int, cache: Path) -> Path:
    """A folder of random tokens: a file for each window, input_ids (1, context), as texts give them."""

    def write(folder: Path) -> None:
        random = np.random.default_rng(1)
        for number in range(samples):
            np.savez(folder / f"{number:04}.npz", input_ids=random.integers(0, shape.vocab, (1, context)))

    return made(cache / f"windows-{shape.vocab}-{samples}-{context}", write)


def made(folder: Path, write: Callable[[Path], None]) -> Path:
    """The folder, written by `write` under another name first unless it is there: a kill leaves no half of it."""
    if not folder.exists():
        part = folder.with_name(f".{folder.name}.{os.getpid()}")
        part.mkdir(parents=True)
        write(part)
        part.rename(folder)
    return folder


def at_depth(shape: Shape, layers: int) -> Shape:
    """The same with so many layers."""
    return replace(shape, layers=layers)
