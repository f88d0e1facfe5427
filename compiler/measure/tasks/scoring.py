"""Decoders on tasks: the choice of the largest log-likelihood, and how two models differ in what they get right."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcompile.compiler.data.tokens import Ids, Tokenizer
from qcompile.compiler.measure.loaded import Subject
from qcompile.compiler.measure.metrics import log_softmax
from qcompile.compiler.measure.paired import Paired, wilson
from qcompile.compiler.measure.tasks.items import CHOICES, Item, digest
from qcompile.passes.errors import UserError

# Log-softmaxes (rows, V).
Scores = npt.NDArray[np.float32]
# Called with a task, and how many of how many items are done by all models.
Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TaskScores:
    """A decoder on a task. accuracy: share of items whose right choice is the likeliest; its 95 % interval is Wilson's.

    chance: what guessing gets. digest: of the items, the same for the same ones. paired: against the reference on the
    same items; None of the reference, and without one.
    """

    model: str
    task: str
    items: int
    digest: str
    chance: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    paired: Paired | None = None

    def told(self) -> str:
        """In a line."""
        own = f"accuracy {self.accuracy:.1%} [{self.accuracy_low:.1%}, {self.accuracy_high:.1%}] of {self.items} items"
        return own if self.paired is None else f"{own}; {self.paired.told()}"


@dataclass(frozen=True)
class Encoded:
    """An item in token ids. windows: (context and choice, how many of its ids stand before the choice), one a choice.

    sizes: bytes of the choices, by which log-likelihoods are divided.
    """

    windows: Sequence[tuple[Ids, int]]
    sizes: Sequence[int]
    answer: int

    @classmethod
    def of(cls, own: Item, tokenizer: Tokenizer, before: Sequence[int]) -> "Encoded":
        """before: ids that the tokenizer puts in front of every text."""
        context, windows = tokenizer.encode(own.context), []
        for choice in own.choices:
            ids = tokenizer.encode(own.context + choice)
            same = next((at for at, (a, b) in enumerate(zip(context, ids, strict=False)) if a != b), len(context))
            start = min(same, len(ids) - 1)
            windows.append((np.asarray([*before, *ids], np.int64), len(before) + max(start, 1 - len(before))))
        return cls(windows, [len(choice.encode()) for choice in own.choices], own.answer)

    def right(self, subject: Subject) -> bool:
        """Whether the model has the right choice as the likeliest."""
        return int(np.argmax(_likelihoods(subject, self.windows) / self.sizes)) == self.answer


def check_fit(task: str, items: Sequence[Item], tokenizer: Tokenizer, tokens: int) -> None:
    """Raise UserError for a choice that a graph of so many tokens cannot take; contexts are cut at their start."""
    for own in items:
        longest = max(len(ids) - start for ids, start in Encoded.of(own, tokenizer, tokenizer.around()[0]).windows)
        if longest > tokens:
            raise UserError(f"task {task}: choices of {longest} tokens, and the model takes {tokens}: leave it out")


def score_tasks(
    subjects: Sequence[Subject],
    tasks: Mapping[str, Sequence[Item]],
    tokenizer: Tokenizer,
    *,
    compared: bool,
    progress: Told | None = None,
) -> list[TaskScores]:
    """Scores of decoders on each task. compared: the first is the others' reference."""
    before, _ = tokenizer.around()
    found = []
    for task, items in tasks.items():
        right = np.zeros((len(subjects), len(items)), np.bool_)
        for number, own in enumerate(items):
            encoded = Encoded.of(own, tokenizer, before)
            right[:, number] = [encoded.right(subject) for subject in subjects]
            if progress:
                progress(task, number + 1, len(items))
        for index, subject in enumerate(subjects):
            pair = Paired.of(right[0], right[index]) if compared and index else None
            share = float(right[index].mean())
            low, high = wilson(share, len(items))
            found.append(
                TaskScores(str(subject.path), task, len(items), digest(items), 1 / CHOICES, share, low, high, pair)
            )
    return found


def _likelihoods(subject: Subject, windows: Sequence[tuple[Ids, int]]) -> npt.NDArray[np.float64]:
    """The log-likelihood of each window's ids from its start on, behind those before.

    What a choice stands behind, all but its last id, is run once for all that stand behind it or its beginning: choices
    of one token behind the same ids take one run together. Where long contexts are cut, so are those of equal length.
    """
    cut, runs, sums = bool(subject.plan.sequence), list[tuple[Ids, int, Scores]](), np.zeros(len(windows))
    for at in sorted(range(len(windows)), key=lambda own: -len(windows[own][0])):
        ids, start = windows[at]
        read, first = ids[:-1], start - 1
        run = next((one for one in runs if one[1] <= first and _begins(one[0], read, whole=cut)), None)
        if run is None:
            run = read, first, _scores(subject, read, first)
            runs.append(run)
        rows = run[2][first - run[1] :][: len(ids) - start]
        sums[at] = rows[np.arange(len(rows)), ids[start:]].sum(dtype=np.float64)
    return sums


def _begins(ids: Ids, beginning: Ids, *, whole: bool) -> bool:
    """Whether ids begin so, or are so as a whole."""
    return np.array_equal(ids if whole else ids[: len(beginning)], beginning)


def _scores(subject: Subject, ids: Ids, first: int) -> Scores:
    """Log-softmaxes of what follows the ids from number `first` on: (len(ids) - first, V).

    A graph of fixed length gets as many ids as it takes: what stands behind changes nothing before it, and of more than
    it takes the last ones.
    """
    step = subject.plan.sequence or 1
    cut = max(len(ids) - step, 0) if subject.plan.sequence and not subject.plan.past else 0
    ids, first = ids[cut:], first - cut
    filled = np.pad(ids, (0, -len(ids) % step), mode="edge")
    return log_softmax(subject.logits(filled)[first : len(ids)])
