"""What `qcompile bench` runs a model on: prompts and decoding steps from its token inputs, else random arrays."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.feeds import token_feeds
from qcompile.compiler.data.inputs import Input, InputPlan
from qcompile.compiler.data.npz import Arrays
from qcompile.passes.errors import UserError
from qcompile.runtime.bench import Case

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Workload:
    """What is asked for, of every model alike.

    prompts: lengths of prefills. decode: steps, each with a single token, behind a prompt of `after` tokens.
    shapes: of inputs that cannot be made from tokens and whose free dimensions (beyond the first) must be told.
    """

    prompts: tuple[int, ...] = (1, 64, 512)
    decode: int = 64
    after: int = 64
    shapes: Shapes = field(default_factory=dict)

    def cases(self, plan: InputPlan, vocabulary: int) -> tuple[list[Case], list[str]]:
        """(cases, remarks on what was asked for and cannot be) of a model; ids are drawn below `vocabulary`."""
        if plan.ids is None or plan.floats or plan.unknown:
            return [_random_case(plan, self.shapes, vocabulary)], ["no prompts: the inputs cannot be made from tokens"]
        if self.shapes:
            raise UserError(f"--shape {next(iter(self.shapes))}: the model is fed with tokens, see --prompt-tokens")
        remarks: list[str] = []
        lengths = self.prompts
        if plan.sequence:
            lengths = (plan.sequence,)
            remarks.append(f"the graph takes exactly {plan.sequence} tokens at a time")
        cases = [_prompt(plan, length, vocabulary) for length in lengths]
        if self.decode and not plan.past:
            remarks.append("no KV cache in the graph: no decoding" if plan.logits else "no decoder: no decoding")
        elif self.decode and plan.sequence not in (None, 1):
            remarks.append("no decoding, which takes one token at a time")
        elif self.decode:
            cases.append(self._decoding(plan, vocabulary))
        return cases, remarks

    def _decoding(self, plan: InputPlan, vocabulary: int) -> Case:
        """Single tokens behind a prompt; each run takes the caches of the run before it."""
        after = plan.sequence or self.after
        ids = _ids(plan, after + self.decode, vocabulary)
        steps = tuple(
            token_feeds(plan, ids[:, done : done + 1], past=done, empty=False)
            for done in range(after, after + self.decode)
        )
        return Case(
            f"decode {self.decode} after {after}",
            token_feeds(plan, ids[:, :after]),
            self.decode * (plan.batch or 1),
            steps=steps,
            caches=plan.caches,
            room=after + self.decode,
        )


def common_vocabulary(plans: Sequence[InputPlan]) -> int:
    """Ids below this are known to every model, so that all can be given the same."""
    return min((plan.vocabulary for plan in plans if plan.vocabulary), default=1)


def _prompt(plan: InputPlan, length: int, vocabulary: int) -> Case:
    """One run over `length` tokens, caches empty: a decoder's prefill; of any other model the latency of a batch."""
    ids = _ids(plan, length, vocabulary)
    if plan.logits is None:
        return Case(f"{len(ids)}×{length} tokens", token_feeds(plan, ids), ids.size, unit="ms")
    return Case(f"prefill {length}", token_feeds(plan, ids), ids.size)


def _ids(plan: InputPlan, length: int, vocabulary: int) -> npt.NDArray[np.int64]:
    """Random ids (batch, length): what they are makes no difference to the time, and all models get the same."""
    return np.random.default_rng(length).integers(0, vocabulary, (plan.batch or 1, length))


def _random_case(plan: InputPlan, shapes: Shapes, vocabulary: int) -> Case:
    """One run on arrays of the right shapes: floats are normal, masks 1, ids random, other integers 0."""
    names = {given.name for given in plan.inputs}
    unknown = [name for name in shapes if name not in names]
    if unknown:
        raise UserError(f"--shape {unknown[0]}: no such input (inputs: {', '.join(sorted(names))})")
    generator = np.random.default_rng(0)
    feeds: Arrays = {}
    for given in plan.inputs:
        shape = _shape(given, shapes.get(given.name))
        if given.is_float:
            feeds[given.name] = generator.standard_normal(shape).astype(given.dtype)
        elif given == plan.ids:
            feeds[given.name] = generator.integers(0, vocabulary, shape).astype(given.dtype)
        else:
            mask = given == plan.mask or given.dtype.kind == "b"
            feeds[given.name] = np.full(shape, int(mask)).astype(given.dtype)
    shown = ", ".join("×".join(map(str, array.shape)) for array in feeds.values())
    rows = max((len(array) for array in feeds.values() if array.ndim), default=1)
    return Case(shown, feeds, rows, unit="ms")


def _shape(given: Input, told: tuple[int, ...] | None) -> tuple[int, ...]:
    """The input's shape: as told, if it fits; else its own, a free leading dimension being 1."""
    own = ", ".join("?" if not isinstance(dim, int) else str(dim) for dim in given.shape)
    if told is not None:
        fits = (len(told) == len(given.shape) or not given.ranked) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(given.shape, told, strict=False)
        )
        if not fits:
            raise UserError(f"--shape {given.name}={','.join(map(str, told))}: the input is [{own}]")
        return told
    if not given.ranked:
        raise UserError(f"input {given.name!r} tells no shape: give one with --shape {given.name}=1,…")
    if any(not isinstance(dim, int) for dim in given.shape[1:]):
        raise UserError(f"input {given.name!r} has free dimensions [{own}]: tell them with --shape {given.name}=1,…")
    return tuple(dim if isinstance(dim, int) else 1 for dim in given.shape)
