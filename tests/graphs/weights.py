"""Weights in other places than the second operand of a MatMul, and operators between them that others write."""

import numpy as np
import onnx

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


@case(ALL, packed={"MatMulInt4": 2, "MatMul": 0}, coverage=1.0)
def leading_ones(make: Graph) -> None:
    y = make.one("MatMul", make.input("b", 5, 32), make.floats(1, 32, 40, scale=0.2))
    make.output(make.one("MatMul", y, make.floats(1, 1, 40, 16, scale=0.2)))


@case(ALL, packed={"MatMulInt4": 2, "MatMul": 0, "Transpose": 0}, coverage=1.0)
def on_the_left(make: Graph) -> None:
    """As a MLP-Mixer mixes tokens: the weight meets the columns of what it multiplies."""
    x = make.one("Transpose", make.input("b", 4, 32), perm=[0, 2, 1])
    y = make.one("Transpose", make.one("MatMul", make.floats(48, 32, scale=0.2), x), perm=[0, 2, 1])
    make.output(make.linear(make.one("Relu", y), 16, 48))


@case(ALL | {"pack": 12, "smooth,awq,gptq,pack": 14}, packed={"MatMulInt4": 4, "Einsum": 2}, coverage=1.0)
def attention_of_einsums(make: Graph) -> None:
    """Keras writes heads this way: (b, s, 32) to (b, s, 4, 8) and back."""
    x = make.input("b", 6, 32)
    q, k, v = (make.one("Einsum", x, make.floats(32, 4, 8, scale=0.2), equation="abc,cde->abde") for _ in range(3))
    scores = make.one("Softmax", make.one("Einsum", k, q, equation="aecd,abcd->acbe"), axis=-1)
    mixed = make.one("Einsum", scores, v, equation="acbe,aecd->abcd")
    make.output(make.one("Einsum", mixed, make.floats(4, 8, 32, scale=0.2), equation="abcd,cde->abe"))


@case(ALL, packed={"MatMulInt4": 2, "CastLike": 0}, coverage=1.0)
def halves_cast_like_what_they_meet(make: Graph) -> None:
    """onnxscript and torch write CastLike: its type is that of the activation, or of another constant."""
    x, other = make.input("b", 32), make.floats(1)
    for like, shape in ((x, (32, 40)), (other, (40, 16))):
        half = make.constant(make.random.standard_normal(shape).astype(np.float16) * np.float16(0.2))
        x = make.one("MatMul", x, make.one("CastLike", half, like))
    make.output(x)


@case(ALL, packed={"MatMulInt4": 2, "Reshape": 0, "Shape": 0, "Size": 0}, coverage=1.0)
def reshaped_by_the_shape_of_a_constant(make: Graph) -> None:
    """What parametrizations leave: a flat weight takes the shape of the one that it stands for, whole or in parts."""
    whole, flat = make.floats(32, 40, scale=0.2), make.floats(1280, scale=0.2)
    x = make.one("MatMul", make.input("b", 32), make.one("Reshape", flat, make.one("Shape", whole)))
    rows, minus = make.one("Shape", whole, start=1), make.constant(np.array([-1], np.int64))
    shape = make.one("Concat", rows, minus, axis=0)
    make.output(make.one("MatMul", x, make.one("Reshape", make.floats(640, scale=0.2), shape)))


@case({"pack": 15}, packed={"Gather": 1})
def indexed_by_a_computed_scalar(make: Graph) -> None:
    """What folds to a scalar stays one: the rank of the output hangs on it."""
    index = make.one("Gather", make.constant(np.array([3, 1], np.int64)), make.constant(np.int64(1)))
    make.output(make.one("Gather", make.linear(make.input("b", 6, 32), 16), index, axis=1))


@case({"smooth,awq,gptq,pack": 15, "smooth,qdq": 25}, packed={"Relu": 3000})
def behind_a_long_chain(make: Graph) -> None:
    """The walk back from a linear to what could absorb its factor has an end."""
    x = make.linear(make.input("b", 32), 32)
    for _ in range(3000):
        x = make.one("Relu", x)
    make.output(make.linear(x, 16))


