"""ONNX Runtime sessions. The only module that imports onnxruntime, and only when a session is asked for."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from qcompile.passes.errors import UserError
from qcompile.passes.interrupts import uninterrupted
from qcompile.passes.library import VARIABLE, library_path
from qcompile.passes.threads import limit
from qcompile.runtime.library import check_version, chosen_kernel, why_no_cuda

# 1.23 and older crash on an absent optional input of an inlined model-local function.
MINIMUM = (1, 24, 4)
_INSTALL = "pip install 'qcompile-onnx[cpu]' or 'qcompile-onnx[cuda]'"
KERNELS = ("auto", "native", "portable")
# Why "auto" leaves CUDA to the portable bodies. Empty it when tests/runtime/cuda/test_gpu.py has passed on a GPU:
# "auto" is then native there, too.
CUDA_UNVERIFIED = "unverified on GPU"
# What ONNX Runtime says of an operator that it does not know.
_UNKNOWN = re.compile(r"is not a registered function/op|No opset import for domain|No Op registered for")
_ALIASES = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "gpu": "CUDAExecutionProvider"}

# Threads of sessions where they are others than those of pools.
_THREADS: ContextVar[int | None] = ContextVar("session threads", default=None)
# Libraries of other people's operators, which every session registers (`custom_operators`).
_LIBRARIES: ContextVar[tuple[Path, ...]] = ContextVar("libraries", default=())


@contextmanager
def custom_operators(libraries: Sequence[Path | str]) -> Iterator[None]:
    """Have every session opened inside register these libraries (their RegisterCustomOps), each once.

    They are native code that runs in this process. No recipe names one, for a recipe comes as data.
    """
    wanted = [Path(library).resolve() for library in libraries]
    for given, library in zip(libraries, wanted, strict=True):
        if not library.is_file():
            raise UserError(f"{given}: no such library of operators; give the .so, .dylib or .dll file")
    token = _LIBRARIES.set(tuple(dict.fromkeys((*_LIBRARIES.get(), *wanted))))
    try:
        yield
    finally:
        _LIBRARIES.reset(token)


@contextmanager
def session_threads(count: int) -> Iterator[None]:
    """Inside, sessions have so many threads, whatever `passes.threads.limited` says: float sums depend on it."""
    token = _THREADS.set(count)
    try:
        yield
    finally:
        _THREADS.reset(token)


def default_threads() -> int:
    """How many threads a session has that is opened now: as many as is said, else one a core of the processor."""
    return _THREADS.get() or limit() or psutil.cpu_count(logical=False) or 1


def registered_libraries() -> tuple[Path, ...]:
    """The libraries that a session opened now would register."""
    return _LIBRARIES.get()


def session(
    model: Path | str | bytes,
    *,
    providers: Sequence[str] = ("cpu",),
    accuracy_level: int = 0,
    threads: int | None = None,
    optimize: bool = True,
    folder: Path | None = None,
    weights: Mapping[str, npt.NDArray[Any]] | None = None,
    spin: bool = True,
    kernels: str = "auto",
    growing: bool = False,
    prepack: bool = True,
    parking: bool = False,
) -> Any:
    """An onnxruntime.InferenceSession of a model file or of serialized bytes.

    accuracy_level: what ORT may do to the activations of 4-bit MatMuls it fuses itself. Left alone it picks 4, int8
    activations (a relative error near 1e-2); 0 computes in the model's own type.
    threads: of the session; None: as many as `passes.threads.limited` says, else as there are cores.
    optimize: False turns every graph optimization off, so that each node runs as the file has it.
    folder: where the external data of a model given as bytes lies.
    weights: initializers handed over in memory; the model must declare each as external data of that shape and type.
    spin: let idle threads of the session wait actively: best for one session alone, a waste beside other work.
    kernels: "native" has the qcompile operators computed by the library of native kernels (on the CPU, and on CUDA
    where it was built with CUDA, unverified on GPU), "portable" by their ONNX bodies; "auto" is native where the
    session runs on the CPU alone and there is a library.
    growing: each run's inputs have other sizes than the last one's, as a decoder's. ONNX Runtime then plans no memory
    by sizes: a plan is of no use for the next token, and one of a long prompt keeps its memory.
    prepack: False leaves float weights as they lie, mapped from their file, instead of copying them into the layout of
    the kernels: for a run or two that takes longer than it saves. Packed products decode their weight in each run then.
    parking: threads that wait actively stop when a run ends: for sessions that take turns.
    """
    ort = _runtime()
    if kernels not in KERNELS:
        raise UserError(f"kernels is {kernels!r}, it must be one of {', '.join(KERNELS)}")
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise UserError(f"{model}: no such model file")
    names = provider_names(providers)
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_mem_pattern = not growing
    threads = threads or _THREADS.get() or limit()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    if parking:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    if weights:
        values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in weights.values()]
        options.add_external_initializers(list(weights), values)
    library = _library(kernels, names)
    if library is not None:
        check_version(model, library)
        _register(options, library)
    for other in _LIBRARIES.get():
        _register(options, other)
    source = model if isinstance(model, bytes) else str(model)
    label = "the model" if isinstance(model, bytes) else str(model)
    try:
        created = ort.InferenceSession(source, options, providers=names)
    except Exception as error:  # ORT's exception classes share no base but Exception
        hint = "; give the library of its operators with --custom-ops" if _UNKNOWN.search(str(error)) else ""
        raise UserError(f"{label}: ONNX Runtime {ort.__version__} cannot load it: {readable(error)}{hint}") from error
    if names[0] not in created.get_providers():
        raise UserError(f"ONNX Runtime could not start {names[0]} (are its CUDA and cuDNN libraries installed?)")
    return created


def provider_names(providers: Sequence[str]) -> list[str]:
    """ONNX Runtime's names of the providers ("cpu", "cuda", or its own), CPU last to take what the others leave."""
    ort = _runtime()
    available = list(ort.get_available_providers())
    names = [_ALIASES.get(name.lower(), name) for name in providers]
    for name in names:
        if name not in available:
            known = ", ".join(available)
            raise UserError(f"ONNX Runtime {ort.__version__} here has no provider {name}; it has {known} ({_INSTALL})")
    # Unverified on GPU: no session of this project has run the CUDA provider yet.
    if "CUDAExecutionProvider" in names and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # finds the CUDA libraries of the nvidia-* packages
    cpu = _ALIASES["cpu"]
    return [name for name in dict.fromkeys(names) if name != cpu] + [cpu]


