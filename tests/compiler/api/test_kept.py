"""GGUF kept: every type decodes to the very numbers of the file, in ONNX Runtime, from graphs of its size."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from gguf_files import blocks, numbers, write
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler.api.kept import Keeper, summary
from qcompile.compiler.files.load import load_model, save_model
from qcompile.compiler.report.inspection import inspect
from qcompile.models.gguf_blocks import KINDS
from qcompile.models.gguf_file import GGUFFile
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.formats import functions
from qcompile.passes.formats.half_scales import halve
from qcompile.passes.formats.lower import lower
from qcompile.passes.fuse import Fuse
from qcompile.runtime.sessions import run, session

K = 512
# Of types with offsets, those with zero points too: their codes stand for 0 at 0 where scales are far from minima.
WITH_OFFSETS = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K")


def _graph(weights: dict[str, np.ndarray], table: np.ndarray | None = None) -> ir.Model:
    """x (rows, K) times each weight (N, K) turned round; of a table (V, K) rows by ids, and its product with x."""
    k = next(iter(weights.values())).shape[1] if weights else table.shape[1]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", k])]
    nodes, outputs, constants = [], [], [numpy_helper.from_array(w.T.copy(), name) for name, w in weights.items()]
    for name, w in weights.items():
        nodes.append(helper.make_node("MatMul", ["x", name], [f"{name}.y"], name=name))
        outputs.append(helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, ["rows", len(w)]))
    if table is not None:
        constants.append(numpy_helper.from_array(table, "table"))
        inputs.append(helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "m"]))
        nodes.append(helper.make_node("Gather", ["table", "ids"], ["rows"], name="lookup"))
        nodes.append(helper.make_node("Transpose", ["table"], ["turned"], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", ["x", "turned"], ["head.y"], name="head"))
        outputs.append(helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", "m", k]))
        outputs.append(helper.make_tensor_value_info("head.y", TensorProto.FLOAT, ["rows", len(table)]))
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def _multiply_by_the_table(model: ir.Model) -> None:
    """x times a table (K, K) as it lies, as plain.y."""
    x, table = model.graph.inputs[0], model.graph.initializers["table"]
    plain = ir.node("MatMul", [x, table], name="plain")
    made = plain.outputs[0]
    made.name, made.type, made.shape = "plain.y", x.type, x.shape
    model.graph.append(plain)
    model.graph.outputs.append(made)


def _kept(folder: Path, tensors: dict[str, tuple[str, np.ndarray]], model: ir.Model) -> Keeper:
    """The model with what a file of the tensors has, written to model.onnx."""
    write(folder / "m.gguf", tensors)
    keeper = Keeper(GGUFFile(folder / "m.gguf"))
    keeper.save(model, folder / "model.onnx")
    onnx.checker.check_model(folder / "model.onnx")
    return keeper


def _run(path: Path, x: np.ndarray, ids: np.ndarray | None = None, **options) -> dict[str, np.ndarray]:
    opened = session(path, threads=1, **{"kernels": "portable", **options})
    names = [own.name for own in opened.get_outputs()]
    return dict(zip(names, run(opened, names, {"x": x} | ({} if ids is None else {"ids": ids})), strict=True))


@pytest.mark.parametrize("spread", [2, 14])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_type_bit_by_bit(tmp_path: Path, kind: str, spread: int) -> None:
    """Products with unit vectors, and all rows looked up: what gguf-py decodes; the body as the file has it, and as
    ONNX Runtime fuses it. spread 14: offsets are rounded where codes are centred, so that they are not.
    """
    raw, own = blocks(kind, 40, K, spread=spread), blocks(kind, 33, K, seed=1, spread=spread)
    w, table = numbers(kind, raw), numbers(kind, own)
    keeper = _kept(tmp_path, {"a": (kind, raw), "b": (kind, own)}, _graph({"w": w}, table))
    assert [(told.weight, told.type, told.reason) for told in keeper.weights] == [("table", kind, ""), ("w", kind, "")]
    ids = np.arange(-33, 33).reshape(3, 22)
    for options in ({"optimize": False}, {}):
        found = _run(tmp_path / "model.onnx", np.eye(K, dtype=np.float32), ids, **options)
        assert np.array_equal(found["w.y"].T, w)
        assert np.array_equal(found["rows"], table[ids])
        assert np.array_equal(found["head.y"].T, table)


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_size_is_that_of_the_blocks(tmp_path: Path, kind: str) -> None:
    """Several layers, whose zero points, if any, are stored once."""
    raws = {f"w{i}": blocks(kind, 256, 2048, seed=i) for i in range(8)}
    model = _graph({name: numbers(kind, raw) for name, raw in raws.items()})
    keeper = _kept(tmp_path, {name: (kind, raw) for name, raw in raws.items()}, model)
    size = sum(raw.size for raw in raws.values())
    assert (tmp_path / "model.onnx.data").stat().st_size == pytest.approx(size, rel=0.02)
    ((_, _, count, told),) = summary(keeper.weights)
    assert count == 8
    assert told == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("kind", list(KINDS))
def test_onnx_runtime_makes_an_integer_product_of_it(tmp_path: Path, kind: str) -> None:
    raw = blocks(kind, 64, K)
    _kept(tmp_path, {"a": (kind, raw)}, _graph({"w": numbers(kind, raw)}))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 4
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    found = [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    assert found.count("MatMulNBits") == 1
    assert set(found) <= {"MatMulNBits", "Reshape", "ReduceSum", "Gemm"}  # of offsets; decoded are none


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_native_kernels_agree(tmp_path: Path, kind: str) -> None:
    raw, x = blocks(kind, 64, K), np.random.default_rng(0).standard_normal((3, K), np.float32)
    w = numbers(kind, raw)
    _kept(tmp_path, {"a": (kind, raw)}, _graph({"w": w}))
    found = _run(tmp_path / "model.onnx", x, kernels="auto")["w.y"]
    wanted = x.astype(np.float64) @ w.T
    assert np.abs(found - wanted).max() < 2e-4 * np.abs(wanted).max()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "IQ4_XS"])
def test_what_is_read_and_written_again_stays_as_it_is(tmp_path: Path, kind: str) -> None:
    """In memory scales are float32; the file has the file's own. `inspect` counts what is stored."""
    raw, own = blocks(kind, 64, 2048), blocks(kind, 256, 2048, seed=1)
    _kept(tmp_path, {"a": (kind, raw), "b": (kind, own)}, _graph({"w": numbers(kind, raw)}, numbers(kind, own)))
    model = load_model(tmp_path / "model.onnx")
    assert not any(node.op_type.startswith(("BlockScales", "Cast")) for node in model.graph)
    halve(model)
    save_model(model, tmp_path / "again.onnx")
    x, ids = np.eye(2048, dtype=np.float32), np.arange(256).reshape(2, 128)
    first, second = (_run(tmp_path / f"{name}.onnx", x, ids) for name in ("model", "again"))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    told = inspect(tmp_path / "again.onnx")
    assert told.linear_bits == pytest.approx(8 * KINDS[kind].size / KINDS[kind].block, rel=0.04)
    assert inspect(tmp_path / "model.onnx").linear_bits == pytest.approx(told.linear_bits, rel=1e-3)
    assert told.parameters == 2048 * (64 + 256)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q4_K", "Q3_K", "IQ4_XS"])
