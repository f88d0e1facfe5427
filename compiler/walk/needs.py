"""What a compile will take of memory and disk, from shapes alone; and what would fit where that is too much.

The walk holds one segment at a time, so the peak is that of the segment and the kind of work that hold most. Each kind
is a sum of what ONNX Runtime and the passes were measured to hold (`test_needs.py` compares peaks).
Invariant: nothing of it grows with depth, but for `HELD` bytes of packed weights and one session of a small file.
"""

import errno
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace

import onnx_ir as ir

from qcompile.compiler.data.feeds import Batch, InputPlan
from qcompile.compiler.facts.memory import available, resident, swappable
from qcompile.compiler.walk.checkpoints import HELD
from qcompile.compiler.walk.saved_run import WHOLE
from qcompile.compiler.walk.segments import Segment, is_large, split, targets
from qcompile.compiler.walk.verify_products import ELEMENTS
from qcompile.passes.base import Pass
from qcompile.passes.contract import Fact, Reads, Stage
from qcompile.passes.errors import UserError
from qcompile.passes.linears import Embedding, Linear, constant, find_embeddings, find_linears, vocabulary_size
from qcompile.passes.observers.gram import CAPACITY, TOGETHER, UNIT
from qcompile.passes.policy import Policy
from qcompile.passes.threads import workers

_log = logging.getLogger(__name__)

# The libraries; two spills of what goes from segment to segment.
BASE, _SPILLS = 190e6, 64e6
# What a thread works on at once: a chunk of columns (rounding.py), and the arrays that its rounding makes of it.
_CHUNK, _ARRAYS = 1 << 23, 2
# Of a session of a whole file, bytes held for each that it has; matrices like the Gram matrix while a pass factors one.
_LOADED, _GRAMS = 2.0, 3
# Arrays of a block of columns that are held while it is compared: the float and the decoded weight, and on the way.
_BLOCKS = 5
# Copies of codes below 8 bits while a session is made of them.
_COPIES = 5
# What is held of an output while it is compared, in its own float32 numbers.
_COMPARED = 8
# Arrays of attention's scores that are held at once: of what a Softmax reads and gives; and while an integer product of
# them is compared with its twin, of both, of their difference and of its squares.
_SCORED, _TWINS = 2, 6
# What passes make that shrinks weights.
_COMPACT = {Fact.PACKED, Fact.INTEGER}
# Bytes beyond which an estimate that is this much too large still says that there is too little.
_SURE = 0.8


@dataclass(frozen=True)
class Fed:
    """A batch. rows: of its products. pairs: of positions within its texts, which attention scores; 0 where it has no
    texts. texts: or pictures, how many they are.
    """

    rows: int = 0
    pairs: int = 0
    texts: int = 0

    @classmethod
    def of_texts(cls, texts: int, length: int) -> "Fed":
        """Texts of so many tokens."""
        return cls(texts * length, texts * length**2, texts)


@dataclass(frozen=True)
class Load:
    """What goes through the segments.

    rows: of the largest batch of calibration; 0 without statistics. checked: of all check batches together; where both
    are 0, nothing is run.
    threads: how many work side by side. total: rows of all batches of calibration; None: no matter how many.
    largest, check: the most that a batch of each kind has.
    """

    rows: int
    checked: int
    threads: int
    total: int | None = None
    largest: Fed = Fed()
    check: Fed = Fed()


@dataclass(frozen=True)
class Need:
    """memory: bytes at the peak. mapped: of them those that are pages of the model's file, which the system may take
    back. disk: beside the output, with what is put aside until it is written. what: the work that holds most.
    """

    memory: float
    mapped: float
    disk: float
    what: str


