"""What tests of budgets choose formats for."""

from pathlib import Path

import onnx_ir as ir
import pytest

from qcompile.models.tiny import tiny_decoder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "m.onnx"
    ir.save(tiny_decoder(), path)
    return path
