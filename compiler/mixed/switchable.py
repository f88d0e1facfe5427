"""A model behind a switch for every integer node: its segments in sessions that stay, one run for each mixture."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.measure.randomness import draws
from qcompile.compiler.mixed.if_nodes import ALL_FLOAT, Setting, add_switches, is_switch, switched_on
from qcompile.compiler.walk.extract import extract
from qcompile.compiler.walk.segments import Segment, split
from qcompile.passes.base import Pass, Region, on_clone, values_by_name
from qcompile.passes.linears import find_embeddings
from qcompile.passes.state import node_state, remember, set_node
from qcompile.passes.threads import ONE_BLAS_THREAD
from qcompile.runtime.sessions import run


class Switched:
    """Runs a model with any choice of its integer nodes on a few batches.

    Between segments, what the float model carries is kept for each batch, so that a run begins at the first segment
    that a setting changes. The float and the integer weights of the whole model are in memory.
    """

    def __init__(
        self,
        model: ir.Model,
        whole: Mapping[str, ir.Value],
        batches: Sequence[Batch],
        outputs: Sequence[str],
        provider: str = "cpu",
    ) -> None:
        targets = {node for node in model.graph if (kept := node_state(node).twin) and not kept.weights_only}
        self.batches, self.outputs = batches, outputs
        segments = split(model, targets.__contains__)
        self._parts = [_Part(model, segment, whole, outputs, provider) for segment in segments]
        self._carried: list[list[Arrays]] = [[{} for _ in batches]]
        self._float: list[Arrays] = [{} for _ in batches]
        for part in self._parts:
            given = [part.run(ALL_FLOAT, b, c) for b, c in zip(batches, self._carried[-1], strict=True)]
            # An array of ONNX Runtime's is a view that keeps the whole arena of its session alive.
            given = [{name: np.array(array) for name, array in results.items()} for results in given]
            self._carried.append([part.went_on(*both) for both in zip(self._carried[-1], given, strict=True)])
            for known, results in zip(self._float, given, strict=True):
                known.update((name, array) for name, array in results.items() if name in self.outputs)

    def run(self, setting: Setting) -> list[Arrays]:
        """The outputs of each batch under a setting."""
        first = next((i for i, part in enumerate(self._parts) if part.changes(setting)), len(self._parts))
        found = []
        for part in self._parts[first:]:
            part.begin()
        for number, batch in enumerate(self.batches):
            outputs, carried = dict(self._float[number]), self._carried[first][number]
            for part in self._parts[first:]:
                results = part.run(setting, batch, carried)
                carried = part.went_on(carried, results)
                outputs.update((name, array) for name, array in results.items() if name in self.outputs)
            found.append(outputs)
        return found

    def share(self, setting: Setting) -> float:
        """The share of the model's nodes behind the first one that a setting changes: how long a run takes."""
        sizes = [part.size for part in self._parts]
        first = next((i for i, part in enumerate(self._parts) if part.changes(setting)), len(sizes))
        return sum(sizes[first:]) / sum(sizes)


class _Part:
    """One segment with its switches in a session."""

    def __init__(
        self,
        model: ir.Model,
        segment: Segment,
        whole: Mapping[str, ir.Value],
        outputs: Sequence[str],
        provider: str,
    ) -> None:
        own = set(segment.nodes)
        given = [value for value in model.graph.outputs if value.producer() in own or value in segment.light]
        ends = [value for value in given if value.name in outputs]
        twins = [value for node in segment.nodes if (kept := node_state(node).twin) for value in kept.activations]
        piece = extract(model, segment.carried, [*dict.fromkeys([*segment.made, *ends])], twins)
        add_switches(piece, segment.nodes, whole)
        self.carry = {str(value.name) for value in segment.carry}
        self.size = sum(tensor.size for tensor in piece.weights.values()) + len(segment.nodes)
        self._names = [output.name for output in piece.proto.graph.output]
        self._open = partial(piece.session, provider)
        self._draws = draws(piece.proto)
        self._opened: Any = None
        session = self._session
        inputs = [given.name for given in session.get_inputs()] if session is not None else []
        self._switches = [name for name in inputs if is_switch(name)]
        self._inputs = {name for name in inputs if not is_switch(name)}

    def __getstate__(self) -> dict[str, Any]:
        """Without the session, which is opened anew where it is wanted: as another process has it."""
        return self.__dict__ | {"_opened": None}

    @property
    def _session(self) -> Any:
        """The session that stays; None of a segment that gives nothing."""
        if self._opened is None and self._names:
            self._opened = self._open()
        return self._opened

    def changes(self, setting: Setting) -> bool:
        """Whether anything in the segment is integer."""
        return any(switched_on(name, setting) for name in self._switches)

    def begin(self) -> None:
        """Draw random numbers from the first one on: a session that stays would go on with the next."""
        if self._draws:
            self._opened = None

    def went_on(self, carried: Arrays, given: Arrays) -> Arrays:
        """What goes on behind the segment, of what entered it and of what it gave."""
        return {name: array for name, array in {**carried, **given}.items() if name in self.carry}

    def run(self, setting: Setting, batch: Batch, carried: Arrays) -> Arrays:
        """What the segment gives: the values it makes for later ones, and its outputs."""
        session = self._session
        if session is None:
            return {}
        feeds = {name: array for name, array in batch.feeds.items() if name in self._inputs}
        feeds |= {name: np.asarray(switched_on(name, setting)) for name in self._switches}
        feeds |= {name: array for name, array in carried.items() if name in self._inputs}
        return dict(zip(self._names, run(session, self._names, feeds), strict=True))


def rewritten(late: Pass, model: ir.Model, values: Sequence[str]) -> tuple[ir.Model, dict[str, ir.Value]]:
    """A copy of the model behind the pass, every integer node with its Twin; and the values of the names given."""
    made, clone = on_clone(late, model)
    named = values_by_name(clone)
    whole = {name: named[name] for name in values}
    looked_up = [embedding.node for embedding in find_embeddings(clone.graph)]
    for node in looked_up:
        remember(node)
    with ONE_BLAS_THREAD:
        made.call(Region.whole(clone))
    for node in looked_up:
        if node.op_type == "Gather":  # the pass left it as it is
            set_node(node, twin=None)
    return clone, whole
