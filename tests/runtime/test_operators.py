"""The operators of the native library inside ONNX Runtime, against float64."""

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from native_models import MALFORMED, NATIVE, TABLES, Case, Damage, native_library, open_session, relative
from onnx import TensorProto, helper

from qcompile.runtime.sessions import session

# Relative error of a product: of 16 bits, of the fp16 that outputs are rounded to, and of 8 bits.
NEAR_EXACT, HALF, INT8 = 1e-4, 4e-4, 2e-2


@pytest.fixture(scope="module")
def library() -> Path:
    return native_library()


def _tolerance(case: Case) -> float:
    if case.attributes.get("activation_bits") == 8:
        return INT8
    return HALF if case.half else NEAR_EXACT


def _check(case: Case, library: Path, *leading: int) -> np.ndarray:
    x = case.x(*leading)
    (y,) = open_session(case.model(), library).run(None, {"x": x})
    assert y.dtype == case.dtype
    assert y.shape == (*leading, case.n)
    assert relative(y, case.expected(x)) < _tolerance(case)
    return y


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "overridable"])
@pytest.mark.parametrize("half", [False, True], ids=["float", "half"])
@pytest.mark.parametrize(
    ("op", "signed", "zero_point"),
    [
        (op, signed, zero_point)
        for op in NATIVE
        for signed in (False, True)
        for zero_point in (False, True)
        if Case(op, signed=signed, zero_point=zero_point).affine or not (signed or zero_point)
    ],
)
def test_every_type_and_both_precisions(library, op, signed, zero_point, half, constant) -> None:
    """Odd K and N and a partial last group throughout."""
    for bits in (None, 8, 16):
        case = Case(op, half=half, signed=signed, zero_point=zero_point, constant=constant)
        case.attributes = {} if bits is None else {"activation_bits": bits}
        _check(case, library, 2, 3)


def test_sixteen_bits_are_the_default(library: Path) -> None:
    x = Case().x(1, 4)
    by_bits = {}
    for bits in (None, 16, 8):
        case = Case(attributes={"activation_bits": bits})
        (by_bits[bits],) = open_session(case.model(), library).run(None, {"x": x})
    np.testing.assert_array_equal(by_bits[None], by_bits[16])
    assert relative(by_bits[8], Case().expected(x)) > 10 * relative(by_bits[16], Case().expected(x))


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "overridable"])
@pytest.mark.parametrize("op", NATIVE)
def test_columns_at_8_bits_among_others(library: Path, op: str, constant: bool) -> None:
    """Panels of 64 columns are, bit for bit, those of a product that takes all activations at their bits."""
    x = Case(op, n=200, x_shape=None).x(5)

    def run(bits: int, *ranges: int) -> np.ndarray:
        attributes = {"activation_bits": bits} | ({"columns_at_8": ranges} if ranges else {})
        case = Case(op, n=200, x_shape=None, constant=constant, attributes=attributes, body=True)
        return np.asarray(open_session(case.model(), library).run(None, {"x": x})[0])

    at_8, at_16 = run(8), run(16)
    ranges_of = {(0, 64): {0}, (64, 128, 128, 200): {1, 2, 3}, (1, 130, 192, 200): {1, 3}, (0, 200): {0, 1, 2, 3}}
    for ranges, narrow in ranges_of.items():
        found = run(16, *ranges)
        for panel in range(4):
            part = slice(64 * panel, 64 * panel + 64)
            np.testing.assert_array_equal(found[:, part], (at_8 if panel in narrow else at_16)[:, part])
    np.testing.assert_array_equal(run(8, 0, 64), at_8)


@pytest.mark.parametrize("op", NATIVE)
@pytest.mark.parametrize("leading", [(), (0,), (1,), (17,), (0, 3), (2, 3), (2, 0, 3), (2, 2, 3)])
def test_ranks_and_empty_inputs(library: Path, op: str, leading: tuple[int, ...]) -> None:
    _check(Case(op, x_shape=None), library, *leading)
    _check(Case(op, x_shape=(*("abc"[: len(leading)]), 70)), library, *leading)


