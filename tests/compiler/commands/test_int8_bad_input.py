"""Calibration data that does not fit, for INT8: one line that says what and where, or the ranges of what is left."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qcompile.compiler.data import feeds
from qcompile.compiler.pipeline import compile_model
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.models.tiny import tiny_conv, tiny_decoder, tiny_mlp
from qcompile.passes.errors import UserError

LISTS = ["smooth,qdq", "qdq"]
ROWS = np.random.default_rng(6).standard_normal((64, 48)).astype("f4")
MODULE = """
import numpy as np
ROWS = np.random.default_rng(6).standard_normal((64, 48)).astype("f4")

def nan():
    yield {"x": ROWS}
    yield {"x": np.full((4, 48), np.nan, np.float32)}

def missing():
    yield {"x": ROWS}
    yield {}

def unknown():
    yield {"x": ROWS, "z": ROWS}

def nothing():
    return []

def integers():
    yield {"x": np.ones((4, 48), np.int64)}

def wide():
    yield {"x": ROWS.astype(np.float64)}

def shape():
    yield {"x": ROWS[:, :40]}

def ragged():
    yield {"x": [[1.0, 2.0], [3.0]]}

def late():
    yield {"x": ROWS}
    raise RuntimeError("the disk is gone")

def empty():
    yield {"x": ROWS[:0]}

def listed():
    yield [ROWS, ROWS]
"""


def _npz(bench: Any, *batches: Any, **arrays: Any) -> list[str]:
    """Files of x, or one of any arrays."""
    folder = bench.folder / "data"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, given in enumerate([{"x": batch} for batch in batches] or [arrays]):
        paths.append(str(folder / f"{number}.npz"))
        np.savez(paths[-1], **given)
    return paths


def _late(value: float) -> np.ndarray:
    spoiled = ROWS.copy()
    spoiled[-1, -1] = value
    return spoiled


# The files of x, and what is said of them.
FILES: dict[str, tuple[Callable[[Any], list[str]], str]] = {
    "NaN": (lambda b: _npz(b, ROWS, _late(np.nan)), r"1\.npz: array 'x' contains NaN or infinity"),
    "infinity": (lambda b: _npz(b, ROWS, _late(-np.inf)), r"1\.npz: array 'x' contains NaN or infinity"),
    "missing": (lambda b: _npz(b, y=ROWS), r"0\.npz: array 'y' is no input of the model \(inputs: x\)"),
    "nothing in it": (lambda b: _npz(b, **{}), r"0\.npz: no array for input 'x' \(needed: x\)"),
    "integers": (lambda b: _npz(b, ROWS.astype(np.int64)), r"0\.npz: array 'x' is int64, the input is float32"),
    "text": (lambda b: _npz(b, np.array(["a", "b"])), r"0\.npz: array 'x' is <U1, the input is float32"),
    "complex": (lambda b: _npz(b, ROWS + 1j), r"0\.npz: array 'x' is complex64, the input is float32"),
    "shape": (lambda b: _npz(b, ROWS[:, :40]), r"array 'x' has shape \[64, 40\], the input is \[batch, 48\]"),
    "rank": (lambda b: _npz(b, ROWS[0]), r"array 'x' has shape \[48\], the input is \[batch, 48\]"),
    "ragged": (lambda b: _npz(b, np.array([[1.0], [1.0, 2.0]], object)), r"0\.npz is not a readable \.npz file"),
    "empty": (lambda b: _npz(b, ROWS[:0]), r"0\.npz: its arrays hold no rows"),
    "two empty ones": (lambda b: _npz(b, ROWS[:0], ROWS[:0]), r"0\.npz: its arrays hold no rows"),
    "gone": (lambda b: [str(b.folder / "data" / "0.npz")], r"0\.npz: no such file"),
}
FUNCTIONS = {
    "nan": r"array 'x' contains NaN or infinity",
    "missing": r"data:missing: no array for input 'x' \(needed: x\)",
    "unknown": r"data:unknown: array 'z' is no input of the model \(inputs: x\)",
    "listed": r"a batch of int8_listed_data:listed has 2 parts, the model needs 1 \(x\): pick them with transform=",
    "nothing": r"gave no batches",
    "integers": r"'x' is int64, the input is float32",
    "shape": r"'x' has shape \[64, 40\], the input is \[batch, 48\]",
    "ragged": r"data:ragged failed: ValueError",
    "late": r"data:late failed: RuntimeError: the disk is gone",
    "empty": r"data:empty: its arrays hold no rows",
}


@pytest.mark.parametrize("passes", LISTS)
@pytest.mark.parametrize("name", FILES)
def test_files_that_do_not_fit(occupied: Any, capsys: Any, name: str, passes: str) -> None:
    make, message = FILES[name]
    source = occupied.save(tiny_mlp(), tokenizer=False)
    occupied.refuses(capsys, source, ["--passes", passes, "--calibration", *make(occupied)], message)


@pytest.mark.parametrize("passes", LISTS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_that_do_not_fit(
    occupied: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, passes: str
) -> None:
    (tmp_path / f"int8_{name}_data.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    source = occupied.save(tiny_mlp(), tokenizer=False)
    options = ["--passes", passes, "--calibration", f"int8_{name}_data:{name}"]
    occupied.refuses(capsys, source, options, FUNCTIONS[name])


def _grids(path: Path) -> dict[str, Any]:
    """Scales and zero points by name."""
    ends = (".quantized.scale", ".quantized.zero_point")
    proto = onnx.load(path)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith(ends)}
    assert found
    return found


def _compiled(bench: Any, passes: str, batches: list[Any], name: str) -> dict[str, Any]:
    """The grids of a model calibrated on some batches."""
    source = bench.save(tiny_mlp(), tokenizer=False)
    folder = bench.folder / name
    folder.mkdir()
    paths = [folder / f"{number}.npz" for number in range(len(batches))]
    for path, batch in zip(paths, batches, strict=True):
        np.savez(path, x=batch)
    report = bench.compile(source, passes, output=f"{name}/model.onnx", calibration=[str(path) for path in paths])
    assert all(np.isfinite(output.relative) for output in report.outputs)
    return _grids(folder / "model.onnx")


@pytest.mark.parametrize("passes", LISTS)
def test_an_empty_batch_among_others_changes_nothing(bench: Any, passes: str) -> None:
    without = _compiled(bench, passes, [ROWS[:32], ROWS[32:]], "without")
    for place in range(3):
        batches = [ROWS[:32], ROWS[32:]]
        batches.insert(place, ROWS[:0])
        np.testing.assert_equal(_compiled(bench, passes, batches, f"with{place}"), without)


@pytest.mark.parametrize("passes", ["qdq(observer=minmax)", "qdq(observer=mse)"])
def test_batches_of_any_size_give_the_same_ranges(bench: Any, passes: str) -> None:
    whole = _compiled(bench, passes, [ROWS], "whole")
    parts = _compiled(bench, passes, np.split(ROWS, [1, 8, 9, 40]), "parts")
    assert whole.keys() == parts.keys()
    for name, found in whole.items():
        np.testing.assert_allclose(parts[name], found, rtol=1e-4)


@pytest.mark.parametrize("passes", LISTS)
def test_double_precision_data_is_converted(bench: Any, passes: str) -> None:
    single, double = (_compiled(bench, passes, [rows], str(rows.dtype)) for rows in (ROWS, ROWS.astype(np.float64)))
    np.testing.assert_equal(double, single)


@pytest.mark.parametrize(
    "passes", [*LISTS, "qdq(observer=minmax)", "qdq(observer=entropy)", "qdq(observer=percentile)"]
)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-30, 1e4])
def test_constant_activations_have_finite_positive_scales(bench: Any, passes: str, value: float) -> None:
    grids = _compiled(bench, passes, [np.full((4, 48), value, np.float32)], "constant")
    scales = [grid for name, grid in grids.items() if name.endswith(".scale")]
    assert all(np.isfinite(scale) and scale > 0 for scale in scales)
    proto = onnx.load(bench.folder / "constant" / "model.onnx")
    names = {"x.quantized.scale", "x_scaled.quantized.scale"} & {t.name for t in proto.graph.initializer}
    if value and names == {"x.quantized.scale"} and abs(value) > 1e-20:
        assert float(grids["x.quantized.scale"]) == pytest.approx(abs(value) / 255, rel=1e-2)


@pytest.mark.parametrize("passes", LISTS)
def test_a_file_that_vanishes_on_the_way(bench: Any, passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are read anew for every segment, but for the first megabytes of them."""
    monkeypatch.setattr(feeds, "_HELD", 0)
    paths = _npz(bench, ROWS, ROWS)
    source = bench.save(tiny_mlp(), tokenizer=False)

    class Thief:
        def step(self, name: str) -> None:
            if name.startswith("segment"):
                Path(paths[1]).unlink(missing_ok=True)

        def total(self, rows: int) -> None:
            pass

        def advance(self, rows: int) -> None:
            pass

    with pytest.raises(UserError, match=r"1\.npz: no such file"):
        compile_model(
            source,
            Recipe(passes=parse_passes(passes)),
            output=bench.folder / "out" / "model.onnx",
            calibration=paths,
            progress=Thief(),
        )
    assert not (bench.folder / "out").exists() or not list((bench.folder / "out").iterdir())


