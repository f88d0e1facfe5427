"""The walk cuts and feeds any graph: invariants over random graphs with several inputs, heads and towers."""

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs.table import Graph, sqnr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opened import opened

from qcompile.compiler import Calibration, Recipe, compile_model, parse_passes
from qcompile.compiler.data.feeds import Batch, input_plan
from qcompile.compiler.walk.extract import captured, extract, reads
from qcompile.compiler.walk.runner import Runner, Stream, went_on
from qcompile.compiler.walk.segments import Segment, split
from qcompile.compiler.walk.walk import by_weights, seen_in
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_linears
from qcompile.passes.observers import OBSERVERS
from qcompile.passes.prepare import Prepare
from qcompile.passes.state import node_state
from qcompile.runtime.sessions import run, session

WIDTH = 32
LISTS = (
    "pack",
    "smooth,awq,gptq,pack",
    "smooth,qdq",
    "qdq(operators=all)",
    "dynamic",
    "outlier,qdq",
    "qdq,bias_correction",
)
# Lists with settings that choose nodes to keep in float, by runs of the graph with a switch for every node.
CHOSEN = [("qdq", {"keep_worst": 1}), ("qdq(operators=all)", {"min_sqnr": 15.0}), ("dynamic", {"min_sqnr": 15.0})]
ONE = ("MatMul", "MatMul", "MatMul", "Gemm", "Relu", "Sigmoid", "LayerNormalization", "Split")
TWO = ("Add", "Mul", "Concat")


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """Values (rows, 32) of one another: fan-out, residuals, Split, towers, heads, inputs read late or never."""
    make = Graph()
    values = [make.input("rows", WIDTH, sizes={"rows": 64}) for _ in range(draw(st.integers(1, 3)))]
    shared = make.floats(WIDTH, WIDTH)
    for _ in range(draw(st.integers(2, 12))):
        operands = [draw(st.sampled_from(values[-4:] + values[:2])) for _ in range(2)]
        operator = draw(st.sampled_from(ONE + TWO))
        values += _step(make, operator, operands, shared if draw(st.integers(0, 5)) == 0 else None)
    values.append(make.linear(values[-1], WIDTH, WIDTH))
    heads = draw(st.lists(st.sampled_from(values[3:]), max_size=2, unique=True))
    inputs = {info.name for info in make.inputs}
    make.output(*dict.fromkeys([head for head in heads if head not in inputs] + values[-1:]))
    return make


def _step(make: Graph, operator: str, operands: list[str], weight: str | None) -> list[str]:
    """The output of a step; `weight`: a weight of others, None for one of its own."""
    if operator == "MatMul":
        return make.op("MatMul", operands[0], weight or make.floats(WIDTH, WIDTH))
    if operator == "Gemm":
        return make.op("Gemm", operands[0], weight or make.floats(WIDTH, WIDTH), make.floats(WIDTH, scale=1.0))
    if operator == "LayerNormalization":
        return make.op(operator, operands[0], make.constant(np.ones(WIDTH, np.float32)))
    if operator == "Split":
        a, b = make.op("Split", operands[0], outputs=2, axis=1)
        return make.op("Concat", b, a, axis=1)
    if operator == "Concat":
        joined = make.one("Concat", *operands, axis=1)
        return make.op("MatMul", joined, make.floats(2 * WIDTH, WIDTH))
    return make.op(operator, *(operands if operator in TWO else operands[:1]))


def _check_segments(model: ir.Model, segments: list[Segment], is_target: Callable[[ir.Node], bool]) -> None:
    """What `split` promises."""
    home = {node: i for i, segment in enumerate(segments) for node in segment.nodes}
    assert len(home) == sum(len(segment.nodes) for segment in segments)
    assert {node for node in model.graph if is_target(node)} <= set(home)
    assert all(any(map(is_target, segment.nodes)) for segment in segments) or len(segments) == 1
    assert not segments[0].carried
    assert not segments[-1].carry
    for before, after in itertools.pairwise(segments):
        assert before.carry == after.carried
        rounding = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
        assert not any(value.producer().op_type in rounding for value in before.carry)
    for node, number in home.items():
        for value in reads(node):
            producer = value.producer()
            if producer in home and home[producer] != number:
                assert home[producer] < number
                assert value in segments[number].carried
                assert value in segments[home[producer]].carry
    _check_pieces(model, segments)


