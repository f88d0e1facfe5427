"""The pass `pack` where there are statistics or codes already: which rounding it takes, and what it reports."""

from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest

from qcompile.models.tiny import tiny_mlp
from qcompile.passes.affine import Quantized
from qcompile.passes.base import Decision, Region
from qcompile.passes.gptq import ErrorCompensated, round_by_rows
from qcompile.passes.linears import Linear, find_linears
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.ranges import ByWeight, Ranges
from qcompile.passes.rounding import round_to_nearest, round_with_clip
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.state import node_state, set_weight, weight_state
from qcompile.passes.statistics import Statistics

SPEC = QuantSpec(4, PerGroup(16))


def _region() -> tuple[Region, Linear, Statistics]:
    """A model's first linear with statistics of its input."""
    model = tiny_mlp()
    linear = find_linears(model.graph)[0]
    k = linear.shape[0]
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((200, k)) @ rng.standard_normal((k, k))).astype(np.float32)
    region, statistics = Region(model, [linear.node]), Statistics(200, x.T @ x, np.abs(x).max(axis=0))
    region.statistics[linear.activation] = statistics
    return region, linear, statistics


def _pack(region: Region, spec: QuantSpec = SPEC) -> Decision:
    step = Pack(Policy(spec, None, None))
    step.call(region)
    (decision,) = step.decisions
    return decision


def _stored(linear: Linear, quantized: Quantized) -> None:
    """The node's operands are exactly this quantized weight."""
    codes, scale, *zero_point = (value.const_value.numpy() for value in linear.node.inputs[1:])
    np.testing.assert_array_equal(codes.astype(np.int16), quantized.codes.astype(np.int16))
    np.testing.assert_array_equal(scale.astype(np.float32), quantized.qparams.scale)
    for array in zero_point:
        np.testing.assert_array_equal(array.astype(np.float32), quantized.qparams.zero_point)


@pytest.mark.parametrize("spec", [SPEC, QuantSpec(4, PerGroup(40), symmetric=True, scale_dtype=np.float16)], ids=str)
def test_statistics_bring_the_clip_search(spec) -> None:
    region, linear, statistics = _region()
    w = linear.read()
    wanted = round_with_clip(w, spec, statistics)
    _pack(region, spec)
    _stored(linear, wanted)


@pytest.mark.parametrize("ranges", get_args(Ranges))
@pytest.mark.parametrize("given", ["nothing", "statistics", "codes"])
def test_ranges_that_choose_nothing_are_told(ranges: Ranges, given: str) -> None:
    """What they would choose is not stored then, and the decision says by what the grid is chosen."""
    region, linear, statistics = _region()
    w = linear.read()
    wanted = {"nothing": ByWeight(ranges)(w, SPEC, None), "statistics": round_with_clip(w, SPEC, statistics)}
    if given != "statistics":
        region.statistics.clear()
    if given == "codes":
        set_weight(linear.weight, codes={False: round_with_clip(w, SPEC, statistics)})
    step = Pack(Policy(SPEC, None, None), ranges=ranges)
    step.call(region)
    _stored(linear, wanted["nothing" if given == "nothing" else "statistics"])
    told = {"nothing": "", "statistics": "by statistics of its input", "codes": "by the pass before"}[given]
    told = "" if ranges == "auto" or not told else f": {told}, not by ranges={ranges}, which is for weights without"
    assert [own.reason for own in step.decisions] == [f"{SPEC}{told}"]


def test_copies_of_one_row_are_followed_as_gptq_does() -> None:
    region, linear, _ = _region()
    w = linear.read()
    x = np.tile(np.random.default_rng(1).standard_normal((1, len(w))), (64, 1)).astype(np.float32)
    known = Statistics(64, x.T @ x, np.abs(x).max(axis=0), x, np.zeros(len(w), np.float32))
    region.statistics[linear.activation] = known
    wanted = round_by_rows(w, SPEC, known)
    assert not np.array_equal(wanted.codes, round_with_clip(w, SPEC, known).codes)
    _pack(region)
    _stored(linear, wanted)


def test_awq_may_forbid_clipping() -> None:
    region, linear, _ = _region()
    w = linear.read()
    set_weight(linear.weight, clip=False)
    _pack(region)
    _stored(linear, round_to_nearest(w, SPEC, None))


def test_codes_of_gptq_are_written_as_they_are() -> None:
    region, linear, statistics = _region()
    w = linear.read()
    chosen = ErrorCompensated()(w, SPEC, statistics)
    assert (chosen.codes != round_with_clip(w, SPEC, statistics).codes).any()
    set_weight(linear.weight, codes={False: chosen})
    _pack(region)
    _stored(linear, chosen)
    assert not weight_state(linear.weight).codes


def test_codes_for_another_grid_are_not_used() -> None:
    region, linear, statistics = _region()
    w = linear.read()
    set_weight(linear.weight, codes={False: ErrorCompensated()(w, QuantSpec(4, PerGroup(32)), statistics)})
    _pack(region)
    _stored(linear, round_with_clip(w, SPEC, statistics))


def test_without_statistics_rounding_is_plain() -> None:
    region, linear, _ = _region()
    w = linear.read()
    region.statistics.clear()
    _pack(region)
    _stored(linear, round_to_nearest(w, SPEC, None))


def test_the_node_keeps_its_reference_for_verification() -> None:
    region, linear, _ = _region()
    w = linear.read()
    _pack(region)
    kept = node_state(linear.node).reference
    assert kept is not None
    reference, quantized = kept
    np.testing.assert_array_equal(reference, w)
    _stored(linear, quantized)


def test_nodes_outside_the_region_are_left_alone() -> None:
    region, linear, _ = _region()
    outside = [node.op_type for node in region.model.graph if node is not linear.node]
    _pack(region)
    assert [node.op_type for node in region.model.graph if node is not linear.node] == outside
    assert isinstance(linear.node, ir.Node)
    assert linear.node.op_type == "MatMulInt4"
