"""`qcompile inspect`: what is in a model file."""

import json
from typing import Any

from rich.console import Console

from qcompile.compiler.commands.declared.inspect import Options
from qcompile.compiler.commands.options import Document, changed
from qcompile.compiler.console.numbers import megabytes, percent
from qcompile.compiler.console.terminal import console, table
from qcompile.compiler.files.folders import model_file
from qcompile.compiler.report.inspection import Summary, WeightGroup, inspect

# Inputs and outputs of a model with caches are alike by the dozen.
_FEW = 8
_LONG = 200


def run(args: Options) -> Document:
    """Print the summary."""
    args = changed(args, model=model_file(args.model))
    summary = inspect(args.model, every=args.all)
    out = console(answer=True)
    _head(out, summary, every=args.all)
    _types(out, summary)
    _weights(out, summary)
    for tie in summary.ties:
        out.print(f"shared: {tie}")
    for key, value in summary.metadata.items():
        out.print(f"{key}: {_shortened(value) if not key.startswith('qcompile.') else json.dumps(value)}")
    return summary.to_dict()


def _head(out: Console, summary: Summary, *, every: bool) -> None:
    opsets = ", ".join(f"{domain} {version}" for domain, version in summary.opsets.items())
    out.print(f"{summary.path}: {megabytes(summary.file_bytes)}, {summary.parameters:,} parameters")
    out.print(f"IR version {summary.ir_version}, opsets {opsets}, made by {summary.producer or 'unknown'}")
    for title, values in (("input", summary.inputs), ("output", summary.outputs)):
        for line in values if every or len(values) <= _FEW else values[:_FEW]:
            out.print(f"{title:7} {line}")
        if not every and len(values) > _FEW:
            out.print(f"{title:7} … {len(values) - _FEW} more (--all lists them)")
    counts = ", ".join(f"{name} {count}" for name, count in summary.operators.items())
    out.print(f"operators: {counts}")
    if summary.functions:
        out.print(f"functions: {', '.join(summary.functions)}")


def _types(out: Console, summary: Summary) -> None:
    shown = table("constants", "tensors", "elements", "bytes", numbers=3)
    for share in summary.types:
        shown.add_row(share.dtype, str(share.tensors), f"{share.elements:,}", megabytes(share.bytes))
    out.print(shown)
    bits = [f"{family} {own:.3f}" for family, own in summary.bits.items()]
    bits += [f"whole file {summary.file_bits:.3f}"] if summary.file_bits is not None else []
    if bits:
        out.print(f"bits per weight: {', '.join(bits)}")


def _weights(out: Console, summary: Summary) -> None:
    shown = table("weights", "count", "operator", "kind", "shape", "stored as", "quantized")
    for group in summary.weights:
        shape = " x ".join(map(str, group.shape))
        name = group.pattern if group.count == 1 else f"{group.pattern}…"
        shown.add_row(name, str(group.count), group.operator, group.kind, shape, group.form, _verdict(group))
    if summary.weights:
        out.print(shown)
    linears = [group for group in summary.weights if group.kind == "linear"]
    if linears:
        done = sum(group.count for group in linears if group.quantized)
        out.print(f"{done} of {sum(group.count for group in linears)} linears are quantized")
    told = [
        f"{percent(share)} of the {family} weights" for family, share in summary.shares.items() if share is not None
    ]
    if told:
        out.print(f"quantized: {', '.join(told)}")


def _shortened(value: Any) -> str:
    """Others' metadata in one line: some models carry a whole vocabulary there."""
    text = " ".join((value if isinstance(value, str) else json.dumps(value)).split())
    return text if len(text) <= _LONG else f"{text[:_LONG]} … ({len(text)} characters, --json shows all)"


def _verdict(group: WeightGroup) -> str:
    return "yes" if group.quantized else f"no: {group.reason}"
