"""A quick paired run of a compiled model and its float original: whether it got slower here."""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qcompile.compiler.data.feeds import Batch
from qcompile.compiler.data.inputs import InputPlan
from qcompile.compiler.results.errors import Speed
from qcompile.runtime.sessions import run, session

# Runs of each model, in turns, and seconds after which no further round begins.
_LEAST, _MOST, _SECONDS = 5, 40, 2.0


def paired(source: Path, compiled: Path, plan: InputPlan, batch: Batch, provider: str) -> Speed:
    """Times of both on one batch, by the kernels that an application has, all cores; the first run does not count."""
    models = [session(path, providers=(provider,)) for path in (source, compiled)]
    feeds = [batch.feeds, plan.coded(batch.feeds)]
    calls = [_call(model, own) for model, own in zip(models, feeds, strict=True)]
    times: tuple[list[float], list[float]] = ([], [])
    for call in calls:
        call()
    begun = time.monotonic()
    while len(times[0]) < _LEAST or (len(times[0]) < _MOST and time.monotonic() - begun < _SECONDS):
        for call, own in zip(calls, times, strict=True):
            started = time.perf_counter()
            call()
            own.append(time.perf_counter() - started)
    ratios = [after / before for before, after in zip(*times, strict=True)]
    spread = statistics.quantiles(ratios, n=4)
    before, after = (1e3 * statistics.median(own) for own in times)
    return Speed(before, after, statistics.median(ratios), spread[0], spread[2], len(ratios), batch.rows)


def _call(model: Any, feeds: dict[str, Any]) -> Callable[[], Any]:
    names = [output.name for output in model.get_outputs()]
    return lambda: run(model, names, feeds)
