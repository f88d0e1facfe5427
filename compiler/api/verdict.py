"""The verdict on models in short tables: flips, percentiles of KL, KL by position, and tasks, against the reference."""

from collections.abc import Sequence

from qcompile.compiler.api.evaluation import Evaluated, Evaluation
from qcompile.compiler.console.visible import told_apart
from qcompile.compiler.measure.changes import TokenChanges
from qcompile.compiler.measure.evaluate import DecoderScores
from qcompile.compiler.measure.tasks.items import CHOICES
from qcompile.compiler.measure.tasks.scoring import TaskScores
from qcompile.compiler.results.sheet import Sheet

_CHANGES = ("flips", "lost", "won", "accuracy drop", "perplexity ratio", "KL p50", "p90", "p99", "max")


def verdict_sheets(evaluation: Evaluation) -> list[Sheet]:
    """Of decoders against a reference: what became of their predictions, and KL by position; none of other models."""
    found = _changed(evaluation.rows)
    return [_changes(found), _positions(found)] if found else []


def _changed(rows: Sequence[Evaluated]) -> list[tuple[list[str], TokenChanges]]:
    """(text and model, what changed) of each row that has it."""
    names = told_apart(own.text for own in rows)
    return [
        ([names[own.text], own.scores.model], own.scores.changes)
        for own in rows
        if isinstance(own.scores, DecoderScores) and own.scores.changes is not None
    ]


def _changes(found: Sequence[tuple[list[str], TokenChanges]]) -> Sheet:
    rows = [
        [
            *names,
            f"{own.flips:.2%}{_interval(own.flips_low, own.flips_high)}",
            f"{own.flips_lost:.2%}",
            f"{own.flips_won:.2%}",
            f"{own.accuracy_drop:+.2%}{_interval(own.accuracy_drop_low, own.accuracy_drop_high, '+.2%')}",
            f"{own.perplexity_ratio:.4f}{_interval(own.perplexity_ratio_low, own.perplexity_ratio_high, '.4f')}",
            *(f"{kl:.3g}" for kl in (own.kl_p50, own.kl_p90, own.kl_p99, own.kl_max)),
        ]
        for names, own in found
    ]
    least = min(own.clusters for _, own in found)
    intervals = f"; [95 % intervals by {least} or more clusters of tokens]" if least > 1 else ""
    notes = (
        "flips: tokens with another most likely token; lost, won: with the right one by the reference alone, by the "
        f"model alone{intervals}; KL in nats",
    )
    return Sheet("", ("text", "model", *_CHANGES), rows, len(_CHANGES), notes)


def _positions(found: Sequence[tuple[list[str], TokenChanges]]) -> Sheet:
    """A column for each bin of positions; texts whose windows are shorter have none in the last ones."""
    longest = max((own.kl_by_position for _, own in found), key=len)
    heads = [f"{one.first}-{one.last}" for one in longest]
    rows = []
    for names, own in found:
        cells = [f"{one.kl:.4g}" + (f" ± {one.kl_error:.1g}" if one.kl_error else "") for one in own.kl_by_position]
        rows.append([*names, *cells, *[""] * (len(heads) - len(cells))])
    note = "KL to the reference of tokens behind so many others in their window, nats, ± its standard error over tokens"
    return Sheet("", ("text", "model", *heads), rows, len(heads), (note,))


def tasks_sheet(tasks: Sequence[TaskScores]) -> Sheet:
    """Every task and model, the reference first: accuracies, and McNemar's test of what differs."""
    rows = []
    for own in tasks:
        accuracy = f"{own.accuracy:.1%}{_interval(own.accuracy_low, own.accuracy_high, '.1%')}"
        cells, pair = [own.task, own.model, str(own.items), accuracy], own.paired
        more = [""] * 4
        if pair is not None:
            drop = f"{pair.accuracy_drop:+.1%}{_interval(pair.accuracy_drop_low, pair.accuracy_drop_high, '+.1%')}"
            more = [str(pair.lost), str(pair.won), drop, f"{pair.mcnemar_p:.2g}"]
        rows.append([*cells, *more])
    heads = ("task", "model", "items", "accuracy", "lost", "won", "accuracy drop", "McNemar's p")
    note = f"the likeliest of {CHOICES} choices; lost, won: items that the reference alone, the model alone gets right"
    return Sheet("", heads, rows, 6, (f"{note}; [95 % intervals]",))


def _interval(low: float | None, high: float | None, form: str = ".2%") -> str:
    return "" if low is None or high is None else f" [{low:{form}}, {high:{form}}]"