def test_fused_it_computes_the_same_and_grows_by_nothing(tmp_path: Path, kind: str) -> None:
    raws = {f"w{i}": (kind, blocks(kind, 128 + 64 * i, 2048, seed=i)) for i in range(3)}
    model = _fused(tmp_path, raws)
    counts = Counter(node.op_type for node in model.graph if node.domain == "qcompile")
    assert all(count == 1 for count in counts.values())


def _fused(folder: Path, tensors: dict[str, tuple[str, np.ndarray]]) -> ir.Model:
    """Products of one input by the tensors of a file, fused, as fused.onnx: no larger, and of the very numbers."""
    weights = {name: numbers(*own) for name, own in tensors.items()}
    _kept(folder, tensors, _graph(weights))
    model = load_model(folder / "model.onnx")
    Fuse().call(Region.whole(model))
    lower(model, "qcompile")
    halve(model)
    written = save_model(model, folder / "fused.onnx")
    before = sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert written.model_bytes + written.data_bytes < 1.001 * before
    k = next(iter(weights.values())).shape[1]
    found = _run(folder / "fused.onnx", np.eye(k, dtype=np.float32))
    for name, weight in weights.items():
        assert np.array_equal(found[f"{name}.y"].T, weight)
    return model


@pytest.mark.parametrize("spread", [2, 14])
@pytest.mark.parametrize("kind", list(KINDS))
def test_any_types_on_one_input_are_fused_with_their_own(tmp_path: Path, kind: str, spread: int) -> None:
    """Each with each, twice: what is joined is of one type, and what cannot be is left apart, at no cost.

    spread 14: some of a type are centred and others are not.
    """
    for other in KINDS:
        if other < kind:
            continue
        kinds = [kind, other, kind, other] if other != kind else [kind] * 3
        raws = {f"w{i}": (own, blocks(own, 64 + 16 * i, K, seed=i, spread=spread)) for i, own in enumerate(kinds)}
        (tmp_path / other).mkdir()
        model = _fused(tmp_path / other, raws)
        products = [node for node in model.graph if functions.is_product(node)]
        assert len(products) == len(set(kinds)) or spread == 14


