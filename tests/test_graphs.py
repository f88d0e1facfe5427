"""tests/graphs/: every graph of the table, compiled by every list of its row, against float in plain ONNX Runtime."""

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs.table import CASES, Case, Feeds, pairs, sqnr

from qcompile.compiler import compile_model
from qcompile.passes.errors import UserError

for module in sorted(path.stem for path in (Path(__file__).parent / "graphs").glob("*.py")):
    importlib.import_module(f"graphs.{module}")


def _run(path: Path, feeds: Feeds) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    outputs = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)
    return [np.array([[*row.values()] for row in o]) if _is_maps(o) else o for o in outputs]


def _is_maps(output: Any) -> bool:
    return isinstance(output, list) and isinstance(output[0], dict)


@pytest.mark.parametrize(("row", "passes"), [pytest.param(c, p, id=f"{c.name}-{p}") for c, p in pairs()])
def test_graph(row: Case, passes: str, tmp_path: Path) -> None:
    graph, least = row.made(), row.lists[passes]
    source, output, recipe, calibration = row.saved(graph, passes, tmp_path)
    if isinstance(least, str):
        with pytest.raises(UserError, match=least):
            compile_model(source, recipe, output=output, calibration=calibration)
        assert not list(output.parent.iterdir())
        return
    report = compile_model(source, recipe, output=output, calibration=calibration)
    unseen = graph.feeds(1000)
    assert sqnr(_run(source, unseen), _run(output, unseen)) >= least
    if row.coverage is not None:
        assert report.coverage == pytest.approx(row.coverage, abs=0.005)
    if row.packed and passes.endswith("pack"):
        operators = Counter(node.op_type for node in onnx.load(output, load_external_data=False).graph.node)
        assert {name: operators[name] for name in row.packed} == row.packed


def test_the_table_is_not_empty() -> None:
    assert len(CASES) >= 2
    assert all(row.lists for row in CASES.values())
