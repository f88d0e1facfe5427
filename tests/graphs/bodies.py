"""Weights in bodies of If, Loop and Scan, their own, shared, captured; and those of recurrent layers."""

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from graphs.table import Graph, case

BITS = {"pack": 15, "smooth,awq,gptq,pack": 15, "qdq": 30, "smooth,qdq": 30, "dynamic": 30}


def body(
    make: Graph, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[str], held: list[str]
) -> onnx.GraphProto:
    """A graph of these nodes; `held`: constants of the main graph that move into it."""
    own = [tensor for tensor in make.constants if tensor.name in held]
    make.constants = [tensor for tensor in make.constants if tensor.name not in held]
    given = [
        helper.make_tensor_value_info(n, TensorProto.BOOL if n == "on" else TensorProto.FLOAT, None) for n in outputs
    ]
    return helper.make_graph(nodes, make.name("body"), inputs, given, own)


def flag(make: Graph) -> str:
    """A condition that calibration takes both ways: whether the first number is above zero."""
    return make.input(dtype=bool, draw=lambda random, size: random.random() < 0.5)


def layers(make: Graph, x: str, y: str, *weights: str, operator: str = "MatMul", **attributes: Any) -> list[Any]:
    """x through products with the weights, a Tanh behind each; named alike in every body that is made of it."""
    nodes, value = [], x
    for i, weight in enumerate(weights):
        end = y if i + 1 == len(weights) else f"h{i}"
        name = make.name("inner")
        nodes.append(helper.make_node(operator, [value, weight], [f"p{i}"], name=name, **attributes))
        nodes.append(helper.make_node("Tanh", [f"p{i}"], [end], name=f"{name}_tanh"))
        value = end
    return nodes


@case({"qdq": "nothing to rank; in bodies of .* --exclude", "dynamic": "nothing to rank"}, options={"keep_worst": 1})
def nothing_outside_of_bodies_to_keep(make: Graph) -> None:
    x, choice, (a, b) = make.input("b", 32), flag(make), (make.floats(32, 32), make.floats(32, 32))
    first, second = (body(make, layers(make, x, "y", w), [], ["y"], [w]) for w in (a, b))
    make.output(make.one("If", choice, then_branch=first, else_branch=second))


@case(BITS, coverage=1.0)
def branches_with_weights_of_their_own(make: Graph) -> None:
    x, choice = make.input("b", 32), flag(make)
    a, b, c = make.floats(32, 32), make.floats(32, 48), make.floats(48, 32)
    first = body(make, layers(make, x, "y", a), [], ["y"], [a])
    second = body(make, layers(make, x, "y", b, c), [], ["y"], [b, c])
    make.output(make.linear(make.one("If", choice, then_branch=first, else_branch=second), 16))


@case(BITS, coverage=1.0)
def merged_decoder(make: Graph) -> None:
    """Both branches hold the same linears, the main graph one of them; Gemms, one turned round, in a branch."""
    x, choice = make.input("b", 64), flag(make)
    a, b = make.floats(64, 64), make.floats(64, 64)
    h = make.one("MatMul", x, a)
    copy = make.constant(next(onnx.numpy_helper.to_array(t) for t in make.constants if t.name == b))
    turned = make.constant(next(onnx.numpy_helper.to_array(t) for t in make.constants if t.name == b).T)
    first = body(make, layers(make, h, "y", a, copy), [], ["y"], [copy])
    second = body(make, layers(make, h, "y", turned, turned, operator="Gemm", transB=1), [], ["y"], [turned])
    make.output(make.one("If", choice, then_branch=first, else_branch=second), make.one("MatMul", h, b))


@case({"pack": 12, "smooth,awq,gptq,pack": 12, "qdq": 28, "smooth,qdq": 28, "dynamic": 28}, coverage=1.0)
def loop_with_a_branch_inside(make: Graph) -> None:
    """Seven products one behind the other, each with the noise of its bits."""
    x, choice = make.input("b", 32), flag(make)
    w, v, u = make.floats(32, 32), make.floats(32, 32), make.floats(32, 32)
    deep = helper.make_node(
        "If",
        [choice],
        ["z"],
        name="deep",
        then_branch=body(make, layers(make, "state", "t", v), [], ["t"], [v]),
        else_branch=body(make, layers(make, "state", "e", w), [], ["e"], []),
    )
    nodes = [deep, *layers(make, "z", "next", u), helper.make_node("Identity", ["go"], ["on"])]
    given = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, ["b", 32]),
    ]
    inner = body(make, nodes, given, ["on", "next"], [u])
    turns, begin = make.constant(np.int64(3)), make.one("MatMul", x, w)
    make.output(make.one("Loop", turns, make.constant(np.bool_(1)), begin, body=inner))


