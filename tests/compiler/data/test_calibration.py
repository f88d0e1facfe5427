"""compiler/data/calibration.py: the user's data, else the bundled text, else the model's own samples, else none."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tokenizers
from bos import put_before_texts
from hypothesis import given as given_data
from hypothesis import settings
from hypothesis import strategies as st

from qcompile.compiler.data import calibration
from qcompile.compiler.data.apart import digests
from qcompile.compiler.data.aside import apart
from qcompile.compiler.data.calibration import Calibration, Data, Sampling, gather, spread
from qcompile.compiler.data.calibration_files import named
from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.data.tokens import load_tokenizer
from qcompile.compiler.mixed.windows import check_windows
from qcompile.models.text import calibration_text
from qcompile.models.tiny import tiny_conv, tiny_decoder, tiny_encoder, tiny_mlp, tiny_tokenizer
from qcompile.passes.errors import UserError

SAMPLING = Sampling(4, 16)


def _gather(
    bench: Any,
    model: ir.Model,
    *files: Path | str,
    needed: bool = True,
    tokenizer: Path | None = None,
    beside: bool = True,
) -> Data:
    path = bench.save(model, tokenizer=beside)
    given = Calibration([str(f) for f in files], tokenizer)
    return gather(input_plan(model), path, SAMPLING, given, needed=needed)


def _ids(data: Data) -> list[list[int]]:
    return [batch.feeds["input_ids"][0].tolist() for batch in data.calibration]


def test_paths_are_files_too(tmp_path: Path) -> None:
    """A program has paths; they ended in a TypeError."""
    given = Calibration(files=[tmp_path / "a.npz"])  # type: ignore[list-item]
    assert given == Calibration.of([tmp_path / "a.npz"]) == Calibration([str(tmp_path / "a.npz")])
    assert given.only_files


def test_windows_are_disjoint_and_spread_over_the_whole_text() -> None:
    windows = spread(range(1000), 16, 4)
    assert [len(w) for w in windows] == [16] * 4
    assert (windows[0][0], windows[-1][-1]) == (0, 1000 // 16 * 16 - 1)
    assert len({int(i) for w in windows for i in w}) == 64
    assert len(spread(range(40), 16, 4)) == 2, "no window twice"
    assert [w.tolist() for w in spread(range(5), 16, 4)] == [[0, 1, 2, 3, 4]]
    assert spread([1], 16, 4) == []


def _arrays(sizes: list[int]) -> list[Batch]:
    """Batches of so many pictures each, every one of a number of its own."""
    numbers = np.split(np.arange(sum(sizes), dtype=np.float32), np.cumsum(sizes)[:-1])
    return [Batch({"image": own.reshape(-1, 1, 1, 1)}, len(own)) for own in numbers]


@settings(max_examples=60, deadline=None)
@given_data(st.lists(st.integers(1, 9), min_size=1, max_size=40))
def test_nodes_are_chosen_by_batches_that_calibration_has_not_seen(sizes: list[int]) -> None:
    """Every batch, or every row of a single one, is on one side; statistics have most; two rows are enough to cut."""
    plan = input_plan(tiny_conv())
    parts = apart(plan, _arrays(sizes))
    seen, held = ([x for batch in part for x in batch.feeds["image"].ravel()] for part in parts)
    assert sorted(seen + held) == list(range(sum(sizes)))
    assert all(batch.rows == len(batch.feeds["image"]) for part in parts for batch in part)
    if len(sizes) > 1:
        assert 1 <= len(parts[1]) <= min(4, max(len(sizes) // 4, 1))
    else:
        assert len(held) == (max(sizes[0] // 4, 1) if sizes[0] > 1 else 0)


def test_one_batch_that_cannot_be_cut_is_told(bench: Any) -> None:
    """A batch fixed by the graph, or inputs of several lengths: the choice is judged on what calibration saw."""
    model = tiny_conv()
    model.graph.inputs[0].shape = ir.Shape([4, 3, 12, 12])
    fixed = input_plan(model)
    (given,) = fixed.inputs
    batch = Batch({given.name: np.zeros([4, *given.shape[1:]], np.float32)}, 4)  # type: ignore[list-item]
    assert apart(fixed, [batch]) == ([batch], [])
    assert "out of the calibration data itself, none held aside" in check_windows(fixed, Data([batch], [], "x"))[1]


@pytest.mark.parametrize(("samples", "windows", "others"), [(4, 4, 2), (40, 18, 2), (8, 8, 2)])
def test_windows_for_choices(bench: Any, samples: int, windows: int, others: int) -> None:
    """Beside those of the statistics; where a text has no more, of them."""
    model = tiny_decoder()
    path = bench.save(model)
    text = bench.folder / "short.txt"
    tokenizer, words = load_tokenizer(bench.folder / "in"), calibration_text()[:4000].split()
    while len(tokenizer.encode(" ".join(words))) >= 21 * 16:
        words.pop()
    text.write_text(" ".join(words))
    sampling = Sampling(samples, 16, aside=True)
    data = gather(input_plan(model), path, sampling, Calibration([str(text)]), needed=True)
    assert (len(data.calibration), len(data.unseen)) == (windows, others)
    seen, held = ({tuple(b.feeds["input_ids"].ravel()) for b in part} for part in (data.calibration, data.unseen))
    assert not seen & held


def _shown_and_seen(data: Data, name: str) -> tuple[set[bytes], set[bytes]]:
    """(rows that the accuracy is told on, rows of the checks and statistics), by their first 16 numbers."""
    shown, seen = (
        {np.asarray(row).ravel()[:16].tobytes() for batch in part for row in batch.feeds[name]}
        for part in (data.evaluation, [*data.checks, *data.calibration])
    )
    assert shown or data.none_aside
    assert ("itself (" in data.measured_on) != bool(shown)
    return shown, seen


@settings(max_examples=60, deadline=None)
@given_data(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.booleans())
def test_the_accuracy_is_told_on_rows_that_no_check_saw(sizes: list[int], needed: bool) -> None:
    """Also where nothing is calibrated, and rows are few: activation bits are chosen on the checks."""
    numbers = np.split(np.arange(sum(sizes), dtype=np.float32), np.cumsum(sizes)[:-1])
    reader = [{"image": np.broadcast_to(own[:, None, None, None], (len(own), 3, 32, 32))} for own in numbers]
    given = Calibration(reader=reader)
    sampling = Sampling(4, 16, accuracy=True)
    data = gather(input_plan(tiny_conv()), Path("m.onnx"), sampling, given, needed=needed)
    shown, seen = _shown_and_seen(data, "image")
    assert not shown & seen
    assert shown or needed or len(sizes) <= 2


@pytest.mark.parametrize("tokens", [10, 40, 64, 70, 400])
@pytest.mark.parametrize("needed", [False, True])
def test_so_it_is_of_texts(bench: Any, tokens: int, needed: bool) -> None:
    text, words = bench.folder / "short.txt", calibration_text()[: 6 * tokens]
    path = bench.save(tiny_decoder())
    tokenizer = load_tokenizer(bench.folder / "in")
    while len(tokenizer.encode(words)) > tokens:
        words = words[:-1]
    text.write_text(words)
    data = gather(input_plan(tiny_decoder()), path, SAMPLING, Calibration([str(text)]), needed=needed)
    shown, seen = _shown_and_seen(data, "input_ids")
    assert not shown & seen


def test_a_model_that_samples_its_own_data_samples_more_for_choices(bench: Any) -> None:
    model = tiny_decoder()
    sampling = Sampling(2, 8, aside=True)
    given = Calibration(["self"])
    data = gather(input_plan(model), bench.save(model), sampling, given, needed=True)
    seen, held = ({tuple(b.feeds["input_ids"].ravel()) for b in part} for part in (data.calibration, data.unseen))
    assert len(held) == 2
    assert not seen & held


def test_the_bundled_text_where_a_tokenizer_lies_beside_the_model(bench: Any) -> None:
    data = _gather(bench, tiny_decoder())
    tokenizer = load_tokenizer(bench.folder / "in")
    start = tokenizer.encode(calibration_text()[:64])[:16]
    assert _ids(data)[0] == start
    assert len(data.calibration) == 4
    assert data.description == "4 windows of 16 tokens from the bundled text (speeches and a novel, English)"
    assert [batch.rows for batch in data.checks] == [16, 16]


@pytest.mark.parametrize("sequence", [None, 16])
def test_a_decoders_windows_begin_with_bos(bench: Any, tmp_path: Path, sequence: int | None) -> None:
    """Of its tokenizer, and are no longer for that; those that accuracy is told on and the user's own, too."""
    path = bench.save(tiny_decoder())
    put_before_texts(bench.folder / "in" / "tokenizer.json", 3)
    plan = replace(input_plan(tiny_decoder()), sequence=sequence)
    data = gather(plan, path, SAMPLING, Calibration([]), needed=True)
    start = load_tokenizer(bench.folder / "in").encode(calibration_text()[:64])[:15]
    assert _ids(data)[0] == [3, *start]
    assert {len(ids) for ids in _ids(data)} == {16}
    assert data.evaluation
    (tmp_path / "mine.txt").write_text("abcdefgh" * 64)
    given = calibration.with_evaluation(plan, path, data, Calibration([str(tmp_path / "mine.txt")]))
    for batch in [*data.calibration, *data.checks, *data.evaluation, *given.evaluation]:
        assert (batch.feeds["input_ids"][:, 0] == 3).all()
        assert sequence is None or batch.feeds["input_ids"].shape[1] == sequence


