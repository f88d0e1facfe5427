"""compiler/walk/promises.py: a pass that does not do what it declares, or does what it does not declare, is caught."""

from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, ClassVar

import onnx_ir as ir
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from qcompile.compiler.plan import build
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.walk import promises
from qcompile.models.tiny import tiny_decoder, tiny_mlp
from qcompile.passes.awq import Awq
from qcompile.passes.base import STATIC, IntegerPass, Pass, Region, WalksAgain, contradiction
from qcompile.passes.contract import Fact, Reads, Stage
from qcompile.passes.errors import BrokenPromise, UserError
from qcompile.passes.gptq import Gptq
from qcompile.passes.linears import find_linears
from qcompile.passes.observers.base import Observer
from qcompile.passes.pack import Pack
from qcompile.passes.policy import Policy
from qcompile.passes.prepare import Prepare
from qcompile.passes.qdq.dynamic import Dynamic
from qcompile.passes.qdq.providers import RULES
from qcompile.passes.qdq.weights import SPEC, WeightGrid, WeightStore
from qcompile.passes.rounding import round_to_nearest
from qcompile.passes.spec import PerGroup, QuantSpec
from qcompile.passes.state import remember, set_node, set_weight
from qcompile.passes.table import PASSES

POLICY = Policy(QuantSpec(4, PerGroup(32)), None, None)


def _region() -> Region:
    model = tiny_mlp()
    Prepare().call(Region.whole(model))
    return Region.whole(model)


def _liar(call: Callable[[Pass, Region], None], *, ensures: Set[Fact] = frozenset(), stage: Stage = Stage.WALK) -> Pass:
    made = type("Liar", (Pass,), {"name": "liar", "stage": stage, "ensures": ensures, "call": call})()
    made.policy = POLICY
    return made


def _says(action: str, **detail: Any) -> Callable[[Pass, Region], None]:
    """Decides so on every linear, and does nothing."""

    def call(made: Pass, region: Region) -> None:
        for linear in find_linears(region.nodes):
            made.decide(linear.name, action, "so it says", kind="MatMul", **detail)

    return call


def _on_linears(change: Callable[[Any], None]) -> Callable[[Pass, Region], None]:
    def call(made: Pass, region: Region) -> None:
        for linear in find_linears(region.nodes):
            change(linear)

    return call


def _packs_unchecked(made: Pass, region: Region) -> None:
    own = Pack(POLICY)
    own.call(region)
    made.decisions += own.decisions
    for node in region.model.graph:
        set_node(node, reference=None)


def _integer_unchecked(made: Pass, region: Region) -> None:
    own = Dynamic(Policy(SPEC, None, None))
    own.call(region)
    made.decisions += own.decisions
    for node in region.model.graph:
        set_node(node, twin=None)


def _static_in_words(made: Pass, region: Region) -> None:
    for linear in find_linears(region.nodes):
        remember(linear.node)
        made.decide(linear.name, "quantized", "", format=STATIC, kind="MatMul")


def _names_twice(made: Pass, region: Region) -> None:
    for node in region.model.graph:
        node.name = "same"


def _renames_the_output(made: Pass, region: Region) -> None:
    region.model.graph.outputs[0].name = "other"


def _removes_what_is_read(made: Pass, region: Region) -> None:
    node = region.nodes[0]
    region.nodes = region.nodes[1:]
    region.model.graph.remove(node)


def _reads_what_nobody_gives(made: Pass, region: Region) -> None:
    region.nodes[0].replace_input_with(0, ir.Value(name="nowhere"))


def _turns_round(made: Pass, region: Region) -> None:
    graph = region.model.graph
    first = graph[0]
    graph.remove(first)
    graph.append(first)


LIARS: Mapping[str, tuple[Pass, str]] = {
    "codes": (_liar(_says("rounded"), ensures={Fact.CODES}), "is said to be rounded and has no chosen codes"),
    "outliers": (_liar(_says("marked"), ensures={Fact.OUTLIERS}), "is said to be marked and has no marked outliers"),
    "clip": (_liar(_says("x"), ensures={Fact.CLIP}), "does not say of node .* whether its ranges may be clipped"),
    "undeclared clip": (
        _liar(_on_linears(lambda own: set_weight(own.weight, clip=True))),
        "leaves clipped ranges at node .* and does not ensure them",
    ),
    "undeclared codes": (
        _liar(_on_linears(lambda own: set_weight(own.weight, codes={own.transposed: None})), ensures={Fact.OUTLIERS}),
        "leaves chosen codes at node",
    ),
    "undeclared outliers": (
        _liar(_on_linears(lambda own: set_node(own.node, outliers="some")), ensures={Fact.CODES}),
        "leaves marked outliers at node",
    ),
    "packed": (_liar(_says("quantized"), ensures={Fact.PACKED}), "is said to be packed and is a MatMul"),
    "packed unchecked": (_liar(_packs_unchecked, ensures={Fact.PACKED}), "has no float weight to be checked against"),
    "integer": (_liar(_says("quantized"), ensures={Fact.INTEGER}), "has no float form to be checked against"),
    "integer unchecked": (
        _liar(_integer_unchecked, ensures={Fact.INTEGER}, stage=Stage.BEHIND),
        "has no float form to be checked against",
    ),
    "static": (_liar(_static_in_words, ensures={Fact.STATIC}), "is said to be on a fixed range, and no input"),
    "canonical": (_liar(_names_twice, ensures={Fact.CANONICAL}, stage=Stage.BEFORE), "two nodes have the name 'same'"),
    "output": (_liar(_renames_the_output), "the graph has lost its output"),
    "removed": (_liar(_removes_what_is_read), "of a node that it removed"),
    "removed behind the walk": (_liar(_removes_what_is_read, stage=Stage.BEHIND), "of a node that it removed"),
    "nowhere": (_liar(_reads_what_nobody_gives), "reads nowhere, which nothing gives"),
    "order": (_liar(_turns_round, stage=Stage.BEHIND), "stands before .*, which it reads"),
}


