"""runtime/library.py and how session() uses it; memory of a session; older versions of ONNX Runtime."""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from cuda_host import on_host
from kernel_builds import SANITIZED, build_kernel_check, run, tool
from native_models import Case, native_library, open_session, relative
from onnx import TensorProto, helper

from qcompile.passes import library as module
from qcompile.passes.errors import UserError
from qcompile.passes.formats.base import VERSION
from qcompile.runtime import library_path, session, sessions
from qcompile.runtime.library import operators_version

ROOT = Path(__file__).resolve().parents[2]
PACKED = 1.15  # resident bytes a session may take for each packed byte


@pytest.fixture(scope="module")
def library() -> Path:
    return native_library()


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that was built without a compiler."""
    monkeypatch.delenv(module.VARIABLE, raising=False)
    monkeypatch.setattr(module, "_candidates", lambda: iter([Path("/nowhere/libqcompile_kernels.so")]))


def test_the_library_is_a_file_that_knows_the_operators_of_the_compiler(library: Path) -> None:
    assert library.is_absolute()
    assert ctypes.CDLL(str(library)).qcompile_operator_version() == VERSION


def test_importing_the_package_loads_no_runtime() -> None:
    code = "import sys, qcompile.runtime as r; r.library_path, r.session; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_library_says_what_to_do(no_library: None) -> None:
    with pytest.raises(UserError, match=r"no library of native kernels .* install g\+\+, then reinstall qcompile-onnx"):
        library_path()
    with pytest.raises(UserError, match="no library of native kernels"):
        session(Case(body=True).model(), kernels="native")


def test_the_variable_names_a_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Path) -> None:
    copy = Path(shutil.copy(library, tmp_path))
    monkeypatch.setenv(module.VARIABLE, str(copy))
    assert library_path() == copy
    monkeypatch.setenv(module.VARIABLE, str(tmp_path / "absent.so"))
    with pytest.raises(UserError, match=r"QCOMPILE_LIBRARY names .*absent.so, which is no file"):
        library_path()
    with pytest.raises(UserError, match="which is no file"):
        session(Case(body=True).model())
    other = tmp_path / "other.so"
    other.write_bytes(b"no library")
    monkeypatch.setenv(module.VARIABLE, str(other))
    with pytest.raises(UserError, match=r"other.so is no library of qcompile's kernels"):
        session(Case(body=True).model())


def test_an_editable_install_has_it_in_site_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Installed:
        url = ROOT.as_uri()

        def read_text(self, name: str) -> str:
            return json.dumps({"url": self.url, "dir_info": {"editable": True}})

        def locate_file(self, name: str) -> Path:
            return tmp_path / name

    monkeypatch.setattr(module, "distribution", lambda name: Installed())
    beside, installed = module._candidates()
    assert beside.parent == ROOT / "runtime"
    assert installed.parent == tmp_path / "qcompile" / "runtime"
    monkeypatch.setattr(Installed, "url", "file:///somewhere/else")
    assert list(module._candidates()) == [beside], "the library of another checkout is not this one's"


def test_kernels_chooses_who_computes(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("MatMulInt8", body=True, attributes={"activation_bits": 8})
    x = case.x(1, 3)

    def error(**options: str) -> float:
        (y,) = session(case.model(), threads=1, **options).run(None, {"x": x})
        return relative(y, case.expected(x))

    portable = error(kernels="portable")
    assert portable < 1e-6 < 1e-3 < error(kernels="native") == error(kernels="auto") == error()
    with pytest.raises(UserError, match="kernels is 'fast', it must be one of auto, native, portable"):
        error(kernels="fast")
    monkeypatch.setattr(sessions, "library_path", lambda: (_ for _ in ()).throw(UserError("no library")))
    monkeypatch.delenv(module.VARIABLE, raising=False)
    assert error() == portable, "auto without a library"


CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def test_auto_is_for_the_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "library_path", lambda: Path("found"))
    monkeypatch.setattr(sessions, "why_no_cuda", lambda library: None)
    assert sessions._library("auto", [CPU]) == Path("found")
    assert sessions._library("auto", [CUDA, CPU]) is None
    assert sessions._library("native", [CUDA, CPU]) == Path("found")
    assert sessions._library("portable", [CPU]) is None
    monkeypatch.setattr(sessions, "CUDA_UNVERIFIED", "")
    assert sessions._library("auto", [CUDA, CPU]) == Path("found")
    assert sessions._library("auto", ["DnnlExecutionProvider", CPU]) is None, "another provider has no kernels"


def test_messages_of_the_library_are_one_line(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        session(Case(attributes={"block_size": 5}).model())
    assert str(caught.value).split(": ", 2)[2] == (
        "node 'node_0' (MatMulInt4): scale has shape (3, 13), w (70, 13) with block_size 5 needs (14, 13): "
        "compile the model again"
    )
    with pytest.raises(UserError, match=r"x \(2, 5\): node 'node_0' \(MatMulInt4\): x has shape \(2, 5\), its last"):
        sessions.run(session(Case(x_shape=None).model()), None, {"x": np.ones((2, 5), np.float32)})
    monkeypatch.setenv("QCOMPILE_KERNEL", "avx1024")
    with pytest.raises(UserError, match="cannot register it: QCOMPILE_KERNEL names no instruction set of this library"):
        session(Case().model())


def test_a_newer_model_is_refused_and_runs_without_the_library(library: Path, tmp_path: Path) -> None:
    case = Case(version=VERSION + 1, body=True)
    path = tmp_path / "model.onnx"
    path.write_bytes(case.model())
    for model in (case.model(), path):
        with pytest.raises(UserError) as caught:
            session(model)
        assert str(caught.value) == (
            "model needs operators version 2 of domain qcompile, this library knows 1: upgrade qcompile-onnx, "
            "or load without the library (kernels='portable')"
        )
    x = case.x(1, 2)
    (y,) = session(path, kernels="portable").run(None, {"x": x})
    assert relative(y, case.expected(x)) < 1e-5


def test_a_node_can_say_that_it_is_newer(library: Path) -> None:
    """For applications that register the library themselves: ONNX Runtime shows it no opset imports."""
    with pytest.raises(Exception, match="needs operators version 2 of domain qcompile, this library knows 1: upgrade"):
        open_session(Case(attributes={"version": 2}).model(), library)
    open_session(Case(attributes={"version": 1}).model(), library)


@pytest.mark.parametrize("version", [1, 2, 200, 1 << 40])
def test_the_version_is_read_without_the_weights(tmp_path: Path, version: int) -> None:
    proto = Case("MatMulInt8", 3000, 400, version=version).proto()
    proto.doc_string = "a long text " * 100
    data = proto.SerializeToString()
    assert operators_version(data) == version
    (tmp_path / "model.onnx").write_bytes(data)
    assert operators_version(tmp_path / "model.onnx") == version
    assert operators_version(str(tmp_path / "model.onnx")) == version


def test_models_without_the_domain_and_broken_files_have_no_version(tmp_path: Path) -> None:
    proto = Case().proto()
    del proto.opset_import[1]
    assert operators_version(proto.SerializeToString()) == 0
    (tmp_path / "empty.onnx").touch()
    assert operators_version(tmp_path / "empty.onnx") == 0
    data = Case().model()
    for end in range(0, len(data), 7):
        assert operators_version(data[:end]) in (0, 1)
    for garbage in (b"\xff" * 40, b"\x42\x7f", b"\x42\x02\x0b\x0b", os.urandom(1000)):
        operators_version(garbage)


_MEMORY = """
import sys
import onnxruntime as ort
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))
options = ort.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
options.intra_op_num_threads = 2
before = resident()
session = ort.InferenceSession(sys.argv[2], options, providers=["CPUExecutionProvider"])
print(resident() - before)
"""


def _deep_model(folder: Path, layers: int, size: int, block_size: int) -> tuple[Path, int]:
    """A chain of 4-bit layers with external data, and the bytes of its packed weights."""
    rng, groups = np.random.default_rng(0), size // block_size
    nodes, tensors = [], []
    folder.mkdir()
    with open(folder / "model.data", "wb") as data:
        for layer in range(layers):
            arrays = {
                f"w{layer}": (TensorProto.UINT4, size, rng.integers(0, 256, size * size // 2, np.uint8)),
                f"s{layer}": (TensorProto.FLOAT, groups, np.full(groups * size, 2.0**-8, np.float32)),
                f"z{layer}": (TensorProto.UINT4, groups, np.full(groups * size // 2, 0x88, np.uint8)),
            }
            for name, (kind, rows, array) in arrays.items():
                tensor = onnx.TensorProto(name=name, data_type=kind, dims=[rows, size])
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", "model.data"), ("offset", data.tell()), ("length", array.nbytes)):
                    tensor.external_data.add(key=key, value=str(value))
                data.write(array.tobytes())
                tensors.append(tensor)
            inputs = [f"y{layer - 1}" if layer else "x", *arrays]
            nodes.append(
                helper.make_node("MatMulInt4", inputs, [f"y{layer}"], domain="qcompile", block_size=block_size)
            )
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["m", size]) for name in ("x", f"y{layers - 1}")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("qcompile", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    return folder / "model.onnx", layers * (size * size // 2 + groups * size * 3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("built", [native_library, on_host], ids=["CPU", "CUDA emulated"])
def test_resident_memory_is_that_of_the_packed_weights(built: Callable[[], Path], tmp_path: Path) -> None:
    """The pages of the file are given back, and nothing else of the weights' size is kept; of CUDA's, on its device."""
    big, packed = _deep_model(tmp_path / "big", 16, 2048, 128)
    small, _ = _deep_model(tmp_path / "small", 16, 64, 32)

    def taken(model: Path) -> int:
        command = [sys.executable, "-c", _MEMORY, str(built()), str(model)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert taken(big) - taken(small) < PACKED * packed


def _operator_tests(**variables: str) -> str:
    """Output of the tests of the operators in a process of their own, which must pass."""
    code = (
        "import sys, onnxruntime, pytest; print('version', onnxruntime.__version__);"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', 'tests/runtime/test_operators.py']))"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, **variables}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout
    return done.stdout


def _tests_with(version: str) -> str:
    """The tests of the operators, run against another version of ONNX Runtime that shadows the installed one."""
    folder = Path(tempfile.gettempdir()) / f"qcompile-onnxruntime-{version or 'newest'}"
    if not folder.exists():
        partial = Path(tempfile.mkdtemp(prefix=folder.name))
        wanted = f"onnxruntime=={version}" if version else "onnxruntime"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial), wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            shutil.rmtree(partial)
            if os.environ.get("CI"):
                pytest.fail(done.stderr)
            pytest.skip(f"{wanted} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
        partial.rename(folder)
    return _operator_tests(PYTHONPATH=os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))


def test_the_oldest_onnxruntime(library: Path) -> None:
    oldest = ".".join(map(str, sessions.MINIMUM))
    assert f"version {oldest}\n" in _tests_with(oldest)


@pytest.mark.slow
def test_the_newest_onnxruntime(library: Path) -> None:
    shutil.rmtree(Path(tempfile.gettempdir()) / "qcompile-onnxruntime-newest", ignore_errors=True)
    _tests_with("")


def test_the_operators_under_sanitizers(library: Path) -> None:
    """Python is not built with them, so their library has to be loaded before anything else."""
    runtimes = [run(tool("g++"), f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so")]
    if not all(map(os.path.isabs, runtimes)):
        pytest.skip("this g++ has no AddressSanitizer")
    built = build_kernel_check(*SANITIZED, target="qcompile_kernels") / "libqcompile_kernels.so"
    options = "detect_leaks=0,allocator_may_return_null=1"  # Python and ONNX Runtime leak; a refused size is no bug
    variables = {"QCOMPILE_LIBRARY": str(built), "LD_PRELOAD": ":".join(runtimes), "ASAN_OPTIONS": options}
    _operator_tests(**variables, UBSAN_OPTIONS="halt_on_error=1,print_stacktrace=1")
