"""The pass itself: the small passes of `order`, one after another."""

from collections.abc import Mapping, Set
from functools import partial
from typing import Any, ClassVar

import onnx_ir as ir

from qcompile.passes.base import Decision, Pass, Region
from qcompile.passes.contract import WEIGHTS, Fact, Stage
from qcompile.passes.errors import UserError
from qcompile.passes.near import did_you_mean
from qcompile.passes.prepare.opset import MAX_OPSET, MIN_OPSET
from qcompile.passes.prepare.order import ORDER, SMALL, Small

_NONE = "none"


class Prepare(Pass):
    """Canonicalize the graph: opset 21, weights as initializers, Gemm as MatMul and Add, no copies.

    A list of small passes (`order`), each of which `without` switches off: names with + between them. Behind all of
    them a product is a MatMul with a constant (K, N) weight or with a Transpose of a table, and a lookup a Gather of
    rows of one; inputs and outputs keep names, order and types; weights keep their types and are never all in memory.
    `divide`, `name_hard_swishes`, `fold_convolutions`, `narrow_doubles` and `take_apart` round elsewhere than before,
    or less; scores that are NaN stay so behind `remove_guards`. The others keep the arithmetic.
    """

    name: ClassVar[str] = "prepare"
    stage: ClassVar[Stage] = Stage.BEFORE
    needs: ClassVar[Set[Fact]] = frozenset()
    ensures: ClassVar[Set[Fact]] = WEIGHTS | {Fact.PARTS}
    parts: ClassVar[Mapping[str, str]] = {small.name: small.summary for small in SMALL.values()}

    def __init__(self, *, opset: int = 21, without: str = _NONE) -> None:
        super().__init__()
        if not MIN_OPSET <= opset <= MAX_OPSET:
            raise UserError(f"prepare: opset must be {MIN_OPSET} to {MAX_OPSET}, got {opset}")
        self.opset = opset
        self.without = _names(without)

    def call(self, region: Region) -> None:
        """Rewrite the whole model in place."""
        changed: dict[str, object] = {}
        for name in self.without:
            self.decide("", "skipped", f"switched off by prepare(without={name})", by=name)
        for turn in ORDER:
            if not turn.only_after or any(map(changed.get, turn.only_after)):
                small = SMALL[turn.name]
                changed[small.name] = self._run(small, region)
        region.nodes = list(region.model.graph)

    def _run(self, small: Small, region: Region) -> object:
        model, given = region.model, {"opset": self.opset, "ask": region.ask}
        if small.name not in self.without:
            return small(model, decide=partial(self.decide, by=small.name), **given)
        if small.ground:
            self._judge(small, model.clone() if small.silent else model, given)
        return 0

    def _judge(self, small: Small, model: ir.Model, given: Mapping[str, Any]) -> None:
        """Raise UserError where a small pass that later code relies on is off and would have done something."""
        found: list[Decision] = []
        small(model, decide=lambda *told, **_: found.append(Decision(*told)), **given)
        for decision in found:
            if decision.action not in ("kept", "skipped"):
                told = f"this model needs it ({decision.reason}), because {small.ground}; leave it on"
                raise UserError(f"prepare(without={small.name}): {told}")


def _names(without: str) -> tuple[str, ...]:
    """The small passes of a list with + between them; UserError for one that there is not."""
    names = () if without == _NONE else tuple(dict.fromkeys(name.strip() for name in without.split("+")))
    for name in names:
        if name not in SMALL:
            hint = did_you_mean(name, SMALL, "`qcompile passes prepare` lists them", 3, alike=0.4)
            raise UserError(f"prepare: there is no small pass {name!r} to do without; {hint}")
    return names
