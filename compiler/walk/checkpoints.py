"""A compile goes on where one that was killed had come to: behind the last segment that became a checkpoint.

Invariant: a compile that goes on writes the bytes that it would have written undisturbed. So a checkpoint is only
taken up where all that the walk reads is the same (`_named`): the source's content, the recipe but for what comes
behind the walk alone (`_is_apart`, `_BEHIND`), the content of all batches, the versions of the packages, the text of
this program and of others' passes, formats and observers, the native kernels, the kind of processor and the number of
threads (`program`).
All of that is read when the compile begins. What goes from one segment to the next is in it: the graph with what passes
noted there, the passes themselves, streams, observers, decisions, the report (`snapshot`).

When: no more often than every `EVERY` seconds, nor so often that writing, as long as it usually takes, is more than
`_SHARE` of the time. A compile of seconds has none. A list whose passes have a state that cannot be pickled has none
either, which is said; nor has one whose folder would not be found or trusted again (`Work.unkept`).
Tensors that passes made go to the folder beside the output (`work`) as soon as more than `HELD` bytes of them are in
memory, or with a checkpoint: memory does not grow with the packed model, unless that disk is full.
"""

import hashlib
import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.compiler.data.calibration import Data
from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.files.cache import digest
from qcompile.compiler.files.header import Damaged
from qcompile.compiler.files.publish import is_full
from qcompile.compiler.files.snapshot import Saver, is_marked, mark, objects_of, restore
from qcompile.compiler.files.work import Work
from qcompile.compiler.measure.phases import phase
from qcompile.compiler.results.report import Report
from qcompile.compiler.walk import program
from qcompile.passes.base import Pass
from qcompile.passes.contract import Fact, Stage
from qcompile.passes.errors import UserError

_log = logging.getLogger(__name__)

# Seconds of work between two checkpoints at least, and the share of the time that they may take.
EVERY, _SHARE = 20.0, 1 / 30
# Bytes of tensors that passes made and that stay in memory; smaller ones than the second stay in any case.
HELD, _SMALL = 16 << 20, 4096
# Raised with every change of what is in a checkpoint.
_VERSION = 2
# Fields of a report that are of the command, not of the work.
_OF_COMMAND = {"source", "source_hash", "recipe", "versions", "given", "calibrated", "warnings", "data", "source_bytes"}
# Settings that the walk does not read, nor what is made before it: those that judge the finished graph, those by which
# nodes stay in float behind the walk, and those that add passes which come there. Data that they choose is in the key.
_BEHIND = {"min_coverage", "min_cosine", "keep_worst", "keep_share", "max_kl", "min_sqnr", "keep_as"}
_BEHIND |= {"attention", "caches"}
T = TypeVar("T")


