"""Additive masks: constants of -1e4 and below, inputs, tables of -inf; none is put on a grid or widens one."""

from typing import Any

import numpy as np

from graphs.table import Graph, case

LISTS = {"qdq(operators=all)": 22, "qdq": 22, "pack": 14, "dynamic": 25}


def _attention(make: Graph, mask: str, x: str) -> None:
    """One head of 32 channels over x (b, 12, 32), its scores summed with the mask."""
    q, k, v = (make.linear(x, 32) for _ in range(3))
    scores = make.one("MatMul", q, make.one("Transpose", k, perm=[0, 2, 1]))
    scaled = make.one("Mul", scores, make.constant(np.float32(0.2)))
    weights = make.one("Softmax", make.one("Add", scaled, mask), axis=-1)
    make.output(make.linear(make.one("MatMul", weights, v), 32))


def _bounded(make: Graph, mask: str, x: str) -> None:
    """The same, its sums not below the lowest number, as XGLM and OPT have it."""
    q, k, v = (make.linear(x, 32) for _ in range(3))
    scores = make.one("MatMul", q, make.one("Transpose", k, perm=[0, 2, 1]))
    scaled = make.one("Add", make.one("Mul", scores, make.constant(np.float32(0.2))), mask)
    weights = make.one("Softmax", make.one("Max", scaled, make.constant(np.finfo(np.float32).min)), axis=-1)
    make.output(make.linear(make.one("MatMul", weights, v), 32))


def _keep(random: np.random.Generator, size: tuple[int, ...]) -> Any:
    """The first half of the positions at least, some of the others."""
    made = random.random(size) < 0.6
    made[..., :6] = True
    return made


def _filled(make: Graph, fill: float) -> None:
    """A mask of booleans as torch exports it: Where, Unsqueeze."""
    x, keep = make.input("b", 12, 32), make.input("b", 12, dtype=np.bool_, draw=_keep)
    chosen = make.one("Where", keep, make.constant(np.float32(0)), make.constant(np.float32(fill)))
    _attention(make, make.one("Unsqueeze", chosen, make.constant(np.array([1], np.int64))), x)


@case(LISTS)
def mask_of_minus_ten_thousand(make: Graph) -> None:
    _filled(make, -1e4)


@case(LISTS)
def mask_of_the_lowest_float(make: Graph) -> None:
    _filled(make, float(np.finfo(np.float32).min))


@case(LISTS)
def mask_of_minus_infinity(make: Graph) -> None:
    _filled(make, -np.inf)


@case(LISTS)
def mask_by_a_product(make: Graph) -> None:
    """BERT's: (1 - mask) * -10000."""
    x, keep = make.input("b", 12, 32), make.input("b", 1, 12, dtype=np.float32, draw=_keep)
    left = make.one("Sub", make.constant(np.float32(1)), keep)
    _attention(make, make.one("Mul", left, make.constant(np.float32(-1e4))), x)


@case(LISTS)
def mask_as_an_input(make: Graph) -> None:
    """The caller gives 0 and -1e4; nothing in the graph says so."""
    x = make.input("b", 12, 32)
    mask = make.input("b", 1, 12, draw=lambda random, size: np.where(_keep(random, size), 0, -1e4))
    _attention(make, make.one("Identity", mask), x)


@case(LISTS | {"smooth,awq,gptq,pack": 14})
def mask_of_infinities_as_an_input(make: Graph) -> None:
    """The caller gives 0 and -inf, for whole heads."""
    x = make.input("b", 12, 32)
    mask = make.input("b", 1, 12, draw=lambda random, size: np.where(_keep(random, size), 0, -np.inf))
    _attention(make, make.one("Mul", make.one("Identity", mask), make.constant(np.float32(1))), x)


@case(LISTS)
def mask_as_an_input_above_the_lowest_number(make: Graph) -> None:
    x = make.input("b", 12, 32)
    _bounded(make, make.input("b", 1, 12, draw=lambda random, size: np.where(_keep(random, size), 0, -np.inf)), x)


