"""Weights in other places than the second operand of a MatMul, and operators between them that others write."""

import numpy as np

from graphs.table import Graph, case

ALL = {"pack": 15, "smooth,awq,gptq,pack": 15, "smooth,qdq": 25, "dynamic": 25}


def _simplified(make: Graph, opset: int) -> None:
    make.opsets[""] = opset
    gamma = make.constant(np.linspace(0.5, 2, 32, dtype=np.float32))
    x = make.linear(make.input("b", 32), 32)
    y = make.one("SimplifiedLayerNormalization", x, gamma, axis=-1, epsilon=1e-5, stash_type=1)
    make.output(make.linear(y, 16))


@case(ALL, packed={"SimplifiedLayerNormalization": 1, "MatMulInt4": 2}, coverage=1.0)
def simplified_norm_of_opset_14(make: Graph) -> None:
    _simplified(make, 14)


@case(ALL, coverage=1.0)
def simplified_norm_of_opset_20(make: Graph) -> None:
    _simplified(make, 20)
