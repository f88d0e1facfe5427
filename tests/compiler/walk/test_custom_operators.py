"""Custom operators: a library, registered for every session of a command, and around calls of the Python functions."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler import Recipe, compile_model, custom_operators, parse_passes
from qcompile.compiler.cli import main
from qcompile.passes.errors import UserError
from qcompile.runtime.sessions import registered_libraries

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """example.ops::Squash, built here."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    built = tmp_path_factory.mktemp("library") / "libsquash.so"
    options = ["-std=c++17", "-shared", "-fPIC", "-I", str(ROOT / "runtime" / "kernels"), "-o", str(built)]
    subprocess.run([compiler, *options, str(ROOT / "tests" / "squash.cpp")], check=True, timeout=120)
    return built


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two products with the operator between them and behind them; data.npz beside the model."""
    random = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "v"], ["a"], name="first"),
        helper.make_node("Squash", ["a"], ["b"], name="squash", domain="example.ops"),
        helper.make_node("MatMul", ["b", "w"], ["c"], name="second"),
        helper.make_node("Squash", ["c"], ["y"], name="last", domain="example.ops"),
    ]
    weights = {name: random.standard_normal((64, 64)).astype(np.float32) / 8 for name in "vw"}
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    info = helper.make_tensor_value_info
    ends = ([info("x", TensorProto.FLOAT, ["n", 64])], [info("y", TensorProto.FLOAT, ["n", 64])])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("example.ops", 1)]
    graph = helper.make_graph(nodes, "g", *ends, constants)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=random.standard_normal((64, 64)).astype(np.float32))
    return tmp_path / "model.onnx"


def _run(path: Path, library: Path, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


@pytest.mark.parametrize(
    ("passes", "least"),
    [("pack", 15), ("smooth,awq,gptq,pack", 15), ("smooth,qdq,bias_correction", 25), ("dynamic", 25)],
)
def test_compiles_by_every_list(model: Path, library: Path, passes: str, least: float) -> None:
    output = model.with_name("q.onnx")
    with custom_operators([library]):
        recipe = Recipe(passes=parse_passes(passes), group_size=32)
        report = compile_model(model, recipe, output=output, calibration=[str(model.with_name("data.npz"))])
    assert registered_libraries() == ()
    assert report.coverage == 1
    x = np.random.default_rng(9).standard_normal((64, 64)).astype(np.float32)
    wanted, found = _run(model, library, x), _run(output, library, x)
    assert 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - found) ** 2)) > least


def test_every_command_takes_the_library(model: Path, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, output, data = ["--custom-ops", str(library)], model.with_name("q.onnx"), str(model.with_name("data.npz"))
    statistics = str(model.with_name("s.statistics"))
    calibrated = [str(model), "--passes", "qdq", "--calibration", data, *given]
    assert main(["calibrate", *calibrated, "-o", statistics]) == 0
    assert main([*calibrated, "--keep-worst", "1", "-o", str(output)]) == 0
    assert main(["sensitivity", *calibrated]) == 0
    unseen = str(model.with_name("unseen.npz"))
    np.savez(unseen, x=np.random.default_rng(7).standard_normal((8, 64)).astype(np.float32))
    assert main(["eval", str(output), "--against", str(model), "--data", unseen, *given]) == 0
    assert main(["bench", str(output), "--against", str(model), "--rounds", "1", "--shape", "x=4,64", *given]) == 0
    sweep = ["sweep", str(model), "--grid", "passes=pack", "--data", data, "-o", str(model.with_name("sweep"))]
    assert main([*sweep, *given]) == 0
    assert (model.with_name("sweep") / "results.csv").read_text().count("done") == 1
    assert "refused" not in capsys.readouterr().out


def test_a_missing_library_is_one_line_that_names_the_option(
    model: Path, library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(model), "--passes", "pack", "-o", str(tmp_path / "q.onnx")]) == 2
    assert "example.ops:Squash" in (told := capsys.readouterr().err)
    assert "give the library of its operators with --custom-ops" in told
    (tmp_path / "text.so").write_text("no library")
    for path, message in ((tmp_path / "none.so", "no such library"), (tmp_path / "text.so", "cannot register it")):
        assert main([str(model), "--passes", "pack", "--custom-ops", str(path)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="no such library"), custom_operators([tmp_path / "none.so"]):
        pass
