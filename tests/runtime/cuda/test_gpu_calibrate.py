"""`--provider cuda`: calibration on a GPU learns what it learns on the CPU. Unverified until a GPU ran it."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from qcompile.compiler.api.calibrate import calibrate_model
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.stages import Calibration
from qcompile.compiler.walk import saved_statistics
from qcompile.models.tiny import tiny_decoder

pytestmark = pytest.mark.gpu

# fp32 products on a GPU may use tf32 (10 bits), and sums come in another order: 1e-3 of the largest magnitude.
TOLERANCE = 1e-3
MOVED = 2e-2  # share of a histogram's counts that may lie in another bin


@pytest.fixture(scope="module")
def provider() -> str:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip(f"onnxruntime {ort.__version__} here has no CUDA provider")
    return "cuda"


def _states(bench: Any, source: Path, passes: str, provider: str) -> dict[str, Any]:
    path: Path = bench.folder / f"{provider}.statistics"
    recipe = Recipe(passes=parse_passes(passes), samples=8, context=32, provider=provider)
    calibrate_model(source, recipe, output=path, calibration=Calibration([str(bench.text)]))
    return dict(saved_statistics.load(path).states)


def _compare(own: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert own.keys() == wanted.keys()
    assert wanted
    for value, state in wanted.items():
        assert own[value].keys() == state.keys()
        for key, array in state.items():
            found, expected = np.asarray(own[value][key], np.float64), np.asarray(array, np.float64)
            assert found.shape == expected.shape, (value, key)
            if "count" in key or "histogram" in key:
                assert np.abs(found - expected).sum() <= 2 * MOVED * expected.sum(), (value, key)
            else:
                limit = TOLERANCE * max(np.abs(expected).max(initial=0), 1e-6)
                np.testing.assert_allclose(found, expected, rtol=0, atol=limit, err_msg=f"{value} {key}")


@pytest.mark.parametrize("passes", ["qdq(observer=minmax)", "qdq(observer=mse)", "smooth,qdq"])
def test_observers_learn_what_they_learn_on_the_cpu(bench: Any, provider: str, passes: str) -> None:
    source = bench.save(tiny_decoder(layers=1))
    _compare(_states(bench, source, passes, provider), _states(bench, source, passes, "cpu"))


def test_a_compile_on_a_gpu_is_as_good(bench: Any, provider: str) -> None:
    """awq and gptq with Gram sums from the GPU: errors of products are at most a tenth above those of the CPU."""
    source = bench.save(tiny_decoder(layers=1))
    reports = [
        bench.compile(source, "awq,gptq,pack", output=f"{name}/model.onnx", provider=name) for name in ("cpu", provider)
    ]
    cpu, gpu = ({node.node: node.error for node in report.nodes} for report in reports)
    assert cpu.keys() == gpu.keys()
    assert cpu
    for name, error in cpu.items():
        assert gpu[name] <= 1.1 * error + 1e-6, name
