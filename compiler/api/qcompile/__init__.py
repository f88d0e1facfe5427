"""An ONNX quantization compiler: exported graphs in, INT4 and INT8 models out, which ONNX Runtime runs as they are.

    import qcompile

    report = qcompile.compile("model.onnx", passes="smooth,awq,pack", output="small/model.onnx")

This file becomes `qcompile/__init__.py` (pyproject.toml). Every name is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qcompile.compiler.api.bench import Benchmark
    from qcompile.compiler.api.calibrate import Calibrated
    from qcompile.compiler.api.evaluation import Evaluation
    from qcompile.compiler.api.jobs import calibrate, compile, dry_run, sensitivity, sweep, timings
    from qcompile.compiler.api.judging import bench, compare, diff, evaluate, explain, inspect
    from qcompile.compiler.api.recipes import load_recipe, save_recipe
    from qcompile.compiler.api.rehearsal import Rehearsal
    from qcompile.compiler.api.running import generate, session
    from qcompile.compiler.data.calibration import Calibration
    from qcompile.compiler.data.images import Pictures
    from qcompile.compiler.mixed.ranking import Ranking
    from qcompile.compiler.recipe import Recipe, Step
    from qcompile.compiler.report.difference import Difference
    from qcompile.compiler.report.explanation import Explanation
    from qcompile.compiler.report.inspection import Summary
    from qcompile.compiler.results.report import Report
    from qcompile.compiler.results.timings import Timings
    from qcompile.compiler.sweep.rows import Sweep
    from qcompile.passes.errors import UserError, Verdict
    from qcompile.passes.library import library_path
    from qcompile.runtime.sessions import custom_operators

    __version__: str

_API, _COMPILER = "qcompile.compiler.api", "qcompile.compiler"
_HOMES = {
    "Benchmark": f"{_API}.bench",
    "Calibrated": f"{_API}.calibrate",
    "Calibration": f"{_COMPILER}.data.calibration",
    "Difference": f"{_COMPILER}.report.difference",
    "Evaluation": f"{_API}.evaluation",
    "Explanation": f"{_COMPILER}.report.explanation",
    "Pictures": f"{_COMPILER}.data.images",
    "Ranking": f"{_COMPILER}.mixed.ranking",
    "Recipe": f"{_COMPILER}.recipe",
    "Rehearsal": f"{_API}.rehearsal",
    "Report": f"{_COMPILER}.results.report",
    "Step": f"{_COMPILER}.recipe",
    "Summary": f"{_COMPILER}.report.inspection",
    "Sweep": f"{_COMPILER}.sweep.rows",
    "Timings": f"{_COMPILER}.results.timings",
    "UserError": "qcompile.passes.errors",
    "Verdict": "qcompile.passes.errors",
    "bench": f"{_API}.judging",
    "calibrate": f"{_API}.jobs",
    "compare": f"{_API}.judging",
    "compile": f"{_API}.jobs",
    "custom_operators": "qcompile.runtime.sessions",
    "diff": f"{_API}.judging",
    "dry_run": f"{_API}.jobs",
    "evaluate": f"{_API}.judging",
    "explain": f"{_API}.judging",
    "generate": f"{_API}.running",
    "inspect": f"{_API}.judging",
    "library_path": "qcompile.passes.library",
    "load_recipe": f"{_API}.recipes",
    "save_recipe": f"{_API}.recipes",
    "sensitivity": f"{_API}.jobs",
    "session": f"{_API}.running",
    "sweep": f"{_API}.jobs",
    "timings": f"{_API}.jobs",
}

__all__ = [
    "Benchmark",
    "Calibrated",
    "Calibration",
    "Difference",
    "Evaluation",
    "Explanation",
    "Pictures",
    "Ranking",
    "Recipe",
    "Rehearsal",
    "Report",
    "Step",
    "Summary",
    "Sweep",
    "Timings",
    "UserError",
    "Verdict",
    "__version__",
    "bench",
    "calibrate",
    "compare",
    "compile",
    "custom_operators",
    "diff",
    "dry_run",
    "evaluate",
    "explain",
    "generate",
    "inspect",
    "library_path",
    "load_recipe",
    "save_recipe",
    "sensitivity",
    "session",
    "sweep",
    "timings",
]


if not TYPE_CHECKING:  # type checkers know the names from above, and no others

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            metadata = importlib.import_module("importlib.metadata")
            try:
                return metadata.version("qcompile-onnx")
            except metadata.PackageNotFoundError:
                return "0+unknown"
        if name in _HOMES:
            return getattr(importlib.import_module(_HOMES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