@pytest.mark.parametrize("name", LIARS)
def test_a_liar_is_caught(name: str) -> None:
    liar, message = LIARS[name]
    with pytest.raises(BrokenPromise, match=rf"pass 'liar' breaks a promise: .*{message}.*; no output was written"):
        promises.run(liar, _region())


def test_who_promises_nothing_keeps_it() -> None:
    for name in ("codes", "outliers", "clip", "packed", "integer", "static"):
        silent = _liar(type(LIARS[name][0]).call)
        promises.run(silent, _region())


def test_a_pass_computes_with_one_thread_of_blas() -> None:
    """Whatever stage it is of, and whether it works side by side or not."""
    seen = list[int]()
    told = lambda *_: seen.extend(own["num_threads"] for own in threadpool_info() if own["user_api"] == "blas")  # noqa: E731
    with threadpool_limits(2, "blas"):
        for stage in Stage:
            promises.run(_liar(told, stage=stage), _region())
        told()
    assert seen == [*[1] * len(Stage), 2]


def test_every_pass_keeps_its_promises_on_a_small_graph() -> None:
    for made in (Pack(POLICY), Dynamic(Policy(SPEC, None, None)), Prepare(), Awq(POLICY, round_to_nearest)):
        promises.run(made, _region())
        assert made.decisions or made.name == "prepare"
    promises.run(Gptq(POLICY), _region())


# --- through a whole compile ------------------------------------------------------------------------------------------


class Third(IntegerPass):
    """A quantizer that shares nothing with qcompile's own: every third linear has int8 weights."""

    name: ClassVar[str] = "third"
    ensures: ClassVar[Set[Fact]] = frozenset({Fact.INTEGER})
    families: ClassVar[tuple[str, ...]] = ("MatMul",)
    told: ClassVar[int] = 1

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def integer_nodes(self, model: ir.Model, policy: Policy) -> Any:
        raise NotImplementedError

    def call(self, region: Region) -> None:
        store = WeightStore(region.model, WeightGrid())
        for number, linear in enumerate(find_linears(region.live_nodes())):
            if number % 3 == 0:
                remember(linear.node, weights_only=True)
                own = store.dequantized(linear.node, RULES["MatMul"])
                size = own.quantized.codes.size
                self.decide(linear.name, "quantized", "int8", kind="MatMul", weights=size, weight=own.codes.name)
            elif number % 3 < self.told:
                remember(linear.node, weights_only=True)
                self.decide(linear.name, "quantized", "int8", kind="MatMul", weights=1, weight="none")


class Boaster(Third):
    """It says of some more that they are, too."""

    name: ClassVar[str] = "boaster"
    told: ClassVar[int] = 2


def test_coverage_counts_what_a_new_quantizer_leaves(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "third", Third)
    source = bench.save(tiny_decoder(layers=2))
    for options in ({}, {"min_coverage": 0.95}):
        with pytest.raises(UserError, match=r"only \d\d\.\d% of the MatMul weights .* third has no format for"):
            bench.compile(source, "third", **options)
    report = bench.compile(source, "third", min_coverage=0.1)
    assert report.quantizers == ("third",)
    assert 0.1 < report.coverage < 0.6
    assert len(report.packed("MatMul")) == 5
    assert len(report.skipped("MatMul")) == 10


def test_what_is_said_to_be_quantized_and_is_not_stops_the_compile(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PASSES, "boaster", Boaster)
    source = bench.save(tiny_decoder(layers=1))
    with pytest.raises(BrokenPromise, match=r"pass 'boaster' .*is said to be quantized and reads the float weight"):
        bench.compile(source, "boaster", min_coverage=0)
    assert not list(bench.folder.glob("out/*"))


# --- what classes declare ---------------------------------------------------------------------------------------------


class _Ranges(Pass):
    reads: Set[Reads] = frozenset({Reads.RANGES})


class _Observes(Pass):
    def observed(self, model: ir.Model) -> dict[ir.Value, Observer]:
        return {}


class _Outputs(Pass):
    reads: Set[Reads] = frozenset({Reads.OUTPUTS})


class _Again(WalksAgain):
    reads: Set[Reads] = frozenset()


class _Behind(Pass):
    stage: ClassVar[Stage] = Stage.BEHIND
    reads: Set[Reads] = frozenset({Reads.SCALES})


class _Rest(Pass):
    stage: ClassVar[Stage] = Stage.BEHIND

    def call_rest(self, model: ir.Model) -> None:
        pass


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        (_Ranges, "it reads RANGES and has no method `observed`"),
        (_Observes, "it does not read RANGES and has a method `observed`"),
        (_Outputs, "it reads OUTPUTS and is no WalksAgain"),
        (_Again, "it does not read OUTPUTS and is a WalksAgain"),
        (_Behind, "it reads statistics, which come with segments, and its stage is not WALK"),
        (_Rest, "it has a method `call_rest`, which comes behind the walk, and its stage is not WALK"),
    ],
)
def test_declarations_that_contradict_the_class(kind: type[Pass], told: str) -> None:
    assert contradiction(kind) == told


def _declared() -> Iterator[type[Pass]]:
    yield from PASSES.own()


def test_qcompiles_own_passes_declare_what_they_are() -> None:
    assert {contradiction(kind) for kind in _declared()} == {""}
    made = build(Recipe(passes=parse_passes("outlier(source=norms),qdq")))
    assert [p.reads for p in made] == [frozenset(), frozenset(), frozenset({Reads.RANGES})]
