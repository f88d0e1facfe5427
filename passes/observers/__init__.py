"""Observers: what is learnt from activations, by nodes that reduce them inside ONNX Runtime."""

from qcompile.passes.observers.base import Observer
from qcompile.passes.observers.cross_entropy import CrossEntropy
from qcompile.passes.observers.entropy import Entropy
from qcompile.passes.observers.extremes import MinMax, MovingAverage
from qcompile.passes.observers.gram import Gram
from qcompile.passes.observers.mse import Mse
from qcompile.passes.observers.output_mse import OutputMse
from qcompile.passes.observers.percentile import Percentile

# By the name that a recipe gives them.
OBSERVERS: dict[str, type[Observer]] = {
    own.name: own for own in (Gram, MinMax, MovingAverage, Percentile, Entropy, Mse, OutputMse, CrossEntropy)
}
