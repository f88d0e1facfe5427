"""`import qcompile`: what it offers, in which forms it takes models and data, and what its results show."""

import ast
import hashlib
import json
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qcompile
from qcompile.compiler.api.data import data_of
from qcompile.compiler.api.fields import Fields
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.data.readers import read_batches
from qcompile.compiler.measure.evaluate import OutputScores
from qcompile.compiler.recipe import SETTINGS
from qcompile.models.tiny import tiny_decoder, tiny_mlp

ROOT = Path(__file__).resolve().parents[3]
ROWS = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
TEXT = "The quick brown fox jumps over the lazy dog. " * 40

# --- the module -------------------------------------------------------------------------------------------------------


def test_importing_it_imports_nothing_else() -> None:
    code = (
        "import sys, time; start = time.process_time(); import qcompile; took = time.process_time() - start; "
        "qcompile.__version__; print(took, *(n for n in ('numpy', 'onnx', 'rich', 'yaml') if n in sys.modules))"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert {tuple(run.stdout.split()[1:]) for run in runs} == {()}
    assert min(float(run.stdout.split()[0]) for run in runs) < 0.05


def test_every_name_is_there_and_known_to_type_checkers() -> None:
    assert dir(qcompile) == sorted(qcompile.__all__)
    for name in dir(qcompile):
        assert getattr(qcompile, name) is not None, name
    tree = ast.parse(Path(qcompile.__file__).read_text(encoding="utf-8"))
    known = next(node for node in tree.body if isinstance(node, ast.If))
    homes = {a.name: own.module for own in known.body if isinstance(own, ast.ImportFrom) for a in own.names}
    assert homes == qcompile._HOMES
    assert {*homes, "__version__"} == set(qcompile.__all__)
    assert (Path(qcompile.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qcompile.nothing  # noqa: B018


def test_the_keywords_are_the_settings_of_a_recipe() -> None:
    """Fields tells type checkers what SETTINGS declares: the same keys, and the same choices."""
    hints = typing.get_type_hints(Fields)
    assert set(hints) == set(SETTINGS) - {"passes"}
    for name, hint in hints.items():
        parts = [hint, *typing.get_args(hint)]
        told = {v for part in parts if typing.get_origin(part) is typing.Literal for v in typing.get_args(part)}
        words = {SETTINGS[name].about.word} - {"", None} if str not in parts else set()
        assert told == set(SETTINGS[name].choices) | words, name


# --- data -------------------------------------------------------------------------------------------------------------


class Reader:
    """ONNX Runtime's protocol."""

    def __init__(self, parts: list[Any]) -> None:
        self.left = iter(parts)

    def get_next(self) -> Any:
        return next(self.left, None)


class Tensor:
    """What torch's tensors have of numpy's protocol, and what they refuse."""

    dtype = "torch.float32"

    def __init__(self, array: Any) -> None:
        self.array, self.detached = array, False

    def detach(self) -> "Tensor":
        self.detached = True
        return self

    def cpu(self) -> "Tensor":
        assert self.detached
        return self

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        assert self.detached, "Can't call numpy() on Tensor that requires grad"
        return self.array


FORMS: dict[str, Callable[[list[Any]], Any]] = {
    "dicts": lambda parts: [{"x": part} for part in parts],
    "generator of dicts": lambda parts: ({"x": part} for part in parts),
    "arrays": lambda parts: list(parts),
    "tuples": lambda parts: [(part,) for part in parts],
    "lists of numbers": lambda parts: [part.astype(np.float64).tolist() for part in parts],
    "tensors": lambda parts: [Tensor(part) for part in parts],
    "tensors by name": lambda parts: [{"x": Tensor(part)} for part in parts],
    "reader": lambda parts: Reader([{"x": part} for part in parts]),
    "function": lambda parts: lambda: iter(parts),
}


@settings(deadline=None)  # a busy machine
@given(st.sampled_from(sorted(FORMS)), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_every_form_of_data_is_the_same_batches(form: str, sizes: list[int], transformed: bool) -> None:
    """Invariant: whatever the form, the batches are the arrays that were given, in their order."""
    parts = [ROWS[:size] + size for size in sizes]
    model = input_plan(tiny_mlp())
    if transformed:
        items = FORMS[form](parts)
        listed = list(items) if not callable(items) and not hasattr(items, "get_next") else None
        labelled = [(item, "label") for item in listed] if listed is not None else items
        made = data_of(labelled, transform=(lambda item: item[0]) if listed is not None else None)
    else:
        made = data_of(FORMS[form](parts))
    batches, _ = read_batches(model, made.reader, "data")
    assert [batch.rows for batch in batches] == sizes
    for batch, part in zip(batches, parts, strict=True):
        np.testing.assert_array_equal(batch.feeds["x"], part)


@pytest.mark.parametrize("form", [{"x": ROWS}, ROWS, Tensor(ROWS), [ROWS]], ids=["dict", "array", "tensor", "list"])
def test_one_batch_may_stand_alone(form: Any) -> None:
    (batch,), _ = read_batches(input_plan(tiny_mlp()), data_of(form).reader, "data")
    np.testing.assert_array_equal(batch.feeds["x"], ROWS)


def test_samples_of_a_data_set_are_rows() -> None:
    """A torch data set gives samples without a batch axis; so do lists of token ids."""
    batches, _ = read_batches(input_plan(tiny_mlp()), data_of(list(ROWS[:3])).reader, "data")
    assert [batch.feeds["x"].shape for batch in batches] == [(1, 48)] * 3
    batches, _ = read_batches(input_plan(tiny_decoder()), data_of([[1, 2, 3], [4, 5]]).reader, "data")
    assert [batch.feeds["input_ids"].tolist() for batch in batches] == [[[1, 2, 3]], [[4, 5]]]


def test_strings_are_files_or_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two words").write_text("text in a file")
    for files in ("a.txt", "self", "module:name", "two words", "no such file.npz", Path("a b")):
        assert data_of(files) == Calibration([str(files)])
    assert data_of(["a.txt", Path("b.txt")]) == Calibration(["a.txt", "b.txt"])
    assert data_of("a text of words").texts == ("a text of words",)
    mixed = data_of(["general", "a text of words"])
    assert (mixed.general, mixed.texts) == (True, ("a text of words",)), "the bundled text beside it, as beside files"
    assert data_of("one\ntwo.txt").texts == ("one\ntwo.txt",)
    assert data_of(["a text", "word"]).texts == ("a text", "word")
    assert data_of(text for text in ["word", "a text"]).texts == ("word", "a text")
    assert data_of([{"text": "word"}, {"text": "two"}], transform=lambda row: row["text"]).texts == ("word", "two")
    assert data_of([{"text": "word", "id": 3}, {"text": "two"}]).texts == ("word", "two"), "as .jsonl has them"
    assert data_of("x" * 5000 + " y").texts


def test_a_column_of_texts_is_texts() -> None:
    pandas = pytest.importorskip("pandas", reason="columns are pandas's")
    assert data_of(pandas.Series(["a text", "word"])).texts == ("a text", "word")
    (batch,), _ = read_batches(input_plan(tiny_mlp()), data_of(pandas.DataFrame(ROWS)).reader, "data")
    np.testing.assert_array_equal(batch.feeds["x"], ROWS)


def endless() -> Iterator[str]:
    while True:
        yield "text"


@pytest.mark.parametrize(
    ("form", "transform", "message"),
    [
        ([(ROWS, ROWS)], None, r"a batch of .* has 2 parts, the model needs 1 \(x\): pick them with transform="),
        ([{"x": ROWS, "labels": ROWS}], None, r"'labels' is no input of the model"),
        (iter([]), None, "list_iterator gave no batches"),
        ([], None, "gave no batches"),
        ([ROWS], lambda batch: batch["x"], "failed: IndexError"),
        (iter([ROWS, "text"]), None, "gave str, not a dict"),
        (iter(["text", ROWS]), None, "gave ndarray among texts"),
        (endless(), None, "gave 100000 texts and does not end"),
        (3, None, "int failed: TypeError"),
        (["a text here", Path("x.npz")], None, r"both files \(x\.npz\) and texts"),
        ("a.npz", lambda batch: batch, "transform= is for calibration data that gives batches"),
    ],
)
def test_what_is_no_data_is_told_in_a_line(form: Any, transform: Any, message: str) -> None:
    with pytest.raises(qcompile.UserError, match=message) as told:
        read_batches(input_plan(tiny_mlp()), data_of(form, transform=transform).reader, "data")
    assert "\n" not in str(told.value)


# --- jobs -------------------------------------------------------------------------------------------------------------


def _weights(path: Path) -> dict[str, str]:
    model = onnx.load(path)
    return {
        t.name: hashlib.sha256(onnx.numpy_helper.to_array(t).tobytes()).hexdigest() for t in model.graph.initializer
    }


def test_a_model_is_the_same_in_every_form(bench: Any) -> None:
    """The weights that come out are those of the file; nothing is written beside the output, or to what was given."""
    path, out = bench.save(tiny_mlp(), tokenizer=False), bench.folder / "out" / "model.onnx"
    proto, graph = onnx.load(path), ir.load(path)
    before = proto.SerializeToString(deterministic=True)
    forms = {"path": path, "text": str(path), "bytes": before, "proto": proto, "graph": graph}
    found = {}
    for name, model in forms.items():
        report = qcompile.compile(model, "pack", output=out, group_size=32)
        found[name] = _weights(out)
        assert report.output == str(out)
        assert report.coverage == 1.0
    assert all(own == found["path"] for own in found.values())
    assert proto.SerializeToString(deterministic=True) == before
    assert ir.serde.serialize_model(graph).graph.node[0].op_type == proto.graph.node[0].op_type
    for model in (proto, path, out.read_bytes() if not list(out.parent.glob("*.data")) else out):
        assert qcompile.session(model).run(None, {"x": ROWS})[0].shape == (64, 10)
    assert qcompile.inspect(proto).parameters == qcompile.inspect(path).parameters


def test_its_bytes_are_the_commands_bytes(bench: Any) -> None:
    path = bench.save(tiny_decoder(layers=1))
    assert bench.run(path, "--passes", "smooth,pack", "--calibration", str(bench.text), "--exclude", "*down*") == 0
    theirs = (bench.folder / "out" / "model.onnx").read_bytes()
    fields: dict[str, Any] = {"samples": 8, "context": 32, "group_size": 32, "exclude": "*down*"}
    qcompile.compile(
        path, ["smooth", "pack"], output=bench.folder / "out" / "model.onnx", calibration=bench.text, **fields
    )
    assert (bench.folder / "out" / "model.onnx").read_bytes() == theirs
    recipe = qcompile.Recipe.from_dict({"passes": "smooth,pack", **fields, "exclude": ["*down*"]})
    qcompile.compile(path, recipe=recipe, output=bench.folder / "out" / "model.onnx", calibration=[bench.text])
    assert (bench.folder / "out" / "model.onnx").read_bytes() == theirs


def test_texts_calibrate_a_decoder(bench: Any) -> None:
    path, out = bench.save(tiny_decoder(layers=1)), bench.folder / "out.onnx"
    fields: dict[str, Any] = {"samples": 4, "context": 32, "group_size": 32}
    report = qcompile.compile(path, "smooth,pack", output=out, calibration=TEXT, **fields)
    assert report.data == "4 windows of 32 tokens from the text given"
    first = out.read_bytes()
    file = bench.folder / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    qcompile.compile(path, "smooth,pack", output=out, calibration=file, **fields)
    assert _weights(out)
    assert first != b""
    model = onnx.load(path)
    with pytest.raises(qcompile.UserError, match=r"is text, but no tokenizer\.json"):
        qcompile.compile(model, "smooth,pack", output=out, calibration=TEXT, **fields)
    told = qcompile.compile(model, "smooth,pack", output=out, calibration=TEXT, tokenizer=path.parent, **fields)
    assert told.data == report.data


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: qcompile.compile(model, "pack"), "a model in memory has no folder of its own"),
        (lambda model: qcompile.compile(3, "pack", output="o.onnx"), "int is no model: give a path, bytes"),
        (lambda model: qcompile.compile(b"no", "pack", output="o.onnx"), "is no ONNX model"),
        (lambda model: qcompile.compile(model, "pakc", output="o.onnx"), "pakc"),
        (lambda model: qcompile.compile(model, output="o.onnx", bitz=4), "unknown key 'bitz'"),
        (lambda model: qcompile.compile(model, output="o.onnx", bits=5), "4 or 8 bits"),
        (lambda model: qcompile.compile("none.onnx"), r"none\.onnx: no such file"),
        (lambda model: qcompile.evaluate(model), "give either text= .* or data="),
        (lambda model: qcompile.evaluate(model, data=ROWS), "a reference"),
        (lambda model: qcompile.compare([], model, data=ROWS), "at least one model"),
        (lambda model: qcompile.bench(model, rounds=0), "must be at least 1"),
        (lambda model: qcompile.sensitivity(model, "pack"), "no pass of the list makes nodes integer"),
        (lambda model: qcompile.session(3), "no model|no such"),
    ],
)
def test_bad_input_is_one_line(bench: Any, call: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(bench.save(tiny_mlp(), tokenizer=False))
    monkeypatch.chdir(bench.folder)
    before = bench.snapshot()
    with pytest.raises(qcompile.UserError, match=message) as told:
        call(model)
    assert "\n" not in str(told.value)
    assert bench.snapshot() == before


def test_weights_in_a_file_need_its_folder(bench: Any) -> None:
    path = bench.save(tiny_mlp(), tokenizer=False)
    bare = onnx.load(path, load_external_data=False)
    for model in (bare, bare.SerializeToString()):
        with pytest.raises(
            qcompile.UserError, match=r"has weights in a file 'model-\w+\.data' and does not say in which"
        ):
            qcompile.compile(model, "pack", output=bench.folder / "out.onnx")


def test_folders_in_folders_out(bench: Any) -> None:
    """A folder is its model; what lies beside it goes with the result, so that it is complete by itself."""
    path, folder = bench.save(tiny_decoder(layers=1)), bench.folder / "small"
    (path.parent / "config.json").write_text("{}")
    fields: dict[str, Any] = {"group_size": 32}
    report = qcompile.compile(path.parent, "pack", output=folder, **fields)
    assert report.output == str(folder / "model.onnx")
    assert {"tokenizer.json", "config.json"} <= {file.name for file in folder.iterdir()}
    assert qcompile.generate(folder, "The fox", max_tokens=4) == qcompile.generate(
        folder / "model.onnx", "The fox", max_tokens=4, tokenizer=path.parent
    )
    assert qcompile.inspect(folder).parameters == qcompile.inspect(folder / "model.onnx").parameters
    scores = qcompile.evaluate(folder, against=path.parent, text=TEXT, context=64, tokens=256)
    assert [row.scores.model for row in scores.rows] == [str(path.parent), str(folder)]
    again = qcompile.compile(onnx.load(path), "pack", output=f"{bench.folder}/other/", **fields)
    assert again.output == str(bench.folder / "other" / "model.onnx")
    assert _weights(Path(again.output)) == _weights(Path(report.output))
    named = qcompile.compile(path.parent, "pack", **fields)
    assert Path(named.output).parent == bench.folder / "in-int4"
    for source, target, message in (
        (path.parent, path.parent, "is the folder that is compiled"),
        (bench.folder, folder, "no .onnx model in it, and no Hugging Face model"),
    ):
        with pytest.raises(qcompile.UserError, match=message):
            qcompile.compile(source, "pack", output=target, **fields)


def test_labels_and_metrics_are_told(bench: Any) -> None:
    path, out = bench.save(tiny_mlp(), tokenizer=False), bench.folder / "out.onnx"
    data, other = [(ROWS[:32], "label"), (ROWS[32:], "label")], [(0.9 * ROWS[:16], "label")]
    fields: dict[str, Any] = {"evaluation": other, "transform": lambda item: item[0]}
    report = qcompile.compile(path, "qdq", output=out, calibration=data, **fields)
    assert report.data == "2 batches of the calibration data"
    known = qcompile.session(path).run(None, {"x": ROWS})[0].argmax(axis=1)

    def share(inputs: Any, outputs: Any, labels: Any) -> float:
        (name,) = outputs[0]
        return float((np.concatenate([own[name] for own in outputs]).argmax(axis=1) == labels).mean())

    fields = {"data": data, "transform": lambda item: item[0], "labels": Tensor(known), "metric": share}
    scores = qcompile.evaluate(out, against=path, **fields)
    (own,) = (row.scores for row in scores.rows)
    assert isinstance(own, OutputScores)
    assert own.classes is not None
    assert own.classes.reference == own.reference_metric == 1.0
    assert own.classes.accuracy == own.metric == own.classes.top1
    assert "top-1" in str(scores)
    assert "metric 1 →" in str(scores)
    for labels, message in ((known[:5], "5"), (known * 0.5, "class numbers, one a row"), (bench.folder / "no", "no")):
        with pytest.raises(qcompile.UserError, match=message):
            qcompile.evaluate(out, against=path, data=ROWS, labels=labels)


def test_a_text_that_was_calibrated_on_is_no_test(bench: Any) -> None:
    path, out = bench.save(tiny_decoder(layers=1)), bench.folder / "out.onnx"
    qcompile.compile(path, "smooth,pack", output=out, calibration=bench.text, samples=4, context=32, group_size=32)
    with pytest.raises(qcompile.UserError, match="is no test data"):
        qcompile.evaluate(out, against=path, text=bench.text)


def test_text_comes_in_pieces(bench: Any) -> None:
    path, pieces = bench.save(tiny_decoder(layers=1)), list[str]()
    text = qcompile.generate(path, "The fox", max_tokens=6, raw=True, on_text=pieces.append)
    assert "".join(pieces) == text
    with pytest.raises(qcompile.UserError, match="at least 1"):
        qcompile.generate(path, "The fox", max_tokens=0)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(make_bench: Any) -> dict[str, Any]:
    bench = make_bench("results")
    path, out = bench.save(tiny_mlp(), tokenizer=False), bench.folder / "out" / "model.onnx"
    text, rows = bench.folder / "in" / "decoder.onnx", bench.folder / "rows.npz"
    np.savez(rows, x=ROWS)
    sweeping = qcompile.Recipe.from_dict({"passes": "pack", "group_size": 32})
    bench.save(tiny_decoder(layers=1), "decoder.onnx")
    return {
        "report": qcompile.compile(path, "qdq", output=out, calibration=[ROWS[:32], ROWS[32:]]),
        "evaluation": qcompile.compare({"small <b>": out}, onnx.load(path), data=ROWS),
        "text": qcompile.evaluate(text, text=TEXT, context=64),
        "ranking": qcompile.sensitivity(path, calibration=[ROWS[:32], ROWS[32:]]),
        "summary": qcompile.inspect(out),
        "sweep": qcompile.sweep(path, {"bits": [4, 8]}, output=bench.folder / "sweep", recipe=sweeping, data=[rows]),
        "bench": qcompile.bench({"float": path, "int8": onnx.load(out)}, threads=1, rounds=2),
    }


@pytest.mark.parametrize("name", ["report", "evaluation", "text", "ranking", "summary", "sweep", "bench"])
def test_results_print_as_short_tables_and_as_plain_values(results: Any, name: str) -> None:
    made = results[name]
    text = str(made)
    assert text == repr(made)
    assert 2 <= len(text.splitlines()) <= 25
    assert max(map(len, text.splitlines())) < 200
    page = made._repr_html_()
    assert page.count("<tr>") >= 2, page
    assert "<b>" not in page, "names are escaped"
    assert json.loads(json.dumps(made.to_dict(), allow_nan=name == "ranking"))
    records = made.records()
    assert records
    assert all(isinstance(own, dict) for own in records)
    pandas = pytest.importorskip("pandas", reason="to_dataframe needs pandas")
    frame = made.to_dataframe()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == len(records)


def test_a_report_is_its_file(results: Any) -> None:
    report = results["report"]
    written = json.loads(Path(report.output).with_name("model.report.json").read_text(encoding="utf-8"))
    assert written == report.to_dict()
    assert "coverage: 100.0%" in str(report)
    errors = [own["error"] for own in report.records() if "error" in own]
    assert sorted(errors) == sorted(node.error for node in report.nodes)


def test_without_pandas_it_is_told(results: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(qcompile.UserError, match="needs pandas: pip install pandas"):
        results["report"].to_dataframe()


def test_results_have_the_names_that_were_given(results: Any) -> None:
    assert [row.scores.model for row in results["evaluation"].rows] == ["small <b>"]
    assert [row.text for row in results["text"].rows] == ["text 1"]
    assert {own["label"] for own in results["bench"].records()} == {"float", "int8"}


def test_settings_without_effect_are_warned_of(bench: Any) -> None:
    """As the command line tells options of no effect; the warning points at the caller's line."""
    path, out = bench.save(tiny_mlp(), tokenizer=False), bench.folder / "out.onnx"
    with pytest.warns(UserWarning, match="has no effect here") as told:
        qcompile.compile(path, "qdq", output=out, calibration=ROWS, bits=8, samples=4)
    assert [str(own.message).split()[0] for own in told] == ["bits", "samples"]
    assert {own.filename for own in told} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qcompile.compile(path, "pack", output=out, bits=8, group_size=32)


def test_progress_is_shown_on_stderr_alone(bench: Any, capfd: pytest.CaptureFixture[str]) -> None:
    path = bench.save(tiny_mlp(), tokenizer=False)
    told: list[str] = []

    class Listener:
        def step(self, name: str) -> None:
            told.append(name)

        def total(self, amount: float) -> None: ...

        def advance(self, amount: float) -> None: ...

    for progress in (False, True, Listener()):
        qcompile.compile(path, "pack", output=bench.folder / "o.onnx", group_size=32, progress=progress)
        out, err = capfd.readouterr()
        assert out == ""
        assert ("saving" in err) == (progress is True)
    assert "saving" in told
