"""How fast models run here, and how much memory they take, against each other."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import psutil

from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.files.load import load_model
from qcompile.compiler.measure.workload import Workload, common_vocabulary
from qcompile.compiler.results.sheet import Sheet, Shown
from qcompile.passes.errors import UserError
from qcompile.runtime.bench import Case, Measured, Subject, cpu_name, measure, native_kernel, paired_ratio, spread
from qcompile.runtime.sessions import ort_version

# ONNX Runtime starts as many as it is told, and waits for all of them.
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Candidate:
    """A model on the command line: [NAME=]FILE.onnx[@SETTING,…]."""

    label: str
    path: Path
    kernels: str
    level: int

    @classmethod
    def parse(cls, text: str, kernels: str) -> "Candidate":
        """kernels: what runs qcompile operators where the text does not say."""
        name, path, settings = _parts(text)
        level = 0
        for setting in filter(None, settings.split(",")):
            key, _, number = setting.partition("=")
            if setting in ("native", "portable"):
                kernels = setting
            elif key == "level" and number in tuple("01234"):
                level = int(number)
            else:
                raise UserError(f"{text}: no setting {setting!r}: there are native, portable and level=0 … level=4")
        path = model_file(path)
        if not path.is_file():
            raise UserError(f"{path}: no such model file")
        return cls(name or text, path, kernels, level)

    def check(self, model: ir.Model) -> None:
        """Refuse settings that would change nothing."""
        operators = {(node.domain, node.op_type) for node in model.graph}
        if self.level and ("com.microsoft", "MatMulNBits") in operators:
            raise UserError(
                f"{self.label}: level={self.level} does nothing to the file's MatMulNBits nodes, which have a level of "
                "their own; compare with the file of target qcompile, …@portable,level=…"
            )
        if self.level and self.kernels == "native":
            raise UserError(f"{self.label}: level={self.level} is for portable bodies: say portable,level={self.level}")

    def runs(self, model: ir.Model, native: str | None) -> str:
        """What computes the model's quantized products."""
        if not any(node.domain == "qcompile" for node in model.graph):
            return "ONNX Runtime's operators"
        if self.kernels == "portable" or (self.kernels == "auto" and native is None):
            return f"portable bodies, accuracy level {self.level}"
        return f"native kernels ({native or 'none for this machine'})"


def _parts(text: str) -> tuple[str, Path, str]:
    """(name, path, settings) of [NAME=]PATH[@SETTINGS]: of all ways to read it, the first whose file exists."""
    heads = [(text, ""), *([text.rsplit("@", 1)] if "@" in text else [])]
    readings = [
        (name, Path(path), settings)
        for head, settings in heads
        for name, path in (("", head), *([head.split("=", 1)] if "=" in head else []))
    ]
    return next((reading for reading in readings if reading[1].exists()), readings[-1])


