"""The nodes of two models that are the same: by their names, those they were joined of, or their weights' names."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qcompile.compiler.files.folders import report_path
from qcompile.compiler.files.load import load_model
from qcompile.compiler.report.explanation import Explained, explain
from qcompile.compiler.report.sizes import Storage, all_constants, file_bytes, storage
from qcompile.compiler.report.stored_weights import Weight, all_weights
from qcompile.compiler.settings.files import plain_of
from qcompile.passes.errors import UserError
from qcompile.passes.formats import BY_NAME
from qcompile.passes.formats.half_scales import stored_as
from qcompile.passes.joined_names import parts_of
from qcompile.passes.tensors import chunks, read

_RECIPE = "qcompile.recipe"
# What the names of torch's weights end in, behind the module's.
_OF_TORCH = ".weight"
# Whether something is a lookup, and what it is called: a tied table is read by two nodes.
_Name = tuple[bool, str]


class File:
    """A model file: its weights with their bytes, those of a shared one at its first reader, and what the report beside
    it says of nodes, by name; empty where none can be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.model = path, load_model(path)
        self.weights = [own for own in all_weights(self.model) if own.tensors]
        self.sizes = list(_counted_once(self.weights))
        self.bytes = file_bytes(path, list(all_constants(self.model)))
        self.explained = _explained(path)
        self.by_weight: dict[_Name, list[Explained]] = {}
        for own in self.explained.values():
            self.by_weight.setdefault((own.is_lookup, _stem(own.weight)), []).append(own)
        self._digests: dict[Storage, str] = {}

    @property
    def compiled(self) -> bool:
        """Whether it says by which recipe it was made."""
        return _RECIPE in self.model.metadata_props

    @property
    def recipe(self) -> Mapping[str, Any]:
        """What it says of that; empty of one that was not compiled."""
        try:
            plain = plain_of(self.model.metadata_props.get(_RECIPE, ""), toml=False)
        except (ValueError, RecursionError):
            return {}
        return plain if isinstance(plain, dict) else {}

    @property
    def called(self) -> set[str]:
        """What its nodes are called, and their weights."""
        stems = _stems(self.weights)
        return {*(own.node for own in self.weights), *stems, *(own.removesuffix(_OF_TORCH) for own in stems)}

    def totals(self, of: Callable[[Weight], str]) -> dict[str, int]:
        """Bytes of weights by what is said of each."""
        found = Counter[str]()
        for weight, size in zip(self.weights, self.sizes, strict=True):
            found[of(weight)] += size
        return dict(found)

    def nodes(self, others: Iterable[str]) -> list["Own"]:
        """Its weights by node. others: names that the nodes of joined products may have."""
        known = {*others, *self.explained}
        found: dict[tuple[bool, str], list[int]] = {}
        for number, weight in enumerate(self.weights):
            found.setdefault((weight.kind == "embedding", weight.node or f"#{number}"), []).append(number)
        return [Own(self, node, parts_of(node, known), lookup, numbers) for (lookup, node), numbers in found.items()]

    def digest(self, tensor: ir.TensorProtocol) -> str:
        """The sha256 of its bytes, which are read once."""
        place = storage(tensor)
        if place not in self._digests:
            total = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
            for chunk in chunks(tensor):
                total.update(chunk)
            self._digests[place] = total.hexdigest()
        return self._digests[place]


@dataclass(frozen=True, eq=False)
class Own:
    """A node of a file. members: the nodes that it was joined of; itself as a rule. numbers: of its weights there."""

    file: File
    node: str
    members: Sequence[str]
    lookup: bool
    numbers: Sequence[int]

    @property
    def weights(self) -> list[Weight]:
        """Those it reads."""
        return [self.file.weights[number] for number in self.numbers]

    @property
    def bytes(self) -> int:
        """Of them, but for those that an earlier node reads, too."""
        return sum(self.file.sizes[number] for number in self.numbers)

    @property
    def told(self) -> list[Explained]:
        """What the report says of its members; by its weights, where nodes are called otherwise there."""
        known = self.file.explained
        if found := [known[name] for name in self.members if name in known]:
            return found
        return [own for stem in _stems(self.weights) for own in self.file.by_weight.get((self.lookup, stem), ())]

    @property
    def names(self) -> set[_Name]:
        """Of the nodes; what the report calls it, where it tells of one."""
        told = [own.node for own in self.told]
        return {(self.lookup, name) for name in (self.node, *self.members, *(told if len(told) == 1 else ()))}

    @property
    def aliases(self) -> set[_Name]:
        """Of its weights as the source has them, with and without what torch ends their names in; of nodes that the
        report tells of.
        """
        told = (name for own in self.told for name in (own.node, _stem(own.weight)))
        found = {*_stems(self.weights), *self.members, *told}
        return {(self.lookup, own) for name in found for own in (name, name.removesuffix(_OF_TORCH)) if own}

    @property
    def tensors(self) -> list[list[ir.TensorProtocol]]:
        """Those of each of its weights."""
        return [list(weight.tensors) for weight in self.weights]


