"""Text to calibrate with, and to judge on: the bundled public-domain texts, and the user's own files."""

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from qcompile.passes.errors import UserError


def calibration_text() -> str:
    """The bundled English text (State of the Union addresses, Moby-Dick; data/README.md has its provenance)."""
    return resources.files("qcompile.models").joinpath("data", "calibration.txt").read_text(encoding="utf-8")


def tasks_path() -> Path:
    """The bundled English text that tasks are made of, other than what models are calibrated on (data/README.md)."""
    return Path(str(resources.files("qcompile.models").joinpath("data", "tasks.txt")))


def tasks_text() -> str:
    """What `tasks_path` holds."""
    return tasks_path().read_text(encoding="utf-8")


def read_texts(paths: Iterable[Path | str]) -> list[str]:
    """The documents of the files, in order: a .jsonl file has one a line, any other file is one.

    A line of .jsonl is a string, or an object whose field "text" (or whose only string) is the document.
    """
    return [document for path in paths for document in _documents(Path(path))]


def _documents(path: Path) -> list[str]:
    text = _read(path)
    documents = list(_lines(text, path)) if path.suffix.lower() == ".jsonl" else [text]
    found = [document for document in documents if document.strip()]
    if not found:
        raise UserError(f"{path}: no text in it")
    return found


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():  # reading a pipe may wait for ever
            raise UserError(f"{path} is not a regular file: save the text in one")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such text file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _lines(text: str, path: Path) -> Iterator[str]:
    # Not splitlines: JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = _document(json.loads(line))
            if document is not None:
                document.encode()  # "\\ud800" is half of a character
        except UnicodeEncodeError as error:
            raise UserError(f"{path}, line {number}: not Unicode text ({error.reason})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error})") from error
        if document is None:
            raise UserError(f'{path}, line {number}: no text: an object with a field "text" is expected')
        yield document


def _document(entry: Any) -> str | None:
    if isinstance(entry, str):
        return entry
    if not isinstance(entry, dict):
        return None
    if isinstance(entry.get("text"), str):
        return str(entry["text"])
    strings = [value for value in entry.values() if isinstance(value, str)]
    return strings[0] if "text" not in entry and len(strings) == 1 else None
