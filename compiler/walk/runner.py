"""Activations that travel from segment to segment: few arrays a batch, put aside; nothing else is kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.compiler.data.feeds import Batch, InputPlan, PastPair
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.facts.memory import give_back
from qcompile.compiler.files.disk_arrays import BUDGET, Spill
from qcompile.compiler.measure.phases import phase
from qcompile.compiler.measure.randomness import draws
from qcompile.compiler.walk.extract import Piece, extract, reads
from qcompile.compiler.walk.opened import Opened
from qcompile.compiler.walk.segments import Segment
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.gram import UNIT, Gram
from qcompile.passes.statistics import Statistics
from qcompile.passes.threads import ONE_BLAS_THREAD
from qcompile.passes.workers import Here, Workers, elsewhere, in_order

# By the name of a carried value: its array for each batch.
Carried = Mapping[str, Sequence[npt.NDArray[Any]]]


@dataclass
class Stream:
    """Batches on their way through the graph.

    quantized: the carried activations of each batch behind the segments rewritten so far (none before the first).
    original: the same activations in the float graph, where they are needed (for checks).
    presents: caches of the batches that a later one follows, as the last run left them; of those that nothing will
    read any more, the shape alone.
    """

    batches: Sequence[Batch]
    quantized: Carried = field(default_factory=dict)
    original: Carried = field(default_factory=dict)
    presents: dict[int, Arrays] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Without the batches: who goes on has them, and gives them anew."""
        return {**vars(self), "batches": ()}

    def followed(self) -> dict[int, int]:
        """By the number of a batch whose caches are read: the last batch that reads them."""
        return {batch.follows: i for i, batch in enumerate(self.batches) if batch.follows is not None}


