"""Observers: what is learnt from activations, by nodes that give what is needed of them."""

from typing import Annotated

from qcompile.passes.extensions import OneOf, Table
from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.cross_entropy import CrossEntropy
from qcompile.passes.observers.entropy import Entropy
from qcompile.passes.observers.extremes import MinMax, MovingAverage
from qcompile.passes.observers.gram import Gram
from qcompile.passes.observers.mse import Mse
from qcompile.passes.observers.output_mse import OutputMse
from qcompile.passes.observers.percentile import Percentile

# Choices of an observer for each activation, where a pass has a rule for it.
AUTO = "auto"


def _check(own: type[Observer]) -> None:
    """Raise ValueError for an observer of another package that cannot be made from a value's name alone."""
    if own.name == AUTO:
        raise ValueError(f"{AUTO} is the word for the choice of another one")
    own("x")


# By the name that a recipe gives them, those of other packages too.
OBSERVERS: Table[type[Observer]] = Table(
    "qcompile.observers",
    "observer",
    Observer,
    (Gram, MinMax, MovingAverage, Percentile, Entropy, Mse, OutputMse, CrossEntropy),
    check=_check,
)


def _fit(own: type[Observer]) -> bool:
    return own.calibrates


# What a parameter takes that names an observer of ranges.
Calibrator = Annotated[str, OneOf(OBSERVERS, fit=_fit)]
CalibratorOrAuto = Annotated[str, OneOf(OBSERVERS, (AUTO,), _fit)]
