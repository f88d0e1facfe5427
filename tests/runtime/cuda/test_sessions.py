"""session() and reports on the CUDA provider, as far as they go without one."""

from pathlib import Path
from typing import Any

import pytest

from qcompile.passes.errors import UserError
from qcompile.runtime import library as module
from qcompile.runtime import sessions

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def test_native_on_cuda_needs_cuda_and_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built: dict[str, Any] = {"architectures": [], "devices": 0}
    monkeypatch.setattr(module, "cuda_architectures", lambda library: built["architectures"])
    monkeypatch.setattr(module, "cuda_devices", lambda library: built["devices"])
    monkeypatch.setattr(sessions, "library_path", lambda: tmp_path / "lib.so")
    with pytest.raises(UserError, match=r"lib.so was built without CUDA: install nvcc .*kernels='portable'"):
        sessions._library("native", [CUDA, CPU])
    built["architectures"] = ["90a"]
    with pytest.raises(UserError, match="there is no GPU, or no CUDA driver"):
        sessions._library("native", [CUDA, CPU])
    monkeypatch.setattr(sessions, "CUDA_UNVERIFIED", "")
    assert sessions._library("auto", [CUDA, CPU]) is None, "portable where there is no GPU"
    built["devices"] = 1
    assert sessions._library("native", [CUDA, CPU]) == sessions._library("auto", [CUDA, CPU]) == tmp_path / "lib.so"


def test_reports_say_that_nothing_was_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "provider_names", lambda names: [CUDA, CPU])
    monkeypatch.setattr(sessions, "why_no_cuda", lambda library: None)
    monkeypatch.setattr(sessions, "library_path", lambda: Path("lib.so"))
    assert sessions.operator_kernels("native", "cuda") == "native kernels (CUDA, unverified on GPU)"
    assert sessions.operator_kernels("auto", "cuda") == "portable operators"
    monkeypatch.setattr(sessions, "CUDA_UNVERIFIED", "")
    assert sessions.operator_kernels("auto", "cuda") == "native kernels (CUDA)"
