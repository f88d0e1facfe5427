"""Tables of times: they come back from their files, and what is none is told in a line."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.compiler.results.timings import VERSION, Product, Timings, check_complete
from qcompile.compiler.sweep.budget.fastest import load_timings
from qcompile.passes.errors import UserError

PRODUCT = st.builds(
    Product,
    st.integers(1, 10**6),
    st.integers(1, 10**6),
    st.text(min_size=1, max_size=20),
    st.sampled_from(["auto", "8", "16"]),
    st.sampled_from(["float32", "float16"]),
)
TIME = st.floats(1e-3, 1e9, allow_nan=False)
ONE = {"k": 4, "n": 8, "format": "int4 g64 asym", "microseconds": 1.5}


def _plain(**changes: Any) -> dict[str, Any]:
    machine = {"cpu": "a processor", "threads": 2}
    return {"version": VERSION, "machine": machine, "target": "qcompile", "rows": 1, "times": [ONE], **changes}


@given(st.dictionaries(PRODUCT, TIME, max_size=5), st.integers(1, 4096))
def test_a_table_comes_back_from_its_file(times: dict[Product, float], rows: int) -> None:
    made = Timings({"cpu": "a processor", "threads": 4}, "qdq", rows, times)
    assert Timings.from_dict(json.loads(made.to_json())) == made
    assert len(made.records()) == len(times)
    assert str(made)


def test_a_file_made_by_hand_needs_no_more_than_it_tells(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(_plain(machine={})))
    table = load_timings(tmp_path / "t.json", "qcompile", 1)
    assert table.times == {Product(4, 8, "int4 g64 asym"): 1.5}
    assert table.told == "an unnamed machine"


def test_a_file_of_an_editor_that_marks_utf_8_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(_plain()), encoding="utf-8-sig")
    assert load_timings(tmp_path / "t.json", "qcompile", 1).times


def test_the_machine_is_told_in_words() -> None:
    machine = {"cpu": "a processor", "kernels": "native kernels (avx2)", "library": "ab", "onnxruntime": "1.32.0"}
    told = "a processor, native kernels (avx2), ONNX Runtime 1.32.0"
    for count, words in ((1, "1 thread"), (2, "2 threads")):
        assert Timings({**machine, "threads": count}, "qcompile", 1, {}).told == f"{told}, {words}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON: give what `qcompile timings MODEL -o FILE` wrote on that machine"),
        ("[]", "is no table of times: Expected `object`"),
        ("{}", "is no table of times: Object missing required field"),
        (_plain(version=1), f"it is of version 1, and this one reads {VERSION}"),
        (_plain(more=1), "unknown field `more`"),
        (_plain(rows=0), "rows must be at least 1"),
        (_plain(times=[{**ONE, "microseconds": 0}]), "microseconds of 4×8 in int4 g64 asym must be a positive number"),
        (_plain(times=[{**ONE, "microseconds": -1}]), "must be a positive number, got -1"),
        (_plain(times=[{**ONE, "microseconds": "2"}]), "Expected `float`, got `str`"),
        (_plain(times=[{**ONE, "k": 0}]), "k and n must be at least 1"),
        (_plain(times=[{**ONE, "activations": "4"}]), "Invalid enum value '4'"),
        (_plain(times=[{**ONE, "us": 4}]), "unknown field `us`"),
        (_plain(times=[ONE, ONE]), "4×8 in int4 g64 asym is there twice"),
        (_plain(target="qdq"), "is of target qdq, and this compile is for qcompile"),
        (_plain(rows=64), "is of 64 rows at a time, and this model is timed with 1"),
        (b"\xff", "is no JSON"),
        (b"1" * 5000, "is no JSON"),
        (_plain(times=[{**ONE, "microseconds": float("nan")}]), "must be a positive number, got nan"),
        (_plain(times=[{**ONE, "microseconds": 10**400}]), "is no table of times"),
        (None, "cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_table_of_this_compile_is_told(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "t.json"
    if content is not None:
        text = content if isinstance(content, str | bytes) else json.dumps(content)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=f"^--for-machine .*t.json.*{message}"):
        load_timings(file, "qcompile", 1)


def test_folders_and_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(UserError, match="is not a regular file: give what `qcompile timings"):
            load_timings(path, "qcompile", 1)


def test_infinite_times_are_none(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps(_plain(times=[{**ONE, "microseconds": float("inf")}])))
    with pytest.raises(UserError, match="must be a positive number, got inf"):
        load_timings(tmp_path / "t.json", "qcompile", 1)


def test_what_it_lacks_is_named_but_not_all_of_it() -> None:
    table = Timings({}, "qcompile", 1, {Product(4, 8, "float"): 1.0})
    check_complete(table, [Product(4, 8, "float")], None)
    wanted = [Product(4, 8, "float"), *(Product(k, 8, "int4 g64 asym", "8") for k in range(1, 6))]
    with pytest.raises(UserError) as told:
        check_complete(table, wanted, Path("t.json"))
    assert "t.json lacks 5 of 6 products: 1×8 in int4 g64 asym, 8-bit activations; 2×8" in str(told.value)
    assert "; …: measure them there" in str(told.value)
