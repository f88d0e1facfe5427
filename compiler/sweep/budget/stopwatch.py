"""How long products take here: each as the compiler stores it for the target, run by ONNX Runtime, in turns."""

import logging
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from qcompile.compiler.console.progress import Progress
from qcompile.compiler.facts.model import versions
from qcompile.compiler.files.cache import Cache, digest
from qcompile.compiler.plan import build
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.results.timings import VERSION, Product, Timings
from qcompile.compiler.walk import activation_bits
from qcompile.models.cache import cache_dir
from qcompile.passes import lists
from qcompile.passes.activations import INT8
from qcompile.passes.affine import Grid
from qcompile.passes.base import Region
from qcompile.passes.contract import Fact
from qcompile.passes.errors import UserError
from qcompile.passes.formats.functions import is_product, product_bits
from qcompile.passes.formats.lower import lower
from qcompile.passes.library import library_digest
from qcompile.passes.policy import Policy
from qcompile.passes.targets import TARGETS
from qcompile.runtime.bench import cpu_name
from qcompile.runtime.sessions import default_threads, operator_kernels, ort_version, run, session

_log = logging.getLogger(__name__)
# Weights that one run reads at least, as copies of a product, so that what a run costs by itself is a small share; and
# at most of one product: of wider ones so many columns are timed, and the rest goes by columns.
_LEAST, _MOST = 1 << 21, 1 << 23
_COPIES = 64
# Rounds at least and at most, and seconds after which none begins beyond the least.
_ROUNDS, _MOST_ROUNDS, _SECONDS = 5, 25, 2.0
# Times below this are what timers cannot tell, in microseconds.
_TINY = 0.05
# Bits of codes up to which a compile is expected to give activations 8 bits: what these add is lost in their errors
# (`activation_bits.BUDGET`).
_COARSE = 4
# Codes are random, since runtimes may keep equal weights once; smaller constants are shapes, and stay.
_CODES = 256
_WEIGHT = "weight"
TYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}
_FLOATS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}


def here() -> dict[str, str | int]:
    """What times depend on, on this machine: processor, kernels by the content of their library, versions, threads."""
    kernels = {"kernels": operator_kernels("auto", "cpu"), "library": library_digest()[:16]}
    return {"cpu": cpu_name(), **kernels, "onnxruntime": ort_version(), "threads": default_threads()}


def timed(
    products: Mapping[Product, Grid | None], target: str, rows: int, progress: Progress | None, *, measure: bool = True
) -> Timings:
    """The times of products here: those of the cache, or, if they are to be measured, new ones; without, none.

    All are of one measurement: what else is at work on the machine, and whose weights are in its caches, is then the
    same for all, and formats are compared by that.
    products: with the grids of their weights, None for float. rows: of x. Raises UserError for targets whose runtime is
    not here.
    """
    if TARGETS[target].runtime and measure:
        told = f"target {target} is for {TARGETS[target].runtime}, which is not here to be timed"
        raise UserError(f"{told}: give times of another machine with --for-machine FILE")
    made = Timings(here(), target, rows, {})
    wanted = [astuple(own) for own in sorted(products)]
    content = {"version": VERSION, "versions": versions(), "machine": made.machine, "target": target, "rows": rows}
    cache, key = _cache(), digest(content | {"products": wanted})
    known = _kept(cache, key).times
    if measure and not set(products) <= set(known):
        known = _measured(products, target, rows, progress)
        _keep(cache, key, replace(made, times=known))
    return replace(made, times=known)


def _cache() -> Cache | None:
    try:
        return Cache(cache_dir() / "timings")
    except UserError as error:
        _log.warning("times are not kept: %s", error)
        return None


def _kept(cache: Cache | None, key: str) -> Timings:
    plain = cache.get(key) if cache is not None else None
    try:
        return Timings.from_dict(plain)
    except ValueError:  # none, or of another version
        return Timings({}, "", 1, {})


def _keep(cache: Cache | None, key: str, table: Timings) -> None:
    if cache is None:
        return
    try:
        cache.put(key, table.to_dict())
    except UserError:
        _log.warning("times are not kept: %s cannot be written; set QCOMPILE_CACHE", cache.folder)


@dataclass(frozen=True)
class _Subject:
    """A session of `copies` of a product, or of none. scale: columns of the product over those that are timed."""

    session: Any
    feeds: Mapping[str, Any]
    copies: int = 1
    scale: float = 1.0


def _measured(
    products: Mapping[Product, Grid | None], target: str, rows: int, progress: Progress | None
) -> dict[Product, float]:
    """Medians over rounds in which every product has one turn, less what a run takes that does nothing.

    Between two turns of a product all others have theirs, so that its weights come from where those of a model come
    from that is larger than the caches; of a small one, where it is small. So every round has the same order: one that
    turns round gives the last of a round two turns in a row, the second from what the first one left in the caches.
    """
    nothing = ir.to_proto(_model("Identity", 8, 8, rows, "float32"))
    empty = _Subject(session(_repeated(nothing, 1), parking=True), _feeds(8, rows, "float32"))
    subjects = dict[Product, _Subject]()
    for number, (own, grid) in enumerate(products.items(), 1):
        if progress is not None:
            progress.step(f"timing products here: {number} of {len(products)} is made")
        subjects[own] = _subject(own, grid, target, rows)
    turns: list[list[float]] = [[] for _ in range(1 + len(subjects))]
    for _ in _rounds(progress):
        for seconds, subject in zip(turns, (empty, *subjects.values()), strict=True):
            seconds.append(_turn(subject))
    idle, *medians = map(statistics.median, turns)
    return {
        product: max(1e6 * (median - idle) / own.copies * own.scale, _TINY)
        for (product, own), median in zip(subjects.items(), medians, strict=True)
    }