def test_bos_beyond_the_vocabulary_is_refused(bench: Any) -> None:
    path = bench.save(tiny_decoder())
    file = bench.folder / "in" / "tokenizer.json"
    inner = tokenizers.Tokenizer.from_file(str(file))
    inner.add_special_tokens(["<far>"])
    inner.save(str(file))
    put_before_texts(file, inner.token_to_id("<far>"))
    with pytest.raises(UserError, match="does not fit the model"):
        gather(input_plan(tiny_decoder()), path, SAMPLING, Calibration([]), needed=True)
    (bench.folder / "mine.txt").write_text("abcdefgh" * 64)
    mine, arrays = Calibration([str(bench.folder / "mine.txt")]), Data([], [], "arrays")
    with pytest.raises(UserError, match="does not fit the model"):
        calibration.with_evaluation(input_plan(tiny_decoder()), path, arrays, mine)


def test_an_encoder_sees_texts_of_five_lengths(bench: Any) -> None:
    """Each half as long as the one before, special tokens and all; the first ids are those of the windows."""
    path, model = bench.save(tiny_encoder()), tiny_encoder()
    sampling = Sampling(12, 64)
    data = gather(input_plan(model), path, sampling, Calibration([]), needed=True)
    tokenizer = load_tokenizer(bench.folder / "in")
    windows = spread(tokenizer.encode(calibration_text()), 64, 12)
    before, behind = tokenizer.around()
    around = len(before) + len(behind)
    assert [batch.rows for batch in data.calibration] == [max(64 >> i % 5, around + 1) for i in range(12)]
    for batch, window in zip(data.calibration, windows, strict=True):
        ids = batch.feeds["input_ids"][0]
        assert ids.tolist() == [*before, *window[: len(ids) - around], *behind]
    assert "12 windows of 4 to 64 tokens" in data.description


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_the_users_text_comes_first(bench: Any, tmp_path: Path, suffix: str) -> None:
    path, text = tmp_path / f"mine{suffix}", "abcdefgh" * 8
    path.write_text(text if suffix == ".txt" else "\n".join(json.dumps({"text": text[i : i + 32]}) for i in (0, 32)))
    data = _gather(bench, tiny_decoder(), path)
    tokenizer = load_tokenizer(bench.folder / "in")
    assert [tokenizer.decode(ids) for ids in _ids(data)] == ["abcdefgh" * 2] * 4
    assert f"from mine{suffix}" in data.description


