"""Mixed precision: the few nodes that stay in float, so that the rest may be integer within a bound."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from qcompile.compiler.data.calibration import Data
from qcompile.compiler.data.feeds import InputPlan
from qcompile.compiler.mixed.ranking import Ranked, Ranking, RankingCache
from qcompile.compiler.mixed.sensitivity import Mixture, Steps, finished_distances, stored_bytes
from qcompile.compiler.mixed.work import work_of
from qcompile.compiler.plan import ensuring
from qcompile.compiler.results.mixed import Kept, Mixed
from qcompile.compiler.settings.bound import Bound
from qcompile.passes.base import IntegerPass, Pass, Reason, Region, on_clone
from qcompile.passes.contract import Fact
from qcompile.passes.errors import UserError
from qcompile.passes.policy import Policy
from qcompile.passes.threads import ONE_BLAS_THREAD

# The share of what keeping nodes in float gains that keeping them with int8 weights has to gain.
_ENOUGH = 0.75
# What fewer nodes than a share of the work allows may leave of the noise, in power, over what all of those leave; and
# what is to be gained, or none are kept: 1 dB.
_NEARLY = 1.25


@dataclass(frozen=True)
class Wish:
    """What is to stay in float: so many of the worst nodes, those that gain most for a share of the work, or the fewest
    that a bound takes; one of four is given.

    max_kl: nats a token. min_sqnr: dB. keep_as: "float", "weights" or "auto", see `keep`.
    """

    keep_worst: int | None
    keep_share: float | None
    max_kl: float | None
    min_sqnr: float | None
    keep_as: str

    @property
    def bound(self) -> Bound:
        """What is to hold; empty for what is no bound."""
        return Bound(self.max_kl, self.min_sqnr)


def keep(
    model: ir.Model,
    passes: Sequence[Pass],
    plan: InputPlan,
    data: Data,
    source: Path,
    wish: Wish,
    provider: str,
    progress: Steps,
    cache: RankingCache,
) -> Mixed:
    """Tell the pass behind the walk which nodes to keep in float, as is wished.

    Case 1: keep_worst: so many of the most sensitive nodes.
    Case 2: max_kl, min_sqnr: the fewest, in the order of the ranking, with which the bound holds, of the finished graph
            also on batches held aside, by which nothing was ranked or searched. The distance falls with every node
            kept, but for noise: the bound holds with these and does not with one less.
    Case 3: keep_share: those first whose noise is largest for their work (`work_of`), as far as this share of the work
            and of the weights goes, and no more than are needed for nearly all that they gain. None, where the finished
            graph is not a decibel better for them, on batches held aside as well.
    Case 4: keep_as "weights": MatMuls that are kept have int8 weights all the same, for which ONNX Runtime's CPU
            provider has a kernel (MatMulNBits); it would decode the weight of a Conv in every run. "auto": so, unless
            floats gain clearly more, or they alone meet the bound.
    The graph is not changed. Raises UserError where the model has not what is asked for, or no choice is enough.
    """
    late = integer_pass(passes)
    progress.step("sensitivity: float outputs and switches")
    mixture = Mixture(model, late, plan, data, source, provider)
    ranking = cache.get()
    if ranking is None:
        ranking = mixture.rank(progress)
        cache.put(ranking)
    progress.step("choosing nodes to keep in float")
    choose = _worst if wish.keep_worst is not None else _fewest if wish.keep_share is None else _cheapest
    made = choose(mixture, ranking, wish)
    late.policy = _keeping(late.policy, made.kept)
    ends = (ranking.all_integer, made.distance, mixture.nbytes, made.size)
    told = (made.held, mixture.held_on) if made.held is not None else ()
    return Mixed(ranking.metric, mixture.windows, len(ranking.nodes), made.kept, *ends, *told)


@dataclass(frozen=True)
class _Tried:
    """A finished graph: the nodes kept, its distance from the float model, the bytes of its weights, its distance on
    what is held aside.
    """

    kept: tuple[Kept, ...]
    distance: float
    size: int
    held: float | None = None

    @property
    def worst(self) -> float:
        """The larger of both distances."""
        return max(self.distance, self.held if self.held is not None else 0.0)


def integer_pass(passes: Sequence[Pass]) -> IntegerPass:
    """The pass of a list that makes nodes integer; UserError where there is none."""
    found = next((p for p in passes if isinstance(p, IntegerPass)), None)
    if found is None:
        raise UserError(f"no pass of the list makes nodes integer: add {ensuring(Fact.INTEGER)} to --passes")
    return found


def _worst(mixture: Mixture, ranking: Ranking, wish: Wish) -> _Tried:
    """Case 1."""
    count = wish.keep_worst or 0
    if _nothing_left(mixture, ranking.nodes[:count]):
        raise UserError(f"keep_worst {count} leaves nothing to quantize: the model has {len(ranking.nodes)} nodes")
    return _tried(mixture, ranking, ranking.nodes[:count], wish)


def _cheapest(mixture: Mixture, ranking: Ranking, wish: Wish) -> _Tried:
    """Case 3."""
    nodes = _affordable(mixture, ranking, wish.keep_share or 0.0)
    while nodes and _nothing_left(mixture, nodes):
        nodes = nodes[:-1]
    plain = _tried(mixture, ranking, [], wish)
    if not nodes:
        return plain

    def noise(count: int) -> float:
        return _power(ranking, mixture.distance(mixture.without([own.node for own in nodes[:count]])))

    enough = _NEARLY * noise(len(nodes))
    count = smallest(lambda own: noise(own) <= enough, len(nodes))
    made = _tried(mixture, ranking, nodes[:count], wish)
    told = [(plain.distance, made.distance), (plain.held, made.held)]
    gains = [_power(ranking, a) > _NEARLY * _power(ranking, b) for a, b in told if a is not None and b is not None]
    return made if all(gains) else plain


def _affordable(mixture: Mixture, ranking: Ranking, share: float) -> list[Ranked]:
    """Those whose noise is largest for their work, which together are at most this share of the work of all nodes, and
    of the bytes of their weights.
    """
    work = work_of(mixture.model, [own.node for own in ranking.nodes], mixture.batches[0], mixture.provider)
    worth = sorted(ranking.nodes, key=lambda own: (-_power(ranking, own.effect) / max(work[own.node], 1), own.node))
    left, room = share * sum(work.values()), share * sum(own.nbytes for own in ranking.nodes)
    chosen = []
    for own in worth:
        if own.effect > 0 and work[own.node] <= left and own.nbytes <= room:
            chosen.append(own)
            left, room = left - work[own.node], room - own.nbytes
    return chosen


def _power(ranking: Ranking, distance: float) -> float:
    """A distance as what adds up over nodes: KL does, of relative errors the squares."""
    return distance if ranking.metric == "KL" else distance**2


def _fewest(mixture: Mixture, ranking: Ranking, wish: Wish) -> _Tried:
    """Case 2."""
    told, bound = wish.bound, wish.bound.distance
    most, nodes = len(ranking.nodes), [ranked.node for ranked in ranking.nodes]
    if ranking.all_float > bound:
        raise UserError(
            f"{told} cannot be met: with all {most} nodes in float it is {mixture.effect.told(ranking.all_float)} "
            f"({mixture.windows}); the passes before change that much"
        )
    count = smallest(lambda k: mixture.distance(mixture.without(nodes[:k])) <= bound, most)
    tried: dict[int, _Tried] = {}

    def holds(more: int) -> bool:
        tried[more] = _tried(mixture, ranking, ranking.nodes[: count + more], wish, bound)
        return tried[more].worst <= bound

    # More, where values that shared a scale went apart, or what is held aside asks for it.
    more = smallest(holds, most - count)
    if more not in tried:
        holds(more)
    if _nothing_left(mixture, ranking.nodes[: count + more]):
        raise UserError(
            f"{told} is met only with all {most} nodes in float: nothing would be quantized; with none of them it is "
            f"{mixture.effect.told(ranking.all_integer)} ({mixture.windows})"
        )
    return tried[more]


def _nothing_left(mixture: Mixture, kept: Sequence[Ranked]) -> bool:
    """Whether no node is integer with these kept: operators between integer ones go with them."""
    return not mixture.without([ranked.node for ranked in kept]).nodes


def smallest(holds: Callable[[int], bool], most: int) -> int:
    """The smallest number of 0 … most that holds, where every number above one that holds does; `most` is not asked.

    Asks for 0, 1, 2, 4, … first: few are enough as a rule.
    """
    low, high = -1, 0
    while high < most and not holds(high):
        low, high = high, max(1, 2 * high)
    high = min(high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _tried(mixture: Mixture, ranking: Ranking, nodes: Sequence[Ranked], wish: Wish, bound: float = 0.0) -> _Tried:
    """The graph that the pass makes with these nodes kept; Case 4."""
    late = mixture.late
    light = _kept(mixture, ranking, nodes, weights_only=late.light and wish.keep_as != "float")
    made = _finished(mixture, light)
    if wish.keep_as != "auto" or made.worst <= bound or not any(own.weights_only for own in light):
        return made
    in_float = _finished(mixture, _kept(mixture, ranking, nodes, weights_only=False))
    gains = [ranking.all_integer - tried.distance for tried in (made, in_float)]
    return in_float if in_float.worst <= bound or gains[0] < _ENOUGH * gains[1] else made


def _finished(mixture: Mixture, kept: tuple[Kept, ...]) -> _Tried:
    made, clone = on_clone(mixture.late, mixture.model)
    made.policy = _keeping(made.policy, kept)
    with ONE_BLAS_THREAD:
        made.call(Region.whole(clone))
    own, held = finished_distances(mixture, clone)
    return _Tried(kept, own, stored_bytes(clone), held)


def _kept(mixture: Mixture, ranking: Ranking, nodes: Sequence[Ranked], *, weights_only: bool) -> tuple[Kept, ...]:
    """Nodes with their ranks; weights_only: those with a kernel for that."""
    ranks = {own: rank for rank, own in enumerate(ranking.nodes, 1)}
    return tuple(
        Kept(
            own.node,
            ranks[own],
            mixture.effect.told(own.effect),
            weights_only and own.operator == "MatMul" and own.weights > 0,
        )
        for own in sorted(nodes, key=ranks.__getitem__)
    )


def _keeping(policy: Policy, kept: Sequence[Kept]) -> Policy:
    """The policy with these nodes kept, and what the report says of each."""
    reasons = {own: Reason("kept for its sensitivity", f"rank {own.rank}, {own.effect} alone") for own in kept}
    in_float = {own.node: told for own, told in reasons.items() if not own.weights_only}
    return replace(policy, kept=in_float, weights_only={o.node: t for o, t in reasons.items() if o.weights_only})
