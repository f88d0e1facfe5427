"""Tokenizers (a tokenizer.json beside the model) and windows of token ids."""

import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qcompile.passes.errors import UserError

Ids = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)

# Embedding tables are padded to round sizes, by a few percent. A tokenizer with fewer ids than this is another model's.
_SMALLEST_SHARE = 0.75

# Characters from which a text is long, and how many long texts' ids are kept: (tokenizer, text, special) -> ids.
_LONG, _KEPT = 1 << 15, 3
_LATEST: dict[tuple[bytes, bytes, bool], npt.NDArray[np.uint32]] = {}


class Tokenizer:
    """A tokenizer.json, with truncation and padding off, and the end-of-text ids of the files beside it."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        self.path = path
        with _told(f"{path} is not a tokenizer.json"):
            self._inner: Any = tokenizers.Tokenizer.from_file(str(path))
            self._inner.no_truncation()
            self._inner.no_padding()
            self._content = hashlib.sha256(path.read_bytes()).digest()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids of the text. special: add what the tokenizer puts around a text (BOS, [CLS] … [SEP]).

        Those of the last long texts are kept, for every tokenizer of the same file content: the bundled text takes half
        a second, and every compile of a process asks for it.
        """
        if len(text) < _LONG:
            return self._encoded(text, special)
        key = (self._content, hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(), special)
        ids = _LATEST.pop(key, None)
        if ids is None:
            ids = np.asarray(self._encoded(text, special), np.uint32)
        _LATEST[key] = ids  # behind the others
        for oldest in list(_LATEST)[:-_KEPT]:
            _LATEST.pop(oldest, None)
        return list(ids.tolist())

    def _encoded(self, text: str, special: bool) -> list[int]:
        with _told(f"{self.path} cannot encode a text of {len(text)} characters"):
            return list(self._inner.encode(text, add_special_tokens=special).ids)

    def around(self) -> tuple[list[int], list[int]]:
        """Ids that the tokenizer puts before and behind a text: [CLS] and [SEP], say."""
        whole, inner = self.encode("a", special=True), self.encode("a")
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []

    def before(self, *, decoder: bool) -> list[int]:
        """What every window of a text begins with: of a decoder BOS, if the tokenizer puts one before a text."""
        return self.around()[0] if decoder else []

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of the ids. special: keep special tokens visible."""
        with _told(f"{self.path} cannot decode {len(ids)} ids"):
            return str(self._inner.decode(list(ids), skip_special_tokens=not special))

    @cached_property
    def size(self) -> int:
        """The largest id plus one, added tokens included."""
        return max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def base_size(self) -> int:
        """The largest id plus one, without added tokens."""
        return max(self._inner.get_vocab(with_added_tokens=False).values(), default=-1) + 1

    def token_id(self, token: str) -> int | None:
        """The id of a token, or None."""
        found = self._inner.token_to_id(token)
        return None if found is None else int(found)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text, from generation_config.json, config.json and tokenizer_config.json."""
        found: set[int] = set()
        for name in ("generation_config.json", "config.json"):
            entry = _json(self.path.parent / name).get("eos_token_id")
            entries = entry if isinstance(entry, list) else [entry]
            found.update(number for number in entries if isinstance(number, int))
        token = _json(self.path.parent / "tokenizer_config.json").get("eos_token")
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str) and (known := self.token_id(text)) is not None:
            found.add(known)
        return frozenset(found)

    def check_vocabulary(self, rows: int | None, ids: Sequence[int] | Ids = ()) -> None:
        """Refuse a tokenizer of another model: ids beyond the `rows` of the embedding, or far fewer ids than rows."""
        if rows is None:
            return
        largest = max(self.base_size, int(max(ids, default=-1)) + 1)
        if largest > rows:
            raise UserError(
                f"{self.path} does not fit the model: it has ids up to {largest - 1}, "
                f"the model's embedding has {rows} rows (give the model's own with --tokenizer DIR)"
            )
        if self.size < _SMALLEST_SHARE * rows:
            raise UserError(
                f"{self.path} does not fit the model: it has {self.size} ids, "
                f"the model's embedding has {rows} rows (give the model's own with --tokenizer DIR)"
            )


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Failures of the tokenizers library as a UserError: `what`, and why.

    It raises bare Exceptions, and where its Rust code panics a PanicException, which is a BaseException, behind lines
    that Rust writes to the process's stderr: those go nowhere.
    """
    try:
        with _muted_panics():
            yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{what}: {reason}; give the model's own with --tokenizer DIR") from error


@contextmanager
def _muted_panics() -> Iterator[None]:
    """File descriptor 2 on /dev/null; Python's own stderr is written to the end before and is not used meanwhile."""
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed: nothing to mute
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def find_tokenizer(path: Path) -> Path | None:
    """The tokenizer.json that is `path`, in the folder `path`, or beside the file `path`; None without one.

    Repositories that keep their graphs in a folder `onnx` have it one folder up.
    """
    folder = path if path.is_dir() else path.parent
    candidates = [folder / "tokenizer.json"] if path.is_dir() else [path, folder / "tokenizer.json"]
    if folder.absolute().name == "onnx":
        candidates.append(folder.absolute().parent / "tokenizer.json")
    return next((c for c in candidates if c.is_file() and c.suffix == ".json"), None)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer at `path`: a tokenizer.json, its folder, or a model file beside it."""
    found = find_tokenizer(Path(path))
    if found is None:
        raise UserError(f"no tokenizer.json at {path}: give its folder with --tokenizer DIR")
    return Tokenizer(found)


def read_text(path: Path) -> str:
    """A UTF-8 text file; bad bytes and emptiness are the user's error."""
    if Path(path).exists() and not Path(path).is_file():  # reading a pipe may wait for ever
        raise UserError(f"{path} is not a regular file: save the text in one")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): give a plain text file") from error
    if not text.strip():
        raise UserError(f"{path} holds no text")
    return text


def windows(
    ids: Sequence[int] | Ids,
    context: int,
    count: int | None = None,
    *,
    partial: bool = False,
    before: Sequence[int] = (),
) -> list[Ids]:
    """Windows of `context` ids from the start, no id in two of them, at most `count`, each int64 (context,).

    A remainder shorter than `context` is left out unless `partial`; a text shorter than one window is one short window.
    before: ids at the start of every window, within `context`.
    """
    room = context - len(before)
    if context < 2 or room < 1:
        raise UserError(f"a context needs at least {max(len(before) + 1, 2)} tokens, got {context}")
    flat = np.asarray(ids, dtype=np.int64)
    if len(flat) < 2:
        raise UserError(f"the text has {len(flat)} tokens: at least 2 are needed")
    starts = range(0, len(flat), room)
    cut = [flat[start : start + room] for start in starts][:count]
    if not partial and len(cut) > 1 and len(cut[-1]) < room:
        cut.pop()
    return [window for window in begun(before, cut) if len(window) > 1]


def begun(before: Sequence[int], windows: Sequence[Ids]) -> list[Ids]:
    """The windows behind the ids that stand before every text."""
    return [np.concatenate([np.asarray(before, np.int64), window]) for window in windows] if before else list(windows)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        _log.warning("%s is not valid JSON (%s): ignored", path, error)
        return {}
    return loaded if isinstance(loaded, dict) else {}
