"""`qcompile bench`: how fast models run here, and how much memory they take, against each other."""

from collections.abc import Sequence
from typing import Any

from qcompile.compiler.api.bench import Candidate, bench_models, cores
from qcompile.compiler.commands.declared.bench import Options
from qcompile.compiler.commands.options import Document
from qcompile.compiler.console.document import written
from qcompile.compiler.console.terminal import Bar, console, table
from qcompile.compiler.files.load import check_result_path
from qcompile.compiler.files.publish import write_text
from qcompile.compiler.measure.workload import Workload
from qcompile.passes.errors import UserError

_NOISY = 0.2


def run(args: Options) -> Document:
    """Measure, print a table, and write JSON if asked."""
    threads = _numbers("--threads", str(cores()) if args.threads is None else args.threads)
    shapes = dict(_shape(text) for text in args.shape)
    workload = Workload(_numbers("--prompt-tokens", args.prompt_tokens), args.decode, args.decode_after, shapes)
    candidates = [Candidate.parse(text, args.kernels) for text in (args.model, *args.against)]
    if args.json_file is not None:
        check_result_path([candidate.path for candidate in candidates], args.json_file)
    report = _measured(candidates, workload, threads, args.rounds)
    _print(report)
    if args.json_file is not None:
        write_text(args.json_file, written(report) + "\n")
    return report


def _measured(
    candidates: Sequence[Candidate], workload: Workload, threads: Sequence[int], rounds: int
) -> dict[str, Any]:
    """The measurement behind a progress bar that draws only between turns: it shares the cores with them."""
    with Bar(still=True) as bar:
        bar.step("measuring")
        return bench_models(candidates, workload, threads=threads, rounds=rounds, progress=bar.at).report


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
    out = console(answer=True)
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
