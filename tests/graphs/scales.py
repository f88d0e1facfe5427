"""Weights of extreme sizes, of zeros and of one number; a bias of one element."""

import numpy as np

from graphs.table import Graph, case

INT8 = {"qdq": 32, "smooth,qdq": 32, "dynamic": 32, "outlier,qdq": 32, "pack": 14}


def _opposite(make: Graph, power: int) -> None:
    """Two products whose sizes cancel: nothing of it shows outside."""
    hidden = make.one("MatMul", make.input("b", 64), make.floats(64, 64, scale=10.0**-power))
    make.output(make.one("MatMul", hidden, make.floats(64, 64, scale=10.0**power)))


@case(INT8, coverage=1.0)
def products_of_1e_12(make: Graph) -> None:
    _opposite(make, 12)


@case(INT8, coverage=1.0)
def products_of_1e_20(make: Graph) -> None:
    _opposite(make, 20)


@case(INT8, coverage=1.0)
def products_of_1e_30(make: Graph) -> None:
    _opposite(make, 30)


@case({"qdq": 30, "smooth,qdq,bias_correction": 30, "pack": 14, "smooth,awq,gptq,pack": 17, "dynamic": 30})
def weights_of_zeros_and_of_one_number(make: Graph) -> None:
    x = make.input("b", 64)
    zeros, ones = (make.constant(np.full((64, 64), number, np.float32)) for number in (0, 0.25))
    parts = [make.one("MatMul", x, weight) for weight in (zeros, ones, make.floats(64, 64))]
    make.output(make.one("Sum", *parts), make.one("Add", parts[0], make.floats(64, scale=1.0)))


@case({"qdq": 22, "smooth,qdq,bias_correction": 22, "dynamic": 28, "pack": 14})
def bias_of_one_element(make: Graph) -> None:
    x = make.input("b", 32)
    for shape in ((), (1,), (1, 1), (1, 8)):
        bias = make.constant(np.full(shape, 0.7, np.float32))
        make.output(make.one("Gemm", x, make.floats(32, 8), bias))
        make.output(make.one("Add", make.linear(x, 8), bias))
