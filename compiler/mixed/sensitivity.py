"""How much each integer node alone changes what a model says."""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from qcompile.compiler.console.visible import visible
from qcompile.compiler.data.calibration import Data
from qcompile.compiler.data.feeds import Batch, InputPlan
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.facts.census import census
from qcompile.compiler.facts.memory import available
from qcompile.compiler.measure.distance import Effect, effect_of
from qcompile.compiler.mixed.if_nodes import ALL_FLOAT, Setting
from qcompile.compiler.mixed.ranking import Ranked, Ranking
from qcompile.compiler.mixed.switchable import Switched, rewritten
from qcompile.compiler.mixed.windows import check_windows, float_outputs, held_windows
from qcompile.compiler.walk.extract import extract
from qcompile.passes.base import IntegerPass
from qcompile.passes.errors import UserError
from qcompile.passes.linears import find_embeddings
from qcompile.passes.tensors import chunks
from qcompile.passes.workers import Here, elsewhere
from qcompile.runtime.sessions import run

# session.qdq_matmulnbits_accuracy_level where an application sets none.
_ORT_DEFAULT = 4
_RECURRENT = ("LSTM", "GRU", "RNN")


class Steps(Protocol):
    """Told what is going on; the pipeline's Progress is one."""

    def step(self, name: str) -> None:
        """A new step begins."""


class Mixture:
    """A float model behind the walk, any choice of whose nodes can be run in integers on the check windows.

    late: the pass that will make nodes integer, its observers filled. source: the file of the float model, which
    effects are relative to. Raises UserError where there is nothing to choose from, or not enough memory.
    """

    def __init__(
        self, model: ir.Model, late: IntegerPass, plan: InputPlan, data: Data, source: Path, provider: str
    ) -> None:
        self.model, self.late, self.provider = model, late, provider
        self.batches, self.windows = check_windows(plan, data)
        self.sites, full = sites(late, model), chosen(late, model, {})
        check_memory(model, sum(batch.rows for batch in self.batches) * (plan.vocabulary or 0))
        self.effect: Effect = effect_of(plan, float_outputs(source, plan, self.batches, provider))
        self.held, self.held_on = held_windows(plan, data)
        self.held_effect = effect_of(plan, float_outputs(source, plan, self.held, provider)) if self.held else None
        clone, whole = rewritten(late, model, sorted(full.values))
        self.switched = Switched(clone, whole, self.batches, self.effect.outputs, provider)
        self.nbytes = stored_bytes(clone)

    def distance(self, setting: Setting) -> float:
        """How far the outputs are from the float model's under a setting."""
        return _distance(self.switched, self.effect, setting)

    def without(self, kept: Sequence[str]) -> Setting:
        """The setting of all nodes that stay integer where the user keeps some in float."""
        return chosen(self.late, self.model, dict.fromkeys(kept, "kept"))

    def rank(self, progress: Steps) -> Ranking:
        """One run for each node."""
        started = time.monotonic()
        settings = {site: Setting.of([site.node], whole) for site, whole in self.sites.items()}
        costs = {site: self.switched.share(setting) for site, setting in settings.items()}
        found: list[Ranked] = []

        def load(site: Ranked) -> tuple[Setting]:
            done = sum(costs[own] for own in measured)
            left = (time.monotonic() - started) * (sum(costs.values()) - done) / done if done else 0.0
            told = f", {left:.0f} s left" if left else ""
            progress.step(f"sensitivity: node {len(measured) + 1} of {len(settings)}{told}")
            return (settings[site],)

        workers, every, measured = elsewhere() or Here(), list(settings), list[Ranked]()
        for number, effect in workers.each(_distance, every, load=load, given=(self.switched, self.effect)):
            measured.append(every[number])
            found.append(replace(every[number], effect=effect))
        found.sort(key=lambda ranked: (-ranked.effect, ranked.node))
        ends = (self.distance(ALL_FLOAT), self.distance(self.without([])))
        return Ranking(self.effect.metric, self.windows, *ends, tuple(found), time.monotonic() - started)


def _distance(switched: Switched, effect: Effect, setting: Setting) -> float:
    return effect.distance(switched.run(setting))