def _rounds(progress: Progress | None) -> Iterator[int]:
    """Numbers of rounds, until there are enough of them; the first, which warms up, is none that a median shows."""
    started = time.monotonic()
    for number in range(_MOST_ROUNDS):
        if number >= _ROUNDS and time.monotonic() - started > _SECONDS:
            return
        if progress is not None:
            progress.step(f"timing products here: round {number + 1}")
        yield number


def _turn(own: _Subject) -> float:
    """Seconds of a run."""
    started = time.perf_counter()
    run(own.session, None, own.feeds)
    return time.perf_counter() - started


def _subject(own: Product, grid: Grid | None, target: str, rows: int) -> _Subject:
    columns = own.n if own.k * own.n <= _MOST else max(_MOST // own.k // 64 * 64, min(own.n, 64))
    copies = min(max(_LEAST // (own.k * columns), 1), _COPIES)
    model = _model("MatMul", own.k, columns, rows, own.type)
    if grid is not None:
        _store(model, grid, target, None if own.activations == "auto" else int(own.activations))
    try:
        opened = session(_repeated(ir.to_proto(model), copies), parking=True)
    except UserError as error:
        raise UserError(f"{own} cannot be timed here: {error}") from error
    return _Subject(opened, _feeds(own.k, rows, own.type), copies, own.n / columns)


def _feeds(k: int, rows: int, kind: str) -> dict[str, Any]:
    return {"x": np.random.default_rng(0).standard_normal((rows, k)).astype(kind)}


def _model(operator: str, k: int, n: int, rows: int, kind: str) -> ir.Model:
    """y (rows, N) of x (rows, K): by a MatMul with a weight (K, N) of zeros, or by an Identity."""
    x, y = (
        ir.Value(name=name, type=ir.TensorType(TYPES[kind]), shape=ir.Shape([rows, columns]))
        for name, columns in (("x", k), ("y", n))
    )
    blank = ir.tensor(np.broadcast_to(np.zeros((), kind), (k, n)), name=_WEIGHT)
    weights = [ir.Value(name=_WEIGHT, const_value=blank)] if operator == "MatMul" else []
    node = ir.node(operator, [x, *weights], name="product", outputs=[y])
    graph = ir.Graph([x], [y], nodes=[node], initializers=weights, opset_imports={"": 21}, name="product")
    return ir.Model(graph, ir_version=10)


def _store(model: ir.Model, grid: Grid, target: str, wanted: int | None) -> None:
    """Store the weights as a compile does, in place."""
    plain = Recipe(parse_passes(lists.PLAIN), target=target)  # type: ignore[arg-type]
    packing = next(own for own in build(plain) if Fact.PACKED in own.ensures)
    packing.dry = True
    packing.policy = Policy(grid, grid, None, target=target, blank=True)  # type: ignore[attr-defined]
    packing.call(Region(model, list(model.graph), vocabulary=None))
    int8, node = INT8.get(target), next(own for own in model.graph if is_product(own))  # all of them are alike
    if int8 is not None and wanted is None:
        coarse = int8.takes(node) and (int8.alone(node) or product_bits(node) <= _COARSE)
        wanted = 8 if coarse else 16
    if int8 is not None:
        activation_bits.write(model, [], wanted)
    lower(model, target)


def _repeated(proto: onnx.ModelProto, copies: int) -> bytes:
    """The graph so many times beside itself on one input, each with weights of its own."""
    nodes, tensors, outputs = list(proto.graph.node), list(proto.graph.initializer), list(proto.graph.output)
    large = {own.name for own in tensors if len(own.raw_data) >= _CODES and own.data_type != onnx.TensorProto.INT64}
    made = {name for node in nodes for name in node.output} | large
    for field in ("node", "initializer", "output", "value_info"):
        proto.graph.ClearField(field)
    proto.graph.initializer.extend(own for own in tensors if own.name not in large)
    random = np.random.default_rng(0)
    for number in range(copies):
        names = {name: f"{name}.{number}" for name in made}
        for node in nodes:
            own = proto.graph.node.add()
            own.CopyFrom(node)
            own.name = f"{node.name}.{number}"
            own.input[:] = [names.get(name, name) for name in node.input]
            own.output[:] = [names[name] for name in node.output]
        for tensor in (tensor for tensor in tensors if tensor.name in large):
            other = proto.graph.initializer.add()
            other.CopyFrom(tensor)
            other.name, other.raw_data = names[tensor.name], _filled(tensor, random)
        for output in outputs:
            told = proto.graph.output.add()
            told.CopyFrom(output)
            told.name = names[output.name]
    return bytes(proto.SerializeToString())


def _filled(tensor: onnx.TensorProto, random: np.random.Generator) -> bytes:
    """Random codes, or numbers of a float weight; scales stay."""
    kind = _FLOATS.get(tensor.data_type)
    if kind is None:
        return random.bytes(len(tensor.raw_data))
    if tensor.name != _WEIGHT:
        return bytes(tensor.raw_data)
    count = len(tensor.raw_data) // np.dtype(kind).itemsize
    return random.standard_normal(count, np.float32).astype(kind).tobytes()