@pytest.mark.parametrize("passes", LISTS)
def test_images_of_several_sizes(bench: Any, passes: str) -> None:
    """Free dimensions may differ from batch to batch."""
    random = np.random.default_rng(0)
    model = tiny_conv()
    free = [axis for axis, dim in enumerate(model.graph.inputs[0].shape) if not isinstance(dim, int)]
    assert 0 in free
    source = bench.save(model, tokenizer=False)
    paths = []
    for number in (1, 3, 2):
        paths.append(str(bench.folder / f"{number}.npz"))
        np.savez(paths[-1], image=random.standard_normal((number, 3, 32, 32)).astype("f4"))
    report = bench.compile(source, passes, calibration=paths)
    assert max(output.relative for output in report.outputs) < 0.1


@pytest.mark.parametrize("passes", LISTS)
def test_windows_of_several_lengths(bench: Any, passes: str) -> None:
    random = np.random.default_rng(0)
    source, paths = bench.save(tiny_decoder()), []
    for length in (5, 32, 1, 17):
        paths.append(str(bench.folder / f"{length}.npz"))
        np.savez(paths[-1], input_ids=random.integers(0, 256, (1, length)))
    report = bench.compile(source, passes, calibration=paths)
    assert report.coverage == 1
    assert max(output.relative for output in report.outputs) < 0.15


@pytest.mark.parametrize("passes", LISTS)
def test_an_activation_that_overflows(occupied: Any, capsys: Any, passes: str) -> None:
    source = occupied.save(tiny_mlp(), tokenizer=False)
    options = ["--passes", passes, "--calibration", *_npz(occupied, ROWS, np.float32(3e38) * np.sign(ROWS))]
    occupied.refuses(capsys, source, options, r"activation \S+ is NaN or infinite on the calibration data")
