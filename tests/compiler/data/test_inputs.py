"""Calibration data as people have it: .npy files, folders, readers, programs that end themselves, odd inputs."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from said import complaints

from qcompile.compiler import Calibration, Recipe, compile_model, parse_passes
from qcompile.compiler.cli import main
from qcompile.compiler.data import readers
from qcompile.compiler.data.calibration import Sampling, gather
from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.models.tiny import tiny_decoder, tiny_mlp
from qcompile.passes.errors import UserError

SAMPLING = Sampling(128, 512)
TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
    "object": TensorProto.STRING,
}


def _plan(**inputs: tuple[str, list[Any]]) -> InputPlan:
    """The plan of a graph that gives back its inputs, of these types and shapes."""
    infos = [helper.make_tensor_value_info(name, TYPES[kind], shape) for name, (kind, shape) in inputs.items()]
    nodes = [helper.make_node("Identity", [info.name], [f"{info.name}_out"]) for info in infos]
    outs = [helper.make_tensor_value_info(f"{i.name}_out", i.type.tensor_type.elem_type, None) for i in infos]
    graph = helper.make_graph(nodes, "g", infos, outs)
    return input_plan(ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])))


def _gathered(plan: InputPlan, given: Calibration) -> list[Batch]:
    return gather(plan, Path("model.onnx"), SAMPLING, given, needed=True).calibration


def _array(kind: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(seed)
    if kind == "object":
        return np.array([f"w{n}" for n in random.integers(9, size=int(np.prod(shape)))]).reshape(shape)
    return np.asarray(random.integers(0, 2, shape)).astype(kind)


@st.composite
def _data(draw: st.DrawFn) -> tuple[dict[str, tuple[str, list[Any]]], list[dict[str, np.ndarray[Any, Any]]]]:
    """Inputs by name, and batches for them that differ in their free dimensions."""
    names = draw(st.lists(st.sampled_from(["a", "b.1", "x_y", "mask", "0"]), min_size=1, max_size=3, unique=True))
    inputs = {
        name: (
            draw(st.sampled_from([*TYPES])),
            draw(st.lists(st.sampled_from(["n", 2, 3]), max_size=3).map(lambda dims: dims if dims else [])),
        )
        for name in names
    }
    batches = []
    for seed in range(draw(st.integers(1, 4))):
        sizes = {
            name: [d if isinstance(d, int) else draw(st.integers(1, 4)) for d in inputs[name][1]] for name in names
        }
        batches.append({name: _array(inputs[name][0], tuple(sizes[name]), seed) for name in names})
    return inputs, batches


class Reader:
    """As ONNX Runtime's CalibrationDataReader."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        self.batches, self.next = batches, 0

    def get_next(self) -> dict[str, Any] | None:
        self.next += 1
        return self.batches[self.next - 1] if self.next <= len(self.batches) else None

    def rewind(self) -> None:
        self.next = 0


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_data())
def test_every_form_of_the_same_data_gives_the_same_batches(made: Any) -> None:
    inputs, batches = made
    plan = _plan(**inputs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place in ("npz", "sets", "named"):
            (folder / place).mkdir()
        for i, batch in enumerate(batches):
            np.savez(folder / "npz" / f"{i}.npz", **batch)
            (folder / "sets" / f"set{i}").mkdir()
            for own, array in batch.items():
                np.save(folder / "sets" / f"set{i}" / f"{own}.npy", array)
                (folder / "named" / own).mkdir(exist_ok=True)
                np.save(folder / "named" / own / f"s{i}.npy", array)
        forms = [
            Calibration([str(folder / "npz")]),
            Calibration([str(folder / "sets")]),
            Calibration([str(folder / "named")]),
            Calibration(reader=Reader(batches)),
            Calibration(reader=iter(batches)),
            Calibration.of(batches),
        ]
        for form in forms:
            found = [batch.feeds for batch in _gathered(plan, form)]
            assert len(found) == len(batches)
            for own, wanted in zip(found, batches, strict=True):
                assert own.keys() == wanted.keys()
                for key, array in wanted.items():
                    assert (own[key].shape, own[key].dtype) == (array.shape, np.dtype(inputs[key][0]))
                    assert (own[key] == array).all()


def test_numbers_in_names_are_in_their_order(tmp_path: Path) -> None:
    for number in (0, 2, 10, 1):
        np.save(tmp_path / f"{number}.npy", np.full((1, 3), number, np.float32))
    batches = _gathered(_plan(x=("float32", ["n", 3])), Calibration([str(tmp_path)]))
    assert [batch.feeds["x"][0, 0] for batch in batches] == [0, 1, 2, 10]


def test_a_long_array_is_cut_where_the_batch_is_fixed_and_scalars_go_with_every_part(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.arange(12, dtype=np.float32).reshape(4, 3), t=np.float32(0.5))
    plan = _plan(x=("float32", [1, 3]), t=("float32", []))
    batches = _gathered(plan, Calibration([str(tmp_path / "a.npz")]))
    assert [(batch.feeds["x"].tolist(), float(batch.feeds["t"])) for batch in batches][3] == ([[9, 10, 11]], 0.5)
    assert len(batches) == 4


def test_a_reader_read_to_its_end_is_rewound() -> None:
    reader = Reader([{"x": np.ones((1, 3), np.float32)}])
    plan = _plan(x=("float32", ["n", 3]))
    for _ in range(2):
        assert len(_gathered(plan, Calibration.of(reader))) == 1


def test_wider_types_are_converted_and_told_and_numbers_are_never_lost(tmp_path: Path) -> None:
    plan = _plan(x=("float32", ["n"]), i=("int32", ["n"]))
    np.savez(tmp_path / "a.npz", x=np.ones(2), i=np.ones(2, np.int64))
    data = gather(plan, tmp_path / "m.onnx", SAMPLING, Calibration([str(tmp_path / "a.npz")]), needed=True)
    assert data.description == "1 batches of a.npz; 'x' converted from float64 to float32"
    for name, array in (("x", np.full(2, 1e300)), ("i", np.full(2, 1 << 40))):
        np.savez(tmp_path / "b.npz", **{"x": np.ones(2), "i": np.ones(2, np.int64), name: array})
        with pytest.raises(UserError, match=f"array '{name}' is .*64 and holds numbers that .*32, the input's type"):
            _gathered(plan, Calibration([str(tmp_path / "b.npz")]))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.ones(2, np.float32)}, "no array for input 'b' \\(needed: a, b\\)"),
        ({"a": np.ones(2, np.float32), "B": np.ones(2)}, "array 'B' is no input of the model"),
        ({"a": np.ones(2, np.float32), "b": np.ones(2)}, "array 'b' is float64, the input takes strings"),
        ({"a": np.array(["x"]), "b": np.array(["x"])}, "array 'a' is <U1, the input is float32"),
        ({"a": np.ones((0,), np.float32), "b": np.ones((0,), "U1")}, "hold no rows"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        _gathered(_plan(a=("float32", ["n"]), b=("object", ["n"])), Calibration([str(tmp_path / "x.npz")]))
    assert "x.npz" in str(caught.value)


def test_a_lone_array_among_several_inputs_is_told_which_names_to_use(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", np.ones(2, np.float32))
    with pytest.raises(UserError, match=r"needs a file of its own name \(a.npy, b.npy\)"):
        _gathered(_plan(a=("float32", ["n"]), b=("float32", ["n"])), Calibration([str(tmp_path / "data.npy")]))


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that becomes the module `user_data`."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "user_data.py"
    sys.modules.pop("user_data", None)


@pytest.mark.parametrize(
    ("source", "name", "message"),
    [
        ("import sys\ndef f():\n    sys.exit()", "f", r"ended the program by itself: sys\.exit\(None\)"),
        ("import sys\ndef f():\n    yield sys.exit(0)", "f", r"ended the program by itself: sys\.exit\(0\)"),
        ("raise SystemExit(3)", "f", r"ended the program by itself: sys\.exit\(3\)"),
        ("raise ValueError('one\\ntwo')", "f", "failed: ValueError: one two"),
        ("def f(:", "f", "failed: SyntaxError"),
        ("class R:\n    def get_next(self):\n        raise KeyError('k')", "R", "failed: KeyError"),
        ("f = 3", "f", "failed: TypeError: 'int' object is not iterable"),
        ("f = ['text', 1]", "f", "gave str, not a dict"),
        ("f = [[1]]", "f", "array 'x' is int64, the input is float32"),
        ("class Panic(BaseException): pass\ndef f():\n    raise Panic('no')", "f", "failed: Panic: no"),
        ("def f():\n    return [{'x': [[1, 2], [3]]}]", "f", "failed: ValueError: setting an array element"),
        ("f = []", "f", "gave no batches"),
        ("f = {'x': [[1.0] * 48]}", "f", "gave str, not a dict from input name to array: put it in a list"),
    ],
)
def test_programs_that_fail_are_one_line_and_exit_two(
    bench: Any, program: Path, capfd: pytest.CaptureFixture[str], source: str, name: str, message: str
) -> None:
    program.write_text(source)
    path = bench.save(tiny_mlp())
    assert main([str(path), "--passes", "qdq", "--calibration", f"user_data:{name}"]) == 2
    told = complaints(capfd.readouterr().err).strip().splitlines()
    assert len(told) == 1
    with pytest.raises(UserError, match=message):
        raise UserError(told[0])


def test_a_reader_without_end_is_refused(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MOST", 5)
    program.write_text("import itertools\nf = itertools.repeat({'x': [[1.0] * 48]})\n")
    with pytest.raises(UserError, match="gave 5 batches and does not end"):
        gather(input_plan(tiny_mlp()), Path("m.onnx"), SAMPLING, Calibration(["user_data:f"]), needed=True)


@pytest.mark.parametrize("name", ["R", "r", "maker", "listed", "Raises"])
def test_readers_of_a_module(bench: Any, program: Path, name: str) -> None:
    program.write_text(
        "import numpy as np\n"
        "class R:\n    n = 0\n    def get_next(self):\n        self.n += 1\n"
        "        return {'x': np.ones((2, 48), np.float32)} if self.n < 3 else None\n"
        "r = R()\nmaker = lambda: R()\nlisted = [{'x': np.ones((2, 48))}] * 2\n"
        "class Raises:\n    left = iter(listed)\n    def get_next(self):\n        return next(self.left)\n"
    )
    data = gather(input_plan(tiny_mlp()), Path("m.onnx"), SAMPLING, Calibration([f"user_data:{name}"]), needed=True)
    assert [batch.rows for batch in data.calibration] == [2, 2]


def _ids_of_rank_one(folder: Path) -> Path:
    """Ids and their mask without a batch axis."""
    random = np.random.default_rng(0)
    table, weight = (random.standard_normal(shape).astype(np.float32) for shape in ((256, 64), (64, 64)))
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["h"]),
        helper.make_node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["m", "axes"], ["m2"]),
        helper.make_node("Mul", ["h", "m2"], ["g"]),
        helper.make_node("MatMul", ["g", "w"], ["y"], name="linear"),
    ]
    ints = [helper.make_tensor_value_info(n, TensorProto.INT64, ["s"]) for n in ("input_ids", "attention_mask")]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", 64])
    constants = {"table": table, "w": weight, "axes": np.array([1])}
    made = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", ints, [out], made)
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_ids_of_rank_one_take_text_one_row_at_a_time(bench: Any, tmp_path: Path) -> None:
    bench.save(tiny_decoder())
    path = _ids_of_rank_one(tmp_path)
    recipe = Recipe(passes=parse_passes("smooth,qdq"), samples=4, context=16, embedding=None)
    report = compile_model(path, recipe, output=tmp_path / "q.onnx", calibration=Calibration((), bench.folder / "in"))
    assert report.data.startswith("4 windows of ")