@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 64, 128, 256, 300, 1000])
@pytest.mark.parametrize("bits", [4, 8])
def test_block_sizes(library: Path, block_size: int, bits: int) -> None:
    """Up to one group a column, and beyond."""
    for signed in (True, False):
        for k, n in ((300, 1), (301, 130)):
            case = Case(f"MatMulInt{bits}", k, n, block_size, signed=signed, zero_point=not signed, x_shape=("a", k))
            _check(case, library, 5)


@pytest.mark.parametrize("block_size", [1, 7, 16, 32, 64, 128, 256, 300, 1000])
@pytest.mark.parametrize("table", TABLES)
def test_block_sizes_of_looked_up_codes(library: Path, block_size: int, table: str) -> None:
    for k, n in ((300, 1), (301, 130)):
        _check(Case(f"MatMul{table}", k, n, block_size, x_shape=("a", k)), library, 5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("op", NATIVE)
def test_the_body_is_what_the_kernel_computes(library: Path, op: str, half: bool) -> None:
    """The same file with the library and without: 16-bit activations are near-exact, 8-bit ones add their rounding."""
    for rows, bits in ((1, 16), (7, 16), (7, 8)):
        case = Case(op, 301, 45, half=half, body=True, attributes={"activation_bits": bits}, x_shape=("a", 301))
        x = case.x(rows)
        (native,) = open_session(case.model(), library).run(None, {"x": x})
        (portable,) = session(case.model(), kernels="portable", threads=1).run(None, {"x": x})  # in floats
        assert relative(native, portable.astype(np.float64)) < (INT8 if bits == 8 else 1e-3 if half else NEAR_EXACT)
        assert not np.array_equal(native, portable), "the body ran in both"


@pytest.mark.parametrize("table", [table for table in TABLES if Case(f"MatMul{table}").byte_scales])
def test_the_type_that_scales_in_bytes_are_of_is_that_of_x(library: Path, table: str) -> None:
    for dtype, message in ((10, r"dtype is 10, but x is of type 1: compile"), (None, "attribute dtype is missing")):
        case = Case(f"MatMul{table}", attributes={"dtype": dtype})
        with pytest.raises(Exception, match=rf"node 'node_0' \(MatMul{table}\): .*{message}"):
            open_session(case.model(), library)


@pytest.mark.parametrize(("half", "exponents"), [(False, (-126, -40, -11, 7, 60)), (True, (-15, -9, 1))])
def test_the_scale_of_the_tensor(library: Path, half: bool, exponents: tuple[int, ...]) -> None:
    """All bytes of scales that are numbers, of both signs; blocks of 16 rows, the last one partial."""
    for exponent in exponents:
        case = Case("MatMulNVFP4", 70, 254, 16, half, body=True, attributes={"exponent": exponent}, x_shape=("a", 70))
        case.arrays["scale"] = np.tile(np.delete(np.arange(256, dtype=np.uint8), [127, 255]), (5, 1))
        x = case.x(3) / 64
        (native,) = open_session(case.model(), library).run(None, {"x": x})
        (portable,) = session(case.model(), kernels="portable", optimize=False, threads=1).run(None, {"x": x})
        assert np.isfinite(portable).all()
        assert relative(native, portable.astype(np.float64)) < (1e-3 if half else NEAR_EXACT)


@pytest.mark.parametrize(
    ("exponent", "message"),
    [
        (None, "attribute exponent is missing"),
        (-127, "exponent is -127, it must be -126 to 127"),
        (128, "exponent is 128"),
        (1.0, "attribute exponent must be an integer"),
    ],
)
def test_scales_of_the_tensor_that_are_refused(library: Path, exponent: object, message: str) -> None:
    case = Case("MatMulNVFP4", attributes={"exponent": exponent})
    with pytest.raises(Exception, match=rf"node 'node_0' \(MatMulNVFP4\): .*{message}"):
        open_session(case.model(), library)


def test_an_overridden_weight_is_used(library: Path) -> None:
    case = Case("MatMulAddInt8", constant=False)
    session = open_session(case.model(), library)
    x = case.x(1, 2)
    for seed in (1, 2):
        other = Case("MatMulAddInt8", constant=False, seed=seed)
        (y,) = session.run(None, {"x": x, **other.arrays})
        assert relative(y, other.expected(x)) < NEAR_EXACT
    (y,) = session.run(None, {"x": x})
    assert relative(y, case.expected(x)) < NEAR_EXACT


def test_a_computed_bias(library: Path) -> None:
    """Everything else is constant; the bias is known at the run only."""
    case = Case("MatMulAddInt4")
    proto = case.proto()
    (bias,) = (i for i in proto.graph.initializer if i.name == "bias")
    proto.graph.initializer.remove(bias)
    proto.graph.input.append(helper.make_tensor_value_info("bias", TensorProto.FLOAT, ["n"]))
    session = open_session(proto.SerializeToString(), library)
    x = case.x(1, 2)
    (y,) = session.run(None, {"x": x, "bias": case.arrays["bias"]})
    assert relative(y, case.expected(x)) < NEAR_EXACT
    with pytest.raises(Exception, match=r"node 'node_0' \(MatMulAddInt4\): bias has shape \(12,\), w \(70, 13\) needs"):
        session.run(None, {"x": x, "bias": np.ones(12, np.float32)})


@pytest.mark.parametrize("outer", [True, False], ids=["weights outside", "weights inside"])
def test_inside_a_branch(library: Path, outer: bool) -> None:
    case = Case()
    graph = case.proto().graph
    branch = helper.make_graph(list(graph.node), "then", [], list(graph.output))
    zero = helper.make_node("Constant", [], ["z"], value=helper.make_tensor("", TensorProto.FLOAT, [], [0.0]))
    other = helper.make_graph([zero], "else", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)])
    if not outer:
        branch.initializer.extend(graph.initializer)
    choice = helper.make_node("If", ["c"], ["out"], then_branch=branch, else_branch=other)
    inputs = [helper.make_tensor_value_info("c", TensorProto.BOOL, []), graph.input[0]]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    whole = helper.make_graph([choice], "g", inputs, [output], list(graph.initializer) if outer else [])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qcompile", 1)]
    model = helper.make_model(whole, opset_imports=opsets, ir_version=10).SerializeToString()
    x = case.x(1, 2)
    (y,) = open_session(model, library).run(None, {"x": x, "c": np.array(True)})
    assert relative(y, case.expected(x)) < NEAR_EXACT


