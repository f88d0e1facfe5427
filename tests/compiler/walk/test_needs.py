"""compiler/walk/needs.py: what a compile takes is told before the work, and refused where it is not there."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qcompile.compiler import Recipe, parse_passes
from qcompile.compiler.api.rehearsal import rehearse
from qcompile.compiler.console.progress import Silent
from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.files.load import save_model
from qcompile.compiler.stages import prepare_model
from qcompile.compiler.walk import needs
from qcompile.compiler.walk.needs import BASE, HELD, Load, Need, foretold, positions
from qcompile.models.tiny import tiny_classifier, tiny_decoder
from qcompile.passes.errors import UserError

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
    assert narrow < BASE + 2 * HELD
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
    with pytest.raises(UserError, match=r"takes about 0\.\d GB of memory \(.*\), 0\.0 GB are free; no list of passes"):
        bench.compile(source, "awq,pack")
    answers = iter([False, False, False, True])  # as it is; in one thread; of shorter texts, too; without statistics
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
    assert positions(plan, Batch({plan.ids.name: ids}, len(ids))) == ids.size
    assert positions(plan, Batch(lambda: {plan.ids.name: ids}, len(ids))) == ids.size
    images = prepare_model(bench.save(tiny_classifier()), Recipe(passes=parse_passes("qdq")), Silent(), dry=True).plan
    assert positions(images, Batch({}, 5)) == 5


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


def test_memory_grows_with_threads(tmp_path: Path) -> None:
    """Each thread compares a block of its own."""
    one, eight = (_need(tmp_path, "pack", Load(0, 96, n), layers=1, hidden=256, ffn=2048).memory for n in (1, 8))
    assert one + 7 * 4 * 256 * 2048 < eight


def test_a_dry_run_tells_memory_and_disk(bench: Any) -> None:
    plan = rehearse(bench.save(tiny_decoder()), Recipe(passes=parse_passes("pack")))
    assert BASE < plan.memory < 2 * BASE
    assert plan.disk == pytest.approx(plan.report.compiled_bytes, rel=0.3)
    assert {"memory", "disk"} <= plan.to_dict().keys()


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
    ],
)
def test_peaks_are_as_foretold(tmp_path: Path, shape: dict[str, Any], dtype: Any) -> None:
    """Of a compile that needs no data, in a process of its own: within a fifth."""
    save_model(tiny_decoder(**shape, dtype=dtype), tmp_path / "m.onnx")
    plan = rehearse(tmp_path / "m.onnx", Recipe(passes=parse_passes("pack")))
    command = [sys.executable, "-c", _PEAK, str(tmp_path / "m.onnx"), "pack", str(tmp_path / "out.onnx")]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert plan.memory == pytest.approx(int(told), rel=0.2)
