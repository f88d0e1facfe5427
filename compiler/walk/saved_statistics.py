"""What observers learnt, in a file: a compile that is given it needs no calibration run for ranges."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.compiler.files import publish
from qcompile.compiler.plan import always
from qcompile.compiler.recipe import Step
from qcompile.passes.contract import Stage
from qcompile.passes.errors import UserError
from qcompile.passes.observers import OBSERVERS
from qcompile.passes.observers.base import Observer, State, same_state
from qcompile.passes.observers.extremes import Extremes
from qcompile.passes.observers.histogram import Histogram
from qcompile.passes.table import PASSES

# To be raised when an observer's state means something else, or a histogram has other bins.
VERSION = 4
_HEADER = "qcompile"
# Elements of an initializer that its fingerprint looks at, and how far two fingerprints of one graph may lie apart:
# another machine rounds sums otherwise, another smoothing factor changes far more.
_SAMPLED, _SAME = 65536, 1e-3


@dataclass(frozen=True)
class Header:
    """Where statistics are from.

    model: hash of the source model. passes: what ran before the ranges were taken, as a recipe writes it. observer: as
    the recipe names it. data: a sentence. fingerprint: by initializer of the graph that was observed, its norm and a
    projection. calibrated: `digests` of the data, drawn: what decides which of it was taken.
    """

    model: str
    passes: str
    observer: str
    data: str
    versions: Mapping[str, str]
    fingerprint: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    calibrated: Mapping[str, str] = field(default_factory=dict)
    drawn: str = ""


@dataclass(frozen=True)
class SavedStatistics:
    """A file of statistics as it was read. states: by the name of the activation, what its observer's `state` gave.

    observers: the names of these observers, by the same.
    """

    path: Path
    header: Header
    states: Mapping[str, State]
    observers: Mapping[str, str]

    def check(self, model: str, steps: Sequence[Step]) -> None:
        """Raise UserError where the file is of another model, or of other passes before the ranges."""
        if self.header.model != model:
            raise UserError(f"{self.path}: these statistics are of another model: calibrate this one")
        if self.header.passes != shaping(steps):
            own, other = shaping(steps) or "none", self.header.passes or "none"
            raise UserError(
                f"{self.path}: these statistics were taken behind passes {other!r}, this list has {own!r} before the "
                "ranges: use the same, or calibrate again"
            )

    def leaves(self, data: Mapping[str, str], drawn: str) -> bool:
        """Whether what a compile holds aside of its own data, whose `digests` these are, was not learnt from.

        Case 1: other data. Case 2: the same, of which the same was held aside. False where contents are not known.
        """
        known = self.header.calibrated
        same = dict(data) == dict(known) and drawn == self.header.drawn
        return bool(data and known) and (same or not data.keys() & known.keys())

    def check_graph(self, model: ir.Model) -> None:
        """Raise UserError where the graph whose activations are to be rounded is not the one that was observed."""
        own, known = fingerprint(model), self.header.fingerprint
        changed = [name for name in own if name not in known or not np.allclose(own[name], known[name], _SAME, 1e-30)]
        if changed:
            raise UserError(
                f"{self.path}: these statistics are of other activations: {changed[0]} differs behind passes "
                f"{self.header.passes!r}, which saw other calibration data or settings: use the same, or calibrate "
                "again"
            )

    def restore(self, observers: Mapping[ir.Value, Observer]) -> None:
        """Give every observer what was learnt of its value; UserError where the file has not what it needs."""
        for observer in observers.values():
            state = self.states.get(observer.value)
            if state is None:
                raise UserError(
                    f"{self.path}: no statistics of activation {observer.value}: calibrate with the passes and "
                    "parameters of this list"
                )
            if not state:
                continue  # no row reached it
            made_with = self.observers[observer.value]
            maker = OBSERVERS.get(made_with, Observer)
            if not same_state(type(observer), maker):
                state = {key: array for key, array in state.items() if key in Extremes.keys}
            _restore(observer, state, self.path, made_with)


def shaping(steps: Sequence[Step]) -> str:
    """The passes that run before ranges are taken, those alone that a recipe can leave out or give parameters."""
    before = [step for step in steps if PASSES[step.name].stage < Stage.BEHIND]
    return ",".join(str(step) for step in before if step not in [Step(name) for name in always()])


def fingerprint(model: ir.Model) -> dict[str, tuple[float, float]]:
    """By float initializer (N,) and more: norm and alternating sum, over the norm, of evenly spread elements."""
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or not tensor.dtype.is_floating_point() or tensor.size < 2:
            continue
        flat = np.asarray(tensor.numpy()).reshape(-1)
        sample = flat[:: -(-flat.size // _SAMPLED)].astype(np.float64)
        sample = sample[np.isfinite(sample)]  # masks hold infinities
        norm = float(np.linalg.norm(sample))
        found[name] = (norm, 1 + float(np.cos(np.arange(len(sample))) @ sample) / norm if norm else 0.0)
    return found


def save(path: Path, header: Header, observers: Mapping[ir.Value, Observer]) -> int:
    """Write what the observers learnt, the old file or the new one whatever happens; returns bytes.

    An activation that no row reached (an expert without a token) has no state; UserError where that is true of all.
    """
    states = {observer.value: observer.state() for observer in observers.values()}
    empty = [value for value, state in states.items() if not state]
    if empty and len(empty) == len(states):
        raise UserError(f"activation {empty[0]} was never seen on the calibration data: is it empty?")
    names = {observer.value: observer.name for observer in observers.values()}
    values = {value: [names[value], *sorted(state)] for value, state in states.items()}
    told = asdict(header) | {"version": VERSION, "values": values}
    arrays = {_HEADER: np.frombuffer(json.dumps(told).encode(), np.uint8)}
    for number, state in enumerate(states.values()):
        arrays |= {f"{number}.{key}": array for key, array in state.items()}
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    with publish.writing(path), publish.staging(path) as part:
        with open(part, "wb") as file:
            file.write(content.getvalue())
            publish.settle(file)
        os.replace(part, path)
    return len(content.getvalue())


def load(path: Path) -> SavedStatistics:
    """Read a file that `save` wrote; UserError for one that is missing, damaged, or of another version."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: make it with `qcompile calibrate MODEL.onnx -o {path}`")
    try:
        with np.load(path, allow_pickle=False) as stored:
            told = json.loads(bytes(stored[_HEADER]).decode()) if _HEADER in stored.files else {}
            version = told.get("version")
            if version == VERSION:
                return _read(path, told, stored)
    except Exception as error:  # BadZipFile, zlib.error, ValueError, KeyError, ... whatever is broken
        raise UserError(f"{path} is damaged or no file of statistics ({error}): calibrate again") from error
    if version is None:
        raise UserError(f"{path} is no file of statistics: make one with `qcompile calibrate MODEL.onnx -o FILE`")
    raise UserError(f"{path} is of version {version}, this qcompile reads version {VERSION}: calibrate again")