@dataclass
class Beside:
    """A float stream that goes along with another one. outputs: by name, where graph outputs are put aside."""

    stream: Stream
    outputs: Mapping[str, Spill]

    def joined(self, first: Stream) -> Stream:
        """Both as one: the batches of the first, then its own, which follow none."""
        names = first.quantized.keys() & self.stream.quantized.keys()
        carried = {name: _Chain(first.quantized[name], self.stream.quantized[name]) for name in names}
        return Stream([*first.batches, *self.stream.batches], carried, presents=first.presents)

    def behind(self, segment: Segment) -> "_Behind":
        """What takes in its results behind a segment."""
        made = [str(value.name) for value in segment.made]
        return _Behind({name: Spill(BUDGET // len(made)) for name in made}, self.outputs)


@dataclass(frozen=True)
class _Behind:
    """Arrays of a batch after the other: those that are carried on, and graph outputs."""

    carried: Mapping[str, Spill]
    outputs: Mapping[str, Spill]

    def append(self, found: Arrays) -> None:
        for name, spill in (*self.carried.items(), *self.outputs.items()):
            if name in found:
                spill.append(found[name])


class _Chain(Sequence[npt.NDArray[Any]]):
    """Two sequences, one behind the other; nothing is copied."""

    def __init__(self, first: Sequence[npt.NDArray[Any]], second: Sequence[npt.NDArray[Any]]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, index: Any) -> Any:
        count = len(self._first)
        return self._first[index] if index < count else self._second[index - count]


@dataclass
class Runner:
    """Runs pieces of one model over streams; optimize: whether ONNX Runtime may rewrite them."""

    model: ir.Model
    plan: InputPlan
    provider: str = "cpu"
    progress: Callable[[int], None] = field(default=lambda rows: None)
    optimize: bool = True

    def collect(
        self, segment: Segment, activations: Iterable[Sequence[ir.Value]], stream: Stream
    ) -> dict[ir.Value, Statistics]:
        """Statistics of the segment's activations on what the graph, rewritten up to here, feeds it.

        activations: in groups that share one Gram matrix, of the rows of all its members. One without a row (of an
        expert that no token was sent to) has none.
        """
        groups = {tuple(group): Gram(*(str(value.name) for value in group)) for group in activations}
        pairs = [(value, own) for group, own in groups.items() for value in group]
        self.observe(segment, {}, stream, more=pairs)
        del pairs
        return _read(groups)

    @phase("statistics")
    def observe(
        self,
        segment: Segment,
        observers: Mapping[ir.Value, Observer],
        stream: Stream,
        *,
        more: Sequence[tuple[ir.Value, Observer]] = (),
    ) -> None:
        """Let observers see the activations they are for, batch by batch; `more` may be for the same ones."""
        presents = self._presents(segment) if stream.followed() else []
        pairs = [*observers.items(), *more]
        every = list(dict.fromkeys(observer for _, observer in pairs))
        piece = extract(self.model, segment.carried, presents, [value for value, _ in pairs])
        for observer in every:
            observer.append(piece.proto.graph)
        others, grams = self._others(piece, stream), [own for own in every if isinstance(own, Gram)]
        with ONE_BLAS_THREAD:
            if others is not None and len(grams) == len(every):
                self._merge(others, piece, segment, stream, grams)
                return
            for results in self._run(piece, segment, stream, others):
                for observer in every:
                    observer.update(results)

    @phase("advance")
    def advance(self, segment: Segment, stream: Stream, outputs: Mapping[str, Spill] | None = None) -> None:
        """Advance the quantized stream through the segment as it is now. outputs: where graph outputs are put aside.

        By native kernels where there are any: what is only observed behind them need not be the bodies' very numbers,
        and with activations of 16 bits they take half of the time.
        """
        made = [str(value.name) for value in segment.made]
        ends = [value for value in self._outputs(segment) if value.name in (outputs or {})]
        if made or ends:
            presents = self._presents(segment) if stream.followed() else []
            piece = extract(self.model, segment.carried, list(dict.fromkeys([*segment.made, *ends, *presents])))
            piece.kernels = "auto"
            carried = {name: Spill(BUDGET // len(made)) for name in made}
            aside = [*carried.items(), *((str(v.name), outputs[str(v.name)]) for v in ends if outputs)]
            for results in self._run(piece, segment, stream, self._others(piece, stream)):
                for name, spill in aside:
                    spill.append(results[name])
            stream.quantized = {**stream.quantized, **carried}
        stream.quantized = _kept(segment, stream.quantized)

    def outputs(
        self,
        segment: Segment,
        stream: Stream,
        *,
        original: bool,
        prepare: Callable[[Piece], Sequence[str]] | None = None,
        each: Callable[[Arrays], None] = lambda found: None,
        beside: "Beside | None" = None,
    ) -> list[Arrays]:
        """Everything the segment gives for each batch: what it makes for later ones, its graph outputs, and what
        `prepare` adds, which may read all that its nodes or their float twins read.

        original: feed it the float stream; float weights, which run once or twice, stay mapped. each: is shown what a
        batch gives as soon as it is there, and may take from it what `prepare` added. beside: goes through the segment,
        too, in the same session.
        """
        wanted = list(dict.fromkeys([*segment.made, *self._outputs(segment)]))
        inside = _computed(segment) if prepare is not None else ()
        piece = extract(self.model, segment.carried, wanted, inside)
        if prepare is not None:
            piece.outputs.extend(prepare(piece))
        piece.prepack = not original
        if original and self.provider == "cpu":
            piece.unturn()
        carried = stream.original if original else stream.quantized
        source = Stream(stream.batches, carried, presents=stream.presents)
        results = list[Arrays]()
        if beside is None:
            for found in self._run(piece, segment, source):
                each(found)
                results.append(found)
            give_back()
            return results
        after = beside.behind(segment)
        for number, found in enumerate(self._run(piece, segment, beside.joined(source))):
            if number < len(stream.batches):
                each(found)
                results.append(found)
            else:
                after.append(found)
        give_back()
        beside.stream.quantized = _kept(segment, {**beside.stream.quantized, **after.carried})
        return results

    def _past(self, pair: PastPair, presents: Arrays) -> npt.NDArray[Any]:
        """The cache that a decode step continues. One that a later segment makes is read here for its shape only (a
        mask's length, say): zeros of that shape stand for it.
        """
        if pair.present in presents:
            return presents[pair.present]
        there = [other for other in self.plan.past if other.present in presents]
        known = next((other for other in there if not other.window), there[0])
        made = presents[known.present]
        shape = list(pair.empty(made.shape[0]).shape)
        shape[pair.axis] = pair.window or made.shape[known.axis]
        return np.zeros(shape, pair.past.dtype)

    def _outputs(self, segment: Segment) -> list[ir.Value]:
        """Graph outputs that the segment computes, and those that are left to it."""
        own = set(segment.nodes)
        return [value for value in self.model.graph.outputs if value.producer() in own or value in segment.light]

    def _presents(self, segment: Segment) -> list[ir.Value]:
        names = {pair.present for pair in self.plan.past}
        return [value for value in self._outputs(segment) if value.name in names]

    def _passing(self, segment: Segment) -> set[str]:
        """Caches of the segment that no node of another one reads; a node that asks for the shape does not count."""
        own = set(segment.nodes)
        made = {value.name for value in self._presents(segment)}
        readers = {value.name: [use.node for use in value.uses()] for value in self.model.graph.inputs}
        return {
            pair.present
            for pair in self.plan.past
            if pair.present in made and all(n in own or n.op_type == "Shape" for n in readers[pair.past.name])
        }

    def _others(self, piece: Piece, stream: Stream) -> Workers | None:
        """Who may run batches elsewhere: those that follow no other one, of a piece that draws no random numbers."""
        alone = self.provider != "cpu" or stream.followed() or draws(piece.proto)
        return None if alone else elsewhere()

    def _merge(self, others: Workers, piece: Piece, segment: Segment, stream: Stream, grams: Sequence[Gram]) -> None:
        """Have units of batches watched elsewhere, and add up what was seen in their order."""
        opened, count = Opened(piece, self.provider, optimize=self.optimize), len(stream.batches)
        units = [range(start, min(start + UNIT, count)) for start in range(0, count, UNIT)]
        names = [(own.value, *own.others) for own in grams]

        def load(unit: range) -> tuple[list[Arrays]]:
            return ([self._feeds(opened.inputs, segment, stream, i) for i in unit],)

        found = others.each(Opened.watched, units, load=load, given=(opened, names))
        for unit, states in zip(units, in_order(found), strict=True):
            for own, state in zip(grams, states, strict=True):
                own.merge(state)
            self.progress(sum(stream.batches[i].rows for i in unit))

    def _run(self, piece: Piece, segment: Segment, stream: Stream, others: Workers | None = None) -> Iterator[Arrays]:
        """The outputs of each batch, in arrays of their own. others: who runs them, if not this process."""
        opened = Opened(piece, self.provider, optimize=self.optimize)
        if not opened.names:
            yield from ({} for _ in stream.batches)
            return
        followed, passing = stream.followed(), self._passing(segment)

        def load(number: int) -> tuple[Arrays]:
            return (self._feeds(opened.inputs, segment, stream, number),)

        found = (others or Here()).each(Opened.run, range(len(stream.batches)), load=load, given=(opened,))
        for i, outputs in enumerate(in_order(found)):
            batch = stream.batches[i]
            if i in followed:
                made = stream.presents.setdefault(i, {})
                made.update((p.present, outputs[p.present]) for p in self.plan.past if p.present in outputs)
            if batch.follows is not None and followed[batch.follows] == i:
                _forget(stream.presents[batch.follows], passing)
            self.progress(batch.rows)
            yield outputs

    def _feeds(self, inputs: set[str], segment: Segment, stream: Stream, number: int) -> Arrays:
        """What a batch gives the piece's inputs."""
        batch, own = stream.batches[number], {given.name for given in self.plan.inputs}
        feeds = {name: array for name, array in batch.feeds.items() if name in inputs} if inputs & own else {}
        if batch.follows is not None:
            past = stream.presents[batch.follows]
            feeds |= {p.past.name: self._past(p, past) for p in self.plan.past if p.past.name in inputs}
        names = inputs & {str(value.name) for value in segment.carried}
        return self.plan.coded(feeds) | {name: stream.quantized[name][number] for name in names}


def _read(groups: dict[tuple[ir.Value, ...], Gram]) -> dict[ir.Value, Statistics]:
    """The statistics of each value that has a row; observers are taken out one after the other, since what they hold is
    more than what they give.
    """
    known = ((group, groups.pop(group).statistics) for group in list(groups))
    return {value: found for group, found in known if found is not None and found.rows for value in group}


def _forget(presents: Arrays, names: set[str]) -> None:
    """Leave zeros of the same shape, which take no memory, in the place of caches."""
    for name in names & presents.keys():
        made = presents[name]
        presents[name] = np.broadcast_to(np.zeros((), made.dtype), made.shape)


def went_on(segment: Segment, carried: Carried, given: Sequence[Arrays]) -> Carried:
    """What goes on behind a segment: of what entered it, and of what it gave for each batch."""
    made = {str(value.name): [arrays[str(value.name)] for arrays in given] for value in segment.made}
    return _kept(segment, {**carried, **made})


def _kept(segment: Segment, carried: Carried) -> Carried:
    """Without what no later segment reads."""
    return {str(value.name): carried[str(value.name)] for value in segment.carry}


def _computed(segment: Segment) -> list[ir.Value]:
    """What the segment's nodes, and the float nodes that they stand for, read and give; no constants."""
    live = [node for node in segment.nodes if node.graph is not None]
    own = [value for node in live for value in (*reads(node), *node.outputs)]
    return [value for value in dict.fromkeys(own) if value.const_value is None and value.name]
