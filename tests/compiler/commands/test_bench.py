"""`qcompile bench` and benchmarks/kernels.py: what is timed, how figures are compared, what is refused."""

import ctypes
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from said import complaints

from qcompile.compiler.api.bench import Candidate, _row
from qcompile.compiler.cli import main
from qcompile.compiler.commands import bench as command
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.files.load import load_model, save_model
from qcompile.compiler.measure.workload import Workload, common_vocabulary
from qcompile.models.tiny import tiny_conv, tiny_decoder, tiny_encoder, tiny_mlp
from qcompile.passes.errors import UserError
from qcompile.passes.library import library_path
from qcompile.runtime import bench
from qcompile.runtime.bench import Case, Loaded, Measured, Runner, Subject, measure, paired_ratio, spread
from qcompile.runtime.sessions import run

SMALL = Workload(prompts=(1, 4), decode=3, after=5)


def _saved(folder: Path, model: ir.Model, name: str = "model.onnx") -> Path:
    save_model(model, folder / name)
    return folder / name


def _cases(path: Path, workload: Workload = SMALL) -> tuple[list[Case], list[str]]:
    plan = input_plan(load_model(path))
    return workload.cases(plan, common_vocabulary([plan]))


# --- figures ----------------------------------------------------------------------------------------------------------


def test_ratios_are_of_one_round_each() -> None:
    # The machine slows down threefold in the last round; the other model is twice as fast in every one.
    reference, own = [2.0, 2.0, 6.0], [1.0, 1.0, 3.0]
    assert paired_ratio(reference, own) == 2.0
    assert paired_ratio(own, reference) == 0.5
    assert paired_ratio([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]) == 2.0
    assert spread([1.0, 1.0, 1.5]) == 0.5
    with pytest.raises(ValueError):
        paired_ratio([1.0], [1.0, 2.0])


def _measured(label: str, threads: int, seconds: list[float]) -> Measured:
    case = Case("prefill 8", {}, amount=8)
    result = Measured(Subject(label, Path("model.onnx"), threads=threads), [case])
    result.loads, result.seconds, result.memory = [Loaded(0.5, 3_000_000)] * 3, {case.name: seconds}, 5_000_000
    return result


def test_rows_compare_with_the_first_model_at_as_many_threads(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        _measured("a", 1, [4.0, 4.0, 4.4]),
        _measured("b", 1, [2.0, 2.0, 2.2]),
        _measured("a", 2, [2.0, 2.0, 2.2]),
        _measured("b", 2, [4.0, 4.0, 8.8]),
    ]
    rows = [_row(result, results, "ONNX Runtime's operators") for result in results]
    cases = [row["cases"][0] for row in rows]
    assert [case["value"] for case in cases] == [2.0, 4.0, 4.0, 2.0]
    assert [case["ratio"] for case in cases] == [1.0, 2.0, 1.0, 0.5]
    assert [case["threads_ratio"] for case in cases] == [1.0, 1.0, 2.0, 0.5]
    assert rows[0]["load_seconds"] == 0.5
    assert rows[0]["loaded_bytes"] == 3_000_000
    report = {"onnxruntime": "1", "cpu": "c", "cores": 2, "rounds": 3, "models": rows, "remarks": {}}
    command._print(report)
    printed = capsys.readouterr().out
    assert "4 ±10% 2.00×" in printed
    assert "b, 2 threads over 1: prefill 8 0.50×" in printed
    assert (
        "noisy machine: 1 of 4 figures have a spread above 20%, the worst 120% in prefill 8 of b at 2 threads"
        in printed
    )


# --- runs -------------------------------------------------------------------------------------------------------------


def test_decoding_grows_the_cache_and_uses_it(tmp_path: Path) -> None:
    path = _saved(tmp_path, tiny_decoder(kv_cache=True))
    cases, remarks = _cases(path)
    assert [case.name for case in cases] == ["prefill 1", "prefill 4", "decode 3 after 5"]
    assert remarks == []
    decoding = cases[-1]
    runner = Runner(Subject("model", path))
    seconds, outputs = runner.decode(decoding)
    assert 0 < seconds < 60
    assert decoding.room == 8
    assert list(outputs) == ["logits"]
    # The last step scores what one run over all tokens does.
    ids = np.concatenate([decoding.feeds["input_ids"], *(step["input_ids"] for step in decoding.steps)], axis=1)
    whole = Case("all", _prompt(decoding, ids), 8)
    expected = run(runner.session, ["logits"], whole.feeds)[0][0, -1]
    np.testing.assert_allclose(outputs["logits"].numpy()[0, -1], expected, rtol=2e-4, atol=2e-5)