def foretold(model: ir.Model, passes: Sequence[Pass], policy: Policy, load: Load) -> Need:
    """What compiling the prepared model takes."""
    policy = replace(policy, blank=True)
    segments = split(model, targets(model).__contains__)
    vocabulary = vocabulary_size(model)
    spilled = max((_spilled(segment, load) for segment in segments), default=0.0)
    found, held, packed = list[Need](), BASE + spilled, 0.0
    for number, segment in enumerate(segments, 1):
        for need in _segment(segment.nodes, passes, policy, vocabulary, load):
            what = f"segment {number} of {len(segments)}, {need.what}"
            found.append(replace(need, memory=need.memory + held + min(packed, HELD), what=what))
        packed += _packed(find_linears(segment.nodes), policy, vocabulary)
        packed += _coded(find_embeddings(segment.nodes), policy)
    held += min(packed, HELD)
    logits = load.checked * max((_width(value) for value in model.graph.outputs), default=0) * 4 * _COMPARED
    found.append(Need(held + logits, 0, 0, "comparing outputs"))
    if packed <= WHOLE and load.checked:
        found.append(Need(held + logits / 2 + _LOADED * packed, packed, 0, "running the saved file"))
    most = max(found, key=lambda need: need.memory)
    early = any(p.stage == Stage.WALK and p.ensures & _COMPACT for p in passes)
    aside = packed if packed > HELD and early else 0
    return replace(most, disk=packed + aside)


def check_fits(
    model: ir.Model,
    passes: Sequence[Pass],
    policy: Policy,
    load: Load,
    *,
    room: int | None = None,
    judged: bool = True,
    cuts: bool = True,
) -> Need:
    """What it takes; UserError, before the work, where memory or disk at hand do not suffice, with what would do.

    Where it would swap it is a warning. room: bytes free on the output's disk; None: not known. judged: whether errors
    are asked for, so that verification cannot be left out. cuts: whether texts may be shorter.
    """
    need, free = foretold(model, passes, policy, load), available()
    if room is not None and _SURE * need.disk > room:
        raise UserError(
            f"the output, with what is put aside beside it, needs {need.disk / 1e6:.0f} MB, {room / 1e6:.0f} MB are "
            "free there; free some space or write elsewhere"
        ) from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if free is None or _fits(need, free):
        return need
    if _fits(need, free + swappable()):
        _log.warning(
            "this compile takes about %.1f GB of memory (%s), %.1f GB are free: it will swap, and be slow",
            need.memory / 1e9,
            need.what,
            free / 1e9,
        )
        return need
    known = ((words, make()) for words, make in _others(model, passes, policy, load, judged=judged, cuts=cuts))
    fitting = next((f"{words} takes about {own.memory / 1e9:.1f} GB" for words, own in known if _fits(own, free)), "")
    raise UserError(
        f"this compile takes about {need.memory / 1e9:.1f} GB of memory ({need.what}), {free / 1e9:.1f} GB are free; "
        + (fitting or "none of the options tried takes so little: use a machine with more memory, or add swap")
    ) from MemoryError()


