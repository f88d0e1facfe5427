"""How fast int8 models are, by int8.py: a process for each model, taking turns, as `qcompile bench` times them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from int8_data import model_kind, workload
from int8_metrics import file_megabytes, shortened


def speed(reference: Path, models: Sequence[Path], threads: Sequence[int], rounds: int) -> dict[str, Any]:
    """Milliseconds of one run of every model, the float one first, at each number of threads."""
    from qcompile.runtime.bench import cpu_name
    from qcompile.runtime.sessions import ort_version

    name, feeds = workload(model_kind(reference), reference)
    rows = [row for count in threads for row in timed(name, feeds, [reference, *models], count, rounds)]
    return {"case": name, "rounds": rounds, "cpu": cpu_name(), "onnxruntime": ort_version(), "rows": rows}


def timed(name: str, feeds: dict[str, Any], models: Sequence[Path], threads: int, rounds: int) -> list[dict[str, Any]]:
    """All models at one number of threads. ratio: of the float model's time to one's own, median over the rounds."""
    from qcompile.runtime.bench import Case, Subject, measure, paired_ratio

    subjects = []
    for model in models:
        # What onnxruntime does where nothing is set: accuracy level 4 in the products that it fuses, no library.
        subject = Subject(str(model), model, kernels="portable", accuracy_level=4, threads=threads)
        wanted = {value.name for value in onnx.load(model, load_external_data=False).graph.input}
        own = {key: array for key, array in feeds.items() if key in wanted}
        subjects.append((subject, [Case(name, own, amount=1, unit="ms")]))
    results = measure(subjects, rounds=rounds, loads=1)
    first = results[0].seconds[name]
    return [
        {
            "file": str(model),
            "MB": round(file_megabytes(model), 1),
            "threads": threads,
            "median_ms": 1e3 * statistics.median(result.seconds[name]),
            "min_ms": 1e3 * min(result.seconds[name]),
            "ratio": paired_ratio(first, result.seconds[name]),
            "running_mb": round((result.memory or 0) / 1e6),
            "seconds": result.seconds[name],
        }
        for model, result in zip(models, results, strict=True)
    ]


def speed_table(result: dict[str, Any]) -> str:
    """A Markdown table: median and minimum, and the speed over the float model's."""
    lines = ["| file | MB | threads | median ms | min ms | x float | memory MB |", "|---|---|---|---|---|---|---|"]
    for row in result["rows"]:
        lines.append(
            f"| {shortened(row['file'])} | {row['MB']} | {row['threads']} | {row['median_ms']:.1f} | "
            f"{row['min_ms']:.1f} | {row['ratio']:.2f} | {row['running_mb']} |"
        )
    told = f"{result['case']}, {result['rounds']} rounds, onnxruntime {result['onnxruntime']}, {result['cpu']}"
    return "\n".join([*lines, "", told])