def _prompt(case: Case, ids: np.ndarray[Any, Any]) -> Mapping[str, Any]:
    """The feeds of a case's first run with other ids."""
    length = ids.shape[1]
    sized = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(length)[None]}
    return {name: sized.get(name, array) for name, array in case.feeds.items()}


def test_all_models_get_the_same_tokens(tmp_path: Path) -> None:
    wide = input_plan(tiny_decoder(kv_cache=True, vocab=256))
    narrow = input_plan(tiny_decoder(vocab=128))
    vocabulary = common_vocabulary([wide, narrow])
    assert vocabulary == 128
    first, second = (SMALL.cases(plan, vocabulary)[0][1].feeds["input_ids"] for plan in (wide, narrow))
    np.testing.assert_array_equal(first, second)
    assert first.max() < 128


def test_what_a_graph_cannot_do_is_remarked(tmp_path: Path) -> None:
    cases, remarks = _cases(_saved(tmp_path, tiny_decoder()))
    assert [case.name for case in cases] == ["prefill 1", "prefill 4"]
    assert remarks == ["no KV cache in the graph: no decoding"]
    cases, remarks = _cases(_saved(tmp_path, tiny_encoder()))
    assert [(case.name, case.unit) for case in cases] == [("1×1 tokens", "ms"), ("1×4 tokens", "ms")]
    assert remarks == ["no decoder: no decoding"]
    fixed = tiny_decoder()
    for value in fixed.graph.inputs:
        value.shape = ir.Shape([2, 6])
    cases, remarks = _cases(_saved(tmp_path, fixed))
    assert [(case.name, case.amount) for case in cases] == [("prefill 6", 12)]
    assert remarks[0] == "the graph takes exactly 6 tokens at a time"


def test_float_inputs_are_random_in_the_shapes_told(tmp_path: Path) -> None:
    path = _saved(tmp_path, tiny_conv())
    (given,) = input_plan(load_model(path)).inputs
    shape = (2, 3, 16, 16)
    cases, remarks = _cases(path, Workload(shapes={given.name: shape}))
    assert remarks == ["no prompts: the inputs cannot be made from tokens"]
    assert cases[0].feeds[given.name].shape == shape
    assert cases[0].unit == "ms"
    assert 0 < Runner(Subject("conv", path)).measure(cases[0]) < 60
    with pytest.raises(UserError, match=r"--shape image=9: the input is \[\?, 3, \?, \?\]"):
        _cases(path, Workload(shapes={"image": (9,)}))
    with pytest.raises(UserError, match=r"'image' has free dimensions .* tell them with --shape image=1,"):
        _cases(path)
    with pytest.raises(UserError, match="--shape nothing: no such input"):
        _cases(path, Workload(shapes={"nothing": (1,)}))


def test_an_input_without_a_rank_is_told_its_shape(tmp_path: Path) -> None:
    model = tiny_mlp()
    given = model.graph.inputs[0]
    given.shape = None
    path = _saved(tmp_path, model)
    cases, _ = _cases(path, Workload(shapes={str(given.name): (3, 5, 16)}))
    assert cases[0].feeds[str(given.name)].shape == (3, 5, 16)
    with pytest.raises(UserError, match="tells no shape: give one with --shape"):
        _cases(path)


