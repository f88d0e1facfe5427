"""Names that passes make: free ones, and short ones where exporters' are long."""

from pathlib import Path

import numpy as np
import onnx
from graphs.table import Graph

from qcompile.compiler import Calibration, Recipe, compile_model, parse_passes
from qcompile.passes.graph import stem

LONG = "model/fused;" * 30


def test_a_long_name_is_cut_and_stays_another_than_its_like() -> None:
    assert stem("short") == "short"
    assert len(stem(LONG)) <= 48
    assert stem(LONG) == stem(LONG) != stem(f"{LONG}x")


def _renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """As exporters do that name a node, and its output, after all that was fused into it."""
    made = {name for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        node.name = f"{LONG}{node.name}"
        for names in (node.input, node.output):
            names[:] = [f"{LONG}{name}" if name in made else name for name in names]
    model.graph.output[0].name = model.graph.node[-1].output[0]
    return model


def test_small_models_of_long_names_do_not_grow(tmp_path: Path) -> None:
    make = Graph()
    x = make.input("b", 16, 16, 16)
    for _ in range(6):
        x = make.one("Relu", make.one("Conv", x, make.floats(16, 16, 3, 3), make.floats(16), pads=[1, 1, 1, 1]))
    make.output(x)
    source, data, output = tmp_path / "model.onnx", tmp_path / "data.npz", tmp_path / "out" / "model.onnx"
    output.parent.mkdir()
    onnx.save(_renamed(make.model()), source)
    np.savez(data, **make.feeds(0))
    compile_model(source, Recipe(passes=parse_passes("qdq")), output=output, calibration=Calibration([str(data)]))
    files = [output, *output.parent.glob("*.data")]
    assert sum(path.stat().st_size for path in files) < 0.75 * source.stat().st_size
    graph = onnx.load(output, load_external_data=False).graph
    assert len({node.name for node in graph.node}) == len(graph.node)
    assert not {value.name for value in graph.value_info} & {tensor.name for tensor in graph.initializer}
