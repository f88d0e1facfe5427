"""`qcompile calibrate` and --statistics: the same model as with a calibration run, and every file that does not fit."""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from observing import observe

from qcompile.compiler import cli
from qcompile.compiler.api import calibrate
from qcompile.compiler.api.calibrate import calibrate_model
from qcompile.compiler.recipe import Recipe, parse_passes
from qcompile.compiler.stages import Calibration
from qcompile.compiler.walk import saved_statistics
from qcompile.models.tiny import tiny_conv, tiny_decoder, tiny_mlp
from qcompile.models.tiny.build import Builder
from qcompile.passes.errors import UserError
from qcompile.passes.observers.percentile import Percentile
from qcompile.passes.spec import ActivationSpec

DECODER = partial(tiny_decoder, layers=1)
ROWS = np.random.default_rng(6).standard_normal((64, 48)).astype("f4")


def _learn(bench: Any, source: Path, passes: str = "smooth,qdq", **settings: Any) -> Path:
    settings = {"samples": 8, "context": 32} | settings
    calibration = Calibration(settings.pop("calibration", [str(bench.text)]))
    path: Path = bench.folder / "model.statistics"
    calibrate_model(source, Recipe(passes=parse_passes(passes), **settings), output=path, calibration=calibration)
    return path


@pytest.fixture(scope="module")
def once(make_bench: Any) -> Callable[[str], bytes]:
    """Statistics of the tiny decoder behind a list of passes, each calibrated once."""
    bench, known = make_bench("statistics"), dict[str, bytes]()
    source = bench.save(DECODER())

    def statistics(passes: str) -> bytes:
        if passes not in known:
            known[passes] = _learn(bench, source, passes).read_bytes()
        return known[passes]

    return statistics


@pytest.fixture(scope="module")
def content(once: Callable[[str], bytes]) -> bytes:
    """Statistics of the tiny decoder behind smooth."""
    return once("smooth,qdq")


def _placed(bench: Any, content: bytes) -> tuple[Path, Path]:
    """The tiny decoder and its statistics in the folder of a test."""
    source: Path = bench.save(DECODER())
    path: Path = bench.folder / "model.statistics"
    path.write_bytes(content)
    return source, path


@pytest.fixture
def learnt(bench: Any, content: bytes) -> tuple[Path, Path]:
    """The tiny decoder and its statistics."""
    return _placed(bench, content)


def _grids(path: Path) -> dict[str, Any]:
    proto = onnx.load(path)
    ends = (".quantized.scale", ".quantized.zero_point")
    return {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name.endswith(ends)}


@pytest.mark.parametrize("passes", ["smooth,qdq", "qdq", "qdq(observer=minmax)", "outlier,qdq"])
def test_statistics_give_the_bytes_of_a_calibration_run(bench: Any, once: Any, passes: str) -> None:
    source, path = _placed(bench, once(passes))
    bench.compile(source, passes, output="run/model.onnx")
    bench.compile(source, passes, output="file/model.onnx", statistics=path)
    for run, file in zip(*(sorted((bench.folder / f).glob("*.data")) for f in ("run", "file")), strict=True):
        assert run.name == file.name
        assert run.read_bytes() == file.read_bytes()
    run, file = (onnx.load(bench.folder / f / "model.onnx").graph for f in ("run", "file"))
    assert run == file


def test_without_a_statistics_pass_no_data_is_needed(bench: Any) -> None:
    np.savez(bench.folder.parent / "x.npz", x=ROWS)
    source = bench.save(tiny_mlp(), tokenizer=False)
    path = _learn(bench, source, "qdq", calibration=[str(bench.folder.parent / "x.npz")])
    report = bench.compile(source, "qdq", statistics=path, calibration=[])
    assert report.coverage == 1
    assert "model.statistics: 1 batches of x.npz" in report.data
    assert all(range.counts for range in report.ranges)


def _two_linears() -> ir.Model:
    """x (batch, 48) to y (batch, 10) with a Relu between: a range with both signs, and one without."""
    b, rng = Builder(opset=21), np.random.default_rng(0)
    shapes = {"first": (48, 32), "second": (32, 10)}
    first, second = (b.weight(name, rng.standard_normal(shape).astype("f4")) for name, shape in shapes.items())
    x = b.input("x", b.dtype, ["batch", 48])
    return b.model({"y": b.MatMul(b.Relu(b.MatMul(x, first, name="a")), second, name="b")})


@pytest.fixture(scope="module")
def histograms(make_bench: Any) -> tuple[Path, str, dict[str, Path]]:
    """Two linears, their calibration data, and a file of statistics by each observer that keeps histograms."""
    bench = make_bench("histograms")
    source, data = bench.save(_two_linears(), tokenizer=False), str(bench.folder / "x.npz")
    np.savez(data, x=ROWS)
    files = {}
    for name in ("mse", "percentile", "entropy"):
        files[name] = bench.folder / f"{name}.statistics"
        _learn(bench, source, f"qdq(observer={name})", calibration=[data]).rename(files[name])
    return source, data, files


