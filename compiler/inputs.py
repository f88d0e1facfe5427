"""What each graph input is for: token ids and caches by their edges, the small integers beside them by their names."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.compiler.wiring import caches, logits_output, token_ids
from qcompile.passes.errors import UserError

Dim = int | str | None


@dataclass(frozen=True)
class Input:
    """A graph input: its name, numpy element type, and shape (int where fixed, else a symbol's name or None)."""

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[Dim, ...]

    @property
    def is_float(self) -> bool:
        """Whether it is of floating type (bfloat16 included)."""
        return self.dtype.kind not in "iub"


@dataclass(frozen=True)
class PastPair:
    """A cache: the input `past` that the output `present` continues, longer along `axis`."""

    past: Input
    present: str
    axis: int

    def empty(self, batch: int) -> npt.NDArray[np.generic]:
        """The cache before the first token: zero-length along `axis`, `batch` along the free dimension."""
        shape = list(self.past.shape)
        fixed = shape[self.axis]
        if isinstance(fixed, int) and fixed > 0:
            raise UserError(f"input {self.past.name!r} has a fixed past of {fixed} tokens: give its contents in a .npz")
        shape[self.axis] = 0
        free = [axis for axis, dim in enumerate(shape) if not isinstance(dim, int)]
        if len(free) > 1:
            raise UserError(f"input {self.past.name!r} {self.past.shape}: its heads and width must be fixed numbers")
        return np.zeros([dim if isinstance(dim, int) else batch for dim in shape], self.past.dtype)


@dataclass(frozen=True)
class InputPlan:
    """The roles of a graph's inputs.

    vocabulary: rows of the embedding that `ids` index. batch, sequence: where the graph fixes the shape of `ids`.
    mask (batch, past + current), positions and types (batch, current) follow from the ids.
    floats and unknown inputs cannot be made from tokens: they need a .npz.
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

    @property
    def past_names(self) -> set[str]:
        """Names of the inputs that hold a cache."""
        return {pair.past.name for pair in self.past}

    def require_tokens(self) -> Input:
        """The ids input of a model that can be fed from text; otherwise the error says what is in the way."""
        for given in (*self.floats, *self.unknown):
            kind = "float input" if given.is_float else "input"
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
    past = tuple(PastPair(inputs[value], present, axis) for value, present, axis in caches(graph))
    ids_value, vocabulary = token_ids(graph)
    roles: dict[str, Input] = {} if ids_value is None else {"ids": inputs[ids_value]}
    taken = {pair.past.name for pair in past} | {given.name for given in roles.values()}
    floats: list[Input] = []
    unknown: list[Input] = []
    for given in inputs.values():
        if given.name in taken:
            continue
        role = _role_by_name(given)
        if role and role not in roles:
            roles[role] = given
        else:
            (floats if given.is_float else unknown).append(given)
    ids = roles.get("ids")
    batch, sequence = (ids.shape[0], ids.shape[1]) if ids is not None and len(ids.shape) == 2 else (None, None)
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
    )


def _input(value: ir.Value) -> Input:
    if value.dtype is None or value.shape is None or not isinstance(value.type, ir.TensorType):
        raise UserError(f"graph input {value.name!r} has no tensor type or no rank: the model must say both")
    dims = tuple(_dim(dim if isinstance(dim, int) else dim.value) for dim in value.shape)
    return Input(value.name or "", np.dtype(value.dtype.numpy()), dims)


def _dim(dim: Dim) -> Dim:
    """Old exporters write -1 for a free dimension."""
    return None if isinstance(dim, int) and dim < 0 else dim


def _role_by_name(given: Input) -> str | None:
    """mask, positions, types or ids, of an input of fitting rank."""
    name, rank = given.name.lower(), len(given.shape)
    if "mask" in name and rank == 2:
        return "mask"
    if given.is_float or given.dtype.kind == "b":
        return None
    if "position" in name and rank in (1, 2):
        return "positions"
    if ("token_type" in name or "segment" in name) and rank == 2:
        return "types"
    return "ids" if "input_ids" in name and rank == 2 else None
