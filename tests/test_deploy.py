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

from qcompile.compiler.measure.generate import Sampling, generate_ids
from qcompile.compiler.measure.loaded import Subject
from qcompile.models.tiny import tiny_decoder
from qcompile.runtime import session
from qcompile.runtime.sessions import run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "docs" / "examples"
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
    "GetAllocatorWithDefaultOptions": "OrtAllocator**",
    "AllocatorFree": "OrtAllocator*, void*",
    "SessionGetInputCount": "const OrtSession*, size_t*",
    "SessionGetInputName": "const OrtSession*, size_t, OrtAllocator*, char**",
    "SessionGetInputTypeInfo": "const OrtSession*, size_t, OrtTypeInfo**",
    "CastTypeInfoToTensorInfo": "const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**",
}
RELEASED = ("Env", "Status", "MemoryInfo", "Session", "Value", "TensorTypeAndShapeInfo", "SessionOptions", "TypeInfo")


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
    opaque = "\n".join(f"struct Ort{name};" for name in (*RELEASED, "RunOptions", "Allocator"))
    return f"""
#include <cstddef>
#include <cstdint>
{opaque}
constexpr unsigned ORT_API_VERSION = 20;
enum OrtLoggingLevel {{ ORT_LOGGING_LEVEL_WARNING = 2 }};
enum OrtAllocatorType {{ OrtArenaAllocator = 1 }};
enum OrtMemType {{ OrtMemTypeDefault = 0 }};
enum ONNXTensorElementDataType {{ ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7 }};
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
def cached(make_bench) -> Path:
    """The same with caches."""
    bench = make_bench("cached")
    bench.compile(bench.save(tiny_decoder(kv_cache=True, outliers=False)))
    return bench.folder / "out" / "model.onnx"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("example")
    (shared,) = (Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so*")
    (folder / "libonnxruntime.so").symlink_to(shared)
    (folder / "libonnxruntime.so.1").symlink_to(shared)
    (folder / "onnxruntime_c_api.h").write_text(_header())
    for example in EXAMPLES.glob("*.cpp"):
        command = [compiler, "-std=c++17", "-Wall", "-Werror", example, "-I", folder, "-L", folder, "-lonnxruntime"]
        subprocess.run([*map(str, command), "-o", str(folder / example.stem)], check=True)
    return folder


@pytest.fixture
def next_token(programs: Path) -> Path:
    return programs / "next_token"


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
    assert done.stderr.startswith("ONNX Runtime: QCOMPILE_KERNEL names no instruction set of this library and machine")
    done = _run(next_token, compiled, tmp_path / "absent.so", *TOKENS)
    assert done.returncode == 1
    assert "absent.so" in done.stderr


def test_the_python_of_the_document_runs(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, _ = _blocks("python")
    _beside(compiled, tmp_path, monkeypatch)
    for block in (first, second):
        names: dict[str, object] = {}
        exec(block, names)
        assert "logits" in [output.name for output in names["running"].get_outputs()]


def test_the_python_of_one_buffer_writes_what_generate_does(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, opened, looped = _blocks("python")
    _beside(cached, tmp_path, monkeypatch)
    looped = looped.replace("[504, 3575, 282]", str(TOKENS)).replace("2048", "24")
    names: dict[str, object] = {}
    exec(f"{opened}\n{looped}", names)
    assert names["ids"] == [*TOKENS, *_greedy(cached, 20 - len(TOKENS))]


def test_the_program_of_one_buffer_writes_what_generate_does(programs: Path, cached: Path) -> None:
    for kernels, library in (("native", native_library()), ("portable", "-")):
        done = _run(programs / "generate", cached, library, 24, 15, *TOKENS)
        assert (done.returncode, done.stderr) == (0, "")
        assert [int(line) for line in done.stdout.split()] == _greedy(cached, 15, kernels)
    done = _run(programs / "generate", cached, "-", 10, 15, *TOKENS)
    assert (done.returncode, done.stderr) == (1, "generate: 5 + 15 tokens do not fit into room for 10\n")


def _greedy(path: Path, count: int, kernels: str = "auto") -> list[int]:
    """What follows TOKENS, as `qcompile generate` has it."""
    return list(generate_ids(Subject(path, kernels=kernels), TOKENS, count, Sampling()))


def _blocks(language: str) -> list[str]:
    """The document's code of a language."""
    text = (ROOT / "docs" / "deploy.md").read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def _beside(compiled: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder, the working one, where the files lie that the document names."""
    shutil.copytree(compiled.parent, folder / "small")
    shutil.copy(native_library(), folder / "libqcompile_kernels.so")
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(("number", "example"), [(0, "next_token.cpp"), (2, "generate.cpp")])
def test_the_document_shows_what_the_program_does(number: int, example: str) -> None:
    """The heart of the example, line by line, but for the names of files."""
    sources = [(EXAMPLES / name).read_text() for name in ("common.h", example)]
    source = re.sub(r"\s+", " ", "".join(sources))
    for line in _blocks("cpp")[number].strip().splitlines():
        known = line.replace('"./libqcompile_kernels.so"', "library").replace('"small/model.onnx"', "model")
        assert re.sub(r"\s+", " ", known.strip()) in source, line
