"""What a compile would do, without doing it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from rich.console import Console

from qcompile.compiler.console.terminal import table
from qcompile.compiler.data.calibration import Calibration
from qcompile.compiler.data.inputs import input_plan
from qcompile.compiler.facts.census import FloatConstant, census
from qcompile.compiler.facts.memory import check_sizes
from qcompile.compiler.facts.model import file_size
from qcompile.compiler.files.load import load_model
from qcompile.compiler.plan import effective, facts_of, planned
from qcompile.compiler.recipe import Recipe
from qcompile.compiler.report.coverage import quantizers
from qcompile.compiler.stages import check_target
from qcompile.compiler.walk import promises
from qcompile.compiler.walk.patterns import check_patterns
from qcompile.compiler.walk.segments import Segment, split
from qcompile.passes.affine import Grid
from qcompile.passes.base import Pass, Region
from qcompile.passes.contract import Reads, Stage
from qcompile.passes.linears import Linear, find_embeddings, find_linears, vocabulary_size
from qcompile.passes.policy import Policy

_NOTHING = "float: no pass of the list quantizes weights"


def print_plan(path: Path, output: Path, recipe: Recipe, calibration: Calibration, console: Console) -> None:
    """Print the nodes by decision, sizes before and after, and the memory that compiling will need."""
    model, recipe = load_model(path), effective(recipe)
    before = file_size(path, model)
    work = planned(recipe, facts_of(model))
    passes = work.passes
    for rewrite in passes:
        if rewrite.stage == Stage.BEFORE:
            promises.run(rewrite, Region.whole(model))
    check_patterns(recipe.include, recipe.exclude, model)
    check_sizes(model)
    check_target(model, recipe.target, work)
    linears, vocabulary = find_linears(model.graph), vocabulary_size(model)
    policy = work.policy
    chosen = {linear: policy.for_linear(linear, vocabulary) for linear in linears}
    looked_up = {embedding: policy.for_embedding(embedding) for embedding in find_embeddings(model.graph)}
    packs = bool(quantizers(passes))
    console.print(f"plan      {path} → {output}", soft_wrap=True)
    made = table("nodes", "operator", "decision", "weights", numbers=1)
    rows: dict[tuple[str, str], list[int]] = {}
    for kind, sites in (("MatMul", chosen), ("Gather", looked_up)):
        for site, spec in sites.items():
            decision = f"float: {spec}" if isinstance(spec, str) else str(spec)
            rows.setdefault((kind, decision if packs else _NOTHING), []).append(int(np.prod(site.shape)))
    own = {*(linear.weight for linear in chosen), *(embedding.table for embedding in looked_up)}
    for constant in (found for found in census(model) if found.value not in own):
        decision = _decision(constant, passes, policy)
        rows.setdefault((constant.readers[0].node.op_type, decision), []).append(constant.size)
    for (kind, decision), sizes in rows.items():
        made.add_row(str(len(sizes)), kind, decision, f"{sum(sizes) / 1e6:.2f} M")
    console.print(made)
    weights: dict[ir.Value, tuple[Grid, int, int]] = {}
    for linear, spec in chosen.items():
        if isinstance(spec, Grid):
            weights[linear.weight] = (spec, *linear.shape)
    for embedding, spec in looked_up.items():
        if isinstance(spec, Grid):
            weights.setdefault(embedding.table, (spec, embedding.shape[1], embedding.shape[0]))
    bits = {value: 8 * np.dtype(spec.scale_dtype).itemsize for value, (spec, _, _) in weights.items()}
    packed = sum(spec.bits_per_weight(k) * k * n / 8 for spec, k, n in weights.values())
    removed = sum(k * n * bits[value] // 8 for value, (_, k, n) in weights.items())
    console.print(f"passes    {', '.join(p.name for p in passes)}")
    plan = input_plan(model)
    segments = split(model, {linear.node for linear in linears}.__contains__)
    console.print(f"walk      {len(segments)} segments; inputs: {', '.join(given.name for given in plan.inputs)}")
    after = before - removed + packed if packs else before
    console.print(f"size      {before / 1e6:.1f} MB → about {after / 1e6:.1f} MB")
    rows_seen = (
        recipe.samples * recipe.context if any(p.reads & {Reads.SCALES, Reads.STATISTICS} for p in passes) else 0
    )
    console.print(f"memory    about {_memory(segments, linears, rows_seen) / 1e9:.1f} GB")


def _decision(constant: FloatConstant, passes: Sequence[Pass], policy: Policy) -> str:
    """What will become of a constant that is neither a linear's nor a table of lookups, as far as the plan tells."""
    own, reader = quantizers(passes), constant.readers[0]
    refused = policy.refusal(reader.node, constant.value)
    if not own or constant.family == "other":
        return _NOTHING if not own else f"float: read by {reader.node.op_type}, which no format is for"
    if constant.family == "Conv" and not any("Conv" in p.families for p in own):
        return f"float: {own[0].name} has no format for weights of {reader.node.op_type}"
    return f"float: {refused}" if refused else "quantized where a format is for it, as the compile tells"


def _memory(segments: list[Segment], linears: list[Linear], rows: int) -> float:
    """Bytes held at the peak: libraries, carried activations, the largest segment's weights and Gram matrices."""
    by_node = {linear.node: linear for linear in linears}
    largest, width = 0.0, 0
    for segment in segments:
        own = [by_node[node] for node in segment.nodes if node in by_node]
        inputs = {linear.activation: linear.shape[0] for linear in own}
        weights = sum(4.0 * k * n for k, n in (linear.shape for linear in own))
        grams = sum(8.0 * k * k for k in inputs.values()) if rows else 0.0
        largest = max(largest, 5 * weights + 2 * grams)
        width = max([width, *(linear.shape[0] for linear in own[:1])])
    return 4e8 + largest + 8.0 * rows * width
