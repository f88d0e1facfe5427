"""Code of the user's: modules, functions and iterables that a command or a function is given."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qcompile.passes.errors import UserError


@contextmanager
def told(named: str) -> Iterator[None]:
    """Whatever the user's code raises inside, SystemExit included, is told in one line. named: what gave it."""
    try:
        yield
    except (UserError, KeyboardInterrupt, MemoryError, GeneratorExit):
        raise
    except SystemExit as error:
        raise UserError(f"{named} ended the program by itself: sys.exit({error.code!r})") from error
    except BaseException as error:  # native code brings exceptions of its own that are no Exception
        detail = " ".join(str(error).split())[:300]
        raise UserError(f"{named} failed: {type(error).__name__}: {detail}") from error


def found(reference: str, option: str) -> Any:
    """What module:name names; the current folder is searched, too. option: that gave it.

    An installed command does not look in the current folder by itself.
    """
    module, _, name = reference.partition(":")
    if not module or not name:
        raise UserError(f"{option} {reference}: give module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with told(f"{option} {reference}"):
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"{option} {reference}: {' '.join(str(error).split())}") from error
