"""Float types as files mix them, and types that files do not say or say wrong."""

import numpy as np
from onnx import TensorProto, helper

from graphs.table import Graph, case

_HALF, _FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
_LISTS = {"pack": 13, "smooth,awq,gptq,pack": 13, "smooth,qdq": 20, "qdq(operators=all)": 20, "dynamic": 20}
_ROWS = {"b": 64}


def _half(make: Graph, *shape: int) -> str:
    return make.constant((make.random.standard_normal(shape) / shape[0] ** 0.5).astype(np.float16), "w")


@case(_LISTS, coverage=1.0)
def half_weights_behind_a_cast(make: Graph) -> None:
    x = make.input("b", 64, sizes=_ROWS)
    x = make.one("Relu", make.one("MatMul", x, make.one("Cast", _half(make, 64, 64), to=_FLOAT)))
    make.output(make.linear(x, 16, 64))


@case(_LISTS, coverage=1.0)
def a_float_product_in_a_half_file(make: Graph) -> None:
    x = make.input("b", 64, dtype=np.float16, sizes=_ROWS)
    a = make.one("Cast", make.one("MatMul", x, _half(make, 64, 64)), to=_FLOAT)
    a = make.one("Cast", make.one("Sigmoid", make.linear(a, 64, 64)), to=_HALF)
    make.output(make.one("MatMul", a, _half(make, 64, 16)), dtype=np.float16)


@case(_LISTS | {"pack": 12})
def a_half_table_and_float_products(make: Graph) -> None:
    ids = make.input("b", dtype=np.int64, draw=lambda random, size: random.integers(0, 300, size), sizes=_ROWS)
    x = make.one("Cast", make.one("Gather", _half(make, 300, 64), ids), to=_FLOAT)
    make.output(make.linear(make.one("Relu", make.linear(x, 64, 64)), 16, 64))


@case(_LISTS, coverage=1.0)
def double_products(make: Graph) -> None:
    make.dtype = np.float64
    x = make.input("b", 64, sizes=_ROWS)
    make.output(make.linear(make.one("Relu", make.linear(x, 64, 64)), 16, 64))


@case(_LISTS, coverage=1.0)
def half_behind_operators_that_onnx_does_not_know(make: Graph) -> None:
    make.dtype = np.float16
    x = make.input("b", 64, sizes=_ROWS)
    gamma = make.constant(np.ones(64, np.float16))
    for _ in range(2):
        y = make.one("FastGelu", make.linear(x, 64, 64), domain="com.microsoft")
        y = make.linear(y, 64, 64)
        x = make.op("SkipSimplifiedLayerNormalization", y, x, gamma, domain="com.microsoft")[0]
    make.output(x)


@case(_LISTS, coverage=1.0)
def a_batch_made_dynamic_by_hand(make: Graph) -> None:
    """Inner values keep the shapes of batch 1."""
    x = make.input("b", 64, sizes=_ROWS)
    for _ in range(3):
        y = make.linear(x, 64, 64)
        x = make.one("Relu", y)
        make.value_info += [helper.make_tensor_value_info(name, _FLOAT, [1, 64]) for name in (x, y)]
    make.output(x)


@case(_LISTS, coverage=1.0)
def stale_shapes_behind_operators_that_onnx_does_not_know(make: Graph) -> None:
    x = make.input("b", 64, sizes=_ROWS)
    for _ in range(2):
        x = make.one("QuickGelu", x, domain="com.microsoft")
        y = make.linear(x, 64, 64)
        make.value_info += [helper.make_tensor_value_info(name, _FLOAT, [1, 64]) for name in (x, y)]
        x = y
    make.output(make.linear(x, 16, 64))


@case({"qdq(activations=uint16)": 30, "qdq(activations=int16)": 30, "qdq": 25}, coverage=1.0)
def small_half_numbers_with_biases(make: Graph) -> None:
    """Scales whose product float16 cannot hold: the int32 bias that ONNX Runtime would make of it is wrong."""
    make.dtype = np.float16
    x = make.input("b", 8, 8, 8, draw=lambda random, shape: random.standard_normal(shape) * 0.02)
    x = make.one("Relu", make.one("Conv", x, make.floats(16, 8, 3, 3), make.floats(16, scale=0.02)))
    x = make.one("Flatten", make.one("Conv", x, make.floats(8, 16, 3, 3), make.floats(8, scale=0.02)))
    x = make.one("Gemm", x, make.floats(128, 64), make.floats(64, scale=0.02))
    make.output(make.linear(make.one("Relu", x), 32, 64, bias=True))


@case(_LISTS | {"pack": 12}, coverage=1.0)
def a_spectrum_whose_size_onnx_infers_wrongly(make: Graph) -> None:
    """STFT without `onesided` has one side; onnx 1.23 says two."""
    x = make.input("b", 400)
    window, step, length = np.hanning(200).astype(np.float32), np.int64(100), np.int64(200)
    frames = make.one("STFT", x, make.constant(step), make.constant(window), make.constant(length))
    power = make.one("ReduceSumSquare", frames, axes=[3], keepdims=0)
    h = make.one("MatMul", make.one("Log", make.one("Add", power, make.constant(np.float32(1)))), make.floats(101, 64))
    make.output(make.linear(make.one("Relu", h), 32, 64))
