"""What is held aside of arrays and pictures: each row is for one thing alone, and what is told on it saw none of it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompile
from qcompile.compiler import cli
from qcompile.compiler.data.aside import FEWEST, MOST, for_accuracy
from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import input_plan
from qcompile.models.text import calibration_text
from qcompile.models.tiny import tiny_conv, tiny_decoder
from qcompile.passes.held import FEWEST_KNOWN

PLAN = input_plan(tiny_conv())
LINE = "It was a bright cold day in April, and the clocks were striking thirteen. "


def _batches(sizes: list[int]) -> list[Batch]:
    """Batches of so many pictures each, every one of a number of its own."""
    numbers = np.split(np.arange(sum(sizes), dtype=np.float32), np.cumsum(sizes)[:-1])
    return [Batch({"image": own.reshape(-1, 1, 1, 1)}, len(own)) for own in numbers]


def _pictures(rows: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, 3, 32, 32)).astype(np.float32)


def _content(path: Path) -> bytes:
    """The model, without the sentence in it that says where its data came from."""
    model = onnx.load(path)
    del model.metadata_props[:]
    return bytes(model.SerializeToString(deterministic=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=80))
def test_rows_to_tell_accuracy_on(sizes: list[int]) -> None:
    """Every row is on one side, the same one in whatever batches; enough stay to calibrate on; the first stays."""
    kept, held, why = for_accuracy(PLAN, _batches(sizes))
    left, taken = ([x for batch in part for x in batch.feeds["image"].ravel()] for part in (kept, held))
    assert sorted(left + taken) == list(range(sum(sizes)))
    assert all(batch.rows == len(batch.feeds["image"]) > 0 for batch in (*kept, *held))
    assert bool(taken) != bool(why)
    if taken:
        assert FEWEST <= len(taken) <= 2 * min(MOST, sum(sizes) // 8)
        assert len(left) >= FEWEST_KNOWN
        assert left[0] == 0
        assert taken == [x for b in for_accuracy(PLAN, _batches([sum(sizes)]))[1] for x in b.feeds["image"].ravel()]
    else:
        assert sum(sizes) < FEWEST_KNOWN + FEWEST, "of pictures that can be cut only too few are no reason"


def test_what_cannot_be_parted_is_not() -> None:
    fixed = tiny_conv()
    fixed.graph.inputs[0].shape = ir.Shape([40, 3, 12, 12])
    batch = Batch({"image": np.zeros((40, 3, 12, 12), np.float32)}, 40)
    assert for_accuracy(input_plan(fixed), [batch]) == (
        [batch],
        [],
        "its 1 batches are too few to hold one aside, and cannot be cut",
    )
    steps = [Batch({"image": np.zeros((20, 1, 1, 1))}, 20, follows) for follows in (None, 0)]
    assert for_accuracy(PLAN, steps)[1:] == ([], "its batches follow one another")


@pytest.mark.parametrize("passes", ["smooth,qdq", "smooth,qdq,bias_correction"])
def test_rows_held_aside_change_nothing(bench: Any, passes: str) -> None:
    """The same bytes as by the other rows alone, with those that were held aside given as evaluation data."""
    source, rows = bench.save(tiny_conv(), tokenizer=False), _pictures(64)
    (kept,), (held,), _ = for_accuracy(PLAN, [Batch({"image": rows}, 64)])
    made = []
    for number, given_ in enumerate(({"calibration": {"image": rows}},
                                     {"calibration": kept.feeds, "evaluation": held.feeds})):  # fmt: skip
        out = bench.folder / str(number) / "m.onnx"
        report = qcompile.compile(source, passes, output=out, **given_)
        made.append((_content(out), report.outputs[0].relative, report.outputs[0].error))
        assert report.measured.startswith("8 rows of ")
        assert report.outputs[0].error
    assert made[0] == made[1]
    assert (
        "8 rows of them held aside to tell the accuracy on"
        in qcompile.compile(source, passes, calibration={"image": rows}, output=bench.folder / "2" / "m.onnx").data
    )


def test_few_rows_are_told_of(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In the terminal and in the page's tile."""
    source, path, out = bench.save(tiny_conv(), tokenizer=False), bench.folder / "few.npz", bench.folder / "o.onnx"
    np.savez(path, image=_pictures(12))
    assert cli.main([str(source), "--passes", "qdq", "--calibration", str(path), "-o", str(out)]) == 0
    told = "of the calibration data itself (12 rows are too few to hold some aside, 36 are not): --eval-data FILE"
    assert told in capsys.readouterr().out
    assert told[:60] in out.with_name("o.report.html").read_text()


