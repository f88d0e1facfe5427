"""Decoders with caches as strangers write them: other masks, names of sizes, widths, and an encoder beside them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from graphs.table import Graph, case

_WIDTH, _VOCABULARY = 64, 256
_OPTIONS = {"min_coverage": 0.0, "group_size": 16, "lm_head": 8, "embedding": 8}


@dataclass
class Written:
    """How a decoder is written.

    mask: what a row sees: "causal", the same by "positions" (position_ids), "all". padding: whether attention_mask is
    looked at. sizes: what batch, rows, past and total are called. wide: of the values' heads. shared: odd layers read
    the caches of the one before. named: outputs are Identities. encoder: cross attention to encoder_hidden_states, with
    encoder_mask. inverted: the mask says what is hidden. turned: keys and queries by their positions.
    normed: queries and keys have a norm of their own, of each head. beside: gates read the norm that attention reads.
    half: in half precision, but for rotations and Softmax, which are computed in single.
    at: sequences, rows and cached rows of the data; first: its first position.
    """

    layers: int = 2
    heads: int = 4
    groups: int = 2
    width: int = 16
    wide: int = 16
    mask: str = "causal"
    padding: bool = True
    sizes: Sequence[str] = ("batch", "sequence", "past", "total")
    shared: bool = False
    named: bool = False
    encoder: bool = False
    encoder_mask: str = "encoder_attention_mask"
    inverted: bool = False
    turned: bool = True
    normed: bool = False
    beside: bool = False
    half: bool = False
    at: tuple[int, int, int] = (1, 3, 5)
    first: int = 0

    def build(self, make: Graph) -> None:
        """Inputs and outputs are called as Hugging Face does."""
        make.opsets, make.dtype = {"": 18}, np.float16 if self.half else np.float32
        _Decoder(make, self).build()


class _Decoder:
    def __init__(self, make: Graph, own: Written) -> None:
        self.make, self.own = make, own

    def build(self) -> None:
        make, own = self.make, self.own
        self._inputs()
        rows, past = self._size("input_ids", 1), self._size("past_key_values.0.key", 2)
        self.total = make.one("Add", past, rows)
        self.rows = make.one("Range", past, self.total, self._numbers(1, shape=()))
        mask, x = self._mask(), make.one("Gather", make.floats(_VOCABULARY, _WIDTH, scale=1.0), "input_ids")
        across = self._additive(self._seen(own.encoder_mask)) if own.encoder else ""
        if not own.turned:
            x = make.one("Add", x, make.one("Gather", make.floats(64, _WIDTH, scale=1.0), self.rows))
        presents: list[str] = []
        for layer in range(own.layers):
            n = self._norm(x)
            q = self._turned(self._of_heads(n, own.heads))
            if not (own.shared and layer % 2):
                presents[-2:] = [*presents[-2:], *self._appended(n, layer)]
            x = make.one("Add", x, self._attention(q, *presents[-2:], mask))
            if own.encoder:
                k, v = (self._heads("encoder_hidden_states", own.groups, size) for size in (own.width, own.wide))
                q = self._heads(self._norm(x), own.heads, own.width)
                x = make.one("Add", x, self._attention(q, k, v, across))
            n = n if own.beside else self._norm(x)
            gate, up = make.linear(n, 96, _WIDTH), make.linear(n, 96, _WIDTH)
            h = make.one("Mul", make.one("Mul", gate, make.one("Sigmoid", gate)), up)
            x = make.one("Add", x, make.linear(h, _WIDTH, 96))
        self._outputs(make.linear(self._norm(x), _VOCABULARY, _WIDTH), presents)

    # Inputs and outputs

    def _inputs(self) -> None:
        own, (batch, rows, past) = self.own, self.own.at
        b, s, p, t = own.sizes
        positions = np.arange(past, past + rows) + own.first
        self._input("input_ids", (b, s), lambda random: random.integers(0, _VOCABULARY, (batch, rows)))
        self._input("attention_mask", (b, t), lambda random: np.ones((batch, past + rows), np.int64))
        self._input("position_ids", (b, s), lambda random: np.tile(positions, (batch, 1)))
        if own.encoder:
            shape, mask = (batch, 7, _WIDTH), np.ones((batch, 7), np.int64)
            mask[0, -2:] = 0
            self._input("encoder_hidden_states", (b, "encoded", _WIDTH), lambda random: random.standard_normal(shape))
            if own.encoder_mask != "attention_mask":
                self._input(own.encoder_mask, (b, "encoded"), lambda random: mask)
            else:
                self.make.makers["attention_mask"] = lambda random: mask
        for layer in range(0, own.layers, 1 + own.shared):
            for part, width in (("key", own.width), ("value", own.wide)):
                self._input(
                    f"past_key_values.{layer}.{part}",
                    (b, own.groups, p, width),
                    lambda random, width=width: random.standard_normal((batch, own.groups, past, width)),
                )

    def _input(self, name: str, shape: Sequence[int | str], draw: object) -> None:
        kind = self.make.dtype if len(shape) > 2 else np.int64
        self.make.inputs.append(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(kind)), shape)
        )
        self.make.makers[name] = lambda random: np.asarray(draw(random)).astype(kind)  # type: ignore[operator]

    def _outputs(self, logits: str, presents: Sequence[str]) -> None:
        step = 1 + self.own.shared
        ends = [f"present.{step * (i // 2)}.{('key', 'value')[i % 2]}" for i in range(len(presents))]
        for value, name in zip((logits, *presents), ("logits", *ends), strict=True):
            if self.own.named:
                self.make.nodes.append(helper.make_node("Identity", [value], [name]))
            else:
                for node in self.make.nodes:
                    node.output[:] = [name if own == value else own for own in node.output]
                    node.input[:] = [name if own == value else own for own in node.input]
            shape = ["b", "s", _VOCABULARY] if name == "logits" else ["b", "g", "t", "w"]
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.make.dtype))
            self.make.outputs.append(helper.make_tensor_value_info(name, kind, shape))

    # Masks

    def _mask(self) -> str:
        make, own = self.make, self.own
        if own.mask == "all":
            return ""
        keys = make.one("Range", self._numbers(0, shape=()), self.total, self._numbers(1, shape=()))
        rows = (self.rows, 0, 1, 3) if own.mask == "causal" else ("position_ids", 1, 3)
        seen = make.one("LessOrEqual", self._unsqueezed(keys, 0, 1, 2), self._unsqueezed(*rows))
        if own.padding:
            seen = make.one("And", seen, self._seen("attention_mask"))
        return make.one("Not", seen) if own.inverted else self._additive(seen)

    def _seen(self, mask: str) -> str:
        return self._unsqueezed(self.make.one("Cast", mask, to=TensorProto.BOOL), 1, 2)

    def _additive(self, seen: str) -> str:
        zero, low = (self.make.constant(self.make.dtype(n)) for n in (0, np.finfo(self.make.dtype).min))
        return self.make.one("Where", seen, zero, low)

    # Layers

    def _attention(self, q: str, k: str, v: str, mask: str) -> str:
        make, own = self.make, self.own
        k, v = self._repeated(k, own.width), self._repeated(v, own.wide)
        scores = make.one("MatMul", q, make.one("Transpose", k, perm=[0, 1, 3, 2]))
        scores = make.one("Mul", scores, make.constant(make.dtype(own.width**-0.5)))
        if own.inverted and mask:
            scores = make.one("Where", mask, make.constant(np.float32(-1e9)), scores)
        elif mask:
            scores = make.one("Add", scores, mask)
        result = make.one("MatMul", self._narrow(make.one("Softmax", self._single(scores))), v)
        result = make.one("Transpose", result, perm=[0, 2, 1, 3])
        wide = own.heads * own.wide
        return make.linear(make.one("Reshape", result, self._numbers(0, -1, wide)), _WIDTH, wide)

    def _appended(self, n: str, layer: int) -> list[str]:
        own, names = self.own, [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        new = self._turned(self._of_heads(n, own.groups)), self._heads(n, own.groups, own.wide)
        return [self.make.one("Concat", *pair, axis=2) for pair in zip(names, new, strict=True)]

    def _repeated(self, x: str, width: int) -> str:
        make, own = self.make, self.own
        times = own.heads // own.groups
        if times == 1:
            return x
        wide = make.one("Expand", self._unsqueezed(x, 2), self._numbers(1, 1, times, 1, 1))
        return make.one("Reshape", wide, self._numbers(0, own.heads, -1, width))

    def _heads(self, x: str, count: int, width: int) -> str:
        projected = self.make.linear(x, count * width, _WIDTH)
        return self.make.one(
            "Transpose", self.make.one("Reshape", projected, self._numbers(0, -1, count, width)), perm=[0, 2, 1, 3]
        )

    def _of_heads(self, x: str, count: int) -> str:
        """Queries or keys before they are turned."""
        found = self._heads(x, count, self.own.width)
        return self._norm(found, self.own.width) if self.own.normed else found

    def _turned(self, x: str) -> str:
        make, half = self.make, self.own.width // 2
        if not self.own.turned:
            return x
        steps = make.constant((100.0 ** (-np.arange(2 * half) % half / half)).astype(np.float32))
        angles = make.one("Cast", self._unsqueezed("position_ids", 1, 3), to=TensorProto.FLOAT)
        angles, x = make.one("Mul", angles, steps), self._single(x)
        left, right = make.op("Split", x, outputs=2, axis=3, num_outputs=2)
        turned = make.one("Concat", make.one("Neg", right), left, axis=-1)
        parts = (make.one("Mul", y, make.one(f, angles)) for y, f in ((x, "Cos"), (turned, "Sin")))
        return self._narrow(make.one("Add", *parts))

    def _single(self, x: str) -> str:
        return self.make.one("Cast", x, to=TensorProto.FLOAT) if self.own.half else x

    def _narrow(self, x: str) -> str:
        return self.make.one("Cast", x, to=TensorProto.FLOAT16) if self.own.half else x

    def _norm(self, x: str, width: int = _WIDTH) -> str:
        make = self.make
        mean = make.one("ReduceMean", make.one("Mul", x, x), self._numbers(-1), keepdims=1)
        root = make.one("Sqrt", make.one("Add", mean, make.constant(make.dtype(1e-5))))
        return make.one("Mul", make.one("Div", x, root), make.constant(np.ones(width, make.dtype)))

    # Shapes

    def _numbers(self, *numbers: int, shape: tuple[int, ...] = (-1,)) -> str:
        return self.make.constant(np.array(numbers, np.int64).reshape(shape))

    def _unsqueezed(self, x: str, *axes: int) -> str:
        return self.make.one("Unsqueeze", x, self._numbers(*axes))

    def _size(self, x: str, axis: int) -> str:
        return self.make.one("Gather", self.make.one("Shape", x), self._numbers(axis, shape=()))


@case({"pack": 12}, packed={"GroupQueryAttention": 2}, options=_OPTIONS)
def a_decoder_that_calls_every_length_the_same(make: Graph) -> None:
    Written(sizes=("batch", "sequence", "sequence", "sequence")).build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 2}, options=_OPTIONS)
def a_decoder_that_calls_every_size_the_same(make: Graph) -> None:
    Written(sizes=("n", "n", "n", "n"), at=(2, 1, 4)).build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 2}, options=_OPTIONS)
def a_decoder_whose_outputs_are_identities(make: Graph) -> None:
    Written(named=True).build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 0}, options=_OPTIONS)
def a_decoder_with_values_of_another_width(make: Graph) -> None:
    Written(wide=24).build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 0}, options=_OPTIONS)
def a_decoder_masked_by_position_ids(make: Graph) -> None:
    Written(mask="positions", first=4).build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 4}, options=_OPTIONS)
def a_decoder_whose_layers_share_caches(make: Graph) -> None:
    Written(layers=4, shared=True).build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 2}, options=_OPTIONS)
def a_decoder_beside_an_encoder(make: Graph) -> None:
    Written(encoder=True, padding=False, turned=False).build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 2}, options=_OPTIONS)
def a_decoder_whose_mask_is_its_encoders(make: Graph) -> None:
    Written(encoder=True, padding=False, turned=False, encoder_mask="attention_mask").build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 2}, options=_OPTIONS)
def a_decoder_whose_mask_says_what_is_hidden(make: Graph) -> None:
    Written(inverted=True).build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 2}, options=_OPTIONS)
def a_half_decoder_with_single_softmax(make: Graph) -> None:
    Written(half=True, at=(1, 4, 0)).build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 2, "SimplifiedLayerNormalization": 5}, options=_OPTIONS)
def a_decoder_with_norms_of_heads(make: Graph) -> None:
    """As Gemma 3 and Qwen 3 have them, but behind the Transpose: they go before it, and keep their names."""
    Written(normed=True).build(make)


@case({"pack": 12}, packed={"GroupQueryAttention": 2, "SwiGLU": 2, "Split": 0}, options=_OPTIONS)
def a_decoder_whose_gates_read_what_attention_reads(make: Graph) -> None:
    """As Cohere has it. Products of one input, of which attention reads the first before the gates are there."""
    Written(beside=True).build(make)


@case(
    {"rotate(judge=false),pack": 12, "smooth,awq,rotate(judge=false),gptq,pack": 12},
    packed={"GroupQueryAttention": 2, "SwiGLU": 2, "Split": 0, "Hadamard": 9},
    options=_OPTIONS,
)
def a_decoder_whose_inputs_are_turned(make: Graph) -> None:
    """One node for queries, keys and values, one for gate and up: they are joined as without it. One for the head."""
    Written().build(make)