@pytest.mark.parametrize("used", ["mse", "percentile", "entropy", "minmax"])
def test_histograms_of_one_observer_serve_the_others(bench: Any, histograms: Any, used: str) -> None:
    source, data, files = histograms
    bench.compile(source, f"qdq(observer={used})", output="run/model.onnx", calibration=[data])
    run = _grids(bench.folder / "run/model.onnx")
    assert len(run) == 4, "a scale and a zero point of each input"
    for made, path in files.items():
        bench.compile(source, f"qdq(observer={used})", output=f"{made}/model.onnx", statistics=path, calibration=[])
        assert _grids(bench.folder / made / "model.onnx") == run, made


@pytest.mark.parametrize(
    "parameters", ["activations=int8", "activations=float8", "provider=tensorrt", "weights=tensor"]
)
def test_one_file_serves_every_grid(bench: Any, once: Any, parameters: str) -> None:
    source, path = _placed(bench, once("smooth(alpha=0.5),qdq"))
    passes = f"smooth(alpha=0.5),qdq({parameters})"
    bench.compile(source, passes, output="file/model.onnx", statistics=path)
    bench.compile(source, passes, output="run/model.onnx")
    assert _grids(bench.folder / "run/model.onnx") == _grids(bench.folder / "file/model.onnx")


def test_a_convolutional_model(bench: Any) -> None:
    images = np.random.default_rng(7).standard_normal((8, 3, 32, 32)).astype("f4")
    np.savez(bench.folder.parent / "x.npz", image=images)
    source = bench.save(tiny_conv(), tokenizer=False)
    path = _learn(bench, source, "qdq", calibration=[str(bench.folder.parent / "x.npz")])
    assert bench.compile(source, "qdq", statistics=path, calibration=[]).packed("Conv")


def _refused(bench: Any, capsys: Any, source: Path, path: Path, message: str, *options: str) -> None:
    (bench.folder / "out").mkdir(exist_ok=True)
    passes = () if "--passes" in options else ("--passes", "smooth,qdq")
    options = (*options, "--calibration", str(bench.text), "--statistics", str(path), *passes)
    bench.refuses(capsys, source, list(options), message)


def test_another_model_is_refused(bench: Any, capsys: Any, learnt: Any) -> None:
    _refused(bench, capsys, bench.save(DECODER(seed=1), "b.onnx"), learnt[1], "of another model: calibrate this one")


def test_other_passes_are_refused(bench: Any, capsys: Any, learnt: Any) -> None:
    source, path = learnt
    _refused(bench, capsys, source, path, "behind passes 'smooth', this list has 'none' before", "--passes", "qdq")
    options = ("--passes", "smooth(alpha=0.5),qdq")
    _refused(bench, capsys, source, path, r"behind passes 'smooth', this list has 'smooth\(alpha=0.5\)'", *options)


def test_smoothing_for_another_grid_or_other_data_is_refused(bench: Any, capsys: Any, learnt: Any) -> None:
    """Smooth chooses its factors by both; nothing in the list says so."""
    source, path = learnt
    told = r"of other activations: \S+ differs behind passes 'smooth', which saw other calibration data or settings"
    _refused(bench, capsys, source, path, told, "--samples", "2")
    path = _learn(bench, source, "smooth,qdq(activations=uint16)")
    _refused(bench, capsys, source, path, told)


def test_missing_values_are_refused(bench: Any, capsys: Any, learnt: Any) -> None:
    source, path = learnt
    options = ("--passes", "smooth,qdq(operators=all)")
    _refused(bench, capsys, source, path, r"no statistics of activation \S+: calibrate with the passes and", *options)


@pytest.mark.parametrize(("made", "used"), [("minmax", "mse"), ("mse", "moving-average"), ("mse", "cross-entropy")])
def test_an_observer_that_kept_less_is_refused(bench: Any, capsys: Any, once: Any, made: str, used: str) -> None:
    source, path = _placed(bench, once(f"smooth,qdq(observer={made})"))
    options = ("--passes", f"smooth,qdq(observer={used})")
    _refused(bench, capsys, source, path, f"observer {made} did not keep what {used} needs", *options)


def test_a_list_without_ranges_is_refused(bench: Any, capsys: Any, learnt: Any) -> None:
    source, path = learnt
    _refused(bench, capsys, source, path, "no pass of this list takes them: add qdq", "--passes", "smooth,awq,pack")
    (bench.folder / "out").mkdir(exist_ok=True)
    assert cli.main(["calibrate", str(source), "--passes", "smooth", "-o", str(bench.folder / "s")]) == 2
    assert "no pass of the list takes ranges" in capsys.readouterr().err
    assert not (bench.folder / "s").exists()