def test_models_take_turns_in_processes_of_their_own(tmp_path: Path) -> None:
    path = _saved(tmp_path, tiny_decoder(kv_cache=True))
    cases = _cases(path)[0]
    steps: list[tuple[int, int]] = []
    results = measure(
        [(Subject("one", path), cases), (Subject("two", path, kernels="portable", threads=2), cases[:1])],
        rounds=2,
        loads=1,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert steps == [(i, 14) for i in range(1, 15)]  # 2 loads, and 4 cases in 2 rounds and one to warm up
    assert [list(result.seconds) for result in results] == [[case.name for case in cases], ["prefill 1"]]
    assert all(len(values) == 2 and min(values) > 0 for result in results for values in result.seconds.values())
    if Path("/proc/self/status").exists():
        assert all(result.memory is not None and 0 < result.memory < 1e9 for result in results)


def test_a_script_without_a_main_guard_can_measure(tmp_path: Path) -> None:
    """A worker that imported the caller's script again would start it over."""
    script = tmp_path / "script.py"
    path = _saved(tmp_path, tiny_conv())
    script.write_text(
        "from qcompile.compiler.cli import main\n"
        f"raise SystemExit(main(['bench', {str(path)!r}, '--rounds', '1', '--shape', 'image=1,3,16,16']))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_failures_in_a_worker_are_told_in_one_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(UserError, match=r"broken\.onnx: ONNX Runtime .* cannot load it"):
        measure([(Subject("broken", broken), ())], rounds=1, loads=1)
    path = _saved(tmp_path, tiny_decoder())
    wrong = Case("wrong", {"input_ids": np.zeros((1, 2), np.float32)}, 1)
    with pytest.raises(UserError, match="decoder: ONNX Runtime failed"):
        measure([(Subject("decoder", path), (wrong,))], rounds=1, loads=1)
    with bench._worker(Subject("killed", path), ()) as worker:
        worker.receive()
        worker.process.kill()
        with pytest.raises(UserError, match=r"killed: its process ended .* \(out of memory\?\)"):
            worker.ask(None)


# --- the command ------------------------------------------------------------------------------------------------------


def test_bench_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, other = _saved(tmp_path / "a", tiny_decoder(kv_cache=True)), _saved(tmp_path / "b", tiny_decoder())
    options = ["--prompt-tokens", "1,4", "--decode", "3", "--decode-after", "5", "--threads", "1", "--rounds", "2"]
    out = tmp_path / "out.json"
    assert main(["bench", str(model), "--against", f"other={other}@portable", *options, "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "other: no KV cache in the graph: no decoding" in printed
    assert "other: ONNX Runtime's operators" in printed
    assert "2 rounds" in printed
    report = json.loads(out.read_text())
    assert report["rounds"] == 2
    assert report["cpu"]
    first, second = report["models"]
    assert (first["label"], second["label"], second["threads"]) == (str(model), "other", 1)
    assert len(first["load_values"]) == 3
    assert [case["name"] for case in first["cases"]] == ["prefill 1", "prefill 4", "decode 3 after 5"]
    assert [case["name"] for case in second["cases"]] == ["prefill 1", "prefill 4"]
    assert [case["ratio"] for case in first["cases"]] == [1.0, 1.0, 1.0]
    for case in (*first["cases"], *second["cases"]):
        assert len(case["seconds"]) == 2
        assert 1 < case["value"] < 1e7
        assert case["spread"] >= 0
    ratio = np.median(np.array(first["cases"][1]["seconds"]) / np.array(second["cases"][1]["seconds"]))
    assert second["cases"][1]["ratio"] == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-tokens", "1,x"], "--prompt-tokens takes different whole numbers"),
        (["--prompt-tokens", "0"], "--prompt-tokens takes"),
        (["--threads", "1,1"], "--threads takes"),
        (["--threads", ""], "--threads takes"),
        (["--rounds", "0"], "--rounds"),
        (["--decode", "-1"], "--decode"),
        (["--shape", "x"], "--shape takes NAME=N,"),
        (["--shape", "input_ids=1,4"], "--shape input_ids: the model is fed with tokens"),
        (["--against", "nowhere.onnx"], r"nowhere\.onnx: no such model file"),
        (["--against", "MODEL@fast"], "no setting 'fast'"),
        (["--against", "MODEL@level=7"], "no setting 'level=7'"),
        (["--against", "MODEL"], "two models have the same name"),
        (["--against", "x=MODEL@native,level=4"], "level=4 is for portable bodies"),
    ],
)
def test_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    model = str(_saved(tmp_path, tiny_decoder()))
    assert main(["bench", model, *(option.replace("MODEL", model) for option in options)]) == 2
    error = complaints(capsys.readouterr().err)
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_a_level_that_does_nothing_is_refused(tmp_path: Path) -> None:
    model = load_model(_saved(tmp_path, tiny_decoder()))
    node = next(node for node in model.graph if node.op_type == "MatMul")
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    candidate = Candidate.parse(f"n={tmp_path / 'model.onnx'}@portable,level=4", "auto")
    with pytest.raises(UserError, match="level=4 does nothing to the file's MatMulNBits nodes"):
        candidate.check(model)


def test_candidates(tmp_path: Path) -> None:
    path = _saved(tmp_path, tiny_conv(), "a=b@native.onnx")
    assert Candidate.parse(str(path), "auto") == Candidate(str(path), path, "auto", 0)
    assert Candidate.parse(f"four={path}@portable,level=4", "native") == Candidate("four", path, "portable", 4)
    assert Candidate.parse(f"{path}@native", "auto").kernels == "native"


# --- benchmarks/kernels.py --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    """The script as a module."""
    path = Path(__file__).parents[3] / "benchmarks" / "kernels.py"
    spec = importlib.util.spec_from_file_location("bench_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_kernels"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def library() -> Path:
    """The library of native kernels, where there is one."""
    try:
        return library_path()
    except UserError:
        pytest.skip("no library of native kernels")


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("variant", ["float", "a0", "a4"])
def test_layers_of_onnx_runtime_compute_the_decoded_weight(
    kernels: ModuleType, variant: str, zero_points: bool
) -> None:
    layer = kernels.Layer(192, 256, 128, zero_points)  # a last group of 64
    case = kernels.Bench(layer, cold=100_000, turn=0.001)
    assert max(case.check(variant, 1, 3)) < kernels.TOLERANCE[variant][1]
    assert 0 < case.time(variant, 1, 3) < 1
    case.weights.scale *= 1.1
    with pytest.raises(ValueError, match=f"wrong result of {variant} at 192×256 g128"):
        case.check(variant, 1, 3)


@pytest.mark.parametrize("zero_points", [False, True])
def test_native_layers_compute_the_decoded_weight(kernels: ModuleType, library: Path, zero_points: bool) -> None:
    case = kernels.Bench(kernels.Layer(192, 256, 32, zero_points), cold=100_000, turn=0.001)
    for variant in kernels.OURS:
        for m in (1, 5, 64):
            case.check(variant, 2, m)


def test_ceilings(kernels: ModuleType, library: Path) -> None:
    ceilings = kernels.Ceilings(4)
    for threads in (1, 2):
        measured = ceilings.measure(threads)
        assert 1e8 < measured["bandwidth"] < 1e13
        assert 1e8 < measured["rate"] < 1e15
    assert ceilings.library.qcompile_dot_rate(b"none", 1, ctypes.c_double(0.001)) == 0.0
    assert ceilings.library.qcompile_read_seconds(None, 1024, 1, 1) == 0.0
    assert ceilings.library.qcompile_read_seconds(ceilings.buffer.ctypes.data, 4096, 0, 1) == 0.0


def test_floors_and_targets(kernels: ModuleType) -> None:
    layer = kernels.Layer(4096, 4096, 128, False)
    assert layer.packed_bytes == 4096 * 2048 + 32 * 4096 * 2
    ours, theirs = kernels.Entry("int8", "avx2", 1), kernels.Entry("a4", "", 1)
    result = kernels.Timings(layer)
    # Round two is twice as slow in everything: fractions and ratios stay.
    result.ceilings[1] = [{"bandwidth": 40e9, "rate": 1e12}, {"bandwidth": 20e9, "rate": 0.5e12}]
    read = layer.packed_bytes / 40e9
    work = 2 * 256 * 4096 * 4096 / 1e12
    result.seconds = {
        (ours, 1): [read / 0.9, 2 * read / 0.9],
        (theirs, 1): [2 * read / 0.9, 4 * read / 0.9],
        (ours, 256): [work / 0.6, 2 * work / 0.6],
        (theirs, 256): [work, 2 * work],
    }
    result.errors = {"int8 avx2": (1e-2, 2e-2)}
    assert result.fraction(ours, 1) == pytest.approx(0.9)
    assert result.bandwidth_fraction(ours, 1) == pytest.approx(0.9)
    assert result.fraction(ours, 256) == pytest.approx(0.6)
    assert result.rate_fraction(ours, 256) == pytest.approx(0.6)
    assert result.ratio(ours, theirs, 1) == pytest.approx(2.0)
    wide = kernels.Entry("a16", "avx2", 1)
    assert result.floor(wide, 256, 0) == pytest.approx(2 * work)
    text = "\n".join(kernels.tables([result], [ours, theirs], [1, 256]))
    assert "| int8 avx2 over a4, M=1 | 128 | 1 | 1.50×, each 1.3× | 2.00× | 2.00× | 2.00× (2.00×) | met |" in text
    assert "| int8 avx2 over a4, M=256 | 128 | 1 | 2.00× | 0.60× | 0.60× | 0.60× (0.60×) | **missed** |" in text
    assert "| int8 avx2 of read bandwidth, M=1, K and N ≥ 4096 | 128 | 1 | 88% | 90.0% | 90.0% | | met |" in text
    assert (
        "| int8 avx2 of int8 dot rate, M=256, K and N ≥ 4096 | 128 | 1 | 70% | 60.0% | 60.0% | | **missed** |" in text
    )
    assert kernels.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)


def test_cold_copies_exceed_the_cache(kernels: ModuleType) -> None:
    layer = kernels.Layer(576, 1536, 128, False)
    assert kernels.copies_of(layer, 1, 128 << 20, "int8") * layer.packed_bytes > 128 << 20
    assert kernels.copies_of(layer, 64, 128 << 20, "int8") == 16
    assert kernels.copies_of(kernels.Layer(4096, 11008, 128, False), 64, 128 << 20, "int8") == 1
