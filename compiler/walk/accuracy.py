"""The accuracy that a report tells: of the saved file, on batches that nothing was fitted to or chosen by."""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.calibration import Data
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.data.npz import Arrays
from qcompile.compiler.measure.metrics import OutputNoise
from qcompile.compiler.measure.predictions import Scored
from qcompile.compiler.results.errors import OutputError
from qcompile.compiler.results.report import Report


class Accuracy:
    """Takes the file's outputs in, batch by batch, beside those of the float model; nothing of them is kept.

    floats: by output, the float model's for each batch of the evaluation data.
    Outputs whose shape depends on their content, and numbers that are not finite in both, are left out.
    """

    def __init__(self, plan: InputPlan, data: Data, floats: Mapping[str, Sequence[npt.NDArray[np.floating]]]) -> None:
        self.plan, self.data, self.floats = plan, data, floats
        self._noise = {name: OutputNoise() for name in floats}
        self._scored = Scored(plan)

    def add(self, number: int, outputs: Arrays) -> None:
        """The file's outputs for a batch."""
        known = {name: own[number] for name, own in self.floats.items()}
        for name, wanted in known.items():
            found = outputs.get(name)
            if found is None or found.shape != wanted.shape:
                self._noise.pop(name, None)
            elif name in self._noise:
                usable = np.isfinite(found) & np.isfinite(wanted)
                self._noise[name].add(np.where(usable, wanted, 0), np.where(usable, found, 0))
        self._scored.add(self.data.evaluation[number], outputs, known)

    def tell(self, report: Report) -> None:
        """Put the errors and predictions into the report, in the place of those of the check batches."""
        report.measured = self.data.measured_on
        told = [(name, own) for name, own in self._noise.items() if own.size]
        if told:
            report.outputs = [OutputError(name, n.relative, n.cosine, n.deviation) for name, n in told]
            report.predictions = self._scored.predictions
