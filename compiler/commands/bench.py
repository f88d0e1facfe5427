"""`qcompile bench`: how fast models run here, and how much memory they take, against each other."""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qcompile.compiler.commands.options import add_custom_ops
from qcompile.compiler.console.terminal import console, progress, table
from qcompile.compiler.data.inputs import InputPlan, input_plan
from qcompile.compiler.files.load import check_result_path, load_model
from qcompile.compiler.files.publish import write_text
from qcompile.compiler.measure.workload import Workload, common_vocabulary
from qcompile.passes.errors import UserError
from qcompile.runtime.bench import Case, Measured, Subject, cpu_name, measure, native_kernel, paired_ratio, spread
from qcompile.runtime.sessions import KERNELS, ort_version

_EPILOG = """A MODEL is [NAME=]FILE.onnx[@SETTING,…]. The settings: native (qcompile operators run by the native
kernels), portable (by their ONNX bodies), level=N (accuracy level of the 4-bit products that ONNX Runtime fuses from
portable bodies: 0 exact, 4 int8 activations). So one compiled file stands for three models:
  qcompile bench small.onnx --against float.onnx a4=small.onnx@portable,level=4 a0=small.onnx@portable,level=0
Each model runs in a process of its own; they take turns, round by round. Prefill is one run over a prompt; decoding
runs single tokens behind a prompt, each taking the caches of the run before, or adding to them in one buffer where
GroupQueryAttention can. Times are of the runs alone: choosing tokens and handing over inputs are left out. Ratios are
medians of the ratios of each round."""
_NOISY = 0.2
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
    return next((reading for reading in readings if reading[1].is_file()), readings[-1])