def test_unread_inputs_need_no_data(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    infos = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64]),
        helper.make_tensor_value_info("left_over", TensorProto.FLOAT, ["n", 7]),
        helper.make_tensor_value_info("label", TensorProto.STRING, ["n"]),
    ]
    weight = numpy_helper.from_array(random.standard_normal((64, 64)).astype(np.float32), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="linear")
    graph = helper.make_graph(
        [node], "g", infos, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [weight]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    np.save(tmp_path / "data.npy", random.standard_normal((8, 64)))
    for passes in ("pack", "smooth,qdq", "dynamic"):
        report = compile_model(
            tmp_path / "m.onnx",
            Recipe(passes=parse_passes(passes)),
            output=tmp_path / "q.onnx",
            calibration=[str(tmp_path / "data.npy")],
        )
        assert report.coverage == 1


@pytest.mark.parametrize("passes", ["pack", "smooth,awq,gptq,pack", "smooth,qdq", "dynamic"])
def test_outputs_that_are_sequences_are_compared_like_others(tmp_path: Path, passes: str) -> None:
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["c"], name="second"),
        helper.make_node("SplitToSequence", ["c"], ["rows"], axis=0),
    ]
    constants = [numpy_helper.from_array(random.standard_normal((64, 64)).astype(np.float32), name) for name in "vw"]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])
    out = helper.make_tensor_sequence_value_info("rows", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [given], [out], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    np.save(tmp_path / "data.npy", random.standard_normal((32, 64)).astype(np.float32))
    files = [str(tmp_path / "data.npy")]
    recipe = Recipe(passes=parse_passes(passes), group_size=32)
    report = compile_model(tmp_path / "m.onnx", recipe, output=tmp_path / "q.onnx", calibration=files)
    (output,) = report.outputs
    assert output.name == "rows"
    assert 0 < output.relative < 0.2


def test_random_checks_give_a_named_dimension_one_size() -> None:
    """A cache of an encoder (rank 4) and its mask (rank 2) share their length; images alone keep their own."""
    plan = _plan(
        cache=("float32", ["b", 4, "s", 16]), mask=("int64", ["b", "s"]), image=("float32", ["b", 3, "h", "w"])
    )
    (batch,) = gather(plan, Path("model.onnx"), SAMPLING, Calibration(), needed=False).checks
    assert [array.shape for array in batch.feeds.values()] == [(1, 4, 16, 16), (1, 16), (1, 3, 64, 64)]
