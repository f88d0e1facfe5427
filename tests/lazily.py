"""Modules that take seconds to load, loaded where a test first needs them: no worker loads torch to collect tests."""

import importlib
from typing import Any


class Lazily:
    """A module of that name, which is imported when something of it is first asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


torch, transformers = Lazily("torch"), Lazily("transformers")