def add_parser(subparsers: Any) -> None:
    """The options of `qcompile bench`."""
    parser = subparsers.add_parser(
        "bench",
        description="Measure load time, memory, and tokens per second.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="[NAME=]FILE.onnx[@SETTING,…], see below")
    parser.add_argument("--against", nargs="+", default=[], metavar="OTHER", help="models to compare it with")
    parser.add_argument("--prompt-tokens", default="1,64,512", metavar="N,…", help="prefill lengths (default 1,64,512)")
    parser.add_argument("--decode", type=int, default=64, metavar="N", help="decoding steps (default 64; 0: none)")
    parser.add_argument("--decode-after", type=int, default=64, metavar="N", help="tokens before them (default 64)")
    parser.add_argument(
        "--threads", default=str(_cores()), metavar="N,…", help="threads (default: every core, %(default)s)"
    )
    add_custom_ops(parser.add_argument)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each model that count (default 5)")
    parser.add_argument("--kernels", default="auto", choices=KERNELS, help="default of the models")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=N,…",
        help="shape of an input that is not made of tokens (repeat for several)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, and write JSON if asked."""
    threads = _numbers("--threads", args.threads)
    if max(threads) > _MOST_THREADS:
        raise UserError(f"--threads takes {_MOST_THREADS} at most, got {max(threads)}")
    if args.rounds < 1 or args.decode < 0 or args.decode_after < 1:
        raise UserError("--rounds and --decode-after must be at least 1, --decode at least 0")
    shapes = dict(_shape(text) for text in args.shape)
    workload = Workload(_numbers("--prompt-tokens", args.prompt_tokens), args.decode, args.decode_after, shapes)
    candidates = [Candidate.parse(text, args.kernels) for text in (args.model, *args.against)]
    labels = [candidate.label for candidate in candidates]
    if len(set(labels)) < len(labels):
        raise UserError("two models have the same name: give them names of their own, as in NAME=FILE.onnx")
    if args.json is not None:
        check_result_path([candidate.path for candidate in candidates], args.json)
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
    results = _measured(subjects, args.rounds)
    report = {
        "onnxruntime": ort_version(),
        "cpu": cpu_name(),
        "cores": _cores(),
        "native_kernel": native,
        "rounds": args.rounds,
        "models": [_row(result, results, runs[result.subject.label]) for result in results],
        "remarks": {label: remarks for label, (_, remarks) in cases.items() if remarks},
    }
    _print(report)
    if args.json:
        write_text(args.json, json.dumps(report, indent=2) + "\n")
    return 0


def _measured(subjects: Sequence[tuple[Subject, Sequence[Case]]], rounds: int) -> list[Measured]:
    """The measurement behind a progress bar that draws only between turns: it shares the cores with them."""
    bar = progress()
    bar.live.auto_refresh = False
    with bar:
        task = bar.add_task("measuring")

        def step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            bar.refresh()

        return measure(subjects, rounds=rounds, progress=step)


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


def _print(report: dict[str, Any]) -> None:
    """The table, then what was measured, then what to doubt."""
    rows: list[dict[str, Any]] = report["models"]
    compared = len({row["label"] for row in rows}) > 1
    names = list(dict.fromkeys((case["name"], case["unit"]) for row in rows for case in row["cases"]))
    heads = [name if unit == "tokens/s" else f"{name}, {unit}" for name, unit in names]
    shown = table("model", "threads", "load s", "MB loaded", "MB running", *heads, numbers=4 + len(heads))
    for row in rows:
        by_name = {case["name"]: _cell(case, compared=compared) for case in row["cases"]}
        load = f"{row['load_seconds']:.2f} ±{row['load_spread']:.0%}"
        memory = [_mega(row["loaded_bytes"]), _mega(row["running_bytes"])]
        cells = [by_name.get(name, "") for name, _ in names]
        shown.add_row(row["label"], str(row["threads"]), load, *memory, *cells)
    out = console()
    out.print(shown)
    for label, runs in dict.fromkeys((row["label"], row["runs"]) for row in rows):
        out.print(f"{label}: {runs}")
    for label, remarks in report["remarks"].items():
        out.print(f"{label}: {'; '.join(remarks)}")
    for line in _scaling(rows):
        out.print(line)
    out.print(
        f"ONNX Runtime {report['onnxruntime']}, {report['cpu']}, {report['cores']} cores; tokens/s where no unit is "
        f"named; medians of {report['rounds']} rounds; ±: largest minus smallest, of the median; "
        + (f"×: speed over {rows[0]['label']} at as many threads, median of the rounds' ratios; " if compared else "")
        + "MB: resident memory that the model added, after loading and after all runs"
    )
    spreads = [(case["spread"], case["name"], row) for row in rows for case in row["cases"]]
    noisy = sum(value > _NOISY for value, _, _ in spreads)
    if noisy:
        worst, name, row = max(spreads, key=lambda item: item[0])
        out.print(
            f"noisy machine: {noisy} of {len(spreads)} figures have a spread above {_NOISY:.0%}, the worst {worst:.0%} "
            f"in {name} of {row['label']} at {row['threads']} threads. Stop other work, or give more --rounds"
        )


def _cell(case: dict[str, Any], *, compared: bool) -> str:
    """Median, spread and, beside others, ratio of a case."""
    value = f"{case['value']:.4g}" if case["value"] < 1000 else f"{case['value']:.0f}"
    ratio = f" {case['ratio']:.2f}×" if compared and case["ratio"] is not None else ""
    return f"{value} ±{case['spread']:.0%}{ratio}"


def _scaling(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each model at each further number of threads."""
    first = {row["label"]: row["threads"] for row in reversed(rows)}
    return [
        f"{row['label']}, {row['threads']} threads over {first[row['label']]}: "
        + ", ".join(f"{case['name']} {case['threads_ratio']:.2f}×" for case in row["cases"])
        for row in rows
        if row["threads"] != first[row["label"]]
    ]


def _mega(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f}"


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers of 1 or more, none twice."""
    parts = [part.strip() for part in text.split(",")]
    numbers = [int(part) for part in parts if part.isdecimal() and int(part) > 0]
    if len(numbers) < len(parts) or len(set(numbers)) < len(numbers):
        raise UserError(f"{option} takes different whole numbers of 1 or more, separated by commas; got {text!r}")
    return tuple(numbers)


def _shape(text: str) -> tuple[str, tuple[int, ...]]:
    """NAME=N,… of --shape."""
    name, _, dims = text.rpartition("=")
    parts = dims.split(",")
    if not name or not all(part.isdecimal() for part in parts):
        raise UserError(f"--shape takes NAME=N,…; got {text!r}")
    return name, tuple(map(int, parts))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