@case(LISTS)
def mask_of_minus_ten_thousand_above_the_lowest_number(make: Graph) -> None:
    x = make.input("b", 12, 32)
    _bounded(make, make.input("b", 1, 12, draw=lambda random, size: np.where(_keep(random, size), 0, -1e4)), x)


@case(LISTS)
def logits_of_which_an_input_forbids_some(make: Graph) -> None:
    x, forbidden = (
        make.input("b", 32),
        make.input(64, draw=lambda random, size: np.where(np.arange(64) % 5, 0, -np.inf)),
    )
    make.output(make.one("Exp", make.one("Add", make.linear(x, 64), forbidden)))


@case({"qdq(operators=all)": 22, "qdq": 22, "pack": 14, "dynamic": 25}, coverage=None)
def mask_looked_up_in_a_table(make: Graph) -> None:
    """A causal table of 0 and -inf, its rows looked up by position."""
    x = make.input("b", 12, 32)
    rows = make.input(12, dtype=np.int64, draw=lambda random, size: random.integers(0, 12, size))
    table = np.where(np.tri(12, dtype=bool), 0, -np.inf).astype(np.float32)
    _attention(make, make.one("Gather", make.constant(table), rows), x)


@case({"qdq(operators=all)": 22, "pack": 14}, options={"min_coverage": 0})
def bias_of_positions_and_a_mask(make: Graph) -> None:
    """A table of small biases beside a constant mask: the sum of both is a mask, the table is none."""
    x = make.input("b", 12, 32)
    rows = make.input(12, dtype=np.int64, draw=lambda random, size: random.integers(0, 12, size))
    bias = make.one("Gather", make.floats(12, 12, scale=1.0), rows)
    causal = make.constant(np.where(np.tri(12, dtype=bool), 0, -1e9).astype(np.float32))
    _attention(make, make.one("Add", bias, causal), x)


@case({"qdq(operators=all)": 22, "qdq": 22})
def maxima_beside_a_padding_of_minus_infinity(make: Graph) -> None:
    x, pads = make.input("b", 8, 12, 12), make.constant(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    for fill in (-np.inf, np.finfo(np.float32).min, -1e4):
        made = make.one("Conv", x, make.floats(8, 8, 3, 3))
        padded = make.one("Pad", made, pads, make.constant(np.float32(fill)))
        make.output(make.one("Conv", make.one("MaxPool", padded, kernel_shape=[2, 2]), make.floats(8, 8, 3, 3)))


BIASED = {
    "qdq(operators=all)": 30,
    "smooth,qdq,bias_correction": 30,
    "smooth,outlier,qdq": 30,
    "pack": 14,
    "dynamic": 25,
}


def _without_tokens(make: Graph, fill: float, rank: int, *, gemm: bool = False) -> None:
    """Probabilities of 48 tokens, of which a bias takes two out of the running."""
    bias = make.random.standard_normal(48).astype(np.float32)
    bias[[3, 9]] = fill
    x, w, b = make.input("b", 32), make.floats(32, 48), make.constant(bias.reshape(*[1] * (rank - 1), 48))
    scores = make.one("Gemm", x, w, b) if gemm else make.one("Add", make.one("MatMul", x, w), b)
    make.output(make.one("Softmax", scores))


@case(BIASED)
def bias_of_minus_infinity(make: Graph) -> None:
    _without_tokens(make, -np.inf, 1)


@case(BIASED)
def bias_of_minus_infinity_in_a_row(make: Graph) -> None:
    _without_tokens(make, -np.inf, 2)


@case(BIASED)
def bias_of_minus_infinity_in_a_gemm(make: Graph) -> None:
    _without_tokens(make, -np.inf, 1, gemm=True)


@case(BIASED)
def bias_of_the_lowest_float(make: Graph) -> None:
    _without_tokens(make, float(np.finfo(np.float32).min), 1)
