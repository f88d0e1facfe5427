"""Calibration text: the bundled one, and what a user may give."""

from pathlib import Path

import pytest

from qcompile.models.text import calibration_text, read_texts
from qcompile.passes.errors import UserError


def test_bundled_text_is_there() -> None:
    text = calibration_text()
    assert len(text) > 400_000
    assert "Ishmael" in text


def test_txt_is_one_document_and_jsonl_one_a_line(tmp_path: Path) -> None:
    plain, lines = tmp_path / "a.txt", tmp_path / "b.jsonl"
    plain.write_text("\ufeffone\ntwo\n", encoding="utf-8")
    lines.write_text(
        '{"text": "three", "url": "x"}\n\n{"content": "four \u2028 still", "id": 4}\n"five"\n', encoding="utf-8"
    )
    assert read_texts([plain, str(lines)]) == ["one\ntwo\n", "three", "four \u2028 still", "five"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "no such text file"),
        ("a.txt", b" \n\n", "no text in it"),
        ("a.jsonl", b"", "no text in it"),
        ("a.txt", b"ab\xffcd", r"not UTF-8 text \(byte 2\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"a": "x", "b": "y"}', 'line 1: no text: an object with a field "text"'),
        ("a.jsonl", b'{"text": 3, "b": "y"}', "line 1: no text"),
        ("a.jsonl", b"[1, 2]", "line 1: no text"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'"\\ud800 x"', "line 1: not Unicode text"),
    ],
)
def test_bad_files_are_told_in_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_texts([path])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a regular file: save the text in one"):
        read_texts([tmp_path])