def chosen(late: IntegerPass, model: ir.Model, kept: Mapping[str, str]) -> Setting:
    """What a pass will make integer in a float model, with the names of `kept` (and why) left in float."""
    policy = replace(late.policy, kept=kept)
    looked_up = [e.name for e in find_embeddings(model.graph) if not isinstance(policy.for_embedding(e), str)]
    own = late.integer_nodes(model, policy)
    return Setting.of([*(str(node.name) for node in own.nodes), *looked_up], (str(value.name) for value in own.whole))


def _nothing(late: IntegerPass, model: ir.Model) -> str:
    """Why there is no node to choose from: of what stands in a body, or recurs, weights alone become codes."""
    told = f"pass {late.name!r} makes no node of this model integer: there is nothing to rank"
    readers = [reader for constant in census(model) if constant.family == "MatMul" for reader in constant.readers]
    alone = [reader.name for reader in readers if reader.owner is not None or reader.node.op_type in _RECURRENT]
    if not alone:
        return told
    return (
        f"{told}; in bodies of If, Loop and Scan and in recurrent layers (here {visible(alone[0])}) weights alone are "
        "quantized: leave some in float with --exclude NAME"
    )


def sites(late: IntegerPass, model: ir.Model) -> dict[Ranked, list[str]]:
    """The nodes that can be kept in float one by one, not measured yet; by each, the values that it alone makes whole.

    An operator that only moves codes is none of them: it is integer where its neighbours are. UserError without any.
    """
    names, found, own = chosen(late, model, {}).nodes, {}, late.integer_nodes(model, late.policy)
    for node in model.graph:
        name = str(node.name)
        if name not in names or node in own.moving:
            continue
        constants = [v.const_value for v in map(_stored, node.inputs) if v is not None and v.const_value is not None]
        large = [tensor for tensor in constants if len(tensor.shape) > 1]
        ranked = Ranked(name, node.op_type, sum(t.size for t in large), sum(t.nbytes for t in large), 0.0)
        found[ranked] = [str(own.ends[node].name)] if node in own.ends else []
    if not found:
        raise UserError(_nothing(late, model))
    return found


def _stored(value: ir.Value | None) -> ir.Value | None:
    """The initializer behind a Transpose, or the value itself."""
    producer = value.producer() if value is not None else None
    return producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else value


def finished_distances(mixture: "Mixture", model: ir.Model) -> tuple[float, float | None]:
    """How far the outputs of a model that is done are from the float model's, as an application will run it: ONNX
    Runtime's own level for MatMulNBits, which rounds activations to int8 in blocks.

    (on what nodes are ranked on, on what is held aside; None without any).
    """
    values = [value for value in model.graph.outputs if value.name in mixture.effect.outputs]
    piece = extract(model, [], values)
    running = piece.session(mixture.provider, accuracy_level=_ORT_DEFAULT)

    def outputs(batches: Sequence[Batch]) -> list[Arrays]:
        given = [{name: array for name, array in batch.feeds.items() if name in piece.inputs} for batch in batches]
        return [dict(zip(piece.outputs, run(running, piece.outputs, feeds), strict=True)) for feeds in given]

    own = mixture.effect.distance(outputs(mixture.batches))
    held = mixture.held_effect.distance(outputs(mixture.held)) if mixture.held_effect is not None else None
    return own, held


def stored_bytes(model: ir.Model) -> int:
    """Bytes of a model's initializers as a file holds them: equal ones once."""
    sizes = {}
    for value in model.graph.initializers.values():
        tensor, digest = value.const_value, hashlib.sha256()
        for chunk in chunks(tensor) if tensor is not None and tensor.dtype != ir.DataType.STRING else ():
            digest.update(chunk)
        sizes[digest.digest()] = 0 if tensor is None else tensor.nbytes
    return sum(sizes.values())


def check_memory(model: ir.Model, scores: int) -> None:
    """Raise UserError where memory will not do; `scores`: numbers in the logits of all batches.

    Float weights lie in it twice, since ONNX Runtime packs its own copy, int8 ones the same, and a copy of what is tied
    or transposed; of the logits, float32, there are the float model's, their log-softmax, a run's and its own.
    """
    tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    needed, free = 4 * sum(tensor.nbytes for tensor in tensors) + 4 * 4 * scores, available()
    if free is not None and needed > free:
        raise UserError(
            f"sensitivity needs the float and the int8 weights in memory at once: about {needed / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free; choose nodes by --exclude instead, or use a larger machine"
        ) from MemoryError()
