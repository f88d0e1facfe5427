"""How much of a compile is verified: `--verify full|sample|none`.

full: every packed product on all its columns; the saved file is run.
sample: every packed product on an eighth of its columns, spread from the first to the last; on 16 random tokens instead
of twice 48, unless speed is measured on them; the saved file is run where evaluation data is to be scored.
none: nothing is run but what passes need; no error is known, so that no product takes int8 activations.
Whatever the level, the saved file is held against the graph byte by byte.
"""

from collections.abc import Sequence
from typing import Literal, get_args

from qcompile.compiler.recipe import Recipe
from qcompile.passes.base import Pass
from qcompile.passes.contract import Stage
from qcompile.passes.errors import UserError
from qcompile.passes.near import near

Level = Literal["full", "sample", "none"]
AUTO = "auto"
LEVELS: tuple[str, ...] = (AUTO, *get_args(Level))
# Bytes of a source from which, where nothing is calibrated, verifying in full would take longer than the packing.
LARGE = 2e9
# One of so many blocks of columns is compared in a sample.
SHARE = 8


def level_of(wanted: str, source_bytes: int, passes: Sequence[Pass]) -> Level:
    """The level that is meant. Raises UserError for a word that means none."""
    if wanted not in LEVELS:
        raise UserError(f"--verify {wanted!r} is not known; choose one of {', '.join(LEVELS)}{near(wanted, LEVELS)}")
    for level in get_args(Level):
        if level == wanted:
            return level  # type: ignore[no-any-return]
    calibrated = any(p.reads for p in passes if p.stage != Stage.BEFORE)
    return "sample" if source_bytes > LARGE and not calibrated else "full"


def check_unverified(recipe: Recipe, evaluation: object, *, bench: bool) -> None:
    """Raise UserError where something is to be judged of a compile that measures nothing."""
    asked = [("--bench", bench), ("--eval-data", evaluation is not None), ("mixed precision", bool(recipe.mixed))]
    wanted = next((name for name, given in asked if given), None)
    if wanted is not None:
        raise UserError(f"--verify none measures nothing, and {wanted} needs measures: leave one of both out")


def told(level: Level, *, ran: str) -> str:
    """What was verified, in words. ran: how the saved file was run; empty where it was not."""
    products = {
        "full": "every packed product on all its columns",
        "sample": f"every packed product on one of {SHARE} blocks of its columns (--verify full: on all)",
        "none": "nothing was run (--verify none): errors are not known",
    }[level]
    return f"{products}; the saved file byte by byte" + (f", and run {ran}" if ran else "")