@case(ALL, packed={"MatMulInt4": 3, "Split": 0}, coverage=1.0)
def packed_into_one(make: Graph) -> None:
    """q, k and v as parts of one constant, which a Split takes apart when the model runs."""
    sizes = make.constant(np.array([32, 32, 32], np.int64))
    parts = make.op("Split", make.floats(96, 32, scale=0.2), sizes, outputs=3, axis=0)
    x = make.input("b", 32)
    make.output(*(make.one("MatMul", x, make.one("Transpose", part, perm=[1, 0])) for part in parts))


@case(ALL, packed={"MatMulInt4": 2, "MatMul": 0}, coverage=1.0)
def adapters_added_to_weights(make: Graph) -> None:
    x = make.input("b", 64)
    delta = make.one("Mul", make.one("MatMul", make.floats(64, 4), make.floats(4, 64)), make.constant(np.float32(0.5)))
    y = make.one("MatMul", x, make.one("Add", make.floats(64, 64), delta))
    make.output(make.linear(make.one("Relu", y), 16, 64))


@case(ALL | {"smooth,qdq": 18}, packed={"MatMulInt4": 3, "Gather": 0}, coverage=1.0)
def layers_stacked_in_one(make: Graph) -> None:
    stacked, x = make.floats(3, 32, 32, scale=0.2), make.input("b", 32)
    for layer in range(3):
        x = make.one("Relu", make.one("MatMul", x, make.one("Gather", stacked, make.constant(np.int64(layer)))))
    make.output(x)


@case({"smooth,qdq": 22}, coverage=1.0)
def convolution_of_normalized_weight(make: Graph) -> None:
    """torch's weight_norm: g v / |v|, computed when the model runs."""
    make.opsets[""] = 18
    v, g = make.floats(8, 4, 3), make.constant(np.linspace(1, 2, 8, dtype=np.float32).reshape(8, 1, 1))
    norm = make.one("ReduceL2", v, make.constant(np.array([1, 2], np.int64)))
    weight = make.one("Mul", make.one("Div", v, norm), g)
    y = make.one("Relu", make.one("Conv", make.input("b", 4, 20), weight, pads=[1, 1]))
    make.output(make.one("Conv", y, make.floats(8, 8, 3), pads=[1, 1]))


@case(ALL, packed={"MatMulInt4": 1, "Gemm": 0}, coverage=1.0)
def gemm_on_the_left(make: Graph) -> None:
    x, bias = make.input("b", 32), make.floats(40, 1, scale=1.0)
    y = make.one("Gemm", make.floats(32, 40), x, bias, transA=1, transB=1, alpha=0.5)
    make.output(make.one("Transpose", y))


def _ids(make: Graph, *shape: int, below: int) -> str:
    return make.input(*shape, dtype=np.int32, draw=lambda random, size: random.integers(0, below, size))


@case({"pack": 10, "qdq": 25, "dynamic": 25}, packed={"MatMulInt4": 2, "Attention": 0}, coverage=1.0)
def encoder_of_an_optimizer(make: Graph) -> None:
    """As onnxruntime.transformers.optimizer writes BERT: weights in EmbedLayerNormalization and Attention."""
    domain = "com.microsoft"
    ids, kinds, mask = (_ids(make, 2, 6, below=n) for n in (50, 2, 2))
    tables = [make.floats(rows, 32, scale=0.5) for rows in (50, 8, 2)]
    norm = make.constant(np.linspace(0.5, 1.5, 32, dtype=np.float32)), make.floats(32, scale=0.1)
    embedded = [ids, kinds, *tables, *norm, mask]
    x, lengths = make.op("EmbedLayerNormalization", *embedded, domain=domain, outputs=2, epsilon=1e-5)
    weights = make.floats(32, 96, scale=0.2), make.floats(96, scale=0.1)
    a = make.one("Attention", x, *weights, lengths, domain=domain, num_heads=4)
    make.output(make.one("SkipLayerNormalization", make.linear(a, 32), x, *norm, domain=domain))