def _read(path: Path, told: Mapping[str, Any], stored: Mapping[str, npt.NDArray[Any]]) -> SavedStatistics:
    states = {}
    for number, (value, (_, *keys)) in enumerate(told["values"].items()):
        states[value] = {key: stored[f"{number}.{key}"] for key in keys}
        if not all(np.isfinite(array).all() for array in states[value].values()):
            raise ValueError(f"{value} holds NaN or infinity")
    marks = {name: (float(a), float(b)) for name, (a, b) in told["fingerprint"].items()}
    plain = {key: str(told[key]) for key in ("model", "passes", "observer", "data")}
    names = {value: str(own) for value, (own, *_) in told["values"].items()}
    digests, drawn = told.get("calibrated", {}), str(told.get("drawn", ""))  # files of older versions have none
    header = Header(**plain, versions=told["versions"], fingerprint=marks, calibrated=digests, drawn=drawn)
    return SavedStatistics(path, header, states, names)


def _restore(observer: Observer, state: State, path: Path, made_with: str) -> None:
    """Restore an observer, and have it show that it knows everything it needs."""
    try:
        observer.restore(state)
        known = observer.state()
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {observer.value}: {error}") from error
    if isinstance(observer, Histogram) and known and known["counts"].shape[1:] != (2, 1 + observer.bins.size):
        raise UserError(f"{path} is damaged: {observer.value} has counts of shape {list(known['counts'].shape)}")
    if not known or not known.keys() <= state.keys():
        raise UserError(f"{path}: observer {made_with} did not keep what {observer.name} needs: calibrate with that")
