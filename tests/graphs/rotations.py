"""Products whose inputs are turned."""

import numpy as np

from graphs.table import Graph, case

_LISTS = {"rotate(judge=false),pack": 16, "smooth,awq,rotate(judge=false),gptq,pack": 17}


def _turned(make: Graph) -> None:
    """Two products of one input, in segments of their own; one of 96 channels; one of 40, which have no blocks."""
    x = make.input("b", 5, 64)
    left, right = make.linear(x, 96, 64, bias=True), make.linear(x, 40, 64)
    make.output(make.linear(make.one("Relu", left), 8, 96), make.linear(make.one("Relu", right), 8, 40))


@case({**_LISTS, "rotate,pack": 16, "rotate(judge=false),qdq": 25}, packed={"MatMulInt4": 4}, coverage=1.0)
def turned(make: Graph) -> None:
    _turned(make)


@case(_LISTS, packed={"Hadamard": 2}, coverage=1.0)
def turned_once(make: Graph) -> None:
    _turned(make)


@case(_LISTS, packed={"Hadamard": 0, "MatMulNBits": 4}, options={"target": "matmulnbits"}, coverage=1.0)
def turned_for_matmulnbits(make: Graph) -> None:
    _turned(make)


@case(_LISTS, packed={"Hadamard": 0, "DequantizeLinear": 4}, options={"target": "qdq"}, coverage=1.0)
def turned_for_qdq(make: Graph) -> None:
    _turned(make)


@case({"smooth,awq,rotate(judge=false),gptq,pack": 17}, packed={"Hadamard": 2}, coverage=1.0)
def turned_halves(make: Graph) -> None:
    make.dtype = np.float16
    _turned(make)


@case({"rotate(judge=false),pack": 16}, packed={"Hadamard": 0}, coverage=1.0)
def halves_that_no_data_tells_of(make: Graph) -> None:
    """Nothing says that they stay within the range of float16, turned."""
    make.dtype = np.float16
    _turned(make)