@case(BITS, coverage=1.0)
def scan_over_a_sequence(make: Graph) -> None:
    x, w, v = make.input(5, 32), make.floats(32, 32), make.floats(32, 32)
    nodes = [
        helper.make_node("MatMul", ["old", w], ["p"], name="state_linear"),
        helper.make_node("Unsqueeze", ["row", make.constant(np.array([0]))], ["r"], name="r"),
        helper.make_node("Add", ["p", "r"], ["s"], name="s"),
        helper.make_node("Tanh", ["s"], ["new"], name="new"),
        helper.make_node("MatMul", ["new", v], ["out"], name="out_linear"),
    ]
    given = [
        helper.make_tensor_value_info("old", TensorProto.FLOAT, [1, 32]),
        helper.make_tensor_value_info("row", TensorProto.FLOAT, [32]),
    ]
    inner = body(make, nodes, given, ["new", "out"], [w, v])
    start = make.constant(np.zeros((1, 32), "f"))
    make.output(*make.op("Scan", start, x, outputs=2, body=inner, num_scan_inputs=1))


@case({"pack": 12, "smooth,awq,gptq,pack": 12, "qdq": 30, "dynamic": 30}, coverage=1.0)
def scan_along_stacked_layers(make: Graph) -> None:
    """A loop over layers: each step takes its matrices and biases of constants, the last layer first."""
    x, w, v = make.input("b", 32), make.floats(3, 32, 32, scale=0.18), make.floats(3, 32, 32, scale=0.18)
    nodes = [
        helper.make_node("MatMul", ["old", "w"], ["p"], name="first_linear"),
        helper.make_node("Add", ["p", "bias"], ["q"], name="q"),
        helper.make_node("Tanh", ["q"], ["h"], name="h"),
        helper.make_node("MatMul", ["h", "v"], ["r"], name="second_linear"),
        helper.make_node("Add", ["r", "old"], ["new"], name="new"),
        helper.make_node("Identity", ["h"], ["seen"], name="seen"),
    ]
    shapes = {"old": ["b", 32], "w": [32, 32], "bias": [32], "v": [32, 32]}
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    inner = body(make, nodes, given, ["new", "seen"], [])
    told = {"num_scan_inputs": 3, "scan_input_directions": [1, 1, 1]}
    make.output(*make.op("Scan", x, w, make.floats(3, 32, scale=0.3), v, outputs=2, body=inner, **told))


@case({"pack": 25, "qdq": 25, "dynamic": 25}, options={"min_coverage": 0})
def convolutions_in_a_branch(make: Graph) -> None:
    x, choice = make.input(1, 8, 12, 12), flag(make)
    w = make.floats(8, 8, 3, 3)
    pads = {"operator": "Conv", "pads": [1, 1, 1, 1]}
    first = body(make, layers(make, x, "y", w, w, **pads), [], ["y"], [])
    second = body(make, layers(make, x, "y", w, **pads), [], ["y"], [])
    make.output(make.one("If", choice, then_branch=first, else_branch=second))


@case({"pack": 25, "qdq": 25, "dynamic": 25}, coverage=1.0, options={"embedding": 8})
def tables_in_a_branch(make: Graph) -> None:
    ids = make.input("b", dtype=np.int64, draw=lambda random, size: random.integers(0, 50, size))
    choice, table, other = flag(make), make.floats(50, 32, scale=1.0), make.floats(50, 32, scale=1.0)

    def branch(weight: str) -> onnx.GraphProto:
        node = helper.make_node("Gather", [weight, ids], ["y"], name=make.name("lookup"))
        return body(make, [node], [], ["y"], [])

    make.output(make.one("If", choice, then_branch=branch(table), else_branch=branch(other)))


def recurrent(make: Graph, operator: str, gates: int, direction: str, **attributes: Any) -> None:
    x, ways = make.input("t", 2, 32), 2 if direction == "bidirectional" else 1
    w, r = make.floats(ways, gates * 48, 32, scale=0.15), make.floats(ways, gates * 48, 48, scale=0.15)
    b = make.floats(ways, 2 * gates * 48, scale=0.1)
    y, last = make.op(operator, x, w, r, b, outputs=2, hidden_size=48, direction=direction, **attributes)
    make.output(y, last)


@case({"pack": 30, "smooth,awq,gptq,pack": 30, "qdq": 30, "dynamic": 30})
def lstm(make: Graph) -> None:
    recurrent(make, "LSTM", 4, "bidirectional")


@case({"pack": 30, "qdq": 30, "dynamic": 30})
def gru(make: Graph) -> None:
    recurrent(make, "GRU", 3, "forward", linear_before_reset=1)


@case({"pack": 30, "qdq": 30, "dynamic": 30})
def rnn(make: Graph) -> None:
    recurrent(make, "RNN", 1, "reverse")


@case({"pack": 30, "qdq": 30, "dynamic": 30})
def lstm_in_half_precision(make: Graph) -> None:
    make.dtype = np.float16
    x = make.input("t", 2, 32)
    w, r = (make.constant((make.random.standard_normal((1, 96, k)) * 0.15).astype("f4")) for k in (32, 24))
    y = make.op("LSTM", make.one("Cast", x, to=TensorProto.FLOAT), w, r, outputs=1, hidden_size=24)[0]
    make.output(y, dtype=np.float32)
