"""tests/mutation/: which faults are planted, which are seen and which not, and the share that the tests catch."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("cosmic_ray", reason="pip install -e .[mutation]")

from mutation import run
from mutation.equivalent import EQUIVALENT
from mutation.mutants import Mutant, mutants
from mutation.record import Record

_ROUNDING = "passes/rounding.py"
_TYPES = '''"""Text."""
from functools import cache
Pair = dict[str, int | float]

@cache
def f(x: int | None, *, y: "Pair | None" = None) -> int | float:
    assert x > 0
    zip(x, y, strict=True)
    raise ValueError(f"{x + 1}")
'''


def _changed(text: str) -> set[str]:
    return {line for one in mutants("x.py", text) for line in one.changed(text) if line[0] == "+"}


def test_types_errors_and_caches_are_left_alone() -> None:
    assert _changed(_TYPES) == set()


@pytest.mark.parametrize(
    ("line", "faults"),
    [
        ("y = a + 1", {"+y = a - 1", "+y = a + 2", "+y = a + 0"}),
        ("y = a < b", {"+y = a <= b"}),
        ("y = a and not b", {"+y = a or not b", "+y = a and  b"}),
        ("f(*a, **b)", set()),
        ("y = n.outputs[0]", {"+y = n.outputs[ 1]"}),
        ("def f(a, *, b): return -a", {"+def f(a, *, b): return a"}),
    ],
)
def test_faults_of_a_line(line: str, faults: set[str]) -> None:
    assert _changed(line + "\n") == faults


def test_a_fault_is_in_the_lines_of_its_statement() -> None:
    text = "LEAST = 1\ndef f(a=2):\n    if (a and\n        f(a)):\n        return g(a,\n            3)\n"
    text += "@onnxscript.script(OPSET)\ndef Body(x):\n    return op.Add(x, 1)\n"
    text += "@property\ndef size(x):\n    text = x\n    return 1\n"
    found = {one.start[0]: one.lines for one in mutants("x.py", text)}
    assert found == {1: None, 2: None, 3: (3, 4), 6: (5, 6), 7: None, 9: None, 10: (12, 13), 13: (13, 13)}


def test_every_mutant_is_python_and_differs() -> None:
    path = run.ROOT / _ROUNDING
    text = path.read_text("utf-8")
    found = list(mutants(_ROUNDING, text))
    assert len(found) > 20
    for mutant in found:
        compile(mutant.source(text), _ROUNDING, "exec")
        assert mutant.source(text) != text


def test_what_need_not_be_seen_is_still_there_to_be_planted() -> None:
    for one in EQUIVALENT:
        lines = [line.strip() for line in (run.ROOT / one.path).read_text("utf-8").splitlines()]
        assert one.line in lines, one
    one = next(one for one in EQUIVALENT if one.path == "passes/routers.py")
    text = (run.ROOT / one.path).read_text("utf-8")
    found = [mutant for mutant in mutants(one.path, text) if run.equivalent(mutant, text)]
    assert [mutant.operator for mutant in found] == ["ReplaceComparisonOperator_Gt_GtE"]


def test_a_sample_is_decided_by_its_seed() -> None:
    found = list(mutants(_ROUNDING, (run.ROOT / _ROUNDING).read_text("utf-8")))
    assert run.sample(found, 20, 3) == run.sample(found, 20, 3) != run.sample(found, 20, 4)
    assert len({one.place for one in run.sample(found, 20, 3)}) == 20


_PLANT = """
from mutation.forked import ROOT, in_fork
from mutation.run import Chosen
text = (ROOT / "passes/affine.py").read_text("utf-8")
line = "    return np.repeat(per_group, "
assert line in text
test = "tests/passes/test_affine.py::test_dequantize_is_code_minus_zero_times_scale"
for fault in ("per_group = per_group + 0", "per_group = per_group + 1", "while True: pass", "__import__('os').abort()"):
    changed = text.replace(line, f"    {fault}\\n{line}")
    fault = ("passes/affine.py", changed)
    code, seconds, said = in_fork(["tests/passes/test_affine.py"], Chosen([test]), limit=2, fault=fault)
    print(code, "1 passed" in said, "1 failed" in said)
"""


def test_the_watcher_tells_harmless_faults_from_others() -> None:
    """0: no test failed; 1: one did; None: it hung, or the process died."""
    paths = os.pathsep.join(str(run.ROOT / folder) for folder in ("tests", "benchmarks"))
    environment = os.environ | {"PYTHONPATH": paths}
    command = [sys.executable, "-c", _PLANT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    seen = ["0 True False", "1 False True", "None False False", "None False False"]
    assert done.stdout.splitlines() == seen, done.stderr


def test_tests_are_chosen_by_the_lines_that_they_run() -> None:
    path = "passes/awq.py"
    own = Record({}, {"tests/passes/test_awq.py::a": 1.0, "tests/passes/test_awq.py::b": 9.0}, {path: {"5": 3, "6": 2}})
    other = Record({}, {"tests/test_graphs.py::c": 0.5}, {path: {"5": 1}})
    ids = [*own.seconds, *other.seconds]
    for line, budget, wanted in [
        (5, 20, ids),
        (5, 10, ids[:2]),
        (5, 0, ids[:1]),
        (6, 20, ids[1:2]),
        (7, 20, []),
        (0, 20, ids),
    ]:
        mutant = Mutant(path, "AddNot", 0, (line, 0), (line, 9), (line, line) if line else None)
        assert run.chosen(mutant, [other, own], budget=budget) == wanted


@pytest.mark.slow
def test_the_share_of_faults_that_are_caught() -> None:
    paths = os.pathsep.join(str(run.ROOT / folder) for folder in ("tests", "benchmarks"))
    command = [sys.executable, "-m", "mutation.run"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
