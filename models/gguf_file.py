"""The tensors of a GGUF file, found again by the numbers of their rows.

A checkpoint that transformers made of the file has its rows under other names, in another order (Llama's queries and
keys), joined (gate and up) or cut apart (experts). Rows are looked for by what they hold, so none of that needs to be
known, and what is found is what the file has, bit for bit.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.models.gguf_blocks import KINDS, Bytes
from qcompile.passes.errors import UserError

Floats = npt.NDArray[np.float32]

# Rows that are decoded together.
_AT_ONCE = 1 << 22
_FLOATS = ("F32", "F64", "F16", "BF16")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a weight as the file has them. kind: their type, one of `KINDS`. data: (N, bytes)."""

    kind: str
    data: Bytes


@dataclass(frozen=True, eq=False)
class _Group:
    """All rows of one type and length. tensors: their data (rows, bytes). sums: of every row, ascending; of: its tensor
    and its place in that.
    """

    tensors: list[Bytes]
    sums: npt.NDArray[np.uint64]
    of: npt.NDArray[np.int64]


class GGUFFile:
    """The matrices of a file. types: bytes and tensors by type."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            tensors = [tensor for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1]
        except Exception as error:
            raise UserError(f"{path} cannot be read as GGUF: {error}") from error
        self.types: dict[str, tuple[int, int]] = {}
        by_form: dict[tuple[str, int], list[Any]] = {}
        for tensor in tensors:
            kind = tensor.tensor_type.name
            count, size = self.types.get(kind, (0, 0))
            self.types[kind] = count + 1, size + int(tensor.n_bytes)
            by_form.setdefault((kind, int(tensor.shape[0])), []).append(tensor)
        self._groups = {form: _group(found) for form, found in by_form.items()}

    def find(self, weight: Floats) -> Rows | str:
        """The rows of the file that hold the numbers of a weight (N, K); or why they are not kept."""
        sums, types = _sums(weight), set[str]()
        missing = np.ones(len(sums), bool)
        for (kind, k), group in self._groups.items():
            if k != weight.shape[1]:
                continue
            places = np.searchsorted(group.sums, sums).clip(max=len(group.sums) - 1)
            if (own := group.sums[places] == sums).any():
                types.add(kind)
            missing &= ~own
            if not own.all():
                continue
            if kind in _FLOATS:
                return f"the file has it in {kind}"
            if kind not in KINDS:
                return f"the file has it in {kind}, of which no format here holds the blocks"
            return Rows(kind, _gathered(group, group.of[places]))
        if not missing.any():
            return f"the file has its rows in several types, {', '.join(sorted(types))}, and a product has one"
        return "no tensor of the file has its numbers: they were changed when it was loaded"


def _group(tensors: list[Any]) -> _Group:
    found = [np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1]) for tensor in tensors]
    sums = [_row_sums(data, tensor.tensor_type) for data, tensor in zip(found, tensors, strict=True)]
    of = [np.stack([np.full(len(own), i), np.arange(len(own))], axis=1) for i, own in enumerate(sums)]
    order = np.argsort(whole := np.concatenate(sums), kind="stable")
    return _Group(found, whole[order], np.concatenate(of)[order])


def _row_sums(data: npt.NDArray[Any], kind: Any) -> npt.NDArray[np.uint64]:
    from gguf import quants

    step = max(1, _AT_ONCE // data.shape[1])
    parts = [data[start : start + step] for start in range(0, len(data), step)]
    with np.errstate(invalid="ignore", over="ignore"):
        return np.concatenate([_sums(quants.dequantize(part, kind)) for part in parts])


def _sums(rows: Floats) -> npt.NDArray[np.uint64]:
    """A number for each row that rows of the same numbers share, and hardly any others (-0 is 0)."""
    k = rows.shape[1]
    factors = np.random.default_rng(0).integers(0, 1 << 63, k, np.uint64) * np.uint64(2) + np.uint64(1)
    step, found = max(1, _AT_ONCE // k), []
    for start in range(0, len(rows), step):
        part = np.ascontiguousarray(rows[start : start + step], np.float32) + np.float32(0)
        found.append((part.view(np.uint32).astype(np.uint64) * factors).sum(axis=1, dtype=np.uint64))
    return np.concatenate(found)


def _gathered(group: _Group, places: npt.NDArray[np.int64]) -> Bytes:
    data = np.empty((len(places), group.tensors[0].shape[1]), np.uint8)
    for i in np.unique(places[:, 0]):
        own = places[:, 0] == i
        data[own] = group.tensors[i][places[own, 1]]
    return data
