"""docs/deploy.md: its Python runs, its C++ program is compiled and runs with the wheel's libonnxruntime."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from native_models import native_library

from qcompile.models.tiny import tiny_decoder
from qcompile.runtime import session
from qcompile.runtime.sessions import run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "next_token.cpp"
TOKENS = [5, 17, 42, 99, 3]

# What the example calls, as the official header declares it; every other slot of the table is padding.
SIGNATURES = {
    "CreateEnv": "OrtLoggingLevel, const char*, OrtEnv**",
    "CreateSession": "const OrtEnv*, const char*, const OrtSessionOptions*, OrtSession**",
    "Run": "OrtSession*, const OrtRunOptions*, const char* const*, const OrtValue* const*, size_t, "
    "const char* const*, size_t, OrtValue**",
    "CreateSessionOptions": "OrtSessionOptions**",
    "SetIntraOpNumThreads": "OrtSessionOptions*, int",
    "CreateTensorWithDataAsOrtValue": "const OrtMemoryInfo*, void*, size_t, const int64_t*, size_t, "
    "ONNXTensorElementDataType, OrtValue**",
    "GetTensorMutableData": "OrtValue*, void**",
    "GetDimensions": "const OrtTensorTypeAndShapeInfo*, int64_t*, size_t",
    "GetTensorTypeAndShape": "const OrtValue*, OrtTensorTypeAndShapeInfo**",
    "CreateCpuMemoryInfo": "OrtAllocatorType, OrtMemType, OrtMemoryInfo**",
    "AddSessionConfigEntry": "OrtSessionOptions*, const char*, const char*",
    "RegisterCustomOpsLibrary_V2": "OrtSessionOptions*, const char*",
}
RELEASED = ("Env", "Status", "MemoryInfo", "Session", "Value", "TensorTypeAndShapeInfo", "SessionOptions")


def _header() -> str:
    """A header that stands in for the official one, made from the list of slots."""
    functions = {name: f"OrtStatus* (*{name})({parameters});" for name, parameters in SIGNATURES.items()}
    functions |= {f"Release{name}": f"void (*Release{name})(Ort{name}*);" for name in RELEASED}
    functions["GetErrorMessage"] = "const char* (*GetErrorMessage)(const OrtStatus*);"
    lines = (ROOT / "tests" / "data" / "ort_c_api_slots.txt").read_text().splitlines()
    slots = [line.split() for line in lines if line[:1].isdigit() and "TOTAL" not in line]
    table = "\n".join(
        functions.pop(name, f"void (*{name})(void);") for _, name in sorted(slots, key=lambda s: int(s[0]))
    )
    assert not functions, "the list has every function that is used"
    opaque = "\n".join(f"struct Ort{name};" for name in (*RELEASED, "RunOptions"))
    return f"""
#include <cstddef>
#include <cstdint>
{opaque}
constexpr unsigned ORT_API_VERSION = 20;
enum OrtLoggingLevel {{ ORT_LOGGING_LEVEL_WARNING = 2 }};
enum OrtAllocatorType {{ OrtArenaAllocator = 1 }};
enum OrtMemType {{ OrtMemTypeDefault = 0 }};
enum ONNXTensorElementDataType {{ ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7 }};
struct OrtApi {{
{table}
}};
struct OrtApiBase {{
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
}};
extern "C" const OrtApiBase* OrtGetApiBase();
"""


@pytest.fixture(scope="module")
def compiled(make_bench) -> Path:
    """A decoder of 4-bit linears, compiled."""
    bench = make_bench("deploy")
    bench.compile(bench.save(tiny_decoder()))
    return bench.folder / "out" / "model.onnx"


@pytest.fixture(scope="module")
def next_token(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("example")
    (shared,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*")
    (folder / "libonnxruntime.so").symlink_to(shared)
    (folder / "libonnxruntime.so.1").symlink_to(shared)
    (folder / "onnxruntime_c_api.h").write_text(_header())
    program = folder / "next_token"
    command = [compiler, "-std=c++17", "-Wall", "-Werror", EXAMPLE, "-I", folder, "-L", folder, "-lonnxruntime"]
    subprocess.run([*map(str, command), "-o", str(program)], check=True)
    return program


def _run(program: Path, *arguments: object, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(program.parent), **variables}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_the_program_computes_what_python_does(next_token: Path, compiled: Path) -> None:
    ids = np.array([TOKENS], np.int64)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for kernels, library in (("native", native_library()), ("portable", "-")):
        (logits,) = run(session(compiled, kernels=kernels), ["logits"], feeds)
        done = _run(next_token, compiled, library, *TOKENS)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == int(logits[0, -1].argmax())
        assert done.stderr == "", "no warning of ONNX Runtime about the library's shapes"


def test_the_program_tells_what_the_library_refuses(next_token: Path, compiled: Path, tmp_path: Path) -> None:
    done = _run(next_token, compiled, native_library(), *TOKENS, QCOMPILE_KERNEL="avx1024")
    assert done.returncode == 1
    assert done.stderr.startswith("next_token: QCOMPILE_KERNEL names no instruction set of this library and machine")
    done = _run(next_token, compiled, tmp_path / "absent.so", *TOKENS)
    assert done.returncode == 1
    assert "absent.so" in done.stderr


def test_the_python_of_the_document_runs(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "docs" / "deploy.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    shutil.copytree(compiled.parent, tmp_path / "small")
    shutil.copy(native_library(), tmp_path / "libqcompile_kernels.so")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        names: dict[str, object] = {}
        exec(block, names)
        assert "logits" in [output.name for output in names["running"].get_outputs()]


def test_the_document_shows_what_the_program_does() -> None:
    """The heart of the example, line by line, but for the names of files."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    heart = re.findall(r"```cpp\n(.*?)```", text, re.DOTALL)[0]
    source = re.sub(r"\s+", " ", EXAMPLE.read_text())
    for line in heart.strip().splitlines():
        known = line.replace('"./libqcompile_kernels.so"', "library").replace('"small/model.onnx"', "model")
        assert known.strip() in source, line