@case({"pack": 12, "smooth,qdq": 25, "dynamic": 25}, packed={"MatMulInt4": 3, "FusedMatMul": 0}, coverage=1.0)
def products_fused_by_a_runtime(make: Graph) -> None:
    domain, x = "com.microsoft", make.input("b", 32)
    y = make.one("FusedMatMul", x, make.floats(48, 32, scale=0.2), domain=domain, alpha=0.5, transB=1)
    told = {"domain": domain, "activation": "Relu", "transB": 1}
    y = make.one("FusedGemm", y, make.floats(32, 48, scale=0.3), make.floats(32), **told)
    make.output(make.linear(y, 16))


@case({"smooth,qdq": 22}, coverage=1.0)
def convolutions_fused_by_a_runtime(make: Graph) -> None:
    x, told = make.input("b", 4, 8, 8), {"domain": "com.microsoft", "activation": "Relu", "pads": [1, 1, 1, 1]}
    y = make.one("FusedConv", x, make.floats(8, 4, 3, 3), make.floats(8, scale=0.1), **told)
    z = make.one("FusedConv", y, make.floats(8, 8, 3, 3), make.floats(8, scale=0.1), y, **told)
    make.output(make.one("Conv", z, make.floats(8, 8, 1, 1)))


@case({"pack": 200, "smooth,qdq": 200}, options={"min_coverage": 0})
def weights_that_come_quantized(make: Graph) -> None:
    """Codes of others stay as they are."""
    codes = make.constant(make.random.integers(-127, 128, (32, 48)).astype(np.int8))
    scale = make.constant(np.full(48, 0.01, np.float32))
    make.output(make.one("MatMul", make.input("b", 32), make.one("DequantizeLinear", codes, scale, axis=1)))


@case(ALL, packed={"MatMulInt4": 2, "Normalizer": 1}, coverage=1.0)
def operators_of_another_domain(make: Graph) -> None:
    """Of ai.onnx.ml; neither onnx nor ONNX Runtime tells the shape of what a Normalizer gives."""
    y = make.one("Normalizer", make.linear(make.input("b", 32), 32), domain="ai.onnx.ml", norm="L2")
    make.output(make.linear(y, 16))


@case({"pack": 12, "smooth,qdq": 20, "dynamic": 25}, coverage=1.0)
def weights_made_of_few_numbers(make: Graph) -> None:
    """Cosines of whole numbers of angles, a bank of 2,048 numbers scattered into 65,536 zeros, an outer product: they
    stay as they are, since no codes of them would be smaller, and do not count."""
    x = make.input("b", 32)
    rows, columns = (
        make.constant(np.arange(n, dtype=np.int32).reshape(shape)) for n, shape in ((32, (32, 1)), (512, (1, 512)))
    )
    turns, size = make.one("Mul", rows, columns), make.constant(np.int32(64))
    rest = make.one("Sub", turns, make.one("Mul", make.one("Div", turns, size), size))
    angles = make.one("Mul", make.one("Cast", rest, to=1), make.constant(np.float32(np.pi / 32)))
    power = make.one("Abs", make.one("MatMul", x, make.one("Cos", angles)))
    places = make.constant(np.arange(0, 1 << 16, 32, dtype=np.int64))
    zeros = make.one("ConstantOfShape", make.constant(np.array([1 << 16])))
    flat = make.one("ScatterElements", zeros, places, make.floats(2048, scale=1.0), axis=0)
    bank = make.one("Reshape", flat, make.constant(np.array([512, 128])))
    window = make.one("Mul", make.floats(128, 1, scale=1.0), make.floats(1, 128, scale=1.0))
    make.output(make.linear(make.one("MatMul", make.one("MatMul", power, bank), window), 64, 128))


@case(ALL, packed={"MatMulInt4": 2, "MatMul": 0}, coverage=1.0)
def padded_and_repeated(make: Graph) -> None:
    """K padded to what a kernel wants, and halves that are the same."""
    x = make.input("b", 64)
    first = make.one("Pad", make.floats(60, 64), make.constant(np.array([0, 0, 4, 0])))
    second = make.one("Tile", make.floats(32, 48, scale=0.15), make.constant(np.array([2, 1])))
    make.output(make.one("MatMul", make.one("Relu", make.one("MatMul", x, first)), second))