def test_a_tokenizer_from_elsewhere(bench: Any, tmp_path: Path) -> None:
    folder = tiny_tokenizer(256, tmp_path / "tok").parent
    assert len(_gather(bench, tiny_decoder(), tokenizer=folder, beside=False).calibration) == 4


def test_without_a_tokenizer_the_model_samples_its_own_text(bench: Any) -> None:
    first, second = (_gather(bench, tiny_decoder(), beside=False) for _ in range(2))
    assert "sampled from the model itself (no tokenizer beside it)" in first.description
    assert _ids(first) == _ids(second), "by the recipe's seed"
    assert len({tuple(ids) for ids in _ids(first)}) == 8
    assert first.own == 4, "of the model; random tokens come behind"
    assert all(0 <= token < 256 for ids in _ids(first) for token in ids)


def test_a_large_model_samples_with_mapped_weights(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data file counts, which is most of it."""
    small = _gather(bench, tiny_decoder(), beside=False)
    given, own = [], calibration.session
    monkeypatch.setattr(calibration, "_PREPACKED", 100_000)
    monkeypatch.setattr(
        calibration, "session", lambda *args, **more: given.append(more["prepack"]) or own(*args, **more)
    )
    large = _gather(bench, tiny_decoder(), beside=False)
    assert given == [False]
    assert [len(ids) for ids in _ids(large)] == [len(ids) for ids in _ids(small)]


def test_models_with_caches_see_a_decode_step(bench: Any) -> None:
    data = _gather(bench, tiny_decoder(kv_cache=True))
    assert [batch.follows for batch in data.calibration] == [None, 0, None, 2, None, 4, None, 6]
    assert [batch.rows for batch in data.calibration] == [15, 1] * 4
    assert [batch.follows for batch in data.checks] == [None, 0, None, 2]


def test_arrays(bench: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.npz" for i in range(3)]
    for i, path in enumerate(paths):
        np.savez(path, x=np.full((5, 48), i, np.float32))
    data = _gather(bench, tiny_mlp(), *paths, beside=False)
    assert [batch.feeds["x"].shape for batch in data.calibration] == [(5, 48)] * 3
    assert data.description == "3 batches of 0.npz, 1.npz, 2.npz"
    assert len(data.checks) == 2


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's with functions that give batches."""
    (tmp_path / "my_batches.py").write_text(
        "import numpy as np\n"
        "def good():\n    for i in range(3):\n        yield {'x': np.full((4, 48), i, np.float32)}\n"
        "def refilled():\n    x = np.empty((4, 48), np.float32)\n"
        "    for i in range(3):\n        x[:] = i\n        yield {'x': x}\n"
        "def empty():\n    return []\n"
        "def wrong():\n    return [{'y': np.ones(3)}]\n"
        "def poisoned():\n    return [{'x': np.full((4, 48), np.nan, np.float32)}]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_batches"
    sys.modules.pop("my_batches", None)


@pytest.mark.parametrize("name", ["good", "refilled"])
def test_a_function_of_the_users(bench: Any, module: str, name: str) -> None:
    data = _gather(bench, tiny_mlp(), f"{module}:{name}", beside=False)
    assert [(batch.rows, float(batch.feeds["x"][0, 0])) for batch in data.calibration] == [(4, 0), (4, 1), (4, 2)]
    assert data.description == f"3 batches of my_batches:{name}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", r"my_batches:empty gave no batches"),
        ("wrong", r"my_batches:wrong: array 'y' is no input of the model \(inputs: x\)"),
        ("poisoned", r"my_batches:poisoned: array 'x' contains NaN or infinity"),
        ("absent", r"my_batches:absent: .*has no attribute 'absent'"),
    ],
)
def test_functions_that_give_nothing_usable(bench: Any, module: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _gather(bench, tiny_mlp(), f"{module}:{name}", beside=False)


def test_without_need_only_the_checks_are_made(bench: Any) -> None:
    for model in (tiny_decoder(), tiny_mlp(), tiny_conv()):
        data = _gather(bench, model, needed=False, beside=False)
        assert data.calibration == []
        assert data.checks
        assert "checks only" in data.description, "random inputs are never used silently"


@pytest.mark.parametrize(
    ("make", "files", "message"),
    [
        (tiny_mlp, [], r"float input 'x' .*cannot be made from text.*\.npz"),
        (tiny_encoder, [], r"no tokenizer lies beside the model, and it is no decoder to sample text from"),
        (tiny_decoder, ["{text}"], r"is text, but no tokenizer.json lies beside .*: give --tokenizer"),
        (tiny_decoder, ["{text}", "a.npz"], r"not a mixture"),
        (tiny_mlp, ["no/folder/"], r"^no/folder: no such file or folder"),
        (tiny_decoder, ["no_such_module:f"], r"no_such_module:f: No module named"),
    ],
)
def test_data_that_cannot_be_had(bench: Any, make: Any, files: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _gather(bench, make(), *(f.format(text=bench.text) for f in files), beside=False)


@pytest.mark.parametrize("size", [100, 400])
def test_a_tokenizer_of_another_model(bench: Any, tmp_path: Path, size: int) -> None:
    folder = tiny_tokenizer(size, tmp_path / "tok").parent
    if size > 256:  # special tokens beyond the table are not used by text; ordinary ones are
        raw = json.loads((folder / "tokenizer.json").read_text())
        raw["model"]["vocab"]["zz"] = 399
        (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"does not fit the model"):
        _gather(bench, tiny_decoder(), tokenizer=folder)


@pytest.mark.parametrize(("length", "general"), [(30_000, 4), (40, 7)])
def test_half_of_a_mixture_is_the_bundled_text(bench: Any, length: int, general: int) -> None:
    """And more of it, where the other text has too few windows: all that are asked for are there."""
    path, text = bench.save(tiny_decoder()), bench.folder / "numbers.txt"
    text.write_text("".join(f"{i} " for i in range(length))[:length])
    sampling = Sampling(samples=8, context=32)
    own, mixed = (
        gather(input_plan(tiny_decoder()), path, sampling, Calibration(files), needed=True)
        for files in ([str(text)], ["general", str(text)])
    )
    digits = set(own.calibration[0].feeds["input_ids"].ravel().tolist())
    numbers = [set(batch.feeds["input_ids"].ravel().tolist()) <= digits for batch in mixed.calibration]
    assert (len(numbers), numbers.count(False)) == (8, general)
    assert mixed.evaluation
    assert mixed.bundled
    assert mixed.description.endswith("the bundled text (speeches and a novel, English) mixed with numbers.txt")


@pytest.mark.parametrize("beside", ["x.npz", "self"])
def test_the_bundled_text_mixes_with_texts_alone(bench: Any, tmp_path: Path, beside: str) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros(2))
    given = Calibration(["general", str(tmp_path / beside) if beside == "x.npz" else beside])
    with pytest.raises(UserError, match=r"general is text: give it alone|self is a word .* stands alone"):
        gather(input_plan(tiny_decoder()), bench.save(tiny_decoder()), SAMPLING, given, needed=True)


def test_a_text_shorter_than_a_window_is_not_mixed(bench: Any) -> None:
    """Nothing of it would be there, and the report would say that it is."""
    text = bench.folder / "short.txt"
    path = bench.save(tiny_decoder())
    text.write_text("a few words")
    with pytest.raises(UserError, match=r"one has \d+ tokens, and a window 32: nothing of it would be there"):
        gather(input_plan(tiny_decoder()), path, Sampling(4, 32), Calibration(["general", str(text)]), needed=True)


def test_what_tells_about_a_folder_is_no_data(tmp_path: Path) -> None:
    """Folders of arrays or images for calibration and for judging often have the same labels.txt."""
    for name in ("seen", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "labels.txt").write_text("cat dog")
        np.savez(tmp_path / name / "x.npz", x=np.zeros(len(name)))
    folders = [str(tmp_path / name) for name in ("seen", "other")]
    assert [path.name for path in named(folders)] == ["x.npz", "x.npz"]
    assert len(digests(named(folders))) == 2
    assert named([str(tmp_path / "none")]) == [tmp_path / "none"], "who reads it says what is wrong"