@dataclass(frozen=True, repr=False)
class Benchmark(Shown):
    """What was measured. report: as in the JSON of `qcompile bench`."""

    report: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The report."""
        return self.report

    def records(self) -> list[dict[str, Any]]:
        """A row for each model, number of threads and case."""
        return [
            {name: value for name, value in row.items() if not isinstance(value, list)}
            | {name: value for name, value in case.items() if not isinstance(value, list)}
            for row in self.report["models"]
            for case in row["cases"]
        ]

    def sheet(self) -> Sheet:
        """A line for each of these."""
        rows = [_cells(own) for own in self.records()]
        title = f"ONNX Runtime {self.report['onnxruntime']}, {self.report['cpu']}, {self.report['rounds']} rounds"
        heads = ("model", "threads", "case", "median", "unit", "spread", "to the first")
        return Sheet(title, heads, rows, 4)


def _cells(own: Mapping[str, Any]) -> list[str]:
    ratio = "" if own["ratio"] is None else f"{own['ratio']:.2f}×"
    median, spread = f"{own['value']:.4g}", f"±{own['spread']:.0%}"
    return [own["label"], str(own["threads"]), own["name"], median, own["unit"], spread, ratio]


def bench_models(
    candidates: Sequence[Candidate],
    workload: Workload | None = None,
    *,
    threads: Sequence[int] = (),
    rounds: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> Benchmark:
    """Measure models in turns, each in a process of its own.

    threads: numbers of them, all cores where there is none. Ratios are of the first model's figures.
    Raises UserError for bad input.
    """
    workload, threads = workload or Workload(), tuple(threads) or (cores(),)
    if max(threads) > _MOST_THREADS:
        raise UserError(f"--threads takes {_MOST_THREADS} at most, got {max(threads)}")
    if rounds < 1 or workload.decode < 0 or workload.after < 1:
        raise UserError("--rounds and --decode-after must be at least 1, --decode at least 0")
    labels = [candidate.label for candidate in candidates]
    if len(set(labels)) < len(labels):
        raise UserError("two models have the same name: give them names of their own, as in NAME=FILE.onnx")
    native = native_kernel()
    models = [load_model(candidate.path) for candidate in candidates]
    plans = [input_plan(model) for model in models]
    for candidate, model in zip(candidates, models, strict=True):
        candidate.check(model)
    cases = _cases(workload, candidates, plans)
    runs = {c.label: c.runs(model, native) for c, model in zip(candidates, models, strict=True)}
    del models
    subjects = [
        (Subject(c.label, c.path, c.kernels, c.level, count, growing=bool(plan.past)), cases[c.label][0])
        for count in threads
        for c, plan in zip(candidates, plans, strict=True)
    ]
    results = measure(subjects, rounds=rounds, progress=progress or (lambda done, total: None))
    report = {
        "onnxruntime": ort_version(),
        "cpu": cpu_name(),
        "cores": cores(),
        "native_kernel": native,
        "rounds": rounds,
        "models": [_row(result, results, runs[result.subject.label]) for result in results],
        "remarks": {label: remarks for label, (_, remarks) in cases.items() if remarks},
    }
    return Benchmark(report)


def _cases(
    workload: Workload, candidates: Sequence[Candidate], plans: Sequence[InputPlan]
) -> dict[str, tuple[list[Case], list[str]]]:
    """(cases, remarks) by label."""
    vocabulary = common_vocabulary(plans)
    made = {}
    for candidate, plan in zip(candidates, plans, strict=True):
        try:
            made[candidate.label] = workload.cases(plan, vocabulary)
        except UserError as error:
            raise UserError(f"{candidate.path}: {error}") from error
    return made


def _row(result: Measured, results: Sequence[Measured], runs: str) -> dict[str, Any]:
    """A model at one number of threads, as in the JSON; ratios to the first model at as many threads."""
    subject = result.subject
    first = next(other for other in results if other.subject.threads == subject.threads)
    fewest = next(other for other in results if other.subject.label == subject.label)
    loads = [load.seconds for load in result.loads]
    memory = [load.memory for load in result.loads if load.memory is not None]
    return {
        "label": subject.label,
        "path": str(subject.path),
        "runs": runs,
        "accuracy_level": subject.accuracy_level,
        "threads": subject.threads,
        "load_seconds": statistics.median(loads),
        "load_values": loads,
        "load_spread": spread(loads),
        "load_ratio": paired_ratio([load.seconds for load in first.loads], loads),
        "loaded_bytes": statistics.median(memory) if memory else None,
        "running_bytes": result.memory,
        "cases": [_case_row(case, result, first, fewest) for case in result.cases],
    }


def _case_row(case: Case, result: Measured, first: Measured, fewest: Measured) -> dict[str, Any]:
    """One case of a row. ratio: speed over the first model's; threads_ratio: over its own at the first thread count."""
    seconds = result.seconds[case.name]
    middle = statistics.median(seconds)
    return {
        "name": case.name,
        "unit": case.unit,
        "value": case.amount / middle if case.unit == "tokens/s" else 1e3 * middle,
        "seconds": seconds,
        "spread": spread(seconds),
        "ratio": paired_ratio(first.seconds[case.name], seconds) if case.name in first.seconds else None,
        "threads_ratio": paired_ratio(fewest.seconds[case.name], seconds),
    }


def cores() -> int:
    """Cores that this process may use."""
    own = psutil.Process()
    return len(own.cpu_affinity()) if hasattr(own, "cpu_affinity") else psutil.cpu_count() or 1
