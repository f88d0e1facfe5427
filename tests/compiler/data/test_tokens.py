"""compiler/data/tokens.py: loading tokenizers, end-of-text ids, vocabulary checks, windows."""

import json
from pathlib import Path

import numpy as np
import pytest

from qcompile.compiler.data import tokens
from qcompile.compiler.data.tokens import Tokenizer, find_tokenizer, load_tokenizer, read_text, windows
from qcompile.models.tiny import tiny_tokenizer
from qcompile.passes.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer as Inner
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    inner = Inner(WordLevel({"[UNK]": 0, "a": 1, "b": 2, "c": 3, "<s>": 4}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 4)])
    inner.enable_truncation(2)
    inner.enable_padding(length=8)
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_encodes_without_truncation_padding_or_special_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a b c a") == [1, 2, 3, 1]
    assert tokenizer.encode("a b", special=True) == [4, 1, 2]
    assert tokenizer.decode([4, 1, 2]) == "a b"
    assert (tokenizer.size, tokenizer.base_size) == (6, 5)


def test_long_texts_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By tokenizers of one content, each special or not; the ids are those of the library, and the caller's own."""
    monkeypatch.setattr(tokens, "_LATEST", {})
    text, encoded = "".join(map(chr, range(32, 127))) * 400, []
    whole = Tokenizer._encoded
    monkeypatch.setattr(Tokenizer, "_encoded", lambda *given: encoded.append(given[1:]) or whole(*given))
    first, again, other = (tiny_tokenizer(size, tmp_path / str(i)) for i, size in enumerate((256, 256, 120)))
    expected = whole(Tokenizer(first), text, False)
    Tokenizer(first).encode(text).clear()
    assert Tokenizer(again).encode(text) == Tokenizer(first).encode(text) == expected
    assert Tokenizer(first).encode(text, special=True) == expected
    assert Tokenizer(other).encode(text) == whole(Tokenizer(other), text, False) != expected
    assert encoded == [(text, False), (text, True), (text, False)]
    assert Tokenizer(first).encode(text + "!") == [*expected, expected[1]]
    assert Tokenizer(first).encode(text) == expected
    assert [special for _, special in encoded] == [False, True, False, False, False]  # the last three are kept
    short = text[: tokens._LONG - 1]
    assert Tokenizer(first).encode(short) == Tokenizer(first).encode(short) == expected[: len(short)]
    assert len(tokens._LATEST) == 3


def test_eos_ids_come_from_every_config(folder: Path) -> None:
    assert Tokenizer(folder / "tokenizer.json").eos_ids == frozenset()
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (folder / "config.json").write_text('{"eos_token_id": 3}')
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load_tokenizer(folder).eos_ids == {1, 2, 3, 5}


def test_a_broken_config_is_ignored(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert load_tokenizer(folder).eos_ids == frozenset()


def test_found_in_a_folder_as_a_file_and_beside_a_model(folder: Path) -> None:
    expected = folder / "tokenizer.json"
    (folder / "model.onnx").touch()
    assert find_tokenizer(folder) == find_tokenizer(expected) == find_tokenizer(folder / "model.onnx") == expected
    assert find_tokenizer(folder / "nowhere" / "model.onnx") is None
    assert find_tokenizer(folder / "onnx" / "model.onnx") == expected, "as repositories with a folder of graphs have it"


def test_missing_and_broken_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json at .*--tokenizer DIR"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_vocabulary_must_fit(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.check_vocabulary(None)
    tokenizer.check_vocabulary(5, [1, 2])  # an unused added token may lie beyond the embedding
    tokenizer.check_vocabulary(8)
    with pytest.raises(UserError, match="has ids up to 4, the model's embedding has 3 rows"):
        tokenizer.check_vocabulary(3)
    with pytest.raises(UserError, match="has ids up to 5, the model's embedding has 5 rows"):
        tokenizer.check_vocabulary(5, [1, 5])
    with pytest.raises(UserError, match="has 6 ids, the model's embedding has 9 rows"):
        tokenizer.check_vocabulary(9)


def test_windows_do_not_overlap_and_leave_the_remainder_out() -> None:
    cut = windows(range(10), 4)
    assert [list(w) for w in cut] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert cut[0].dtype == np.int64
    assert [len(w) for w in windows(range(10), 4, partial=True)] == [4, 4, 2]
    assert [len(w) for w in windows(range(9), 4, partial=True)] == [4, 4]  # a single token predicts nothing
    assert len(windows(range(10), 4, 1)) == 1
    assert [list(w) for w in windows(range(3), 8)] == [[0, 1, 2]]


def test_windows_of_a_decoder_begin_as_its_tokenizer_begins_a_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.before(decoder=True) == [4]
    assert tokenizer.before(decoder=False) == []
    assert [list(w) for w in windows(range(7), 4, before=[9])] == [[9, 0, 1, 2], [9, 3, 4, 5]]
    assert [list(w) for w in windows(range(7), 4, before=[9], partial=True)][-1] == [9, 6], (
        "one token behind BOS counts"
    )
    with pytest.raises(UserError, match="at least 3 tokens, got 2"):
        windows(range(9), 2, before=[7, 8])


def test_windows_need_two_tokens() -> None:
    with pytest.raises(UserError, match="context needs at least 2"):
        windows(range(9), 1)
    with pytest.raises(UserError, match="the text has 1 tokens"):
        windows([7], 4)


def test_text_must_be_utf8_and_not_empty(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"ab\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 2\)"):
        read_text(path)
    path.write_text(" \n")
    with pytest.raises(UserError, match="holds no text"):
        read_text(path)
