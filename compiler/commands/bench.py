"""`qcompile bench`: how fast models run here, and how much memory they take, against each other."""

import json
from collections.abc import Sequence
from dataclasses import field
from typing import Annotated, Any

from qcompile.compiler.api.bench import Candidate, bench_models, cores
from qcompile.compiler.commands.options import CustomOps, Document, JsonFile, Kernels, Talk, command, option, positional
from qcompile.compiler.console.terminal import Bar, console, table
from qcompile.compiler.files.load import check_result_path
from qcompile.compiler.files.publish import write_text
from qcompile.compiler.measure.workload import Workload
from qcompile.passes.errors import UserError

_EPILOG = """A MODEL is [NAME=]FILE.onnx[@SETTING,…]. The settings: native (qcompile operators run by the native
kernels), portable (by their ONNX bodies), level=N (accuracy level of the 4-bit products that ONNX Runtime fuses from
portable bodies: 0 exact, 4 int8 activations). So one compiled file stands for three models:
  qcompile bench small.onnx --against float.onnx a4=small.onnx@portable,level=4 a0=small.onnx@portable,level=0
Each model runs in a process of its own; they take turns, round by round. Prefill is one run over a prompt; decoding
runs single tokens after a prompt, each taking the caches of the run before, or adding to them in one buffer where
GroupQueryAttention can. Times are of the runs alone: choosing tokens and handing over inputs are left out. Ratios are
medians of the ratios of each round."""
_NOISY = 0.2


@command()
class Options(JsonFile, Talk, CustomOps):
    """Measure load time, memory, and tokens per second."""

    epilog = _EPILOG

    model: Annotated[str, positional("MODEL", "[NAME=]FILE.onnx[@SETTING,…], see below")]
    against: Annotated[list[str], option("models to compare it with", "OTHER…", many=True)] = field(
        default_factory=list
    )
    prompt_tokens: Annotated[str, option("prefill lengths (default 1,64,512)", "N,…")] = "1,64,512"
    decode: Annotated[int, option("decoding steps (default 64; 0: none)", "N")] = 64
    decode_after: Annotated[int, option("tokens before them (default 64)", "N")] = 64
    threads: Annotated[str, option(f"threads (default: every core, {cores()})", "N,…")] = str(cores())
    rounds: Annotated[int, option("turns of each model that count (default 5)", "N")] = 5
    kernels: Annotated[Kernels, option("default of the models", "{auto,native,portable}")] = "auto"
    shape: Annotated[
        list[str], option("shape of an input that is not made of tokens (repeat for several)", "NAME=N,…")
    ] = field(default_factory=list)


def run(args: Options) -> Document:
    """Measure, print a table, and write JSON if asked."""
    threads = _numbers("--threads", args.threads)
    shapes = dict(_shape(text) for text in args.shape)
    workload = Workload(_numbers("--prompt-tokens", args.prompt_tokens), args.decode, args.decode_after, shapes)
    candidates = [Candidate.parse(text, args.kernels) for text in (args.model, *args.against)]
    if args.json_file is not None:
        check_result_path([candidate.path for candidate in candidates], args.json_file)
    report = _measured(candidates, workload, threads, args.rounds)
    _print(report)
    if args.json_file is not None:
        write_text(args.json_file, json.dumps(report, indent=2) + "\n")
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
