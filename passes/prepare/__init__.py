"""Canonicalization: the graph forms that every later pass may rely on."""

from qcompile.passes.prepare.prepare import Prepare

__all__ = ["Prepare"]