@case(ALL, packed={"MatMulInt4": 4, "MatMul": 0}, coverage=1.0)
def masked_bounded_and_mixed(make: Graph) -> None:
    """What training leaves behind: a mask, a triangle, bounds, positive weights, a mixture of matrices by a Softmax."""
    x = make.input("b", 64)
    mask = make.one("Cast", make.constant(make.random.random((64, 64)) > 0.3), to=1)
    x = make.one("Tanh", make.one("MatMul", x, make.one("Mul", make.floats(64, 64), mask)))
    x = make.one("Tanh", make.one("MatMul", x, make.one("Trilu", make.floats(64, 64), upper=0)))
    ends = [make.constant(np.float32(end)) for end in (-0.2, 0.2)]
    x = make.one("Tanh", make.one("MatMul", x, make.one("Clip", make.floats(64, 64), *ends)))
    shares = make.one(
        "Reshape", make.one("Softmax", make.floats(4, scale=1.0), axis=0), make.constant(np.array([4, 1, 1]))
    )
    parts = make.one("Mul", shares, make.one("Softplus", make.floats(4, 64, 48, scale=1.0)))
    mixed = make.one("ReduceSum", parts, make.constant(np.array([0])), keepdims=0)
    make.output(make.one("MatMul", x, mixed))


@case({"smooth,qdq": 25, "qdq": 25}, coverage=1.0)
def standardized_convolutions(make: Graph) -> None:
    """timm's StdConv2d: torch writes it as a BatchNormalization in training, of the weight."""
    ones, zeros = make.constant(np.ones(16, np.float32)), make.constant(np.zeros(16, np.float32))
    x = make.input("b", 8, 10, 10)
    for rows in (8, 16):
        flat = make.one("Reshape", make.floats(16, rows, 3, 3, scale=1.0), make.constant(np.array([1, 16, -1])))
        norm = make.op("BatchNormalization", flat, ones, zeros, zeros, ones, training_mode=1, momentum=1.0, outputs=3)
        x = make.one(
            "Relu", make.one("Conv", x, make.one("Reshape", norm[0], make.constant(np.array([16, rows, 3, 3]))))
        )
    make.output(x)


@case(ALL, packed={"MatMulInt4": 3, "Einsum": 2}, coverage=1.0)
def einsums_of_three(make: Graph) -> None:
    """Attention that ends in one Einsum with its output projection; a bilinear layer."""
    x = make.input("b", 5, 64)
    q = make.one("Reshape", make.linear(x, 64, 64), make.constant(np.array([0, 0, 4, 16])))
    a = make.one("Softmax", make.one("Einsum", q, q, equation="bthe,bshe->bhts"), axis=-1)
    y = make.one("Einsum", a, q, make.floats(4, 16, 64, scale=0.15), equation="bhts,bshe,hed->btd")
    make.output(make.one("Einsum", make.one("Tanh", y), make.floats(64, 32), equation="btd,df->btf"))


@case(ALL, packed={"MatMulInt4": 2, "CastLike": 0, "GatherElements": 0}, coverage=1.0)
def cast_like_an_input_and_permuted(make: Graph) -> None:
    x = make.input("b", 64)
    half = make.constant((make.random.standard_normal((64, 64)) / 8).astype(np.float16))
    order = make.constant(np.argsort(make.random.random((64, 48)), axis=0))
    y = make.one("Relu", make.one("MatMul", x, make.one("CastLike", half, x)))
    make.output(make.one("MatMul", y, make.one("GatherElements", make.floats(64, 48), order, axis=0)))


@case({"pack": "GatherElements.* reads beyond the 64 elements of its table"})
def permuted_out_of_range(make: Graph) -> None:
    order = np.argsort(make.random.random((64, 48)), axis=0)
    order[7, 11] = 1 << 23
    weight = make.one("GatherElements", make.floats(64, 48), make.constant(order), axis=0)
    make.output(make.one("MatMul", make.input("b", 64), weight))


