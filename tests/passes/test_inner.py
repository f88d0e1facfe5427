"""Weights in bodies and of recurrent nodes: random graphs through every list, and what must hold of each."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graphs.experts import experts_without_a_token
from graphs.table import Feeds, sqnr
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qcompile.compiler import Calibration, Recipe, compile_model, parse_passes
from qcompile.compiler.cli import main
from qcompile.compiler.results.report import Report

WIDTH = 32
# dB of one product, by list: 4 bits in groups of 32, 8 bits a channel, ranges that 96 rows showed, with room.
NOISE = {"pack": 19.0, "gptq,pack": 19.0, "pack8": 40.0, "qdq": 28.0, "dynamic": 33.0}
LISTS = {"pack8": ("pack", {"bits": 8})}


class Nest:
    """A random graph of products in nested bodies; weights are drawn from a few, held by the main graph or by bodies.

    Bodies of one depth give the same names to values of their own.
    """

    def __init__(self, draw: Any) -> None:
        self.draw, self.random = draw, np.random.default_rng(draw(st.integers(0, 2**16)))
        self.weights = [self._matrix() for _ in range(draw(st.integers(1, 3)))]
        self.main: list[onnx.TensorProto] = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(self.weights)]
        self.flag, self.turns = "flag", "turns"
        self.products = 0

    def _matrix(self) -> np.ndarray:
        q, _ = np.linalg.qr(self.random.standard_normal((WIDTH, WIDTH)))
        return q.astype(np.float32)  # keeps the size of what goes through

    def graph(self, depth: int, read: list[str], name: str) -> onnx.GraphProto:
        """A body of one to three steps on one of the values it can read."""
        held: dict[str, onnx.TensorProto] = {}
        nodes: list[onnx.NodeProto] = []
        made: list[str] = []  # all of them count
        x = self.draw(st.sampled_from(read))
        for step in range(self.draw(st.integers(1, 2))):
            kinds = ["MatMul", "Gemm", "MatMul"] + (["If", "Loop"] if depth else [])
            x = self._step(self.draw(st.sampled_from(kinds)), nodes, held, x, [*read, x], depth, f"{name}{step}")
            made.append(x)
        y, i, go, on, state = (f"{end}.{depth}" for end in ("y", "i", "go", "on", "state"))
        nodes.append(helper.make_node("Sum", [*made, self.draw(st.sampled_from(read))], [y]))
        given = [] if not name.endswith("loop") else [
            helper.make_tensor_value_info(i, TensorProto.INT64, []),
            helper.make_tensor_value_info(go, TensorProto.BOOL, []),
            helper.make_tensor_value_info(state, TensorProto.FLOAT, ["b", WIDTH]),
        ]  # fmt: skip
        outputs = [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)]
        if given:
            nodes.append(helper.make_node("Identity", [go], [on]))
            outputs.insert(0, helper.make_tensor_value_info(on, TensorProto.BOOL, None))
        return helper.make_graph(nodes, name, given, outputs, list(held.values()))

    def _step(
        self, kind: str, nodes: list, held: dict[str, onnx.TensorProto], x: str, read: list[str], depth: int, name: str
    ) -> str:
        y = f"h{len(nodes)}.{depth}"
        if kind == "If":
            branches = {f"{end}_branch": self.graph(depth - 1, read, f"{name}{end}") for end in ("then", "else")}
            nodes.append(helper.make_node("If", [self.flag], [y], name=f"{name}if", **branches))
        elif kind == "Loop":
            body = self.graph(depth - 1, [*read, f"state.{depth - 1}"], f"{name}loop")
            nodes.append(helper.make_node("Loop", [self.turns, "", x], [y], name=f"{name}node", body=body))
        else:
            self.products += 1
            number = self.draw(st.integers(0, len(self.weights) - 1))
            w, turn = f"w{number}", kind == "Gemm" and self.draw(st.booleans())
            if self.draw(st.booleans()):  # a copy of its own, under the same name in every body
                w = f"own{number}{'t' if turn else ''}.{depth}"
                array = self.weights[number].T if turn else self.weights[number]
                held.setdefault(w, numpy_helper.from_array(np.ascontiguousarray(array), w))
            attributes = {"transB": 1} if turn else {}
            nodes.append(helper.make_node(kind, [x, w], [y], name=f"{name}product", **attributes))
        return y

    def model(self) -> onnx.ModelProto:
        body = {f"{end}_branch": self.graph(2, ["x", "a"], end) for end in ("then", "else")}
        nodes = [
            helper.make_node("MatMul", ["x", "w0"], ["a"], name="first"),
            helper.make_node("If", ["flag"], ["b"], name="nest", **body),
            helper.make_node("MatMul", ["b", "w0"], ["c"], name="last"),
        ]
        inputs = [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", WIDTH]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
        ]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("c", "b", "a")]
        constants = [*self.main, numpy_helper.from_array(np.array(2), "turns")]
        graph = helper.make_graph(nodes, "nest", inputs, outputs, constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    def feeds(self, seed: int, *, flag: bool) -> Feeds:
        random = np.random.default_rng(seed)
        return {"x": random.standard_normal((24, WIDTH)).astype("f"), "flag": np.array(flag)}


def _run(path: Path, feeds: Feeds) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def _codes(path: Path) -> int:
    """Bytes of the model and its data."""
    return sum(file.stat().st_size for file in path.parent.iterdir() if file.suffix in (".onnx", ".data"))


def _floats(graph: onnx.GraphProto) -> list[str]:
    """Float constants of 1024 elements and more, in a graph and its bodies."""
    found = [t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and np.prod(t.dims) >= 1024]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += _floats(attribute.g)
            elif attribute.type == onnx.AttributeProto.TENSOR and np.prod(attribute.t.dims) >= 1024:
                found += [node.name] if attribute.t.data_type == TensorProto.FLOAT else []
    return found


def _compiled(nest: Nest, passes: str, folder: Path) -> tuple[Report, Path, Path]:
    source, output = folder / "m.onnx", folder / "out" / "m.onnx"
    onnx.save(nest.model(), source)
    output.parent.mkdir()
    data = []
    for seed in range(4):
        data.append(str(folder / f"{seed}.npz"))
        np.savez(data[-1], **nest.feeds(seed, flag=bool(seed % 2)))
    listed, options = LISTS.get(passes, (passes, {}))
    recipe = Recipe(**{"passes": parse_passes(listed), "group_size": 32, **options})
    return compile_model(source, recipe, output=output, calibration=Calibration(data)), source, output


@pytest.mark.parametrize("passes", NOISE)
@given(data=st.data())
@settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.generate])
def test_nested_bodies(passes: str, data: st.DataObject) -> None:
    """Outputs within what the bits promise, no float weight left in any graph, each weight stored once."""
    nest = Nest(data.draw)
    with tempfile.TemporaryDirectory() as folder:
        report, source, output = _compiled(nest, passes, Path(folder))
        for flag in (True, False):
            feeds = nest.feeds(100, flag=flag)
            least = NOISE[passes] - 10 * np.log10(2 * nest.products + 2)
            assert sqnr(_run(source, feeds), _run(output, feeds)) >= least
        assert not _floats(onnx.load(output).graph)
        assert report.coverage == 1.0
        bits = 4 if passes in ("pack", "gptq,pack") else 8
        one = WIDTH * WIDTH * bits // 8
        stored = sum(file.stat().st_size for file in output.parent.glob("*.data"))
        assert stored <= 2 * len(nest.weights) * (one + 1024), "as it is read, and turned round"
        decided = {d.node for d in report.decisions[report.quantizer or ""] if d.action == "quantized"}
        products = [n.name for g in _graphs(onnx.load(source).graph) for n in g.node if n.op_type in ("MatMul", "Gemm")]
        assert not set(products) - decided


def _graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [graph, *(found for body in inner for found in _graphs(body))]


def test_ranges_of_an_expert_without_a_token_travel_in_a_file(tmp_path: Path) -> None:
    graph, source = experts_without_a_token.made(), tmp_path / "m.onnx"
    onnx.save(graph.model(), source)
    np.savez(tmp_path / "x.npz", **graph.feeds(0))
    data = ["--passes", "qdq", "--calibration", str(tmp_path / "x.npz")]
    statistics, output = tmp_path / "s.npz", tmp_path / "o.onnx"
    assert main(["calibrate", str(source), *data, "-o", str(statistics)]) == 0
    assert main([str(source), *data, "--statistics", str(statistics), "-o", str(output)]) == 0
    unseen = graph.feeds(100)
    assert sqnr(_run(source, unseen), _run(output, unseen)) > 15