class Checkpoints:
    """Those of one compile, of a model that is prepared and not walked through yet.

    found: what `after` was given for the checkpoint that is gone on from; None where there is none. seconds: worked
    until then. Where there is one, model, passes and report are as they were there.
    """

    def __init__(
        self, work: Work, model: ir.Model, passes: Sequence[Pass], report: Report, data: Data, more: Iterable[str] = ()
    ) -> None:
        """more: words for whatever else decides the result."""
        self._work, self._model, self._passes, self._report, self._data = work, model, passes, report, data
        self._more = [*more, *objects_of(model)]
        self._beside: dict[str, Any] = {}
        self._last, self._off, self._full, self._costs = time.monotonic(), False, False, [0.0]
        self._held = 0  # bytes that passes made since tensors were put aside
        self._walked = [own for own in passes if not _is_apart(own)]
        self._key, self._unnamed = "", ""
        try:
            self._key = self._named()
        except (OSError, program.Unnamed) as error:
            self._unnamed = str(error)
        self._begun, self.seconds = self._last, 0.0
        prepared = mark(model)  # not kept: who holds a tensor of a file holds every page of it that was read
        there = self._key and (work.is_finished(self._key) or work.waiting)
        self.found = self._resumed(prepared) if there else None

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives of the recipe; what it gave where the compile of the same one goes on."""
        name = f"{name} {digest(self._report.recipe)}"
        if name not in self._beside:
            self._beside[name] = make()
        found: T = self._beside[name]
        return found

    @phase("checkpoints")
    def after(self, state: Any, done: int, of: int, nodes: Iterable[ir.Node]) -> None:
        """Behind a finished segment of these nodes: put aside what is large, and make it a checkpoint if one is due."""
        now = time.monotonic()
        last = done == of and self._work.shelf is not None
        due = not self._off and (last or now - self._last >= max(EVERY, median(self._costs) / _SHARE))
        self._held += _made_for(nodes)
        if due or self._held > HELD:
            self.settle(everything=due)
        if not due or self._full:
            return
        try:
            if hindrance := self._unnamed or self._work.unkept:
                self._off = True
                _log.warning("if this compile is interrupted, it begins anew: %s", hindrance)
            else:
                with self._work.arrays(done) as arrays:
                    saved = Saver(self._model, arrays, self._work.tensors).saved(self._state(state))
                self._work.keep(self._key, done, of, self.seconds + now - self._begun, saved)
        except OSError as error:
            self._off = True
            _log.warning("no more checkpoints beside %s: %s", self._work.output, error.strerror or error)
        except Exception as error:  # whatever the state of somebody's pass raises
            self._off = True
            _log.warning("if this compile is interrupted, it begins anew: %s (%s)", self._unpickled(), error)
        self._last = time.monotonic()
        self._costs.append(self._last - now)

    def settle(self, *, everything: bool = False) -> None:
        """Put tensors that passes made into the folder's file. From when the disk is full they stay in memory, and
        there are no more checkpoints, which would need them on the disk.
        """
        self._held = 0
        if self._full:
            return
        made = [value for value in self._model.graph.initializers.values() if _is_large(value.const_value, everything)]
        placed: dict[int, ir.ExternalTensor] = {}
        tensors = [value.const_value for value in made if value.const_value is not None]  # none is freed meanwhile
        for value, tensor in zip(made, tensors, strict=True):
            if id(tensor) not in placed:
                try:
                    placed[id(tensor)] = self._work.place(tensor)
                except UserError as error:
                    if not is_full(error.__cause__):
                        raise
                    self._off = self._full = True
                    _log.warning("packed weights stay in memory, and there are no more checkpoints: %s", error)
                    return
            value.const_value = placed[id(tensor)]

    def _state(self, state: Any) -> Mapping[str, Any]:
        told = {name: value for name, value in vars(self._report).items() if name not in _OF_COMMAND}
        return {"walk": state, "passes": [vars(own) for own in self._walked], "report": told, "beside": self._beside}

    def _resumed(self, prepared: Sequence[ir.TensorProtocol]) -> Any:
        """Continue from the checkpoint that is there, if it is of the same compile."""
        try:
            if not self._work.adopted(self._key):
                _log.warning(
                    "%s: an unfinished compile with other settings, data or versions lies there; "
                    "it is not gone on from",
                    self._work.output,
                )
                return None
            state = self._restored(prepared)
        except Damaged as error:
            _log.warning("begun anew: %s", error)
            self._work.drop()
            return None
        for own, known in zip(self._walked, state["passes"], strict=True):
            vars(own).clear()
            vars(own).update(known)
        vars(self._report).update(state["report"])
        self._beside = state["beside"]
        header = self._work.kept
        assert header is not None
        self.seconds = header.seconds
        self._report.resumed, self._report.reused = header.next, ""
        if self._work.taken:
            self._report.reused = str(self._work.shelf)
            told = "the walk is that of an earlier compile, which took %.0f s for it (%s)"
            _log.warning(told, header.seconds, self._work.shelf)
        else:
            _log.warning("%s: going on at %s, where the compile was interrupted", self._work.output, header.next)
        return state["walk"]

    def _restored(self, prepared: Sequence[ir.TensorProtocol]) -> Any:
        """The state that the checkpoint holds, and the model as it was there; else Damaged, and the model untouched."""
        arrays: BinaryIO | None = None
        try:
            content, arrays = self._work.content()
            return restore(self._model, content, prepared, arrays, self._work.tensors)
        except Damaged:
            raise
        except Exception as error:  # whatever the class of somebody's pass raises
            if arrays is not None:
                arrays.close()
            raise Damaged(f"the checkpoint cannot be read ({type(error).__name__}: {error})") from error

    def _unpickled(self) -> str:
        """Which pass cannot be pickled, in words."""
        for own in self._walked:
            try:
                Saver(self._model, _Nowhere(), Path()).saved(vars(own))  # type: ignore[arg-type]
            except Exception:
                return f"the state of pass {own.name} cannot be put aside"
        return "its state cannot be put aside"

    def _named(self) -> str:
        """A name of all that the walk reads; the data is read once for it."""
        report, data = self._report, self._data
        streams = (data.calibration, data.checks, data.evaluation)
        return digest(
            {
                "version": _VERSION,
                "source": report.source_hash,
                **walked(report.recipe, self._passes),
                "versions": {**report.versions, "python": sys.version},
                "program": program.digest_of(self._passes),
                "machine": program.machine(),
                "data": [_digest_of(stream) for stream in streams],
                "told": [data.real, data.guess, data.description],
                "more": self._more,
            }
        )


def walked(recipe: Mapping[str, Any], passes: Sequence[Pass]) -> dict[str, Any]:
    """What the walk reads of a recipe's plain values: settings, and the passes that it knows of; by name alone those
    that lists have added. passes: all of them.
    """
    given = {str(step).partition("(")[0]: str(step) for step in recipe["passes"]}
    steps = [given.get(own.name, own.name) for own in passes if not _is_apart(own)]
    return {"recipe": {name: own for name, own in recipe.items() if name not in _BEHIND | {"passes"}}, "passes": steps}


def _is_apart(own: Pass) -> bool:
    """Whether a pass comes behind the walk, sees nothing of it, and no pass before it is made for what it does."""
    kind = type(own)
    given = (kind.rounds_by, kind.activation_grid, kind.refuses_codes, kind.observed, kind.observed_in)
    none = (Pass.rounds_by, Pass.activation_grid, Pass.refuses_codes, Pass.observed, Pass.observed_in)
    return own.stage == Stage.BEHIND and given == none and not own.takes & {Fact.FLOAT, Fact.CODES, Fact.OUTLIERS}


class _Nowhere:
    """A file that takes everything."""

    def tell(self) -> int:
        return 0

    def write(self, data: Any) -> int:
        return len(data)


def _made_for(nodes: Iterable[ir.Node]) -> int:
    """Bytes of the large tensors that passes made for these nodes, in memory."""
    read = {value for node in nodes for value in node.inputs if value is not None}
    tensors = {id(tensor): tensor for value in read if (tensor := value.const_value) is not None}
    return sum(tensor.nbytes for tensor in tensors.values() if _is_large(tensor, lazy=False))


def _is_large(tensor: ir.TensorProtocol | None, lazy: bool) -> bool:
    """Whether a tensor was made by a pass and takes memory; `lazy`: or is computed whenever it is read."""
    if tensor is None or is_marked(tensor) or tensor.nbytes < _SMALL:
        return False
    return isinstance(tensor, (ir.Tensor, ir.PackedTensor)) or (lazy and isinstance(tensor, ir.LazyTensor))


def _digest_of(batches: Sequence[Batch]) -> str:
    """Of the arrays of all batches, with their names and types."""
    total = hashlib.sha256()
    for batch in batches:
        total.update(f"{batch.rows} {batch.follows}".encode())
        for name, array in sorted(batch.feeds.items()):
            total.update(f"{name} {array.dtype} {array.shape}".encode())
            total.update(_bytes(array))
    return total.hexdigest()


def _bytes(array: npt.NDArray[Any]) -> Any:
    if array.dtype.hasobject:
        return repr(array.tolist()).encode()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
