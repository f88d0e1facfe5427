"""compiler/measure/phases.py: each moment of a job counts for one phase; compiler/report/phases.py draws them."""

import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from html_reports import Page
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.compiler.measure.phases import OTHER, phase, phases, recorded
from qcompile.compiler.report.page import to_html
from qcompile.compiler.report.phases import waterfall
from qcompile.compiler.results.phases import Phase, longest
from qcompile.models.tiny import tiny_decoder

# A job: each item is a phase and what it does inside.
_JOBS = st.recursive(
    st.just([]), lambda inside: st.lists(st.tuples(st.sampled_from("abc"), inside), max_size=4), max_leaves=8
)


def _work(job: Any) -> None:
    for name, inside in job:
        with phase(name):
            time.sleep(1e-4)
            _work(inside)


@settings(max_examples=20, deadline=None)
@given(_JOBS)
def test_each_moment_counts_for_one_phase(job: Any) -> None:
    """However phases lie in each other: their seconds add up to the job's, and their spans do not overlap."""

    @recorded
    def run() -> list[Phase]:
        _work(job)
        return phases()

    found = run()
    spans = sorted(span for own in found for span in own.spans)
    assert sum(own.seconds for own in found) == pytest.approx(spans[-1][1], abs=0.002)
    assert all(start <= stop for start, stop in spans)
    assert {own.name for own in found} == {OTHER} | {name for name, _ in _flat(job)}


def _flat(job: Any) -> list[Any]:
    return [item for one in job for item in (one, *_flat(one[1]))]


def test_a_phase_has_its_memory_and_its_processor_time() -> None:
    """A peak that is gone when the phase ends is still its own."""

    @recorded
    def run() -> list[Phase]:
        with phase("small"):
            pass
        with phase("large", of_pass=True):
            large = b"x" * (200 << 20)
            started = time.process_time()
            while time.process_time() - started < 0.2:
                pass
            del large
        return phases()

    found = {own.name: own for own in run()}
    assert found["large"].memory > found["small"].memory + (150 << 20)
    assert found["large"].of_pass
    assert 0.2 <= found["large"].cpu < 0.2 + found["large"].seconds
    assert phases() == [], "no job runs"


def test_an_error_ends_its_phase() -> None:
    """What follows is not counted for it."""

    @recorded
    def run() -> list[Phase]:
        with pytest.raises(ValueError), phase("wrong"):
            raise ValueError
        with phase("next"):
            return phases()

    assert [own.name for own in run()] == [OTHER, "wrong", "next"]


def test_a_compile_tells_its_phases(bench: Any) -> None:
    """Every pass of the list, statistics and checks, in JSON and as a waterfall on the page."""
    report = bench.compile(bench.save(tiny_decoder()), "smooth,pack")
    names = {own.name for own in report.phases}
    assert {"load", "prepare", "smooth", "pack", "statistics", "probes", "save"} <= names
    assert {own.name for own in report.phases if own.of_pass} >= {"prepare", "smooth", "pack"}
    assert sum(own.seconds for own in report.phases) == pytest.approx(report.seconds, rel=0.02)
    assert [own["name"] for own in report.to_dict()["phases"]] == [own.name for own in report.phases]
    page = Page(to_html(report))
    assert names <= set(page.cells())
    assert longest(report.phases).count(",") <= 4


@pytest.mark.parametrize(
    ("name", "passes", "settings"),
    [
        ("bench", "pack", {"bench": True}),
        ("sensitivity", "qdq", {"keep_worst": 1}),
        ("ladder", "smooth,pack", {"calibration": ["self"]}),
        ("checkpoints", "pack", {}),
    ],
)
def test_what_takes_memory_beside_the_walk_has_a_name(
    bench: Any, name: str, passes: str, settings: dict[str, Any]
) -> None:
    """Two sessions in turns, a float and an integer graph in one, whole compiles without data, reading all data once
    more for its digest: none of it is said to be of `other`, nor is what it leaves behind.
    """
    report = bench.compile(bench.save(tiny_decoder()), passes, **settings)
    named = {own.name: own for own in report.phases}
    assert named[name].seconds > 0
    assert named[OTHER].seconds < 0.1 * report.seconds + 0.3


def test_the_waterfall() -> None:
    """A row each, a bar for each stretch, in seconds from the left; names are escaped."""
    drawn = waterfall([Phase("a", seconds=1, spans=[(0, 1)]), Phase("<b>", True, 1, spans=[(1, 1.5), (1.75, 2)])])
    assert '<path class="k-kept" d="M0.0 3h440.0v14H0.0z">' in drawn
    assert '<path class="k-int4" d="M440.0 23h220.0v14H440.0zM770.0 23h110.0v14H770.0z">' in drawn
    assert "<b>" not in drawn
    assert drawn.count(" s</text>") == 10


def test_the_line_on_the_terminal() -> None:
    """The longest by name, without those that hardly count."""
    found = [Phase("load", seconds=0.1), Phase("gptq", True, 7), Phase("awq", True, 2.9)]
    assert longest(found) == "gptq 7.0 s, awq 2.9 s, all else 0.1 s"
    assert longest(found[1:]) == "gptq 7.0 s, awq 2.9 s"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing of the parent is counted")
def test_the_peak_is_that_of_this_process_not_of_the_one_that_started_it() -> None:
    own = "from qcompile.compiler.measure.phases import peak_memory; print(peak_memory())"
    array = np.ones(1 << 27, np.float32)
    told = int(subprocess.run([sys.executable, "-c", own], check=True, capture_output=True, text=True).stdout)
    assert 1 << 23 < told < array.nbytes