def _check_pieces(model: ir.Model, segments: list[Segment]) -> None:
    """A piece holds or is fed whatever its nodes read, and is fed only what it takes."""
    for segment in segments:
        wanted = [value for node in segment.nodes for value in node.outputs if value.name]
        twins = [value for node in segment.nodes if (own := node_state(node).twin) for value in own.activations]
        graph = extract(model, segment.carried, wanted, twins).proto.graph
        known = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
        read: set[str] = set()
        for node in graph.node:
            assert set(filter(None, node.input)) <= known
            read.update(node.input)
            known.update(node.output)
        assert {info.name for info in graph.input} <= read | {value.name for value in twins}
        assert {value.name for value in twins} <= known


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graphs())
def test_any_graph_is_cut_so_that_every_piece_has_what_it_reads(make: Graph) -> None:
    model = ir.from_proto(make.model())
    Prepare().call(Region.whole(model))
    linears = find_linears(model.graph)
    targets = {linear.node for linear in linears}
    segments = split(model, targets.__contains__)
    _check_segments(model, segments, targets.__contains__)
    watched = {
        v: OBSERVERS["minmax"](str(v.name)) for node in model.graph for v in (*captured(node), *node.outputs) if v.name
    }
    shown = [value for own in seen_in(segments, watched) for value in own]
    assert sorted(map(id, shown)) == sorted(map(id, watched)), "each value is observed once"
    _walk_and_compare(model, make, segments)


def _walk_and_compare(model: ir.Model, make: Graph, segments: list[Segment]) -> None:
    """Outputs and statistics of the walk are those of the whole graph."""
    feeds = [make.feeds(seed) for seed in range(2)]
    runner, stream = Runner(model, input_plan(model)), Stream([Batch(own, 64) for own in feeds])
    proto, outputs = ir.to_proto(model), [dict[str, Any]() for _ in feeds]
    found, checks = [], Stream(stream.batches)
    for segment in segments:
        groups = by_weights(find_linears(segment.nodes))
        found.append((groups, runner.collect(segment, groups, stream)))
        given = runner.outputs(segment, checks, original=True)
        checks.original = went_on(segment, checks.original, given)
        runner.advance(segment, stream)
        for kept, arrays in zip(outputs, given, strict=True):
            kept.update(arrays)
    del proto.graph.output[:]
    names = list(
        dict.fromkeys([*(str(v.name) for v in model.graph.outputs), *(str(v.name) for _, own in found for v in own)])
    )
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    running = session(proto.SerializeToString())
    whole = [dict(zip(names, run(running, names, own), strict=True)) for own in feeds]
    for kept, arrays in zip(outputs, whole, strict=True):
        for value in model.graph.outputs:
            np.testing.assert_allclose(kept[value.name], arrays[value.name], rtol=1e-3, atol=1e-3)
    for groups, statistics in found:
        for group in groups:
            rows = np.concatenate([arrays[str(value.name)] for arrays in whole for value in group])
            scale = max(1.0, float(np.square(rows).sum(axis=0).max()))
            for value in group:
                assert statistics[value].rows == len(rows)
                np.testing.assert_allclose(statistics[value].gram, rows.T @ rows, rtol=0, atol=1e-3 * scale)


def _checked(model: ir.Model, is_target: Callable[[ir.Node], bool]) -> list[Segment]:
    segments = split(model, is_target)
    _check_segments(model, segments, is_target)
    return segments


@pytest.mark.parametrize(("passes", "options"), [*((own, {}) for own in LISTS), *CHOSEN])
def test_any_graph_goes_through_every_list(
    passes: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("walk.walk", "mixed.switchable"):
        monkeypatch.setattr(f"qcompile.compiler.{module}.split", _checked)

    @settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(graphs())
    def compiled(make: Graph) -> None:
        source, output, data = tmp_path / "m.onnx", tmp_path / "o.onnx", [tmp_path / f"{i}.npz" for i in range(3)]
        onnx.save(make.model(), source)
        for seed, path in enumerate(data):
            np.savez(path, **make.feeds(seed))
        recipe = Recipe(passes=parse_passes(passes), group_size=16, **options)
        refusal = ""
        try:
            compile_model(source, recipe, output=output, calibration=Calibration([str(path) for path in data]))
        except UserError as error:
            refusal = str(error)
        if refusal:
            assert options, refusal
            assert re.search("nothing (would be|to) quantize", refusal), refusal
            return
        sessions = [opened(path) for path in (source, output)]
        names = {given.name for given in sessions[0].get_inputs()}
        feeds = {name: array for name, array in make.feeds(9).items() if name in names}
        wanted, found = (own.run(None, feeds) for own in sessions)
        assert sqnr(wanted, found) > 3

    compiled()