@pytest.mark.parametrize("half", [False, True])
def test_shapes_are_inferred_with_their_names(library: Path, half: bool) -> None:
    def shape(case: Case) -> list[int | str]:
        return open_session(case.model(), library).get_outputs()[0].shape

    assert shape(Case(half=half)) == ["a", "b", 13]
    assert shape(Case(half=half, x_shape=(4, 70))) == [4, 13]
    assert shape(Case(half=half, x_shape=(70,))) == [13]
    first, second, columns = shape(Case(half=half, x_shape=(None, None, 70)))
    assert columns == 13
    assert first != second, "two unknown sizes must not look equal"


def test_threads_and_sessions_at_once(library: Path) -> None:
    """One session used by several threads, beside other sessions: the bits are those of a session alone."""
    cases = [
        Case(op, 512, 320, 64, attributes={"activation_bits": b}, x_shape=("a", 512)) for op in NATIVE for b in (8, 16)
    ]
    sessions = [open_session(case.model(), library, threads=2) for case in cases]
    jobs = [(case, session, rows) for rows in (1, 3, 40) for case, session in zip(cases, sessions, strict=True)] * 4

    def run(job: tuple) -> np.ndarray:
        case, session, rows = job
        return session.run(None, {"x": case.x(rows)})[0]

    alone = [
        open_session(case.model(), library).run(None, {"x": case.x(rows)})[0]
        for case, _, rows in jobs[: len(jobs) // 4]
    ]
    with ThreadPoolExecutor(6) as pool:
        for found, wanted in zip(pool.map(run, jobs), alone * 4, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_not_finite_and_tiny_rows_are_what_floats_make_of_them(library: Path) -> None:
    case = Case()
    x = case.x(1, 6)
    x[0, 1, 3], x[0, 2, 5], x[0, 4] = np.nan, np.inf, 1e-40
    (y,) = open_session(case.model(), library).run(None, {"x": x})
    assert np.isnan(y[0, 1]).all()
    assert not np.isfinite(y[0, 2]).any()
    assert np.abs(y[0, 4]).max() < 1e-36
    rows = [0, 3, 5]
    assert relative(y[0, rows], case.expected(x[0, rows])) < NEAR_EXACT


def test_every_instruction_set_can_be_forced(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = ctypes.CDLL(str(library))
    functions.qcompile_kernels.restype = functions.qcompile_chosen_kernel.restype = ctypes.c_char_p
    names = functions.qcompile_kernels().decode().split(",")
    assert names[0] == "reference"
    case = Case("MatMulAddInt4", 300, 130, x_shape=("a", 300))
    outputs = []
    for name in names:
        monkeypatch.setenv("QCOMPILE_KERNEL", name)
        assert functions.qcompile_chosen_kernel().decode() == name
        outputs.append(_check(case, library, 9))
    for output in outputs[1:]:
        assert relative(output, outputs[0]) < 1e-5
    monkeypatch.setenv("QCOMPILE_KERNEL", "")
    assert functions.qcompile_chosen_kernel().decode() == names[-1], "the fastest"


def test_a_row_has_the_same_bits_in_every_batch(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = ctypes.CDLL(str(library))
    functions.qcompile_kernels.restype = ctypes.c_char_p
    for name in functions.qcompile_kernels().decode().split(","):
        monkeypatch.setenv("QCOMPILE_KERNEL", name)
        for bits in (8, 16):
            case = Case("MatMulInt4", 200, 140, 64, x_shape=("a", 200), attributes={"activation_bits": bits})
            session, x = open_session(case.model(), library, threads=2), case.x(35)
            (whole,) = session.run(None, {"x": x})
            for size in (1, 2, 7):
                parts = [session.run(None, {"x": x[i : i + size]})[0] for i in range(0, 35, size)]
                np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_an_unknown_instruction_set_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_KERNEL", "avx1024")
    with pytest.raises(Exception, match=r"QCOMPILE_KERNEL names no instruction set .* it may be reference,"):
        open_session(Case().model(), library)
    monkeypatch.delenv("QCOMPILE_KERNEL")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    monkeypatch.setenv("QCOMPILE_KERNEL", "avx1024")
    with pytest.raises(Exception, match=r"QCOMPILE_KERNEL was changed since the library was registered"):
        ort.InferenceSession(Case().model(), options, providers=["CPUExecutionProvider"])


def test_registering_twice_is_refused(library: Path) -> None:
    options = ort.SessionOptions()
    for _ in range(2):
        options.register_custom_ops_library(str(library))
    with pytest.raises(Exception, match="Domain already set in registry"):
        ort.InferenceSession(Case().model(), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("body", [False, True], ids=["alone", "with body"])
@pytest.mark.parametrize(("damage", "message"), MALFORMED, ids=[message for _, message in MALFORMED])
def test_malformed_nodes_are_refused_at_load(library: Path, damage: Damage, message: str, body: bool) -> None:
    case = Case("MatMulAddInt4", body=body)
    damage(case)
    with pytest.raises(Exception) as caught:
        open_session(case.model(), library)
    assert re.search(message, str(caught.value)), caught.value


@pytest.mark.parametrize("k", [-70, 0, 1 << 62])
@pytest.mark.parametrize("op", [op for op in NATIVE if Case(op).in_fields])
def test_absurd_rows_of_fields_are_refused(library: Path, op: str, k: int) -> None:
    """The shape of their bytes does not tell K: an attribute does."""
    message = rf"node 'node_0' \({op}\): K is {k}, it must be 1 to 2147483648"
    for x_shape in (None, ("a", 70)):
        with pytest.raises(Exception, match=message):
            open_session(Case(op, attributes={"K": k}, x_shape=x_shape).model(), library)


def test_a_pair_in_two_blocks_is_refused(library: Path) -> None:
    """Of rows that share a code, and scales of blocks that begin between them."""
    case = Case("MatMulPairs64", attributes={"block_size": 33})
    with pytest.raises(Exception, match=r"\(MatMulPairs64\): block_size is 33, it must be even or all of K"):
        open_session(case.model(), library)


@pytest.mark.parametrize("inputs", [["x", "w"], ["x", "", "scale"], ["x", "w", "scale", "scale", "scale"]])
def test_a_wrong_number_of_inputs_is_refused(library: Path, inputs: list[str]) -> None:
    proto = Case(zero_point=False).proto()
    proto.graph.node[0].input[:] = inputs
    with pytest.raises(Exception, match="invalid model"):
        open_session(proto.SerializeToString(), library)


@pytest.mark.parametrize("dims", [(1 << 40, 1 << 40), (-5, 13), (1 << 31, 1 << 31)])
def test_absurd_sizes_are_refused(library: Path, dims: tuple[int, int]) -> None:
    proto = Case(x_shape=None).proto()
    proto.graph.initializer[0].dims[:] = dims
    with pytest.raises(Exception, match=r"overflow|Out of bounds|size|bad_alloc"):
        open_session(proto.SerializeToString(), library)


def test_an_input_left_open_at_the_end(library: Path) -> None:
    case = Case(zero_point=False)
    proto = case.proto()
    proto.graph.node[0].input.append("")
    x = case.x(1, 2)
    (y,) = open_session(proto.SerializeToString(), library).run(None, {"x": x})
    assert relative(y, case.expected(x)) < NEAR_EXACT


def test_shapes_known_at_the_run_only_are_checked_there(library: Path) -> None:
    session = open_session(Case(x_shape=None).model(), library)
    with pytest.raises(Exception, match=r"x has shape \(2, 5\), its last dimension must be the 70 rows of w"):
        session.run(None, {"x": np.ones((2, 5), np.float32)})
    with pytest.raises(Exception, match=r"x is a scalar, it must have at least one dimension"):
        session.run(None, {"x": np.array(1, np.float32)})
    # Weights that come as inputs of any shape.
    case = Case("MatMulInt8")
    proto = case.proto()
    del proto.graph.initializer[:]
    for name, kind in (("w", TensorProto.UINT8), ("scale", TensorProto.FLOAT), ("zero_point", TensorProto.UINT8)):
        proto.graph.input.append(helper.make_tensor_value_info(name, kind, None))
    session = open_session(proto.SerializeToString(), library)
    x = case.x(1, 2)
    (y,) = session.run(None, {"x": x, **case.arrays})
    assert relative(y, case.expected(x)) < NEAR_EXACT
    for name, array in case.arrays.items():
        with pytest.raises(Exception, match=r"node 'node_0' \(MatMulInt8\): .* has shape"):
            session.run(None, {"x": x, **case.arrays, name: array[:-1]})
        with pytest.raises(Exception, match=rf"{name} has shape .*must have 2 dimensions"):
            session.run(None, {"x": x, **case.arrays, name: array.reshape(-1)})


def test_models_of_several_nodes_share_the_pool(library: Path) -> None:
    """A chain, so that outputs of one node are inputs of the next, in one arena."""
    first, second = Case("MatMulAddInt4", 96, 96, x_shape=("a", 96)), Case("MatMulInt8", 96, 96, seed=3)
    a, b = first.proto(), second.proto()
    for proto, tag, x, y in ((a, "a_", "x", "h"), (b, "b_", "h", "y")):
        node = proto.graph.node[0]
        node.name, node.output[0] = tag, y
        node.input[:] = [x, *(tag + name for name in node.input[1:])]
        for tensor in proto.graph.initializer:
            tensor.name = tag + tensor.name
    graph = helper.make_graph(
        [a.graph.node[0], b.graph.node[0]],
        "g",
        list(a.graph.input),
        list(b.graph.output),
        [*a.graph.initializer, *b.graph.initializer],
    )
    whole = helper.make_model(graph, opset_imports=list(a.opset_import), ir_version=10)
    session = open_session(whole.SerializeToString(), library, threads=2)
    for rows in (1, 5, 70, 2):
        x = first.x(rows)
        (y,) = session.run(None, {"x": x})
        assert relative(y, second.expected(first.expected(x))) < NEAR_EXACT
