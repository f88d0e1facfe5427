"""compiler/walk/needs.py: what a compile takes is told before the work, and refused where it is not there."""

import itertools
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler import Recipe, parse_passes
from qcompile.compiler.api.rehearsal import rehearse
from qcompile.compiler.console.progress import Silent
from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.files.load import save_model
from qcompile.compiler.files.work import Work
from qcompile.compiler.settings.steps import parse_step
from qcompile.compiler.stages import prepare_model
from qcompile.compiler.walk import needs, runner
from qcompile.compiler.walk.needs import BASE, Fed, Load, Need, fed, foretold, load_of
from qcompile.compiler.walk.walk import Job
from qcompile.models.tiny import tiny_classifier, tiny_decoder
from qcompile.passes import policy
from qcompile.passes.errors import UserError
from qcompile.passes.observers.gram import Gram

LISTS = ["pack", "smooth,awq,pack", "gptq,pack", "smooth,qdq", "dynamic"]


def _need(folder: Path, passes: str, load: Load, **shape: Any) -> Need:
    save_model(tiny_decoder(**shape), folder / "m.onnx")
    made = prepare_model(folder / "m.onnx", Recipe(passes=parse_passes(passes)), Silent(), dry=True)
    return foretold(made.model, made.passes, made.policy, load)


@pytest.mark.parametrize("passes", LISTS)
def test_memory_does_not_grow_with_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: str) -> None:
    """But for the packed weights that are held before they are put aside, and a whole session of a small file."""
    monkeypatch.setattr(needs, "HELD", 0)
    monkeypatch.setattr(needs, "WHOLE", 0)
    shallow, deep = (
        _need(tmp_path, passes, Load(64, 96, 2), layers=layers, hidden=256, heads=4, kv_heads=2, ffn=512)
        for layers in (2, 6)
    )
    assert deep.memory == shallow.memory
    assert deep.disk > 1.5 * shallow.disk


@pytest.mark.parametrize("passes", LISTS)
def test_memory_grows_with_what_a_segment_holds(tmp_path: Path, passes: str) -> None:
    sizes: dict[str, Any] = {"layers": 1, "hidden": 256, "heads": 4, "kv_heads": 2}
    narrow, wide = (_need(tmp_path, passes, Load(64, 96, 2), **sizes, ffn=ffn).memory for ffn in (512, 4096))
    assert wide > narrow > BASE
    assert narrow < BASE + (128 << 20)
    if passes != "pack":
        assert _need(tmp_path, passes, Load(4096, 96, 2), **sizes, ffn=512).memory > narrow