def operator_kernels(kernels: str, provider: str) -> str:
    """Who computes qcompile's operators in a session of these settings, in a few words."""
    names = provider_names([provider])
    library = _library(kernels, names)
    if library is None:
        return "portable operators"
    if _ALIASES["cuda"] in names:
        return f"native kernels ({', '.join(filter(None, ['CUDA', CUDA_UNVERIFIED]))})"
    return f"native kernels ({chosen_kernel(library)})"


def _library(kernels: str, providers: list[str]) -> Path | None:
    """The library that a session of these providers is to register, None for none."""
    if kernels == "portable" or (kernels == "auto" and not _native_by_default(providers)):
        return None
    try:
        library = library_path()
    except UserError:
        if kernels == "native" or os.environ.get(VARIABLE):
            raise
        return None
    reason = why_no_cuda(library) if _ALIASES["cuda"] in providers else None
    if reason and kernels == "native":
        raise UserError(reason)
    return None if reason else library


def _native_by_default(providers: list[str]) -> bool:
    """Whether all providers are ones that the library has kernels for, tried on their hardware."""
    tried = {_ALIASES["cpu"]} if CUDA_UNVERIFIED else {_ALIASES["cpu"], _ALIASES["cuda"]}
    return set(providers) <= tried


def _register(options: Any, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:  # ORT's exception classes share no base but Exception
        raise UserError(f"{library}: ONNX Runtime cannot register it: {readable(error)}") from error


def run(session: Any, outputs: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
    """The named outputs (all of them for None) as numpy arrays; a failure inside ORT is told in one line.

    A sequence of tensors, or of maps, comes as one row of all its numbers: enough to compare two models by.
    """
    with failures(feeds):
        found = session.run(None if outputs is None else list(outputs), dict(feeds))
        return [output if isinstance(output, np.ndarray) else _row(output) for output in found]


@contextmanager
def failures(feeds: Mapping[str, Any]) -> Iterator[None]:
    """Tell a failure inside ONNX Runtime, on these feeds, in one line: a UserError."""
    try:
        yield
    except Exception as error:  # ORT's exception classes share no base but Exception
        shapes = ", ".join(f"{name} {getattr(array, 'shape', '?')}" for name, array in list(feeds.items())[:6])
        raise UserError(f"ONNX Runtime failed on inputs {shapes}: {readable(error)}") from error


def on_device(session: Any) -> str:
    """Where a session's provider keeps what it works on: "cpu" or "cuda"."""
    return "cuda" if session.get_providers()[0] == _ALIASES["cuda"] else "cpu"


def ort_value(array: npt.NDArray[Any], device: str) -> Any:
    """An OrtValue of an array: on the CPU the array's own memory, elsewhere a copy."""
    return _runtime().OrtValue.ortvalue_from_numpy(array, device)


def bound_outputs(binding: Any, count: int | None = None) -> list[Any]:
    """What a run with this binding gave, or the first `count` outputs of it: OrtValues take microseconds each."""
    found = binding.get_outputs_as_ortvaluevector()
    return [_runtime().OrtValue(found[index]) for index in range(len(found) if count is None else count)]


def _row(output: Any) -> npt.NDArray[Any]:
    """All numbers of an output that is no tensor, one behind the other; maps in the order of their keys."""
    if isinstance(output, Mapping):
        output = [output[key] for key in sorted(output)]
    if isinstance(output, list | tuple):
        parts = [_row(part) for part in output]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return np.ravel(np.asarray(output))


def ort_version() -> str:
    """The version of the installed ONNX Runtime."""
    return str(_runtime().__version__)


def readable(error: Exception) -> str:
    """The first line of an ONNX Runtime error, without its status prefix and C++ source position."""
    text = str(error).strip()
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"^(Exception during initialization: |Non-zero status code .* Status Message: )(?=node ')", "", text)
    text = re.sub(r"/\S+\.(?:cc|h|cpp|cuh?):\d+ .*?(?:\) |\] )(?=\S)", "", text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:400] if lines else type(error).__name__


def _runtime() -> Any:
    # It sends nothing about the models of strangers, and does not complain where a user has no folder to note an id in.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        with uninterrupted():
            import onnxruntime
    except ImportError as error:
        raise UserError(f"ONNX Runtime is not installed: {_INSTALL}") from error
    version = getattr(onnxruntime, "__version__", None)
    if version is None:  # the folder is left over from an uninstalled package
        raise UserError(f"ONNX Runtime is broken: reinstall it with {_INSTALL}")
    if _parsed(version) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise UserError(f"ONNX Runtime {version} is too old: qcompile needs {wanted} or newer ({_INSTALL})")
    return onnxruntime


def _parsed(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])
