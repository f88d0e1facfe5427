"""facts/census.py, coverage.py: every large float constant is quantized or has its reason; too little fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphs.table import Graph
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from qcompile.compiler import Calibration, Recipe, compile_model, parse_passes
from qcompile.compiler.facts.census import LEAST, census
from qcompile.compiler.report.inspection import inspect
from qcompile.compiler.results.report import Report
from qcompile.models.tiny import tiny_branch, tiny_decoder
from qcompile.passes.base import Region
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_linears
from qcompile.passes.pack import Pack
from qcompile.passes.table import PASSES

D = 32
LISTS = ["pack", "smooth,qdq", "dynamic", "prepare"]


def _linear(make: Graph, x: str) -> str:
    return make.linear(x, D, D)


def _gemm(make: Graph, x: str) -> str:
    return make.one("Gemm", x, make.floats(D, D), make.floats(D), transB=1)


def _left(make: Graph, x: str) -> str:
    return make.one(
        "Transpose", make.one("MatMul", make.floats(D, D), make.one("Transpose", x, perm=[1, 0])), perm=[1, 0]
    )


def _einsum(make: Graph, x: str) -> str:
    return make.one("Einsum", x, make.floats(D, D), equation="bi,ij->bj")


def _fused(make: Graph, x: str) -> str:
    return make.one("FusedMatMul", x, make.floats(D, D), domain="com.microsoft", transB=1)


def _batched(make: Graph, x: str) -> str:
    y = make.one("MatMul", x, make.floats(1, D, D, scale=0.2))
    return make.one("Squeeze", y, make.constant(np.array([0])))


def _convolution(make: Graph, x: str) -> str:
    axes = make.constant(np.array([2]))
    return make.one("Squeeze", make.one("Conv", make.one("Unsqueeze", x, axes), make.floats(D, D, 1, scale=0.2)), axes)


def _recurrent(make: Graph, x: str) -> str:
    axes = make.constant(np.array([0]))
    weights = make.floats(1, 4 * D, D, scale=0.2), make.floats(1, 4 * D, D, scale=0.2)
    (y,) = make.op("LSTM", make.one("Unsqueeze", x, axes), *weights, hidden_size=D)
    return make.one("Squeeze", y, make.constant(np.array([0, 1])))


def _norm(make: Graph, x: str) -> str:
    y = make.one("MatMul", x, make.floats(D, LEAST, scale=0.2))
    y = make.one("LayerNormalization", y, make.floats(LEAST), make.floats(LEAST), axis=-1)
    return make.one("MatMul", y, make.floats(LEAST, D))


def _branch(make: Graph, x: str) -> str:
    """Another weight for each sign of the sum, in two bodies."""
    condition = make.one("Greater", make.one("ReduceSum", x, keepdims=0), make.constant(np.float32(0)))
    bodies = {}
    for name in ("then_branch", "else_branch"):
        y, w = make.name("y"), make.floats(D, D)
        node = helper.make_node("MatMul", [x, w], [y], name=f"n_{y}")
        out = helper.make_tensor_value_info(y, TensorProto.FLOAT, None)
        bodies[name] = helper.make_graph([node], name, [], [out])
    return make.one("If", condition, **bodies)


PARTS: dict[str, Callable[[Graph, str], str]] = {
    part.__name__: part
    for part in (_linear, _gemm, _left, _einsum, _fused, _batched, _convolution, _recurrent, _norm, _branch)
}


def _compiled(make: Graph, folder: Path, passes: str, **options: Any) -> Report:
    source = folder / "m.onnx"
    onnx.save(make.model(), source)
    np.savez(folder / "c.npz", **make.feeds(0))
    recipe = Recipe(passes=parse_passes(passes), group_size=32, **options)
    calibration = Calibration([str(folder / "c.npz")])
    return compile_model(source, recipe, output=folder / "out" / "m.onnx", calibration=calibration)


def _accounted(report: Report) -> int:
    """Elements of all weights that some decision names, each once."""
    names = {d.detail["weight"]: d.detail["weights"] for d in report.quantizing if d.detail.get("weights")}
    return sum(names.values())


@settings(max_examples=16, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=5), st.sampled_from(LISTS))
def test_every_constant_has_its_decision(
    tmp_path_factory: pytest.TempPathFactory, parts: list[str], passes: str
) -> None:
    """Whatever the graph and the list: as many elements in decisions as in large float constants of the source."""
    make = Graph()
    x = make.input("b", D)
    for part in parts:
        x = PARTS[part](make, x)
    make.output(x)
    report = _compiled(make, tmp_path_factory.mktemp("coverage"), passes, min_coverage=0)
    wanted = sum(int(np.prod(c.dims)) for c in make.constants if np.prod(c.dims) >= LEAST)
    assert _accounted(report) == wanted, report.quantizing
    assert all(d.reason for d in report.quantizing)


@pytest.mark.parametrize("passes", LISTS)
def test_graphs_with_everything_at_once(tmp_path: Path, passes: str) -> None:
    make = Graph()
    x = make.input("b", D)
    for part in PARTS.values():
        x = part(make, x)
    make.output(x)
    report = _compiled(make, tmp_path, passes, min_coverage=0)
    assert _accounted(report) == sum(int(np.prod(c.dims)) for c in make.constants if np.prod(c.dims) >= LEAST)
    found = inspect(tmp_path / "out" / "m.onnx").shares
    assert found == pytest.approx({family: report.share(family) for family in ("MatMul", "Conv")}), (
        "the file says so, too"
    )


class Half(Pack):
    """A quantizer of somebody else, which skips two thirds of the linears without a word."""

    name: ClassVar[str] = "half"

    def call(self, region: Region) -> None:
        linears = find_linears(region.live_nodes())
        nodes = {linear.node for linear in linears[::3]}
        super().call(Region(region.model, [node for node in region.nodes if node in nodes], region.statistics))


def test_a_new_quantizer_is_held_to_what_it_left(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "half", Half)
    source = bench.save(tiny_decoder())
    for options in ({"min_coverage": 0.95}, {}):
        with pytest.raises(
            UserError, match=r"only \d\d\.\d% of the MatMul weights .*left in float: half has no format"
        ):
            bench.compile(source, "half", **options)
    report = bench.compile(source, "half", min_coverage=0.1)
    assert report.quantizers == ("half",)
    assert 0.1 < report.coverage < 0.9
    assert len(report.skipped("MatMul")) > 5


def _cnn() -> Graph:
    make = Graph()
    h = make.one("Relu", make.one("Conv", make.input("b", 3, 12, 12), make.floats(D, 3, 5, 5)))
    h = make.one("Flatten", make.one("GlobalAveragePool", make.one("Conv", h, make.floats(D, D, 3, 3))))
    make.output(make.linear(h, 10, D))
    return make


def _small() -> Graph:
    """A convolution below the size of the census, whose decision tells no size."""
    make = Graph()
    make.output(make.one("ConvTranspose", make.input("b", 3, 8, 8), make.floats(3, 4, 3, 3)))
    return make


def _lstm() -> Graph:
    make = Graph()
    make.output(_recurrent(make, make.input("b", D)))
    return make


def _nothing() -> Graph:
    make = Graph()
    make.output(make.one("Relu", make.input("b", D)))
    return make


def _patches() -> Graph:
    """Patches by a convolution of 2 % of the weights, then a wide linear, as in a vision transformer."""
    make = Graph()
    h = make.one("Conv", make.input("b", 3, 8, 8), make.floats(D, 3, 8, 8, scale=0.1), strides=[8, 8])
    h = make.linear(make.one("Flatten", h), 4096, D)
    make.output(make.linear(make.one("Relu", h), D, 4096))
    return make


@pytest.mark.parametrize(
    ("build", "passes", "least", "message"),
    [
        (_cnn, "pack", None, r"MatMul and Conv weights .*Conv weights \(9\d\.\d% of all\); --passes smooth,equalize,"),
        (_cnn, "pack", 0.9, r"only 0\.0% of the Conv weights were quantized, below --min-coverage 0\.9; "),
        (_small, "pack", None, r"format for ConvTranspose weights .*; --passes smooth,equalize,qdq,bias_corre"),
        (_nothing, "pack", None, r"pack quantizes nothing of this model: it has no constant weight; no output was"),
        (_patches, "pack", 0.9, r"only 0\.0% of the Conv weights were quantized"),
        (_cnn, "smooth,qdq,bias_correction", 1.0, None),
        (_cnn, "dynamic", 1.0, None),
        (_small, "dynamic", 1.0, None),
        (_cnn, "pack", 0, None),
        (_nothing, "pack", 0, None),
        (_patches, "pack", None, None),
        (_patches, "dynamic", None, None),
        (_lstm, "pack", 0, None),
    ],
)  # fmt: skip
def test_what_is_enough(
    tmp_path: Path, build: Callable[[], Graph], passes: str, least: float | None, message: str | None
) -> None:
    if message is None:
        _compiled(build(), tmp_path, passes, min_coverage=least)
        return
    with pytest.raises(UserError, match=message):
        _compiled(build(), tmp_path, passes, min_coverage=least)
    assert not list((tmp_path / "out").glob("*"))


def test_what_the_user_keeps_does_not_count(tmp_path: Path) -> None:
    report = _compiled(_cnn(), tmp_path, "pack", exclude=("Conv",), min_coverage=1.0)
    assert (report.share("MatMul"), report.share("Conv"), report.coverage) == (1.0, None, 1.0)
    assert report.elements("Conv", "kept") == D * 3 * 25 + D * D * 9
    report = _compiled(_cnn(), tmp_path, "pack", exclude=("*",), min_coverage=1.0)
    assert (report.coverage, report.elements("MatMul", "kept")) == (1.0, 10 * D)


def test_a_small_weight_that_the_user_keeps_does_not_count_either(tmp_path: Path) -> None:
    make = Graph()
    h = make.one("Conv", make.input("b", 3, 12, 12), make.floats(D, 3, 1, 1))
    make.output(make.linear(make.one("Flatten", make.one("GlobalAveragePool", h)), 10, D))
    report = _compiled(make, tmp_path, "pack", exclude=("Conv",), min_coverage=1.0)
    assert (report.share("MatMul"), report.share("Conv")) == (1.0, None)


def test_a_weight_of_a_body_that_the_main_graph_shares_counts_twice() -> None:
    """Packed for one reader, still in the file for the other."""
    found = census(tiny_branch(), least=1)
    shared = next(constant for constant in found if constant.name == "outer.weight")
    assert {reader.owner.op_type if reader.owner else "" for reader in shared.readers} == {"", "If"}


def test_the_census_looks_through_what_only_moves() -> None:
    make = Graph()
    x, w = make.input("b", D), make.floats(D, D)
    half, scale = make.one("Cast", make.floats(D, D), to=10), make.floats(D)
    seen = make.one("Mul", make.one("Cast", half, to=1), scale)
    y = make.one("MatMul", make.one("MatMul", x, make.one("Transpose", w, perm=[1, 0])), seen)
    codes = make.constant(np.ones((2 * LEAST, D), np.int8))
    back = make.one("DequantizeLinear", codes, make.floats(2 * LEAST), axis=0)
    experts = make.one(
        "Gather", make.floats(4, D, D), make.input(dtype=np.int64, draw=lambda r, s: r.integers(0, 4, s))
    )
    y = make.one("MatMul", make.one("MatMul", y, make.one("Transpose", back, perm=[1, 0])), make.floats(2 * LEAST, D))
    make.output(make.one("MatMul", y, experts))
    found = census(ir.serde.deserialize_model(make.model()))
    assert [(c.size, c.family) for c in found] == [
        (LEAST, "MatMul"), (LEAST, "MatMul"), (2 * LEAST * D, "MatMul"), (4 * LEAST, "MatMul"),
    ], "neither codes nor their scales nor a factor of a column"  # fmt: skip


def test_the_census_looks_through_choices() -> None:
    """Of an If between weights, and of rows that a computed end cuts off, the product behind is the reader."""
    make = Graph()
    x, choice = make.input("b", D), make.input(dtype=bool)
    weights = [make.floats(D, D) for _ in range(3)]
    told = onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, None)
    names = ("then_branch", "else_branch")
    branches = {
        name: onnx.helper.make_graph([onnx.helper.make_node("Identity", [w], ["w"])], name, [], [told])
        for name, w in zip(names, weights, strict=False)
    }
    end = make.one("Slice", make.one("Shape", x), *(make.constant(np.array([n])) for n in (0, 1)))
    cut = make.one("Slice", weights[2], make.constant(np.array([0])), end)
    y = make.one("MatMul", x, make.one("If", choice, **branches))
    make.output(make.one("MatMul", y, make.one("Transpose", cut, perm=[1, 0])))
    found = census(ir.serde.deserialize_model(make.model()))
    assert {c.name: [r.node.op_type for r in c.readers] for c in found} == {key: ["MatMul"] for key in weights}


def test_the_census_is_linear_in_a_chain_of_constants() -> None:
    make = Graph()
    value = make.floats(D, D)
    for _ in range(5000):
        value = make.one("Neg", value)
    make.output(make.one("MatMul", make.input("b", D), value))
    (found,) = census(ir.serde.deserialize_model(make.model()))
    assert [reader.node.op_type for reader in found.readers] == ["MatMul"]


def test_a_bias_is_no_weight_of_its_product(tmp_path: Path) -> None:
    """1,024 biases of an LSTM are told of, and belong to no share."""
    make = Graph()
    axes, x = make.constant(np.array([0])), make.input("b", D)
    weights = make.floats(1, LEAST, D, scale=0.1), make.floats(1, LEAST, LEAST // 4, scale=0.1)
    bias = make.floats(1, 2 * LEAST, scale=0.1)
    (y,) = make.op("LSTM", make.one("Unsqueeze", x, axes), *weights, bias, hidden_size=LEAST // 4)
    make.output(make.linear(make.one("Squeeze", y, make.constant(np.array([0, 1]))), D, LEAST // 4))
    report = _compiled(make, tmp_path, "prepare", min_coverage=0)
    assert report.elements("MatMul", "skipped") == LEAST * D + LEAST * LEAST // 4 + D * LEAST // 4
    assert report.elements("other", "skipped") == 2 * LEAST


def test_weights_that_are_computed_have_no_better_list(tmp_path: Path) -> None:
    """A convolution whose weight is quantized already: `smooth,qdq,bias_correction` is not for it either."""
    make = Graph()
    codes, scale = make.constant(np.ones((8, 8, 3, 3), np.int8)), make.constant(np.float32(0.1))
    weight = make.one("DequantizeLinear", codes, scale)
    make.output(make.one("Conv", make.input(1, 8, 6, 6), weight))
    with pytest.raises(UserError, match="its weight is quantized already") as refused:
        _compiled(make, tmp_path, "pack")
    assert "--passes" not in str(refused.value)
