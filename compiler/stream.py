"""Activations that travel from segment to segment: one array a batch, nothing else is kept."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qcompile.compiler.extract import Piece, extract
from qcompile.compiler.feeds import Batch, InputPlan
from qcompile.compiler.segments import Segment
from qcompile.passes import observers
from qcompile.passes.errors import UserError
from qcompile.passes.statistics import Statistics
from qcompile.runtime.session import run

Arrays = dict[str, npt.NDArray[Any]]
Progress = Callable[[int], None]
TWIN = "::float"


@dataclass
class Stream:
    """Batches on their way through the graph.

    quantized: the carried activation of each batch behind the segments rewritten so far (None before the first).
    original: the same activation in the float graph.
    presents: caches of the batches that a later one follows, as the last run left them.
    """

    batches: Sequence[Batch]
    quantized: list[npt.NDArray[Any]] | None = None
    original: list[npt.NDArray[Any]] | None = None
    presents: dict[int, Arrays] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        """Whether the two graphs differ up to here."""
        return self.quantized is not None

    def followed(self) -> set[int]:
        """Numbers of the batches whose caches a later batch reads."""
        return {batch.follows for batch in self.batches if batch.follows is not None}


@dataclass
class Runner:
    """Runs pieces of one model over streams."""

    model: ir.Model
    plan: InputPlan
    provider: str = "cpu"
    progress: Progress = field(default=lambda rows: None)

    def collect(
        self, segment: Segment, activations: Sequence[ir.Value], stream: Stream, *, cross: bool
    ) -> dict[ir.Value, Statistics]:
        """Advance the float stream through the segment and gather statistics of its activations.

        The statistics are those that the rewritten graph so far produces; with `cross` each carries XᵀX₀ too.
        """
        twin = stream.diverged
        carry = [segment.carry] if segment.carry is not None else []
        presents = self._presents(segment) if stream.followed() else []
        piece = extract(self.model, _given(segment), [*activations, *carry, *presents])
        graph = piece.proto.graph
        drop = [str(value.name) for value in (*activations, *carry)]
        keep = [output for output in graph.output if output.name not in drop]
        del graph.output[:]
        graph.output.extend(keep)
        copied = _add_twin(piece, segment) if twin else set()
        for value in activations:
            name = str(value.name)
            observers.observe(graph, name, reference=name + TWIN if twin and cross and name in copied else None)
        carried_out = [str(value.name) + (TWIN if twin else "") for value in carry]
        observers.add_outputs(graph, carried_out, _element_type(segment.carry))
        found: dict[ir.Value, Statistics] = {}
        advanced: list[npt.NDArray[Any]] = []
        for outputs in self._run(piece, segment, stream, twin=twin):
            for value in activations:
                _accumulate(found, value, outputs)
            advanced.extend(outputs[name] for name in carried_out)
        stream.original = advanced or None
        return found

    def advance(self, segment: Segment, stream: Stream) -> None:
        """Advance the quantized stream through the segment as it is now."""
        if segment.carry is None:
            return
        presents = self._presents(segment) if stream.followed() else []
        piece = extract(self.model, _given(segment), [segment.carry, *presents])
        name = str(segment.carry.name)
        stream.quantized = [outputs[name] for outputs in self._run(piece, segment, stream, twin=False)]

    def outputs(
        self,
        segment: Segment,
        stream: Stream,
        *,
        original: bool,
        prepare: Callable[[Piece], Sequence[str]] | None = None,
    ) -> list[Arrays]:
        """Everything the segment gives for each batch: its carry, its graph outputs, and what `prepare` adds.

        original: feed it the float stream.
        """
        wanted = [segment.carry] if segment.carry is not None else []
        wanted += [value for value in self._outputs(segment) if value not in wanted]
        piece = extract(self.model, _given(segment), wanted)
        if prepare is not None:
            piece.outputs.extend(prepare(piece))
        source = Stream(stream.batches, stream.original if original else stream.quantized, None, stream.presents)
        return list(self._run(piece, segment, source, twin=False))

    def _outputs(self, segment: Segment) -> list[ir.Value]:
        """Graph outputs that the segment computes."""
        own = set(segment.nodes)
        return [value for value in self.model.graph.outputs if value.producer() in own]

    def _presents(self, segment: Segment) -> list[ir.Value]:
        names = {pair.present for pair in self.plan.past}
        return [value for value in self._outputs(segment) if value.name in names]

    def _run(self, piece: Piece, segment: Segment, stream: Stream, *, twin: bool) -> Iterator[Arrays]:
        names = [output.name for output in piece.proto.graph.output]
        if not names:
            return
        session = piece.session(self.provider)
        inputs = {given.name for given in session.get_inputs()}
        followed = stream.followed()
        for i, batch in enumerate(stream.batches):
            feeds = {name: array for name, array in batch.feeds.items() if name in inputs}
            if batch.follows is not None:
                past = stream.presents[batch.follows]
                feeds |= {p.past.name: past[p.present] for p in self.plan.past if p.past.name in inputs}
            if segment.carried is not None and stream.quantized is not None:
                feeds[str(segment.carried.name)] = stream.quantized[i]
            if twin and segment.carried is not None and stream.original is not None:
                feeds[str(segment.carried.name) + TWIN] = stream.original[i]
            outputs = dict(zip(names, run(session, names, feeds), strict=True))
            if i in followed:
                kept = stream.presents.setdefault(i, {})
                kept.update((p.present, outputs[p.present]) for p in self.plan.past if p.present in outputs)
            self.progress(batch.rows)
            yield outputs


def _given(segment: Segment) -> list[ir.Value]:
    return [segment.carried] if segment.carried is not None else []


def _element_type(value: ir.Value | None) -> int:
    return int(value.dtype) if value is not None and value.dtype is not None else onnx.TensorProto.FLOAT


def _accumulate(found: dict[ir.Value, Statistics], value: ir.Value, outputs: Arrays) -> None:
    name = str(value.name)
    gram, absmax, rows = (outputs[name + end] for end in (observers.GRAM, observers.ABSMAX, observers.ROWS))
    cross = outputs.get(name + observers.CROSS)
    if not np.isfinite(absmax).all():
        raise UserError(f"activation {name} is NaN or infinite on the calibration data: the model overflows there")
    if value not in found:
        found[value] = Statistics(int(rows[0]), gram, absmax, cross)
        return
    own = found[value]
    own.rows += int(rows[0])
    own.gram += gram
    np.maximum(own.absmax, absmax, out=own.absmax)
    if own.cross is not None and cross is not None:
        own.cross += cross


def _add_twin(piece: Piece, segment: Segment) -> set[str]:
    """Duplicate what depends on the carried value, reading its float original; returns the names copied."""
    assert segment.carried is not None
    carried = str(segment.carried.name)
    graph = piece.proto.graph
    copied = {carried}
    for given in list(graph.input):
        if given.name == carried:
            twin = graph.input.add()
            twin.CopyFrom(given)
            twin.name = carried + TWIN
    for node in list(graph.node):
        if not _reads(node, copied):
            continue
        copy = graph.node.add()
        copy.CopyFrom(node)
        copy.name = node.name + TWIN
        _rename(copy, copied)
        del copy.output[:]
        copy.output.extend(name + TWIN if name else "" for name in node.output)
        copied.update(name for name in node.output if name)
    return copied


def _subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _reads(node: onnx.NodeProto, names: set[str]) -> bool:
    return any(name in names for name in node.input) or any(
        _reads(inner, names) for graph in _subgraphs(node) for inner in graph.node
    )


def _rename(node: onnx.NodeProto, names: set[str]) -> None:
    for i, name in enumerate(node.input):
        if name in names:
            node.input[i] = name + TWIN
    for graph in _subgraphs(node):
        for inner in graph.node:
            _rename(inner, names)