@case(dict.fromkeys(("pack", "qdq", "qdq(operators=all)"), "If .* when the model runs"))
def weights_chosen_by_a_branch(make: Graph) -> None:
    x, choice = make.input("b", 64), make.input(dtype=bool, draw=lambda random, size: random.random() < 0.5)
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = onnx.helper.make_node("Transpose", [make.floats(64, 64)], [f"{name}_w"], perm=[1, 0])
        told = onnx.helper.make_tensor_value_info(f"{name}_w", onnx.TensorProto.FLOAT, None)
        branches[name] = onnx.helper.make_graph([node], name, [], [told])
    y = make.one("MatMul", make.one("Tanh", make.linear(x, 64, 64)), make.one("If", choice, **branches))
    make.output(make.linear(y, 256, 64))


@case(dict.fromkeys(("pack", "qdq", "qdq(operators=all)"), "Slice .* when the model runs"))
def weights_cut_by_the_length_of_an_input(make: Graph) -> None:
    x = make.input("b", "t", 64)
    length = make.one("Slice", make.one("Shape", x), *(make.constant(np.array([n])) for n in (1, 2)))
    zero = make.constant(np.array([0]))
    part = make.one("Slice", make.floats(64, 64), zero, length, make.constant(np.array([1])))
    make.output(make.one("MatMul", make.one("Relu", make.linear(x, 64, 64)), part))


@case({"pack": "its 2 weights are quantized already", "qdq": "its 2 weights are quantized already"})
def everything_quantized_already(make: Graph) -> None:
    """Two products as onnxruntime's quantize_static and quantize_dynamic write them, the bias of one as int32."""
    x, scale, zero = make.input("b", 32), make.constant(np.float32(0.02)), make.constant(np.uint8(128))
    codes = [make.constant(make.random.integers(-127, 128, (32, 32)).astype(np.int8)) for _ in range(2)]
    back = make.one("DequantizeLinear", make.one("QuantizeLinear", x, scale, zero), scale, zero)
    y = make.one("MatMul", back, make.one("DequantizeLinear", codes[0], scale))
    bias = make.constant(make.random.integers(-99, 99, 32).astype(np.int32))
    y = make.one("Add", y, make.one("DequantizeLinear", bias, make.constant(np.float32(0.0004))))
    numbers = make.op("DynamicQuantizeLinear", y, outputs=3)
    z = make.one("MatMulInteger", numbers[0], codes[1], numbers[2])
    make.output(make.one("Mul", make.one("Cast", z, to=onnx.TensorProto.FLOAT), make.one("Mul", numbers[1], scale)))


@case(ALL, packed={"MatMulInt4": 2, "MatMul": 0}, coverage=1.0)
def sparse_constants(make: Graph) -> None:
    """As onnxruntime's sparsify_initializers writes pruned weights; here in Constants."""
    x = make.input("b", 64)
    for columns in (64, 48):
        dense = (make.random.standard_normal((64, columns)) / 4).astype("f") * (make.random.random((64, columns)) < 0.2)
        places = np.flatnonzero(dense)
        values, indices = (onnx.numpy_helper.from_array(a, "t") for a in (dense.reshape(-1)[places], places))
        sparse = onnx.helper.make_sparse_tensor(values, indices, [64, columns])
        x = make.one("Tanh", make.one("MatMul", x, make.one("Constant", sparse_value=sparse)))
    make.output(x)


@case(ALL | {"outlier,qdq": 25, "qdq(operators=weights)": 25}, coverage=1.0)
def transposed_weights_that_are_outputs(make: Graph) -> None:
    """The weight as a product reads it is asked for, too."""
    x, w, v = make.input("b", 64), make.floats(64, 64), make.floats(48, 64)
    turned, other = make.one("Transpose", w, perm=[1, 0]), make.one("Transpose", v, perm=[1, 0])
    make.output(make.one("MatMul", make.one("Relu", make.one("MatMul", x, turned)), other), turned, other)