@pytest.mark.parametrize("target", ["qdq", "matmulnbits"])
@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "MXFP4"])
def test_other_targets_compute_the_same(tmp_path: Path, kind: str, target: str) -> None:
    raw, own = blocks(kind, 32, K), blocks(kind, 34, K, seed=1)
    w, table = numbers(kind, raw), numbers(kind, own)
    _kept(tmp_path, {"a": (kind, raw), "b": (kind, own)}, _graph({"w": w}, table))
    model = load_model(tmp_path / "model.onnx")
    lower(model, target)
    halve(model)
    assert not model.functions
    assert {node.domain for node in model.graph} <= {"", "com.microsoft"}
    save_model(model, tmp_path / "other.onnx")
    if KINDS[kind].table and target == "qdq":
        forms = {own.form.split()[0] for own in inspect(tmp_path / "other.onnx").weights}
        assert forms == {KINDS[kind].table}
    found = _run(tmp_path / "other.onnx", np.eye(K, dtype=np.float32), np.arange(34).reshape(2, 17))
    for made, wanted in ((found["w.y"].T, w), (found["rows"].reshape(34, K), table), (found["head.y"].T, table)):
        np.testing.assert_allclose(made, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@settings(max_examples=25, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=3),
    seed=st.integers(0, 999),
    joined=st.booleans(),
)
def test_rows_are_found_wherever_they_went(tmp_path_factory, kinds: list[str], seed: int, joined: bool) -> None:
    """Rows in another order, joined of two tensors of a type, or cut apart."""
    folder, rng = tmp_path_factory.mktemp("kept"), np.random.default_rng(seed)
    raws = {f"w{i}": (kind, blocks(kind, 48, 256, seed=seed + i)) for i, kind in enumerate(kinds)}
    raws |= {"more": (kinds[0], blocks(kinds[0], 16, 256, seed=seed + 77))}
    weights = {name: numbers(*own)[rng.permutation(len(own[1]))] for name, own in raws.items()}
    whole = weights.pop("more")
    if joined:
        weights["joined"] = np.concatenate([whole, weights["w0"]])
        weights["part"] = weights.pop("w0")[5:30]
    keeper = _kept(folder, raws, _graph(weights))
    assert {own.weight: own.reason for own in keeper.weights} == dict.fromkeys(weights, "")
    found = _run(folder / "model.onnx", np.eye(256, dtype=np.float32))
    for name, weight in weights.items():
        assert np.array_equal(found[f"{name}.y"].T, weight)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_K", "IQ4_NL"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_table_that_is_multiplied_as_it_is_too(tmp_path: Path, kind: str, whole: bool) -> None:
    """Its columns are rows of the file only where that has them as well (`whole`); else that product stays in float."""
    raw = blocks(kind, 256, 256)
    table = numbers(kind, raw)
    model = _graph({}, table)
    _multiply_by_the_table(model)
    tensors = {"a": (kind, raw)} | ({"b": ("F32", np.ascontiguousarray(table.T))} if whole else {})
    keeper = _kept(tmp_path, tensors, model)
    reason = "the file has it in F32" if whole else "no tensor of the file has its numbers: they were changed when"
    assert [own.reason[: len(reason)] for own in keeper.weights] == ["", reason]
    ids = np.arange(256).reshape(2, 128)
    found = _run(tmp_path / "model.onnx", np.eye(256, dtype=np.float32), ids)
    assert np.array_equal(found["plain.y"], table)
    assert np.array_equal(found["head.y"].T, table)
    assert np.array_equal(found["rows"].reshape(256, 256), table)


def test_a_weight_kept_in_both_orientations(tmp_path: Path) -> None:
    """A matrix of the file equal to its own columns: each reader has the numbers that it reads."""
    raw = np.repeat(blocks("Q4_0", 1, 32), 32, axis=0)
    scale, codes = raw[:, :2], np.full((32, 16), 0x99, np.uint8)
    raw = np.concatenate([scale, codes], axis=1)
    table = numbers("Q4_0", raw)
    model = _graph({}, table)
    _multiply_by_the_table(model)
    keeper = _kept(tmp_path, {"a": ("Q4_0", raw)}, model)
    assert [own.reason for own in keeper.weights] == ["", ""]
    found = _run(tmp_path / "model.onnx", np.eye(32, dtype=np.float32), np.arange(32).reshape(2, 16))
    assert np.array_equal(found["plain.y"], table)
    assert np.array_equal(found["head.y"].T, table)


@pytest.mark.parametrize(("kind", "kept"), [("Q4_0", True), ("Q4_1", False), ("Q6_K", True), ("Q2_K", False)])
def test_offsets_need_the_rank_of_the_input(tmp_path: Path, kind: str, kept: bool) -> None:
    raw = blocks(kind, 32, 256)
    model = _graph({"w": numbers(kind, raw)})
    model.graph.inputs[0].shape = None
    write(tmp_path / "m.gguf", {"a": (kind, raw)})
    keeper = Keeper(GGUFFile(tmp_path / "m.gguf"))
    keeper.save(model, tmp_path / "model.onnx")
    (told,) = keeper.weights
    assert told.reason == (
        "" if kept else f"the rank of its input is not known, whose sums the offsets of {kind} are times"
    )