def matched(a: File, b: File) -> Iterator[tuple[list[Own], list[Own]]]:
    """Nodes of both that are one, several where those of one file are joined in the other; one side is empty of nodes
    that the other has not. In the order of a.

    By names first; then, of those that have no partner, by their weights.
    """
    groups = [[own] for own in (*a.nodes(b.called), *b.nodes(a.called))]
    groups = _joined(groups, lambda own: own.names)
    groups = _joined(groups, lambda own: own.aliases, alone=True)
    for group in groups:
        yield [own for own in group if own.file is a], [own for own in group if own.file is b]


def same_numbers(a: Sequence[Own], b: Sequence[Own]) -> bool:
    """Whether both have the same tensors, bit by bit; of joined nodes, whether those of the parts side by side are."""
    one, other = ([tensors for own in side for tensors in own.tensors] for side in (a, b))
    if len(one) == len(other):
        digests = ([own.file.digest(t) for own in side for tensors in own.tensors for t in tensors] for side in (a, b))
        return next(digests) == next(digests)
    whole, parts = (one, other) if len(one) == 1 else (other, one)
    if len(whole) != 1 or any(len(part) != len(whole[0]) for part in parts):
        return False
    return all(starmap(_side_by_side, zip(whole[0], zip(*parts, strict=True), strict=True)))


def _side_by_side(whole: ir.TensorProtocol, parts: Sequence[ir.TensorProtocol]) -> bool:
    shapes = [tuple(part.shape.numpy()) for part in (whole, *parts)]
    axes = [axis for axis in range(len(shapes[0])) if len({shape[axis] for shape in shapes if len(shape) > axis}) > 1]
    if any(len(shape) != len(shapes[0]) for shape in shapes) or len({part.dtype for part in (whole, *parts)}) > 1:
        return False
    arrays = [read(part) for part in parts]
    if not axes:  # a table of levels is of all
        return all(np.array_equal(array, read(whole)) for array in arrays)
    return len(axes) == 1 and np.array_equal(np.concatenate(arrays, axes[0]), read(whole))


def _joined(groups: list[list[Own]], called: Callable[[Own], Set[_Name]], *, alone: bool = False) -> list[list[Own]]:
    """Groups that have a name in common, of both files, as one. alone: those alone that are of one file so far."""
    free = [not alone or len({id(own.file) for own in group}) == 1 for group in groups]
    names = [
        {name for own in group for name in called(own)} if ours else set()
        for group, ours in zip(groups, free, strict=True)
    ]
    files: dict[_Name, set[int]] = {}
    for group, own in zip(groups, names, strict=True):
        for name in own:
            files.setdefault(name, set()).update(id(each.file) for each in group)
    first, parent = dict[_Name, int](), list(range(len(groups)))

    def root(number: int) -> int:
        while parent[number] != number:
            number = parent[number]
        return number

    for number, own in enumerate(names):
        for name in (name for name in own if len(files[name]) > 1):
            one, other = sorted((root(number), root(first.setdefault(name, number))))
            parent[other] = one
    made: dict[int, list[Own]] = {}
    for number, group in enumerate(groups):
        made.setdefault(root(number), []).extend(group)
    return list(made.values())


def _explained(path: Path) -> dict[str, Explained]:
    if not report_path(path).is_file():
        return {}
    try:
        return {own.node: own for own in explain(path).nodes}
    except UserError:
        return {}


def _counted_once(weights: Sequence[Weight]) -> Iterator[int]:
    """Bytes of each, without those that an earlier one has."""
    seen = set[Storage]()
    for weight in weights:
        parts = {storage(part): part.nbytes for tensor in weight.tensors for part in stored_as(tensor)}
        yield sum(size for place, size in parts.items() if place not in seen)
        seen |= parts.keys()


def _stems(weights: Iterable[Weight]) -> list[str]:
    """Names of weights, as `_stem`."""
    return list(dict.fromkeys(_stem(str(weight.tensors[0].name or "")) for weight in weights))


def _stem(name: str) -> str:
    """The name of a weight; of codes without what they have behind it: a format's name, a number where that was taken,
    and what follows.
    """
    formats = "|".join(re.escape(own.name) for own in BY_NAME.usable())
    return re.sub(rf"\.(?:{formats})(?:_\d+)?(?:\..*)?$", "", name)
