"""Convolutions of every kind under static int8: the outputs are right, and nothing crashes."""

import numpy as np

from graphs.table import Graph, case

LISTS = {"qdq": 27, "smooth,equalize,qdq,bias_correction": 27, "qdq(provider=tensorrt)": 27}
# Ranges end where the calibration data does, which is small here.
DEEP = {"qdq": 22, "smooth,qdq,bias_correction": 22, "qdq(provider=tensorrt)": 22}


@case(LISTS, coverage=1.0)
def convolutions_of_one_dimension_and_three(make: Graph) -> None:
    one, three = make.input("b", 8, 50), make.input("b", 4, 6, 7, 8)
    made = make.one("Conv", one, make.floats(16, 8, 3), make.floats(16), dilations=[2], pads=[4, 0], strides=[2])
    make.output(made, make.one("Conv", three, make.floats(6, 4, 3, 3, 3), make.floats(6)))


@case(LISTS, coverage=1.0)
def convolutions_by_groups(make: Graph) -> None:
    x = make.input("b", 8, 12, 12)
    for group in (4, 8):
        weight, bias = make.floats(16, 8 // group, 3, 3), make.floats(16)
        made = make.one("Conv", x, weight, bias, group=group, auto_pad="SAME_UPPER", strides=[2, 2])
        make.output(made)


@case({"qdq": 35, "qdq(provider=tensorrt)": 27}, coverage=1.0)
def transposed_convolutions(make: Graph) -> None:
    """Channels that differ by powers of ten; one scale for each along axis 1 of the weight, shared by the groups."""
    x = make.input("b", 8, 9, 9)
    sizes = np.exp(make.random.standard_normal((1, 16, 1, 1)))
    weight = make.constant((make.random.standard_normal((8, 16, 3, 3)) * sizes).astype(np.float32))
    padded = {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]}
    make.output(make.one("ConvTranspose", x, weight, make.floats(16), **padded))
    make.output(make.one("ConvTranspose", x, make.floats(8, 4, 3, 3), make.floats(16), group=4, strides=[2, 2]))


@case(DEEP)
def convolutions_behind_norms(make: Graph) -> None:
    x, n = make.input("b", 8, 12, 12), 16
    positive = [make.constant((np.abs(make.random.standard_normal(n)) + 0.5).astype(np.float32)) for _ in range(3)]
    plain = [make.floats(n, scale=1.0) for _ in range(2)]
    batch = make.one(
        "BatchNormalization", make.one("Conv", x, make.floats(n, 8, 3, 3)), positive[0], *plain, positive[1]
    )
    slope = make.constant(np.full((n, 1, 1), 0.2, np.float32))
    own = make.one("InstanceNormalization", make.one("Conv", x, make.floats(n, 8, 3, 3)), positive[2], plain[0])
    for value in (make.one("PRelu", batch, slope), make.one("LeakyRelu", own, alpha=0.1)):
        make.output(make.one("Conv", value, make.floats(4, n, 3, 3), make.floats(4)))


@case(DEEP)
def convolutions_that_share(make: Graph) -> None:
    """One weight and one bias, in one place of a thousand times the other's sums."""
    x, weight, bias = make.input("b", 8, 12, 12), make.floats(8, 8, 3, 3), make.floats(8, scale=1.0)
    first = make.one("Conv", x, weight, bias, pads=[1, 1, 1, 1])
    large = make.one("Mul", first, make.constant(np.float32(1000)))
    make.output(make.one("Conv", large, weight, bias, pads=[1, 1, 1, 1]), first)


@case({"qdq": 27, "smooth,qdq,bias_correction": 27}, options={"min_coverage": 0})
def convolutions_with_computed_parts(make: Graph) -> None:
    x, scale = make.input("b", 8, 12, 12), make.input(1, sizes={})
    bias = make.one("Mul", make.floats(8), scale)
    make.output(make.one("Conv", x, make.floats(8, 8, 3, 3), bias))
    make.output(make.one("Conv", x, make.one("Mul", make.floats(8, 8, 3, 3), scale), make.floats(8)))


@case({"qdq": 26, "qdq(provider=tensorrt)": 26, "qdq(provider=tensorrt,operators=all)": 24})
def convolutions_and_a_move_at_the_end(make: Graph) -> None:
    """Plain ONNX Runtime loads the file for TensorRT, whatever stands at its end."""
    x = make.input("b", 3, 14, 14)
    made = make.one("Relu", make.one("Conv", x, make.floats(16, 3, 3, 3), make.floats(16)))
    last = make.one("Conv", made, make.floats(8, 16, 3, 3))
    make.output(make.one("Reshape", last, make.constant(np.array([0, 0, -1], np.int64))))
    make.output(make.one("Transpose", make.one("Conv", made, make.floats(4, 16, 1, 1)), perm=[0, 2, 3, 1]))
    make.output(make.one("Flatten", make.one("Conv", made, make.floats(4, 16, 1, 1))))


@case({"qdq": 28, "smooth,qdq,bias_correction": 28})
def convolution_between_clips_whose_ends_are_rows_of_one(make: Graph) -> None:
    """ONNX Runtime takes ends of shape (1,) for scalars."""
    x, ends = make.input("b", 8, 12, 12), [make.constant(np.array([end], np.float32)) for end in (-0.7, 6.0)]
    made = make.one("Clip", make.one("Conv", x, make.floats(16, 8, 3, 3), make.floats(16)), *ends)
    make.output(make.one("Conv", made, make.floats(8, 16, 3, 3)))
