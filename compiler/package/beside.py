"""What lies beside a model: its configuration, its tokenizer, its licence."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from qcompile.compiler.data.tokens import Tokenizer, load_tokenizer
from qcompile.models import licences
from qcompile.models.hf import COMPANIONS
from qcompile.passes.errors import UserError

GENAI, LICENCES = "genai_config.json", "LICENSES.txt"
_MORE = ("chat_template.json", "vocab.json", "merges.txt", "tokenizer.model")


def companions(folder: Path) -> list[Path]:
    """What lies beside a model in its folder, for whoever runs it: configuration, tokenizer, template, licences."""
    named = [folder / name for name in dict.fromkeys((*COMPANIONS, *_MORE))]
    return [path for path in named if path.is_file()] + licence_files(folder)


@dataclass(frozen=True)
class Beside:
    """The files in a model's folder that say what the graph does not."""

    tokenizer: Tokenizer

    @classmethod
    def of(cls, path: Path) -> "Beside":
        """Those in the folder of the tokenizer at `path`: a folder, or a model file beside it."""
        return cls(load_tokenizer(path))

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.tokenizer.path.parent

    def told(self, name: str) -> Mapping[str, Any]:
        """`table` of a file in the folder."""
        return table(self.folder / name)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """config.json, what it says of the text model of several in front of the rest."""
        own = self.told("config.json")
        text = own.get("text_config")
        return {**own, **text} if isinstance(text, dict) else own

    def number(self, *names: str) -> int | None:
        """The first positive number that config.json has under one of these names."""
        found = (self.config.get(name) for name in names)
        return next((n for n in found if isinstance(n, int) and not isinstance(n, bool) and n > 0), None)

    @property
    def files(self) -> list[Path]:
        """What an application needs beside the graph: configuration, tokenizer, chat template, licences."""
        return companions(self.folder)

    @property
    def licences(self) -> list[Path]:
        """The model's own licence and notices."""
        return licence_files(self.folder)


def licence_files(folder: Path) -> list[Path]:
    """A model's own licence and notices in a folder; what a package says of them (`LICENCES`) is none."""
    return [path for path in licences.licence_files(folder) if path.name != LICENCES]


def table(path: Path) -> Mapping[str, Any]:
    """The table in a JSON file; empty where there is no such file, UserError where it is no table."""
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({str(error)[:200]}); copy it from the model again") from error
    if not isinstance(read, dict):
        raise UserError(f"{path} is no table of keys and values; copy it from the model again")
    return read
