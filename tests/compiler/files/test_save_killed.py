"""kill -9 at random moments of a save: the path always holds a complete model, the new one or the old one."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qcompile.compiler.files.load import load_model

# Saves models over one another for ever; generation g has eight weights full of g.
_WRITER = """
import sys, numpy as np, onnx_ir as ir
from pathlib import Path
from qcompile.compiler.files.load import save_model

def model(generation):
    values = []
    for i in range(8):
        array = np.full((256, 512), generation, np.float32)
        array[0, 0] = i  # no two weights are equal
        tensor = ir.Tensor(array)
        values.append(ir.Value(name=f"w{i}", shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype),
                               const_value=tensor))
    node = ir.node("Sum", values)
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, name=str(generation), opset_imports={"": 21})
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return ir.Model(graph, ir_version=10)

generation = int(sys.argv[2])
while True:
    save_model(model(generation), Path(sys.argv[1]))
    print(generation, flush=True)
    generation += 1
"""


@pytest.mark.slow
def test_kill(tmp_path):
    path, generation, seen, rng = tmp_path / "model.onnx", 1, set(), random.Random(0)
    for _ in range(25):
        process = subprocess.Popen([sys.executable, "-c", _WRITER, str(path), str(generation)], stdout=subprocess.PIPE)
        process.stdout.readline()  # the first save is complete
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.wait()
        generation = _check(path) + 1
        seen.add(generation)
    assert len(seen) > 12, "the kills met different saves"
    left = sorted(os.listdir(tmp_path))
    assert len(left) <= 6, "what one killed save left behind is removed by the next"


def _check(path: Path) -> int:
    """The generation that the complete model at `path` is of."""
    model = load_model(path)
    generation = int(model.graph.name)
    for i in range(8):
        array = model.graph.initializers[f"w{i}"].const_value.numpy()
        assert array[0, 0] == i
        assert np.count_nonzero(array == generation) >= array.size - 1
    return generation
