"""Inputs and constants of unusual kinds: strings, scalars, what passes straight through, weights without elements."""

import numpy as np
from onnx import TensorProto, helper

from graphs.table import Graph, case

ROWS = {"b": 64}
LISTS = {"pack": 15, "smooth,awq,gptq,pack": 15, "smooth,qdq": 25, "dynamic": 25}


@case(LISTS)
def strings_that_become_rows_of_a_table(make: Graph) -> None:
    words = np.array(["red", "green", "blue", "none of them"], object)
    text = make.input("b", dtype=object, sizes=ROWS, draw=lambda random, size: words[random.integers(4, size=size)])
    make.opsets["ai.onnx.ml"] = 2
    keys = {"keys_strings": ["red", "green", "blue"], "values_int64s": [0, 1, 2], "default_int64": 3}
    ids = make.one("LabelEncoder", text, domain="ai.onnx.ml", **keys)
    h = make.linear(make.one("Gather", make.floats(16, 32, scale=1.0), ids), 32)
    make.output(make.linear(make.one("Relu", h), 32))
    make.output(make.one("Identity", text), dtype=object)


@case(LISTS)
def a_scalar_and_an_input_that_is_an_output(make: Graph) -> None:
    t = make.input(draw=lambda random, size: 1 + random.random(size) / 4)
    x, passed = make.input("b", 32, sizes=ROWS), make.input("b", dtype=np.int64, sizes=ROWS)
    make.output(make.linear(make.one("Relu", make.linear(make.one("Mul", x, t), 32)), 32))
    make.output(make.one("Identity", passed), dtype=np.int64)


@case(LISTS)
def a_product_without_columns(make: Graph) -> None:
    h = make.linear(make.one("Relu", make.linear(make.input("b", 32, sizes=ROWS), 32)), 32)
    make.output(make.one("Concat", h, make.one("MatMul", h, make.constant(np.zeros((32, 0), np.float32))), axis=1))


@case(LISTS)
def a_product_over_no_columns(make: Graph) -> None:
    h = make.linear(make.one("Relu", make.linear(make.input("b", 32, sizes=ROWS), 32)), 32)
    none = make.one("Slice", h, *(make.constant(np.array([number])) for number in (0, 0, 1)))
    make.output(make.one("Add", h, make.one("MatMul", none, make.constant(np.zeros((0, 32), np.float32)))))


@case(LISTS)
def rows_behind_an_empty_constant(make: Graph) -> None:
    x = make.one("Concat", make.input("b", 32, sizes=ROWS), make.constant(np.zeros((0, 32), np.float32)), axis=0)
    make.output(make.linear(make.one("Relu", make.linear(x, 32)), 32))


@case(LISTS)
def an_operator_whose_shape_nobody_infers(make: Graph) -> None:
    """ai.onnx.ml's Normalizer: neither onnx nor ONNX Runtime says more than the type of what it gives."""
    make.opsets["ai.onnx.ml"] = 3
    h = make.linear(make.input("b", 32, sizes=ROWS), 32)
    make.output(make.linear(make.one("Normalizer", h, domain="ai.onnx.ml", norm="L2"), 32))


@case(LISTS)
def an_input_of_a_rank_that_nobody_tells(make: Graph) -> None:
    """ONNX Runtime takes any rank then; the data tells it."""
    x = make.input("b", 6, 32, ranked=False)
    h = make.one("Relu", make.linear(x, 32, bias=True))
    make.output(make.linear(h, 32))


@case(LISTS)
def ids_of_a_rank_that_nobody_tells(make: Graph) -> None:
    ids = make.input("b", 6, dtype=np.int64, ranked=False, draw=lambda random, size: random.integers(0, 40, size))
    make.output(make.linear(make.linear(make.one("Gather", make.floats(40, 32, scale=1.0), ids), 32), 32))


@case(LISTS)
def ids_that_count_from_the_end(make: Graph) -> None:
    ids = make.input("b", dtype=np.int64, draw=lambda random, size: random.integers(-50, 50, size))
    make.output(make.linear(make.one("Gather", make.floats(50, 64, scale=0.5), ids), 32, 64))


@case(LISTS)
def a_classifier_that_gives_maps(make: Graph) -> None:
    """As skl2onnx writes one: a label, and a dictionary of probabilities for each row."""
    h = make.one("Relu", make.linear(make.input("b", 64), 64, 64, bias=True))
    probabilities = make.one("Softmax", make.linear(h, 20, 64, bias=True), axis=1)
    maps = make.one("ZipMap", probabilities, domain="ai.onnx.ml", classlabels_strings=[f"class {i}" for i in range(20)])
    inner = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    make.outputs.append(helper.make_value_info(maps, helper.make_sequence_type_proto(inner)))
    make.output(probabilities)


def _tower(make: Graph, name: str, count: int, length: int) -> str:
    """One vector for each text; what is computed of its sizes is cut and joined by them."""
    make.inputs.append(helper.make_tensor_value_info(name, TensorProto.INT64, ("batch", "sequence")))
    make.makers[name] = lambda random: random.integers(0, 50, (count, length))
    x = make.one("Gather", make.floats(50, 64, scale=1.0), name)
    sizes = [make.one("Gather", make.one("Shape", name), make.constant(np.array([axis]))) for axis in (0, 1)]
    apart = make.one("Concat", *sizes, make.constant(np.array([4, 16])), axis=0)
    whole = make.one("Concat", *sizes, make.constant(np.array([64])), axis=0)
    h = make.one("Transpose", make.one("Reshape", make.linear(x, 64, 64), apart), perm=[0, 2, 1, 3])
    h = make.one("Reshape", make.one("Transpose", make.one("Relu", h), perm=[0, 2, 1, 3]), whole)
    return make.linear(make.one("ReduceMean", h, axes=[1], keepdims=0), 64, 64)


@case({"pack": 12, "smooth,qdq": 25, "qdq(operators=all)": 20})
def queries_and_passages_of_other_lengths(make: Graph) -> None:
    """Of which the file says that both are ("batch", "sequence")."""
    query, passage = _tower(make, "query", 3, 7), _tower(make, "passage", 5, 11)
    make.output(make.one("MatMul", query, make.one("Transpose", passage, perm=[1, 0])), query, passage)


@case({"smooth,qdq": 20, "qdq(operators=all)": 15})
def texts_and_images_of_other_numbers(make: Graph) -> None:
    """Both numbers are called "batch"; ONNX Runtime reuses memory by such names."""
    image = make.input("batch", 3, 16, 16, sizes={"batch": 2})
    text = _tower(make, "text", 3, 6)
    h = make.one("Conv", image, make.floats(64, 3, 4, 4, scale=0.1), strides=[4, 4])
    h = make.linear(make.one("ReduceMean", h, axes=[2, 3], keepdims=0), 64, 64)
    make.output(make.one("MatMul", text, make.one("Transpose", h, perm=[1, 0])), text, h)
