"""A saved file against the documented rules of a runtime that is not at hand."""

from collections.abc import Iterator
from pathlib import Path

from qcompile.compiler.console.visible import visible
from qcompile.compiler.walk.verify_saved import read_saved
from qcompile.passes.conform import CHECKS
from qcompile.passes.errors import UserError
from qcompile.passes.targets import TARGETS

# Broken rules that a message names.
_NAMED = 3


def check_conformance(path: Path, target: str) -> Iterator[str]:
    """What is to be told of a file that was saved for the target; nothing where ONNX Runtime itself ran it.

    UserError where a node breaks a rule: one that the model came with, since what passes write keeps to them.
    """
    if target not in CHECKS:
        return
    found, runtime = CHECKS[target](read_saved(path)), TARGETS[target].runtime
    if found.broken:
        more = f" and {len(found.broken) - _NAMED} more" if len(found.broken) > _NAMED else ""
        told = "; ".join(visible(own) for own in found.broken[:_NAMED])
        raise UserError(f"target {target}: by the rules of {runtime} {told}{more}: compile the float model, or exclude")
    counted = ", ".join(f"{number} {what}" for what, number in found.checked.items()) or "no Q, DQ or MatMulNBits"
    yield f"{counted} keep to the documented rules of {runtime}; checked by their text, not run here"
    yield from map(visible, found.remarks)
