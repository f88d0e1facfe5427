"""Mixtures of experts, as exporters write them: batched products, tables by index, routed tokens, MoE nodes."""

import numpy as np
from onnx import TensorProto

from graphs.table import Graph, case

K, E, H = 32, 4, 48
# A few rows show the ranges of all experts, whose outputs partly cancel: less than 8 bits promise.
ALL = {"pack": 15, "smooth,awq,gptq,pack": 15, "qdq": 22, "smooth,qdq": 22, "dynamic": 25}


def routed(make: Graph, x: str, *, bias: bool = False) -> str:
    """The scores of a router on x (t, K), before any Softmax."""
    scores = make.one("MatMul", x, make.floats(K, E))
    return make.one("Add", scores, make.constant(np.array([0, 0, 0, -1e4], "f"))) if bias else scores


def along(make: Graph, *numbers: int) -> str:
    return make.constant(np.array(numbers, np.int64))


@case({**ALL, "qdq(operators=all)": 15}, coverage=1.0)
def batched_experts(make: Graph) -> None:
    """All experts on all tokens: (1, t, K) by (E, K, H), then (E, t, H) by (E, H, K); the router weighs them."""
    x = make.input("t", K)
    p = make.one("Softmax", routed(make, x), axis=-1)
    h = make.one("Relu", make.one("MatMul", make.one("Unsqueeze", x, along(make, 0)), make.floats(E, K, H)))
    y = make.one("MatMul", h, make.floats(E, H, K))
    by = make.one("Unsqueeze", make.one("Transpose", p, perm=[1, 0]), along(make, 2))
    make.output(make.one("ReduceSum", make.one("Mul", y, by), along(make, 0), keepdims=0))


@case(ALL, coverage=1.0)
def experts_of_a_rank_two_input_and_of_unknown_sizes(make: Graph) -> None:
    x, z = make.input("t", K), make.input("e", "t", K, sizes={"e": E})
    w = make.floats(E, K, H)
    make.output(make.one("MatMul", x, w), make.one("MatMul", z, w))


@case({"pack": 15, "qdq": 30, "dynamic": 30}, packed={"MatMulInt8": 1, "GatherInt4": 2}, coverage=1.0)
def experts_by_index(make: Graph) -> None:
    """Each token's two experts: their matrices are looked up, (t, 2, H, K) and, the other way round, (t, 2, H, K)."""
    x = make.input("t", K)
    values, chosen = make.op("TopK", routed(make, x), along(make, 2), outputs=2)
    up = make.one("Gather", make.floats(E, H, K, scale=0.2), chosen, axis=0)
    down = make.one("Gather", make.floats(E, H, K, scale=0.2), chosen, axis=0)
    column = make.one("Unsqueeze", x, along(make, 1, 3))
    h = make.one("Relu", make.one("MatMul", up, column))
    y = make.one("MatMul", make.one("Transpose", h, perm=[0, 1, 3, 2]), down)
    weights = make.one("Unsqueeze", make.one("Softmax", values, axis=-1), along(make, 2, 3))
    make.output(make.one("ReduceSum", make.one("Mul", y, weights), along(make, 1, 2), keepdims=0))


@case(
    {"pack": 12, "smooth,awq,gptq,pack": 12, "dynamic": 20, "qdq": 20, "smooth,qdq,bias_correction": 20}, coverage=1.0
)
def experts_without_a_token(make: Graph) -> None:
    """Tokens go to the expert of the highest score; the last expert never gets one."""
    x = make.input("t", K, sizes={"t": 24})
    best = make.one("ArgMax", routed(make, x, bias=True), axis=-1, keepdims=0)
    total = make.one("ConstantOfShape", make.one("Shape", x))
    for e in range(E):
        rows = make.one("NonZero", make.one("Equal", best, make.constant(np.array([e]))))
        index = make.one("Transpose", rows, perm=[1, 0])
        h = make.one("Relu", make.one("MatMul", make.one("GatherND", x, index), make.floats(K, H)))
        total = make.one("ScatterND", total, index, make.one("MatMul", h, make.floats(H, K)))
    make.output(make.one("Add", total, x))


@case({"pack": 13, "qdq": 30, "dynamic": 30}, coverage=1.0)
def node_of_experts(make: Graph) -> None:
    x = make.input("t", K)
    w, v = make.floats(E, H, K, scale=0.15), make.floats(E, K, H, scale=0.15)
    make.output(make.one("MoE", x, routed(make, x), w, "", v, domain="com.microsoft", k=2, activation_type="relu"))


@case({"pack": 13, "qdq": 30, "smooth,qdq": 30}, options={"target": "qnn"}, coverage=1.0)
def node_of_experts_beside_qnn(make: Graph) -> None:
    """MoE runs on the CPU provider; its decoded tables stand beside an activation that the router has codes of."""
    node_of_experts.build(make)


@case({"pack": 15, "qdq": 30}, coverage=1.0)
def experts_of_half_precision_and_odd_width(make: Graph) -> None:
    make.dtype = np.float16
    x, ids = make.input("t", K), make.input("t", dtype=np.int64, draw=lambda random, size: random.integers(0, E, size))
    up = make.one("Gather", make.floats(E, K, 33, scale=0.2), ids, axis=0)
    y = make.one("MatMul", make.one("Unsqueeze", x, along(make, 1)), up)
    make.output(make.one("Cast", y, to=TensorProto.FLOAT), dtype=np.float32)


@case({"qdq": 25, "qdq(operators=all)": 25, "dynamic": 25, "pack": 12}, coverage=1.0)
def matrices_chosen_by_a_router(make: Graph) -> None:
    """Two of eight matrices, taken by index: products of two activations by form, but their weights have codes."""
    x = make.input(1, 32)
    scores, chosen = make.op("TopK", make.linear(x, 8), make.constant(np.array([2])), outputs=2, axis=-1)
    index = make.one("Reshape", chosen, make.constant(np.array([-1])))
    up, down = (make.one("Gather", make.floats(8, *shape, scale=0.15), index) for shape in ((32, 64), (64, 32)))
    y = make.one("MatMul", make.one("Relu", make.one("MatMul", x, up)), down)
    shares = make.one("Reshape", make.one("Softmax", scores), make.constant(np.array([2, 1, 1])))
    make.output(make.one("ReduceSum", make.one("Mul", y, shares), make.constant(np.array([0])), keepdims=0))