def _others(
    model: ir.Model, passes: Sequence[Pass], policy: Policy, load: Load, *, judged: bool, cuts: bool
) -> Iterator[tuple[str, Callable[[], Need]]]:
    """Options that take less memory, in words, the least change first."""
    few = replace(load, threads=1)
    quarter = replace(load.largest, rows=load.largest.rows // 4, pairs=load.largest.pairs // 16)
    short = replace(few, rows=load.rows // 4, largest=quarter)
    yield "--threads 1", lambda: foretold(model, passes, policy, few)
    if cuts and short.rows >= 2:
        yield f"--threads 1 --context {short.rows}", lambda: foretold(model, passes, policy, short)
    unseen = replace(few, checked=0, check=Fed())
    if load.checked and not judged:
        yield "--threads 1 --verify none", lambda: foretold(model, passes, policy, unseen)
    plain = [p for p in passes if not p.reads and p.ensures & _COMPACT]
    if plain and load.rows:
        words = f"--passes {','.join(p.name for p in plain)} --threads 1"
        yield words, lambda: foretold(model, plain, policy, replace(few, rows=0, largest=Fed()))
        if load.checked and not judged:
            yield (
                f"{words} --verify none",
                lambda: foretold(model, plain, policy, replace(unseen, rows=0, largest=Fed())),
            )


def _fits(need: Need, free: float) -> bool:
    """Of what is resident only the libraries are counted in what it takes: a notebook may hold arrays of its own."""
    return _SURE * (need.memory - need.mapped) - min(resident(), BASE) <= free


def _spilled(segment: Segment, load: Load) -> float:
    """What is held of the arrays that enter a segment and of those that leave it."""
    widths = [_width(value) for value in segment.carry]
    if load.total is None or not all(widths):
        return _SPILLS if load.rows else 0.0
    return min(_SPILLS, 2 * 4.0 * load.total * sum(widths))


def _segment(
    nodes: Sequence[ir.Node], passes: Sequence[Pass], policy: Policy, vocabulary: int | None, load: Load
) -> Iterator[Need]:
    """What each kind of work on a segment holds beside what is held throughout."""
    linears, tables = find_linears(nodes), find_embeddings(nodes)
    weights = {linear.weight: linear for linear in linears}
    sizes = [float(constant(value).nbytes) for value in _constants(nodes)]
    stored, largest = sum(sizes), max(sizes, default=0.0)
    elements = sum(_size(linear) for linear in weights.values())
    floats = 4.0 * elements
    # Half precision is cast to float32 as a whole, and then let go of; a table that is read turned is turned, too.
    halves = [own for own in weights.values() if constant(own.weight).nbytes < 4 * _size(own)]
    cast = sum(4.0 * _size(own) * (1 + own.transposed) for own in halves)
    # Codes of 8 bits are decoded to float32 before the product. Others are in the graph that a session is made of, and
    # in its bytes; ONNX Runtime has its own copy, makes one for MatMulNBits and one in the layout of its kernel.
    eight = [own for own in weights.values() if _bits(own, policy, vocabulary) == 8]
    packed = _packed(weights.values(), policy, vocabulary)
    running = _COPIES * (packed - _packed(eight, policy, vocabulary)) + sum(4.0 * _size(own) for own in eight)
    seen = {linear.activation: linear.shape[0] for linear in linears}
    wide = float(sum(seen.values()) + sum(linear.shape[1] for linear in linears)) * 4
    deepest = max((linear.shape[0] for linear in linears), default=0)
    deepest = max([deepest, *(table.shape[1] for table in tables)])
    codes = elements + sum(float(table.shape[0] * table.shape[1]) for table in tables)
    chunks = 4.0 * _ARRAYS * min(load.threads * min(_CHUNK, 1024 * deepest), codes)  # no more than there are
    statistics = load.rows > 0 and any(p.reads & {Reads.SCALES, Reads.STATISTICS} for p in passes)
    grams = sum(4.0 * k * k + 4.0 * CAPACITY * k for k in seen.values()) if statistics else 0.0
    scaling = floats if statistics and len([p for p in passes if p.reads & {Reads.STATISTICS, Reads.SCALES}]) > 1 else 0
    shown, checked = (max((_scores(node, own) for node in nodes), default=0.0) for own in (load.largest, load.check))
    if load.checked:
        run = load.checked * wide + _SCORED * checked
        mapped = stored - sum(constant(own.weight).nbytes for own in halves if not own.transposed)
        yield Need(mapped + cast + run, mapped, 0, "float outputs")
    if load.rows:
        carried = 2 * load.rows * wide + _SCORED * shown
        summed = _summed(list(seen.values()), load) if statistics else 0.0
        yield Need(stored + floats + cast + summed + carried, stored, 0, "statistics")
    factor = 4.0 * _GRAMS * max((k * k for k in seen.values()), default=0) if statistics else 0.0
    yield Need(largest + scaling + codes + packed + chunks + grams + factor, largest, 0, "passes")
    if not (load.rows or load.checked):
        return
    if any(Fact.INTEGER in p.ensures for p in passes):
        twins = load.checked * wide + _TWINS * checked
        yield Need(stored + 3 * floats + twins, stored, 0, "float twins")
    else:
        probed = scaling + codes + grams + 3 * load.checked * wide + _SCORED * checked
        yield Need(probed + running, 0, 0, "packed products")
        read = float(sum(constant(weight).nbytes for weight in weights))
        compared = max((_size(own) for own in weights.values()), default=0)  # one weight after the other
        blocks = 4.0 * _BLOCKS * min(load.threads * ELEMENTS, compared)
        yield Need(probed + read + blocks, read, 0, "comparing packed products")


def _summed(widths: Sequence[int], load: Load) -> float:
    """What Gram observers of so many channels hold, at the peak: each a sample, its rows that are not multiplied yet,
    and the total; beside it the sum of a unit, where rows are multiplied before that is at its end. One of them holds
    the sum and, while it multiplies, its batch and all its rows once more; or at the end the sum and what it gives.
    """
    rows, largest = max(load.rows, 1), max(widths, default=0)
    batches = math.inf if load.total is None else -(-load.total // rows)
    several = batches > UNIT
    matrices = 2 if several and (UNIT - 1) * rows >= TOGETHER else 1
    waiting = rows * min(UNIT - 1, batches, (TOGETHER - 1) // rows)
    kept = min(CAPACITY, rows * batches)
    multiplying = largest * (several and matrices == 1) + waiting + 2 * rows
    own = largest * max(largest * (3 - matrices) * several, multiplying)
    return 4.0 * (sum(k * (matrices * k + kept + waiting) for k in widths) + own)


def _scores(node: ir.Node, fed: Fed) -> float:
    """Bytes of one array (texts, heads, T, T) of attention's scores, as a Softmax reads it; 0 for other nodes.

    Invariant: they are those of the batch, whether the graph fixes both lengths, one of them, or none.
    """
    shape = node.inputs[0].shape if node.op_type == "Softmax" and node.inputs[0] is not None else None
    heads = shape[1] if shape is not None and len(shape) == 4 else 0
    if shape is None or not isinstance(heads, int):
        return 0.0
    fixed = [size for size in shape[2:] if isinstance(size, int)]
    return 4.0 * heads * math.prod(fixed) * (fed.pairs, fed.rows, fed.texts)[len(fixed)]


def _constants(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    read = (value for node in nodes for given in node.inputs if given is not None for value in _behind(given))
    return [value for value in dict.fromkeys(read) if is_large(value)]


def _behind(value: ir.Value) -> list[ir.Value]:
    producer = value.producer()
    source = producer.inputs[0] if producer is not None and producer.op_type == "Transpose" else None
    return [value] if source is None else [value, source]


def _size(linear: Linear) -> int:
    return linear.shape[0] * linear.shape[1]


def _bits(linear: Linear, policy: Policy, vocabulary: int | None) -> int:
    spec = policy.for_linear(linear, vocabulary)
    return 0 if isinstance(spec, str) else spec.bits


def _packed(linears: Iterable[Linear], policy: Policy, vocabulary: int | None) -> float:
    """Bytes of linears as they will be stored, a shared weight once."""
    total = 0.0
    for linear in {own.weight: own for own in linears}.values():
        spec, kept = policy.for_linear(linear, vocabulary), constant(linear.weight).dtype.bitwidth
        total += (kept if isinstance(spec, str) else spec.bits_per_weight(linear.shape[0])) * _size(linear) / 8
    return total


def _coded(tables: Iterable[Embedding], policy: Policy) -> float:
    """Bytes of tables as they will be stored."""
    chosen = ((table.shape, policy.for_embedding(table)) for table in tables)
    return sum(
        spec.bits_per_weight(width) * rows * width / 8 for (rows, width), spec in chosen if not isinstance(spec, str)
    )


def _width(value: ir.Value) -> int:
    last = value.shape[-1] if value.shape is not None and len(value.shape) else 0
    return last if isinstance(last, int) else 0


def fed(plan: InputPlan, batch: Batch) -> Fed:
    """Of ids in arrays rows are their number, where `batch.rows` are the texts."""
    if plan.ids is None:
        return Fed(batch.rows, texts=batch.rows)
    ids = batch.feeds[plan.ids.name]
    found = Fed.of_texts(math.prod(ids.shape[:-1]), ids.shape[-1])
    return replace(found, rows=max(batch.rows, found.rows))


def load_of(calibration: Sequence[Fed], checked: Sequence[Fed]) -> Load:
    """Of all batches of calibration, and of all check batches."""
    rows = [own.rows for own in calibration]
    most = (
        Fed(*(max(sizes) for sizes in zip(*map(astuple, own), strict=True))) if own else Fed()
        for own in (calibration, checked)
    )
    return Load(max(rows, default=0), sum(own.rows for own in checked), workers(), sum(rows), *most)
