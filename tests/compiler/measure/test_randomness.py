"""Models that draw random numbers: compared on the same draws, and saved as free as they came."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs.table import Graph

from qcompile.compiler import Recipe, compile_model, parse_passes
from qcompile.compiler.cli import main

LISTS = ["pack", "smooth,awq,gptq,pack", "smooth,qdq,bias_correction", "qdq(operators=all)", "smooth,dynamic"]


def _noisy(make: Graph) -> None:
    """Noise beside the mean, as a speech model has it, wider than the signal."""
    mean = make.linear(make.input(2, 16, 32), 32)
    noise = make.one("Mul", make.one("RandomNormalLike", mean), make.constant(np.float32(2)))
    h = make.one("Relu", make.linear(make.one("Add", mean, noise), 32))
    make.output(make.linear(h, 8), make.linear(make.one("RandomNormalLike", mean), 8))


def _read_late(make: Graph) -> None:
    """Numbers that depend on no input, read in two places of the walk."""
    x, drawn = make.input(2, 16, 32), make.one("RandomUniform", shape=[2, 16, 32])
    h = make.linear(make.one("Add", make.linear(x, 32), drawn), 32)
    make.output(make.one("Add", make.linear(make.one("Relu", h), 32), drawn))


def _chosen(make: Graph) -> None:
    """Tokens that are drawn."""
    scores = make.one("Softmax", make.linear(make.input(16, 32), 8))
    made = make.one("Multinomial", make.one("Log", scores), sample_size=1)
    make.output(make.linear(make.one("Gather", make.floats(8, 32, scale=1.0), made), 32))


def _in_a_body(make: Graph) -> None:
    mean = make.linear(make.input(2, 16, 32), 32)
    inner = onnx.helper.make_node("RandomNormalLike", [mean], ["drawn"])
    out = onnx.helper.make_tensor_value_info("drawn", 1, None)
    branch = onnx.helper.make_graph([inner], "branch", [], [out])
    other = onnx.helper.make_graph([onnx.helper.make_node("Neg", [mean], ["neg"])], "other", [], [])
    other.output.append(onnx.helper.make_tensor_value_info("neg", 1, None))
    noise = make.one("If", make.constant(np.array(True)), then_branch=branch, else_branch=other)
    make.output(make.linear(make.one("Add", mean, noise), 32))


def _saved(build: Callable[[Graph], None], folder: Path, seed: float | None = None) -> tuple[Path, list[str]]:
    make = Graph()
    build(make)
    model = make.model()
    for node in model.graph.node:
        if seed is not None and node.op_type.startswith("Random"):
            node.attribute.append(onnx.helper.make_attribute("seed", seed))
    onnx.save(model, folder / "model.onnx")
    for number in range(4):
        np.savez(folder / f"{number}.npz", **make.feeds(number))
    return folder / "model.onnx", [str(folder / f"{number}.npz") for number in range(4)]


def _seeds(path: Path) -> list[Any]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [a.f for node in nodes for a in node.attribute if a.name == "seed"]


@pytest.mark.parametrize("passes", LISTS)
@pytest.mark.parametrize("build", [_noisy, _read_late, _chosen, _in_a_body])
def test_the_error_is_that_of_quantization(tmp_path: Path, build: Callable[[Graph], None], passes: str) -> None:
    """It was that of the draws: refused as destroyed, or as a damaged file, or told as 1."""
    source, data = _saved(build, tmp_path)
    report = compile_model(source, Recipe(passes=parse_passes(passes)), output=tmp_path / "q.onnx", calibration=data)
    assert max(output.relative for output in report.outputs) < (0.7 if passes.endswith("pack") else 0.1)
    assert _seeds(tmp_path / "q.onnx") == []


def test_a_seed_of_the_models_own_stays(tmp_path: Path) -> None:
    source, data = _saved(_noisy, tmp_path, 7.0)
    compile_model(source, Recipe(passes=parse_passes("qdq")), output=tmp_path / "q.onnx", calibration=data)
    assert _seeds(tmp_path / "q.onnx") == [7.0, 7.0]


def test_two_draws_stay_two(tmp_path: Path) -> None:
    """Each has a seed of its own, and neither is taken for the other."""
    source, data = _saved(_noisy, tmp_path)
    compile_model(source, Recipe(passes=parse_passes("qdq")), output=tmp_path / "q.onnx", calibration=data)
    nodes = onnx.load(tmp_path / "q.onnx", load_external_data=False).graph.node
    assert sum(node.op_type == "RandomNormalLike" for node in nodes) == 2


def test_eval_and_bounds_compare_the_same_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, data = _saved(_noisy, tmp_path)
    output = str(tmp_path / "q.onnx")
    given = ["--passes", "qdq", "--calibration", *data, "--min-sqnr", "20", "-o", output]
    assert main([str(source), *given]) == 0
    assert "all of them" not in capsys.readouterr().out
    other = tmp_path / "other.npz"  # what was calibrated on is no test data
    with np.load(data[0]) as seen:
        np.savez(other, **{name: array[..., ::-1] for name, array in seen.items()})
    told = tmp_path / "e.json"
    assert main(["eval", output, "--against", str(source), "--data", str(other), "--json", str(told)]) == 0
    assert '"sqnr' in (tmp_path / "e.json").read_text()
    assert "0.99" in capsys.readouterr().out
