"""What each graph input is for: token ids and caches by their edges, the small integers beside them by their names."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.compiler.data.graph_inputs import (
    cache_sizes,
    cache_window,
    caches,
    in_one_buffer,
    logits_output,
    token_ids,
)
from qcompile.passes.contrib.codes import CacheCodes, HalfPrecision, codes_of
from qcompile.passes.errors import UserError
from qcompile.passes.masks import reaches_product
from qcompile.runtime.caches import Caches

Dim = int | str | None
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Input:
    """A graph input: its name, numpy element type, and shape (int where fixed, else a symbol's name or None).

    ranked: False where the graph tells no rank; the shape is () then, and data may have any. unbounded: whether it may
    hold infinities, as an additive mask does: no product would meet them.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[Dim, ...]
    ranked: bool = True
    unbounded: bool = False

    @property
    def is_float(self) -> bool:
        """Whether it is of floating type (bfloat16 included)."""
        return self.dtype.kind not in "iubO"

    @property
    def is_string(self) -> bool:
        """Whether its elements are strings, which ONNX Runtime takes as Python objects."""
        return self.dtype.kind == "O"

    def filler(self) -> npt.NDArray[np.generic]:
        """An array for an input that nothing reads: zeros (or ""), free dimensions 1."""
        shape = [dim if isinstance(dim, int) else 1 for dim in self.shape]
        return np.full(shape, "", object) if self.is_string else np.zeros(shape, self.dtype)


@dataclass(frozen=True)
class PastPair:
    """A cache: the input `past` that the output `present` continues, longer along `axis`.

    shared: both may be one buffer (batch, heads, room, width): see `graph_inputs.in_one_buffer`.
    window: see `graph_inputs.cache_window`.
    codes: how floats are stored in it, where it holds codes, or half precision beside single.
    """

    past: Input
    present: str
    axis: int
    shared: bool = False
    window: int = 0
    codes: CacheCodes | HalfPrecision | None = None

    def empty(self, batch: int) -> npt.NDArray[np.generic]:
        """The cache before the first token: zero-length along `axis` (`window` zeros where one slides over it), `batch`
        along the free dimension.
        """
        shape = list(self.past.shape)
        fixed = shape[self.axis]
        if isinstance(fixed, int) and fixed > 0:
            raise UserError(f"input {self.past.name!r} has a fixed past of {fixed} tokens: give its contents in a .npz")
        shape[self.axis] = self.window
        free = [axis for axis, dim in enumerate(shape) if not isinstance(dim, int)]
        if len(free) > 1:
            raise UserError(f"input {self.past.name!r} {self.past.shape}: its heads and width must be fixed numbers")
        return np.zeros([dim if isinstance(dim, int) else batch for dim in shape], self.past.dtype)


@dataclass(frozen=True)
class InputPlan:
    """The roles of a graph's inputs.

    vocabulary: rows of the embedding that `ids` index. batch, sequence: where the graph fixes the shape of `ids`;
    ids of rank 1 are one row: batch is 1.
    mask (batch, past + current), positions and types (batch, current) follow from the ids, and have their rank.
    floats and unknown inputs cannot be made from tokens: they need a .npz.
    unread: what no node reads and no output gives back; data may leave it out.
    logits: the output with one score for each id of the vocabulary, for every token.
    """

    inputs: tuple[Input, ...]
    ids: Input | None
    vocabulary: int | None
    mask: Input | None
    positions: Input | None
    types: Input | None
    past: tuple[PastPair, ...]
    floats: tuple[Input, ...]
    unknown: tuple[Input, ...]
    logits: str | None
    batch: int | None
    sequence: int | None
    unread: tuple[Input, ...] = ()

    @property
    def required(self) -> tuple[Input, ...]:
        """The inputs that data must have: neither caches nor unread, nor what follows from the ids."""
        derived = (self.mask, self.positions, self.types) if self.ids is not None else ()
        spared = self.past_names | {given.name for given in (*self.unread, *derived) if given is not None}
        return tuple(given for given in self.inputs if given.name not in spared)

    def fillers(self) -> dict[str, npt.NDArray[np.generic]]:
        """Arrays for the unread inputs, which ONNX Runtime wants all the same."""
        return {given.name: given.filler() for given in self.unread}

    @property
    def past_names(self) -> set[str]:
        """Names of the inputs that hold a cache."""
        return {pair.past.name for pair in self.past}

    @property
    def caches(self) -> Caches:
        """How a session is to keep them from run to run."""
        shared = bool(self.past) and self.ids is not None and all(pair.shared for pair in self.past)
        presents = {pair.past.name: pair.present for pair in self.past}
        return Caches(presents, shared, self.ids.name if self.ids is not None else "")

    def coded(self, feeds: Arrays) -> Arrays:
        """Feeds whose caches hold floats as the graph takes them: in codes where it does."""
        found = {pair.past.name: pair.codes for pair in self.past if pair.codes is not None}
        return feeds | {
            name: codes.encode(feeds[name])
            for name, codes in found.items()
            if name in feeds and feeds[name].dtype.kind == "f"
        }

    def decoded(self, outputs: Arrays) -> Arrays:
        """Outputs with caches in floats, whatever the graph gives."""
        found = {pair.present: pair.codes for pair in self.past if pair.codes is not None}
        return outputs | {name: codes.decode(outputs[name]) for name, codes in found.items() if name in outputs}

    def with_caches_of(self, model: ir.Model) -> "InputPlan":
        """The plan of a graph that a pass left whose caches may be of another type; nothing else is asked anew."""
        codes = {value.name: own for value in model.graph.inputs if (own := codes_of(value)) is not None}

        def typed(given: Input) -> Input:
            return replace(given, dtype=codes[given.name].dtype.numpy()) if given.name in codes else given

        past = (replace(pair, past=typed(pair.past), codes=codes.get(pair.past.name)) for pair in self.past)
        return replace(self, past=tuple(past), inputs=tuple(map(typed, self.inputs)))

    def require_tokens(self) -> Input:
        """The ids input of a model that can be fed from text; otherwise the error says what is in the way."""
        for given in (*self.floats, *self.unknown):
            kind = "float input" if given.is_float else "string input" if given.is_string else "input"
            raise UserError(
                f"{kind} {given.name!r} ({given.dtype}, shape {list(given.shape)}) cannot be made from text: "
                "give all inputs in .npz files, arrays by input name"
            )
        if self.ids is None:
            names = ", ".join(repr(i.name) for i in self.inputs) or "none"
            raise UserError(f"the model has no token input (inputs: {names}): give its inputs in .npz files")
        return self.ids

    def require_decoder(self) -> str:
        """The name of the logits of a model that is a decoder."""
        self.require_tokens()
        if self.logits is None:
            raise UserError("the model is no decoder: no output has a score for every id of the vocabulary")
        return self.logits


def input_plan(model: ir.Model) -> InputPlan:
    """The roles of the model's inputs."""
    graph = model.graph
    inputs = {value: _input(value) for value in graph.inputs if not value.is_initializer()}
    past = tuple(
        PastPair(
            _cache(value, inputs[value]),
            present,
            axis,
            in_one_buffer(value, graph),
            cache_window(value),
            codes_of(value),
        )
        for value, present, axis in caches(graph)
    )
    ids_value, vocabulary = token_ids(graph)
    roles: dict[str, Input] = {} if ids_value is None else {"ids": inputs[ids_value]}
    taken = {pair.past.name for pair in past} | {given.name for given in roles.values()}
    floats: list[Input] = []
    unknown: list[Input] = []
    unread = [given for value, given in inputs.items() if not value.uses() and not value.is_graph_output()]
    if ids_value is not None and len(inputs[ids_value].shape) not in (1, 2):  # several texts an example, say
        unknown.append(roles.pop("ids"))
    rank = len(roles["ids"].shape) if roles else 2
    for given in inputs.values():
        if given.name in taken or given in unread:
            continue
        role = role_by_name(given, rank)
        if role and role not in roles:
            roles[role] = given
        else:
            (floats if given.is_float else unknown).append(given)
    ids = roles.get("ids")
    batch, sequence = (1, *ids.shape)[-2:] if ids is not None else (None, None)
    return InputPlan(
        inputs=tuple(inputs.values()),
        ids=ids,
        vocabulary=vocabulary,
        mask=roles.get("mask"),
        positions=roles.get("positions"),
        types=roles.get("types"),
        past=past,
        floats=tuple(floats),
        unknown=tuple(unknown),
        logits=logits_output(graph, {pair.present for pair in past}, vocabulary),
        batch=batch if isinstance(batch, int) else None,
        sequence=sequence if isinstance(sequence, int) else None,
        unread=tuple(unread),
    )


def _input(value: ir.Value) -> Input:
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        raise UserError(f"graph input {value.name!r} is {value.type}, which cannot be fed: export it as plain tensors")
    if value.dtype is None:
        raise UserError(f"graph input {value.name!r} has no type: the model must say it")
    ranked, shape = value.shape is not None, value.shape or ()
    dims = tuple(_dim(dim if isinstance(dim, int) else dim.value) for dim in shape)
    return Input(value.name or "", np.dtype(value.dtype.numpy()), dims, ranked, not reaches_product(value))


def _cache(value: ir.Value, given: Input) -> Input:
    """A cache with the heads and the width that its reader states, where the graph names them by symbols."""
    known = cache_sizes(value)
    shape = tuple(known.get(axis, dim) if not isinstance(dim, int) else dim for axis, dim in enumerate(given.shape))
    return replace(given, shape=shape)


def _dim(dim: Dim) -> Dim:
    """Old exporters write -1 for a free dimension."""
    return None if isinstance(dim, int) and dim < 0 else dim


def role_by_name(given: Input, rank: int) -> str | None:
    """mask, positions, types or ids, of an input of fitting rank: that of the ids."""
    name, own = given.name.lower(), len(given.shape) if given.ranked else rank
    if "mask" in name and own == rank and not given.is_string:
        return "mask"
    if given.dtype.kind not in "iu":
        return None
    if "position" in name and own in (1, rank):
        return "positions"
    if ("token_type" in name or "segment" in name) and own == rank:
        return "types"
    return "ids" if "input_ids" in name and own == 2 else None
