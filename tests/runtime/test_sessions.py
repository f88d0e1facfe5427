"""runtime/sessions.py: provider names, versions, and errors told in one line."""

import builtins
import types
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.models.tiny import tiny_mlp
from qcompile.passes.errors import UserError
from qcompile.runtime import sessions as module
from qcompile.runtime.sessions import ort_version, provider_names, readable, run, session


@pytest.fixture
def mlp() -> bytes:
    return ir.to_proto(tiny_mlp()).SerializeToString()


def _stub(monkeypatch: pytest.MonkeyPatch, **attributes: object) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", types.SimpleNamespace(**attributes))


def test_runs_a_model_given_as_bytes(mlp: bytes) -> None:
    made = session(mlp, threads=1)
    (given,) = made.get_inputs()
    x = np.zeros((2, given.shape[1]), np.float32)
    outputs = run(made, None, {given.name: x})
    assert outputs[0].shape[0] == 2


def test_does_not_import_onnxruntime_on_import() -> None:
    import subprocess
    import sys

    code = "import sys, qcompile.runtime.sessions as s; sys.exit('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_provider_names_are_normalised_with_cpu_last() -> None:
    assert provider_names(["cpu"]) == ["CPUExecutionProvider"]
    assert provider_names(["CPUExecutionProvider", "cpu"]) == ["CPUExecutionProvider"]


def test_an_absent_provider_is_refused_with_what_exists() -> None:
    with pytest.raises(UserError, match=r"no provider RocketExecutionProvider.*CPUExecutionProvider"):
        provider_names(["RocketExecutionProvider"])


def test_missing_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "onnxruntime":
            raise ImportError(name)
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"not installed: pip install 'qcompile-onnx\[cpu\]'"):
        ort_version()


@pytest.mark.parametrize(("version", "fine"), [("1.23.2", False), ("1.24.3", False), ("1.24.4", True), ("2.0.0", True)])
def test_old_runtimes_are_refused(monkeypatch: pytest.MonkeyPatch, version: str, fine: bool) -> None:
    _stub(monkeypatch, __version__=version)
    if fine:
        assert ort_version() == version
    else:
        with pytest.raises(UserError, match=f"{version} is too old: qcompile needs 1.24.4"):
            ort_version()


def test_unloadable_models_are_one_readable_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no protobuf at all")
    for model, label in ((b"garbage", "the model"), (broken, "broken.onnx")):
        with pytest.raises(UserError, match=f"{label}: ONNX Runtime .* cannot load it: ") as caught:
            session(model)
        assert "\n" not in str(caught.value)
        assert "ONNXRuntimeError" not in str(caught.value)
    with pytest.raises(UserError, match="no such model file"):
        session(tmp_path / "absent.onnx")


def test_run_errors_name_the_inputs(mlp: bytes) -> None:
    made = session(mlp, threads=1)
    with pytest.raises(UserError, match=r"failed on inputs .* \(2, 3, 4\)"):
        run(made, None, {made.get_inputs()[0].name: np.zeros((2, 3, 4), np.float32)})


def test_readable_drops_status_and_source_position() -> None:
    raw = "[ONNXRuntimeError] : 1 : FAIL : /src/core/graph/model.cc:181 onnxruntime::Model::Model(int) Opset 99\nmore"
    assert readable(RuntimeError(raw)) == "Opset 99"
    assert readable(RuntimeError("")) == "RuntimeError"


def test_accuracy_level_reaches_the_session(mlp: bytes) -> None:
    """Level 0 is set explicitly, because ONNX Runtime's own default is 4."""
    made = session(mlp, threads=1, accuracy_level=0)
    assert made.get_session_options().get_session_config_entry("session.qdq_matmulnbits_accuracy_level") == "0"
    assert module.MINIMUM == (1, 24, 4)