def test_what_cannot_fit_is_refused_before_the_work_with_what_would(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = bench.save(tiny_decoder(layers=1))
    (bench.folder / "out").mkdir()
    before = bench.snapshot()
    monkeypatch.setattr(needs, "resident", lambda: 0)
    monkeypatch.setattr(needs, "available", lambda: 1 << 20)
    monkeypatch.setattr(needs, "swappable", lambda: 0)
    with pytest.raises(UserError, match=r"about 0\.\d GB of memory \(.*\), 0\.0 GB are free; none of the options"):
        bench.compile(source, "awq,pack")
    # As it is, and with swap; in one thread; of shorter texts, too; unverified; without statistics.
    answers = iter([False, False, False, False, False, True])
    monkeypatch.setattr(needs, "_fits", lambda need, free: next(answers))
    with pytest.raises(UserError, match=r"free; --passes pack --threads 1 takes about 0\.\d GB"):
        bench.compile(source, "awq,pack")
    assert bench.snapshot() == before
    monkeypatch.setattr(needs, "_fits", lambda need, free: True)
    assert bench.compile(source, "awq,pack").outputs
    monkeypatch.setattr(needs, "available", lambda: None)
    monkeypatch.setattr(needs, "_fits", lambda need, free: False)
    assert bench.compile(source, "awq,pack").outputs, "where nobody tells what there is"


def test_rows_of_arrays_with_ids_are_tokens(bench: Any) -> None:
    """A file of several texts is one batch, which leads with the texts: products see all tokens of them."""
    plan = prepare_model(bench.save(tiny_decoder()), Recipe(), Silent(), dry=True).plan
    assert plan.ids is not None
    ids = np.ones((3, 40), np.int64)
    assert fed(plan, Batch({plan.ids.name: ids}, len(ids))) == Fed(ids.size, 3 * 40 * 40, 3)
    assert fed(plan, Batch(lambda: {plan.ids.name: ids}, len(ids))) == Fed(ids.size, 3 * 40 * 40, 3)
    assert fed(plan, Batch({plan.ids.name: ids[0]}, 40)) == Fed(40, 40 * 40, 1), "of rank 1 they are one text"
    images = prepare_model(bench.save(tiny_classifier()), Recipe(passes=parse_passes("qdq")), Silent(), dry=True).plan
    assert fed(images, Batch({}, 5)) == Fed(5, texts=5)


@pytest.mark.parametrize(("passes", "calibrated", "arrays"), [("smooth,qdq", False, 6), ("gptq,pack", True, 2)])
def test_scores_of_attention_are_counted(tmp_path: Path, passes: str, calibrated: bool, arrays: int) -> None:
    """(texts, heads, T, T) in a batch: the more the longer texts are, of as many tokens."""
    rows, heads = 1 << 14, 4
    load = Load(rows * calibrated, 96 if calibrated else rows, 2)
    needs_of = [
        _need(tmp_path, passes, replace(load, **{"largest" if calibrated else "check": Fed(rows, rows * length)}))
        for length in (256, 512, 1024)
    ]
    more = [b.memory - a.memory for a, b in itertools.pairwise(needs_of)]
    assert more == [arrays * 4 * heads * rows * length for length in (256, 512)]


def test_scores_of_images_are_of_their_patches() -> None:
    """Where the graph fixes how many there are, a batch has that many for each of its rows."""
    scores = ir.Value(name="scores", shape=ir.Shape(["batch", 12, 197, 197]))
    node = ir.Node("", "Softmax", [scores])
    assert needs._scores(node, Fed(8, texts=8)) == 4 * 8 * 12 * 197 * 197
    assert needs._scores(ir.Node("", "Relu", [scores]), Fed(8, texts=8)) == 0
    assert needs._scores(ir.Node("", "Softmax", [ir.Value(name="x")]), Fed(8, 64)) == 0


@settings(max_examples=8, deadline=None)
@given(
    texts=st.integers(1, 3),
    length=st.integers(2, 1024),
    heads=st.sampled_from([2, 4, 8]),
    passes=st.sampled_from(["smooth,qdq", "gptq,pack", "pack"]),
)
def test_a_fixed_length_changes_nothing(texts: int, length: int, heads: int, passes: str) -> None:
    """The same graph on the same data takes the same, whether its axes are fixed or free."""
    with TemporaryDirectory() as folder:
        told = [_told(Path(folder), passes, heads, texts, length, fixed=fixed) for fixed in (False, True)]
    assert told[0] == told[1]
    assert told[0][1] == 4 * heads * texts * length**2


def _told(folder: Path, passes: str, heads: int, texts: int, length: int, *, fixed: bool) -> tuple[Need, float]:
    """What a compile takes on batches of texts, and attention's scores in it."""
    made = _prepared(folder, passes, heads, (texts, length) if fixed else None)
    assert (made.plan.batch, made.plan.sequence) == ((texts, length) if fixed else (None, None))
    batch = Batch({made.plan.ids.name: np.ones((texts, length), np.int64)}, texts)
    load = load_of([fed(made.plan, batch)] * 3, [fed(made.plan, batch)] * 2)
    scores = sum(needs._scores(node, load.largest) for node in made.model.graph)
    return foretold(made.model, made.passes, made.policy, load), scores


def _prepared(folder: Path, passes: str, heads: int, shape: tuple[int, int] | None) -> Any:
    model = tiny_decoder(layers=1, heads=heads, kv_heads=2)
    for value in model.graph.inputs if shape is not None else ():
        value.shape = ir.Shape(shape)
    if shape is not None:
        model.graph.outputs[0].shape = ir.Shape([*shape, 256])
    save_model(model, folder / "m.onnx")
    return prepare_model(folder / "m.onnx", Recipe(passes=parse_passes(passes)), Silent(), dry=True)


@pytest.mark.parametrize("lengths", [(64, 1500), (1500, 64)])
def test_scores_of_one_fixed_length(lengths: tuple[int, int]) -> None:
    """Those of every token and all positions that are fixed, as a decoder's of an encoder's states."""
    shapes = [["texts", 6, *((n if n == 1500 else own) for n in lengths)] for own in (64, "tokens")]
    nodes = [ir.Node("", "Softmax", [ir.Value(name="x", shape=ir.Shape(shape))]) for shape in shapes]
    assert [needs._scores(node, Fed.of_texts(3, 64)) for node in nodes] == [4 * 3 * 6 * 64 * 1500] * 2


def test_a_fixed_length_is_not_to_be_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shorter `--context` is told where it can be given."""
    monkeypatch.setattr(needs, "available", lambda: 1 << 20)
    monkeypatch.setattr(needs, "swappable", lambda: 0)
    monkeypatch.setattr(needs, "_fits", lambda need, free: False)
    made = _prepared(tmp_path, "gptq,pack", 4, None)
    told = [
        [words for words, _ in needs._others(made.model, made.passes, made.policy, load, judged=False, cuts=cuts)]
        for load in [load_of([Fed.of_texts(1, 64)], [Fed.of_texts(1, 48)])]
        for cuts in (True, False)
    ]
    assert "--threads 1 --context 16" in told[0]
    assert [words for words in told[0] if "context" not in words] == told[1]


@pytest.mark.parametrize("widths", [[256, 256, 700], [512] * 3, [1024] * 3 + [64], [2048]])
@pytest.mark.parametrize(("rows", "batches"), [(201, 7), (64, 12), (512, 9), (300, 1), (1100, 2), (2100, 5)])
def test_observers_hold_what_is_foretold(widths: list[int], rows: int, batches: int) -> None:
    """Arrays of all of a segment's observers, from the first batch until their statistics are read: the peak."""
    rng = np.random.default_rng(0)
    values = [ir.Value(name=str(number)) for number in range(len(widths))]
    groups = {(value,): Gram(str(value.name)) for value in values}
    feeds = {f"{n}.seen": rng.standard_normal((1, rows, k), np.float32) for n, k in enumerate(widths)}
    tracemalloc.start()
    try:
        _observe(groups.values(), feeds, batches)
        found = runner._read(groups)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    told = needs._summed(widths, Load(rows, 0, 1, rows * batches))
    assert set(found) == set(values)
    assert not groups
    assert 0.9 * peak < told < 1.5 * peak


def _observe(observers: Iterable[Gram], feeds: Arrays, batches: int) -> None:
    """Each batch in arrays of its own, as a session gives it: observers hold them."""
    for _ in range(batches):
        for own, (name, array) in zip(observers, feeds.items(), strict=True):
            own.update({name: array.copy()})


def test_little_data_is_spilled_little(tmp_path: Path) -> None:
    """What goes from segment to segment is no more than the rows of all batches, and no more than a spill holds."""
    few, many, endless = (
        _need(tmp_path, "gptq,pack", Load(64, 96, 2, total), layers=2, hidden=256, ffn=512).memory
        for total in (64, 128, None)
    )
    assert many - few == 2 * 4 * 64 * 256
    assert (
        many < endless == _need(tmp_path, "gptq,pack", Load(64, 96, 2, 1 << 40), layers=2, hidden=256, ffn=512).memory
    )


@pytest.mark.parametrize("passes", LISTS)
def test_memory_grows_with_threads_up_to_the_pieces_there_are(tmp_path: Path, passes: str) -> None:
    """Threads have pieces of their own, and no more of them than there are: of a small model a few."""
    sizes: dict[str, Any] = {"layers": 1, "hidden": 256, "heads": 4, "kv_heads": 2, "vocab": 512}
    small = [_need(tmp_path, passes, Load(64, 96, n), **sizes, ffn=2048).memory for n in (1, 8, 64, 1024)]
    assert small == sorted(small)
    assert small[0] + 64e6 > small[1] == small[2] == small[3]
    one, four = (_need(tmp_path, "pack", Load(0, 96, n), layers=1, hidden=1024, ffn=8192).memory for n in (1, 4))
    assert one + 3 * 4 * needs.ELEMENTS < four


def test_what_is_not_run_takes_nothing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--verify none` runs no check batches; and it is offered, where nothing is asked for that needs them."""
    seen, own = list[Load](), needs.foretold
    monkeypatch.setattr(needs, "foretold", lambda *told: (seen.append(told[-1]), own(*told))[1])
    source = bench.save(tiny_decoder(layers=1))
    bench.compile(source, "pack", verify="none")
    bench.compile(source, "pack")
    assert seen[0].checked == 0 < seen[1].checked
    monkeypatch.setattr(needs, "_fits", lambda need, free: seen[-1].checked == 0)
    with pytest.raises(UserError, match=r"free; --threads 1 --verify none takes about 0\.\d GB"):
        bench.compile(source, "pack")
    with pytest.raises(UserError, match="none of the options tried"):
        bench.compile(source, "pack", bench=True)


def test_what_swaps_is_warned_of(bench: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    source = bench.save(tiny_decoder(layers=1))
    monkeypatch.setattr(needs, "resident", lambda: 0)
    monkeypatch.setattr(needs, "available", lambda: 1 << 20)
    monkeypatch.setattr(needs, "swappable", lambda: 1 << 40)
    assert bench.compile(source, "pack").outputs
    assert [own.getMessage()[-24:] for own in caplog.records] == ["it will swap, and be slow"[-24:]]


def test_a_notebook_full_of_arrays_is_no_reason_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    need = Need(4e9, 0, 0, "")
    monkeypatch.setattr(needs, "resident", lambda: 10 << 30)
    assert not needs._fits(need, 1e9)
    assert needs._fits(need, 4e9)


def test_a_disk_too_small_is_refused_before_the_work(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = bench.save(tiny_decoder(layers=1))
    monkeypatch.setattr(Work, "room", 1000)
    monkeypatch.setattr(Job, "walk", lambda *_: pytest.fail("the walk began"))
    with pytest.raises(UserError, match=r"put aside beside it, needs 0 MB, 0 MB are free") as raised:
        bench.compile(source, "pack")
    assert isinstance(raised.value.__cause__, OSError)


def test_what_an_unfinished_compile_holds_of_the_disk_is_free(tmp_path: Path) -> None:
    work = Work(tmp_path / "not" / "there" / "model.onnx")
    free = shutil.disk_usage(tmp_path).free
    assert work.room == pytest.approx(free, abs=1e9)
    (tmp_path / ".model.onnx.abcdefgh.work.tmp").mkdir(mode=0o700)
    with open(tmp_path / ".model.onnx.abcdefgh.work.tmp" / "tensors", "wb") as file:
        file.truncate(1 << 40)  # takes no room
    assert (Work(tmp_path / "model.onnx").room or 0) > 1 << 40


def test_a_dry_run_tells_memory_and_disk(bench: Any) -> None:
    plan = rehearse(bench.save(tiny_decoder()), Recipe(passes=parse_passes("pack")))
    assert BASE < plan.memory < 2 * BASE
    assert plan.disk == pytest.approx(plan.report.compiled_bytes, rel=0.3)
    assert {"memory", "disk"} <= plan.to_dict().keys()


def test_no_weight_is_read_for_its_grid(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of nvfp4 follows from the largest number of a weight, and its size does not."""
    source, recipe = bench.save(tiny_decoder()), Recipe(passes=parse_passes("pack"), weights=parse_step("nvfp4"))
    report = bench.compile(source, "pack", weights=parse_step("nvfp4"))
    monkeypatch.setattr(policy, "_largest", lambda weight: pytest.fail("it was read"))
    plan = rehearse(source, recipe)
    assert plan.report.compiled_bytes == pytest.approx(report.compiled_bytes, rel=0.03, abs=16 << 10)
    assert plan.disk == pytest.approx(report.compiled_bytes, rel=0.3)


_PEAK = """
import resource, sys
from pathlib import Path
from qcompile.compiler import Recipe, compile_model, parse_passes
report = compile_model(Path(sys.argv[1]), Recipe(passes=parse_passes(sys.argv[2])), output=Path(sys.argv[3]))
print(report.peak_memory)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ({"layers": 2, "hidden": 1024, "heads": 16, "kv_heads": 4, "ffn": 2816, "vocab": 8192}, "fp32"),
        ({"layers": 2, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocab": 8192}, "fp32"),
        ({"layers": 2, "hidden": 2048, "heads": 32, "kv_heads": 8, "ffn": 8192, "vocab": 8192}, "fp16"),
        ({"layers": 1, "hidden": 1024, "heads": 8, "kv_heads": 2, "ffn": 1024, "vocab": 65536}, "fp32"),
        ({"layers": 3, "hidden": 512, "heads": 8, "kv_heads": 8, "ffn": 1408, "vocab": 32768}, "fp32"),
        ({"layers": 2, "hidden": 1536, "heads": 12, "kv_heads": 2, "ffn": 8960, "vocab": 16384}, "fp16"),
        ({"layers": 6, "hidden": 768, "heads": 12, "kv_heads": 12, "ffn": 3072, "vocab": 4096}, "fp32"),
        ({"layers": 1, "hidden": 3072, "heads": 24, "kv_heads": 8, "ffn": 8192, "vocab": 4096}, "fp16"),
    ],
)
def test_peaks_are_as_foretold(tmp_path: Path, shape: dict[str, Any], dtype: Any) -> None:
    """Of a compile that needs no data, in a process of its own: within a fifth."""
    save_model(tiny_decoder(**shape, dtype=dtype), tmp_path / "m.onnx")
    plan = rehearse(tmp_path / "m.onnx", Recipe(passes=parse_passes("pack")))
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "m.onnx"), "pack", str(tmp_path / "out.onnx")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert plan.memory == pytest.approx(int(told), rel=0.2)
