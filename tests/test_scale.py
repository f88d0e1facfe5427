"""benchmarks/scale.py: the decoders that it makes run, their weights are heavy-tailed; lines through figures."""

from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from plan import Plan, Rates, Work
from scale import Line, Run, fits
from scale_models import SHAPES, at_depth, decoder, tokens

from qcompile.compiler.files.load import load_model
from qcompile.runtime.sessions import session


@pytest.mark.parametrize("name", ["tied", "own head"])
def test_decoders_run(name: str, tmp_path: Path) -> None:
    """Finite logits of ordinary size, as many weights as the shape says, tails that a normal has not."""
    shape = at_depth(SHAPES["tiny"], 2)
    shape = shape if name == "tied" else type(shape)(64, 96, 4, 4, 512, layers=2)
    model, data = decoder(shape, tmp_path), tokens(shape, 2, 16, tmp_path)
    arrays = load_model(model).graph.initializers.values()
    large = [value.const_value for value in arrays if value.const_value is not None and value.const_value.size > 1000]
    assert sum(tensor.size for tensor in large) == shape.weights
    gate = next(tensor.numpy().astype(np.float64) for tensor in large if "gate_proj" in str(tensor.name))
    assert np.mean(gate**4) / np.mean(gate**2) ** 2 > 6
    (logits,) = session(model).run(None, {"input_ids": np.load(data / "0001.npz")["input_ids"]})
    assert 0.5 < logits.astype(np.float64).std() < 50
    assert logits.shape == (1, 16, shape.vocab)
    assert decoder(shape, tmp_path) == model  # from the cache


def test_fits() -> None:
    """A layer's seconds, the share of its packed bytes that memory grows by, and what is said of deeper models."""
    runs = [Run("py", "s", "pack", n, 10 + 3 * n, 1.0, 10**9 + 10**6 * n, 0, 10**8 * n) for n in (1, 2, 4)]
    assert Line.through([(1, 2.0), (3, 6.0)]).at(10) == pytest.approx(20)
    assert fits([*runs, Run("py", "s", "pack", 8, failed="killed")]).splitlines()[-1].split(" | ")[3:] == [
        "3.00", "1.0", "0.03", "1.03", "0.07", "1.08 |",
    ]  # fmt: skip


def test_plan() -> None:
    """Constants of runs that have them are found again, and more machines shorten what they share, no further."""
    shape, rates = SHAPES["small"], Rates(2e-11, 3e-11, 4e-8)
    work = Work.of(shape, 1000)
    runs = [
        {
            "layers": n,
            "phases": {
                "statistics": 1 + n * rates.calibration * work.calibration,
                "gptq": 2 + n * rates.rounding * work.rounding,
                "probes": 3 + n * rates.other * work.weights,
            },
        }
        for n in (1, 2, 4)
    ]
    found = Rates.measured(shape, 1000, runs)
    assert astuple(found) == pytest.approx(astuple(rates), rel=1e-6)
    one, eight, many = (Plan.of(SHAPES["llama-2-7b"], rates, 32, 512, n, 1, 1e9) for n in (1, 8, 1000))
    assert eight.rounding == pytest.approx(one.rounding / 8)
    assert many.calibration == eight.calibration, "eight units of four windows"
    assert many.other == one.other
    assert one.network == 0 < eight.network