def test_pictures_that_calibration_leaves_out_come_first(bench: Any) -> None:
    """They cost calibration nothing."""
    image = pytest.importorskip("PIL.Image")
    source, folder = bench.save(tiny_conv(), tokenizer=False), bench.folder / "pictures"
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)):
        image.fromarray(pixels).save(folder / f"{number:02}.png")
    report = qcompile.compile(source, "qdq", calibration=[folder], samples=40, output=bench.folder / "a.onnx")
    assert report.data.startswith("40 of 48 images,")
    assert "held aside" not in report.data
    assert report.measured == "8 rows of pictures, not calibrated on"
    report = qcompile.compile(source, "qdq", calibration=[folder], samples=48, output=bench.folder / "b.onnx")
    assert "; 6 rows of them held aside to tell the accuracy on" in report.data
    assert report.measured == "6 rows of pictures, not calibrated on"


@pytest.mark.filterwarnings("ignore:samples has no effect")
def test_ranges_of_a_file_may_have_seen_it_all(bench: Any) -> None:
    """Rows are unseen where `calibrate` held the same ones aside, or learnt from other data."""
    source, arrays = bench.save(tiny_conv(), tokenizer=False), []
    for seed in range(2):
        arrays.append(bench.folder / f"{seed}.npz")
        np.savez(arrays[-1], image=_pictures(64, seed))
    stats, direct, out = (bench.folder / name for name in ("m.statistics", "direct.onnx", "o.onnx"))
    made = qcompile.calibrate(source, "qdq", calibration=arrays[0], output=stats)
    assert "8 rows of them held aside" in made.data
    wanted = qcompile.compile(source, "qdq", calibration=arrays[0], output=direct)
    for given_, measured in (
        ({"calibration": arrays[0]}, wanted.measured),
        ({"calibration": arrays[1]}, "8 rows of 1.npz, not calibrated on"),
        ({"calibration": arrays[0], "samples": 3}, "the statistics may have seen all of it"),
        ({"calibration": {"image": _pictures(64)}}, "the statistics may have seen all of it"),
    ):
        report = qcompile.compile(source, "qdq", statistics=stats, output=out, **given_)
        assert measured in report.measured
        assert list(report.calibrated.values())[-1] == "0.npz"
    with pytest.raises(qcompile.UserError, match=r"0\.npz is no test data: it is calibrated on"):
        qcompile.compile(source, "qdq", statistics=stats, evaluation=arrays[0], output=out)


@pytest.mark.parametrize("kind", ["memory", "file", "bundled"])
def test_texts_are_known_by_their_content(bench: Any, kind: str) -> None:
    """Whether they lie in files or not, on both sides; the text that comes with qcompile, too."""
    source, out = bench.save(tiny_decoder()), bench.folder / "out" / "m.onnx"
    text = LINE * 20 if kind != "bundled" else calibration_text()
    file = bench.folder / "t.txt"
    file.write_bytes(text.encode())
    data = {"memory": [text, LINE * 30], "file": file, "bundled": None}[kind]
    fields: dict[str, Any] = {"calibration": data, "samples": 4, "context": 32, "group_size": 32}
    qcompile.compile(source, "smooth,pack", output=out, **fields)
    for given_ in (text, [text], [file]):
        with pytest.raises(qcompile.UserError, match=r"is no test data: .* was calibrated on it"):
            qcompile.evaluate(out, against=source, text=given_)
    with pytest.raises(qcompile.UserError, match="is no test data: it is calibrated on"):
        qcompile.compile(source, "smooth,pack", output=out, evaluation=[text], **fields)
    other = bench.folder / "other.txt"
    other.write_text("Something else entirely, and nothing of what was there before. " * 8)
    scores = qcompile.evaluate(out, against=source, text=other, context=32)
    assert scores.rows[-1].scores.kl > 0
    told = json.loads(out.with_name("m.report.json").read_text())["calibrated"]
    assert hashlib.sha256(text.encode()).hexdigest() in told