def test_what_is_left_in_float_and_why(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw, half = blocks("Q4_0", 32, 256), rng.standard_normal((32, 256)).astype(np.float16)
    other = rng.integers(0, 256, (32, 66), np.uint8)
    other[:, :2] = np.full(32, 0.01, "<f2").view(np.uint8).reshape(-1, 2)
    weights = {
        "half": half.astype(np.float32),
        "other": numbers_of_another(other),
        "changed": numbers("Q4_0", raw) * np.float32(1.5),
    }
    keeper = _kept(tmp_path, {"a": ("Q4_0", raw), "b": ("F16", half), "c": ("IQ2_XXS", other)}, _graph(weights))
    assert {own.weight: own.reason for own in keeper.weights} == {
        "half": "the file has it in F16",
        "other": "the file has it in IQ2_XXS, of which no format here holds the blocks",
        "changed": "no tensor of the file has its numbers: they were changed when it was loaded",
    }
    x = np.eye(256, dtype=np.float32)
    found = _run(tmp_path / "model.onnx", x)
    assert all(np.array_equal(found[f"{name}.y"].T, weight) for name, weight in weights.items())


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (("Q8_0", "Q4_0"), "the file has its rows in several types, Q4_0, Q8_0, and a product has one"),
        (("Q4_K", "Q6_K"), "the file has its rows in several types, Q4_K, Q6_K, and a product has one"),
        (("Q4_0", "changed"), "no tensor of the file has its numbers: they were changed when it was loaded"),
    ],
)
def test_a_weight_joined_of_two_types_is_told(tmp_path: Path, kinds: tuple[str, ...], reason: str) -> None:
    """As of queries, keys and values that a checkpoint has as one."""
    raws = [(kind, blocks(kind, 16, 256, seed=i)) for i, kind in enumerate(kinds) if kind != "changed"]
    parts = [numbers(*own) for own in raws] + [np.ones((16, 256), np.float32)] * (len(raws) < len(kinds))
    keeper = _kept(tmp_path, {f"t{i}": own for i, own in enumerate(raws)}, _graph({"w": np.concatenate(parts)}))
    assert [own.reason for own in keeper.weights] == [reason]


def numbers_of_another(raw: np.ndarray) -> np.ndarray:
    import gguf

    return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType.IQ2_XXS)


CHANGES = {
    "groups": [-16, 0, 1, 7, 8, 15, 17, 31, 2**40, "x", None],
    "middle": ["x", None],
    "half": [(), (0,), (4,), (0, 32), (3, 32), (4, 31), (1, 4, 32)],
    "factors": [(), (7,), (0, 32), (11, 32), (12, 31), (1, 12, 32)],
    "inputs": [1],
}


@pytest.mark.parametrize(("what", "value"), [(what, value) for what, own in CHANGES.items() for value in own])
@pytest.mark.parametrize("place", ["BlockScales6", "AddOffsets6", "AddRowOffsets6", "AddOffsets"])
def test_blocks_that_do_not_fit_are_told_in_a_line(tmp_path: Path, place: str, what: str, value: object) -> None:
    """Other attributes, constants of other shapes or none, for an operator of blocks of a kept file."""
    kind = "Q4_1" if place == "AddOffsets" else "Q4_K"
    raw, own = blocks(kind, 32, 1024), blocks(kind, 34, 1024, seed=1)
    _kept(tmp_path, {"a": (kind, raw), "b": (kind, own)}, _graph({"w": numbers(kind, raw)}, numbers(kind, own)))
    model = onnx.load(tmp_path / "model.onnx")
    node = next(node for node in model.graph.node if node.op_type == place)
    factors = place != "AddOffsets"
    if what == "inputs":
        del node.input[-1]
    elif what in ("groups", "middle"):
        node.attribute.remove(next(own for own in node.attribute if own.name == what))
        node.attribute.extend([] if value is None else [helper.make_attribute(what, value)])
    elif what == "half" or factors:
        name, dtype = (node.input[-1], np.uint8) if what == "factors" else (node.input[-1 - factors], np.float16)
        model.graph.initializer.remove(next(own for own in model.graph.initializer if own.name == name))
        model.graph.initializer.append(numpy_helper.from_array(np.ones(value, dtype), name))
    else:
        return
    onnx.save(model, tmp_path / "model.onnx")
    for read in (load_model, inspect):
        with pytest.raises(UserError, match=rf"model.onnx: node .*{place}.*; export") as told:
            read(tmp_path / "model.onnx")
        assert "\n" not in str(told.value)
