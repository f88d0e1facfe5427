"""What differs between two models: what their files and reports say, and on data what the second makes of it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qcompile.compiler.api.data import twice
from qcompile.compiler.api.evaluation import EvaluationSet, Told, evaluate_models, tokenizer_of
from qcompile.compiler.data.calibration import data_batches
from qcompile.compiler.data.feeds import Batch, token_batches
from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.compiler.data.tokens import Ids
from qcompile.compiler.files.load import load_model
from qcompile.compiler.measure.loaded import text_windows
from qcompile.compiler.report.difference import Difference, Layer, difference
from qcompile.compiler.walk.runner import Carried
from qcompile.compiler.walk.saved_run import by_segments, is_heavy

# Values that go on behind a segment, at most; nodes that are looked at for what is before them.
_MOST, _FAR = 2, 64


def diff_models(
    a: Path,
    b: Path,
    *,
    every: bool = False,
    worst: int | None = None,
    on: EvaluationSet | None = None,
    progress: Told | None = None,
) -> Difference:
    """As `report.difference`; with data the scores of b against a, and errors of values that both carry on.

    Raises UserError as that does, and as `evaluate_models`.
    """
    found = difference(a, b, every=every, worst=worst)
    if on is None:
        return found
    on = replace(on, data=twice(on.data))
    made = evaluate_models([b], on, against=a, progress=progress)
    found = replace(found, scores=[own.row() for own in made.rows if not own.of_reference])
    try:
        if layers := _layers(a, b, on):
            return replace(found, layers=layers)
        why = "nothing of one name goes on between large weights of both"
    except Exception as error:  # whatever a graph that nobody prepared lacks to be run by its parts
        why = f"{type(error).__name__}: {str(error)[:200]}"
    return replace(found, notes=[*found.notes, f"what goes on between layers is not told ({why})"])


def _layers(a: Path, b: Path, on: EvaluationSet) -> list[Layer]:
    """Of the values of one name that go on behind segments of both graphs, in b's order, on the first window.

    At most two go on, as before a norm that adds them up: no pass scales these. Caches and masks are not among them.
    """
    known, found = dict[str, npt.NDArray[Any]](), dict[str, float]()

    def seen(carried: Carried) -> None:
        known.update((name, array.astype(np.float64)) for name, array in _few(carried))

    def compared(carried: Carried) -> None:
        for name, array in _few(carried):
            before = known.get(name)
            if before is not None and before.shape == array.shape and (size := float(np.linalg.norm(before))) > 0:
                found.setdefault(name, float(np.linalg.norm(array - before)) / size)

    for path, watch in ((a, seen), (b, compared)):
        plan = input_plan(load_model(path))
        by_segments(path, plan, [_first(path, plan, on, a, b)], "cpu", between=watch)
    made = {str(value.name): node for node in load_model(a).graph for value in node.outputs}
    return [Layer(name, _behind(made.get(name)), error) for name, error in found.items()]


def _behind(node: ir.Node | None) -> str:
    """The nearest node with a weight before a value, by the node that gives it."""
    near = [] if node is None else [node]
    for own in near:  # grows while it is walked
        if is_heavy(own) or len(near) > _FAR:
            return str(own.name) if is_heavy(own) else ""
        near += [made for value in own.inputs if value is not None and (made := value.producer()) is not None]
    return ""


def _few(carried: Carried) -> list[tuple[str, npt.NDArray[Any]]]:
    own = [(name, arrays[0]) for name, arrays in carried.items()] if len(carried) <= _MOST else []
    return [(name, array) for name, array in own if array.dtype.kind == "f" and array.ndim > 1]


def _first(path: Path, plan: InputPlan, on: EvaluationSet, *models: Path) -> Batch:
    """The first window or batch, as the inputs of a model take it."""
    if not on.texts:
        return data_batches(plan, path, on.data)[0]
    return token_batches(plan, [_window(plan, on, models)] * (plan.batch or 1))[0]


def _window(plan: InputPlan, on: EvaluationSet, models: Sequence[Path]) -> Ids:
    tokenizer = tokenizer_of(models[1:], on, models[0])
    return text_windows(Path(on.texts[0]), tokenizer, plan, on.context, on.tokens)[0]