def _rewritten(path: Path, change: Any) -> None:
    with np.load(path) as stored:
        arrays = {name: stored[name] for name in stored.files}
    header = json.loads(bytes(arrays["qcompile"]))
    change(header, arrays)
    arrays["qcompile"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    content = io.BytesIO()
    np.savez(content, **arrays)
    path.write_bytes(content.getvalue())


def _nan(header: Any, arrays: Any) -> None:
    name = next(name for name in arrays if name.endswith(".low"))
    arrays[name] = np.float32(np.nan)


def _bins(header: Any, arrays: Any) -> None:
    name = next(name for name in arrays if name.endswith(".counts"))
    arrays[name] = arrays[name][:, :, :100]


BROKEN = {
    "version": (lambda header, arrays: header.update(version=1), "is of version 1, this qcompile reads version 4"),
    "not finite": (_nan, "is damaged or no file of statistics .*NaN or infinity"),
    "array gone": (lambda header, arrays: arrays.pop("3.low"), "is damaged or no file of statistics"),
    "header gone": (lambda header, arrays: header.clear(), "is no file of statistics: make one with"),
    "other bins": (_bins, r"is damaged: \S+ has counts of shape \[1, 2, 100\]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_content_is_refused(bench: Any, capsys: Any, learnt: Any, name: str) -> None:
    source, path = learnt
    change, message = BROKEN[name]
    _rewritten(path, change)
    _refused(bench, capsys, source, path, message)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_refused(bench: Any, capsys: Any, learnt: Any, share: float) -> None:
    source, path = learnt
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    _refused(bench, capsys, source, path, "is damaged or no file of statistics .*: calibrate again")


def test_a_damaged_byte_is_refused_or_harmless(learnt: Any) -> None:
    """Every array of the file has a checksum; what lies between them may change."""
    _, path = learnt
    content, whole = path.read_bytes(), saved_statistics.load(path)
    for place in range(40, len(content), len(content) // 50):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :])
        try:
            found = saved_statistics.load(path)
        except UserError:
            continue
        np.testing.assert_equal(dict(found.states), dict(whole.states))


def test_missing_and_foreign_files_are_refused(bench: Any, capsys: Any) -> None:
    source = bench.save(DECODER())
    _refused(bench, capsys, source, bench.folder / "nothing", "no such file: make it with `qcompile calibrate")
    np.savez(bench.folder / "x.npz", x=ROWS)
    _refused(bench, capsys, source, bench.folder / "x.npz", "is no file of statistics")
    np.save(bench.folder / "x.npy", ROWS)
    _refused(bench, capsys, source, bench.folder / "x.npy", "is damaged or no file of statistics")


def test_a_failed_run_leaves_the_old_file(bench: Any, learnt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = learnt
    before = path.read_bytes()

    def full(*paths: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_statistics.os, "replace", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        _learn(bench, source, "qdq")
    assert path.read_bytes() == before
    assert list(bench.folder.glob("*.tmp")) + list(bench.folder.glob(".*.tmp")) == []


def test_two_runs_give_identical_files(bench: Any, learnt: Any, content: bytes) -> None:
    assert _learn(bench, learnt[0]).read_bytes() == content


def test_the_source_is_not_overwritten(bench: Any, capsys: Any) -> None:
    source = bench.save(DECODER())
    assert cli.main(["calibrate", str(source), "-o", str(source)]) == 2
    assert "is the input file" in capsys.readouterr().err


def test_the_command_prints_what_stands_out(bench: Any, capsys: Any) -> None:
    source = bench.save(DECODER())
    options = ["--samples", "4", "--context", "32", "--calibration", str(bench.text), "--observer", "percentile"]
    assert cli.main(["calibrate", str(source), *options]) == 0
    told = capsys.readouterr().out
    assert "widest ranges of 4 activations" in told
    assert "most clipped of" in told
    assert (bench.folder / "in" / "model.statistics").is_file()
    assert saved_statistics.load(bench.folder / "in" / "model.statistics").header.observer == "percentile"
    assert cli.main(["calibrate", str(source), "--observer", "magic"]) == 2
    assert "got 'magic'" in capsys.readouterr().err


def test_the_share_that_a_range_clips() -> None:
    """Half of what a percentile leaves out lies beyond each end."""
    numbers = np.random.default_rng(0).permutation(np.linspace(-1, 3, 4001))
    observer = observe(Percentile("x", percentile=98), [numbers[:, None]])
    (found,) = calibrate.seen({"x": observer}, ActivationSpec())
    assert (found.observed_low, found.observed_high) == (-1, 3)
    assert found.clipped == pytest.approx(0.02, abs=1e-3)
    assert (found.low, found.high) == pytest.approx((-0.96, 2.96), abs=5e-3)
    (found,) = calibrate.seen({"x": observe(Percentile("x", percentile=100), [numbers[:, None]])}, ActivationSpec())
    assert found.clipped == 0
