"""Graphs that no single value carries forward: heads, inputs read late, sides that meet again."""

import numpy as np

from graphs.table import Graph, case

_ROWS = {"b": 64}
_LISTS = {
    "pack": 14,
    "smooth,awq,gptq,pack": 15,
    "smooth,qdq": 22,
    "outlier,qdq": 25,
    "qdq,bias_correction": 25,
    "dynamic": 25,
    "smooth,dynamic": 25,
}


@case(_LISTS, packed={"MatMulInt4": 3}, coverage=1.0)
def two_heads(make: Graph) -> None:
    h = make.one("Relu", make.linear(make.input("b", 32, sizes=_ROWS), 32))
    make.output(make.linear(h, 8), make.linear(h, 9))


@case(_LISTS)
def two_heads_and_their_trunk(make: Graph) -> None:
    h = make.one("Relu", make.linear(make.input("b", 32, sizes=_ROWS), 32))
    make.output(make.linear(h, 8), h, make.linear(h, 9))


@case(_LISTS, packed={"MatMulInt4": 2}, coverage=1.0)
def a_linear_on_the_input_later(make: Graph) -> None:
    x = make.input("b", 32, sizes=_ROWS)
    make.output(make.one("Add", make.one("Relu", make.linear(x, 32)), make.linear(x, 32)))


@case(_LISTS)
def two_towers(make: Graph) -> None:
    sides = [make.one("Relu", make.linear(make.input("b", 32, sizes=_ROWS), 48)) for _ in range(2)]
    sides = [make.linear(side, 32, 48) for side in sides]
    make.output(make.one("Concat", *sides, axis=1), make.linear(make.one("Mul", *sides), 16))


def _attention(make: Graph, x: str, read: str) -> str:
    q, k, v = make.linear(x, 64, 64), make.linear(read, 64, 64), make.linear(read, 64, 64)
    scores = make.one("MatMul", q, make.one("Transpose", k, perm=[0, 2, 1]))
    p = make.one("Softmax", make.one("Div", scores, make.constant(np.float32(8))), axis=-1)
    return make.one("MatMul", p, v)


@case(_LISTS, coverage=1.0)
def attention_on_embeddings(make: Graph) -> None:
    x = make.input("b", "s", 64, sizes=_ROWS)
    gamma = make.constant(np.ones(64, np.float32))
    n = make.one("LayerNormalization", x, gamma)
    make.output(make.linear(_attention(make, n, n), 64, 64))


@case(_LISTS)
def cross_attention_in_every_layer(make: Graph) -> None:
    """What an encoder made is an input; each layer's keys and values are read of it."""
    x = make.input("b", "t", 64, sizes=_ROWS)
    encoded = make.input("b", "s", 64, sizes=_ROWS)
    for _ in range(2):
        x = make.one("Add", x, make.linear(_attention(make, x, encoded), 64, 64))
    make.output(x)


@case({"qdq": 25, "qdq(operators=all)": 20, "qdq(operators=weights)": 25, "smooth,qdq(operators=all)": 20})
def a_split_between_products(make: Graph) -> None:
    """YOLO's C2f block."""
    a = make.one("Conv", make.input("b", 8, 8, 8), make.floats(32, 8, 1, 1))
    m = make.one("Mul", a, make.one("Sigmoid", a))
    p, q = make.op("Split", m, make.constant(np.array([16, 16])), outputs=2, axis=1)
    c = make.one("Conv", q, make.floats(16, 16, 3, 3), pads=[1, 1, 1, 1])
    make.output(make.one("Conv", make.one("Concat", p, q, c, axis=1), make.floats(16, 48, 1, 1)))


@case({"pack": 15, "gptq,pack": 17, "smooth,awq,gptq,pack": 17}, packed={"MatMulInt4": 11}, coverage=1.0)
def an_unrolled_loop(make: Graph) -> None:
    """Six steps that share two weights: one Gram matrix for each weight."""
    x, w, u = make.input("b", 6, 64), make.floats(64, 64), make.floats(64, 64)
    steps = make.op("Split", x, outputs=6, axis=1)
    h = make.constant(np.zeros((1, 1, 64), np.float32))
    for step in steps:
        h = make.one("Tanh", make.one("Add", make.one("MatMul", step, w), make.one("MatMul", h, u)))
    make.output(h)
