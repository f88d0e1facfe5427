"""Options that several commands have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def add_custom_ops(add: Callable[..., Any]) -> None:
    """Add --custom-ops; the command line has its libraries registered around the whole command."""
    told = "a library of custom operators that the model needs (a .so, .dylib or .dll: its code runs); may repeat"
    add("--custom-ops", type=Path, action="append", default=[], metavar="FILE", help=told)


def add_data(add: Callable[..., Any], told: str, metavar: str = "FILE") -> None:
    """--data: files of inputs that models are scored on."""
    add("--data", nargs="+", action="extend", type=Path, default=[], metavar=metavar, help=told)
