"""Items from running text: the last word of a sentence, the sentence that follows, words hidden in a long context."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import TypeVar

from qcompile.compiler.measure.tasks.items import CHOICES, Item, item
from qcompile.passes.errors import UserError

T = TypeVar("T")
# Tokens that are left empty in a context: most sentences are longer.
_LEAST = 12
# Where a sentence ends: not behind a title.
_END = re.compile(r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)\s+(?=[A-Z])")
_WORD = re.compile(r"\b[a-z]+\b")
_LAST_WORD = re.compile(r"(?s)(.*\s)([a-z]{4,12})[.!?]")
# Characters of a context of sentences, and of a sentence that is chosen among others.
_CONTEXT, _SENTENCE = (100, 700), (40, 200)
# Words, or sentences, of the nearest paragraphs, among which wrong ones are chosen: a text may be of several kinds.
_NEAR = 24
_ROLES = ("captain", "carpenter", "cook", "doctor", "pilot", "sailor", "steward", "surgeon")
# Common words of as many letters, which most vocabularies have whole.
_WORDS = (
    *("river", "stone", "bread", "chair", "green", "horse", "light", "music", "night", "paper", "plant", "round"),
    *("sugar", "table", "train", "water", "white", "world", "black", "glass", "north", "south", "beach", "cloud"),
)


@dataclass(frozen=True)
class Passage:
    """A sentence behind those before it in its paragraph, at most two."""

    before: str
    sentence: str
    paragraph: int


def passages(text: str) -> Iterator[Passage]:
    """Every sentence of a text that has one before it; paragraphs are apart by blank lines."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text)):
        sentences = [" ".join(own.split()) for own in _END.split(paragraph.strip())]
        for index in range(1, len(sentences)):
            yield Passage(" ".join(sentences[max(index - 2, 0) : index]), sentences[index], number)


def cloze(text: str, count: int) -> list[Item]:
    """The last word of a sentence, behind what stands before it, among words that the text has behind the same word.

    All are of as many letters, and none stands in the context, where it would be told by that alone.
    """
    random, found = Random("cloze"), []
    behind: dict[str, list[tuple[str, int]]] = {}
    for own in passages(text):
        match = _LAST_WORD.fullmatch(own.sentence)
        if match and _within(_CONTEXT, context := f"{own.before} {match[1].rstrip()}"):
            found.append((context, match[2], own.paragraph))
        for before, word in pairwise(own.sentence.split()):
            if _WORD.fullmatch(plain := word.rstrip(".,;:!?")):
                behind.setdefault(before, []).append((plain, own.paragraph))
    items = []
    for context, word, place in _drawn(random, found, count):
        there = set(_WORD.findall(context.lower()))
        followers = behind.get(context.split()[-1], [])
        alike = [own for own in followers if len(own[0]) == len(word) and own[0] not in there | {word}]
        others = _nearest(alike, place)
        if word not in there and len(others) >= CHOICES - 1:
            wrong = random.sample(others, CHOICES - 1)
            items.append(item(context, f" {word}", [f" {other}" for other in wrong], random))
    return items[:count]


def next_sentence(text: str, count: int) -> list[Item]:
    """The sentence that follows, among sentences of other paragraphs that are about as long."""
    random = Random("next-sentence")
    all_of = [own for own in passages(text) if _within(_SENTENCE, own.sentence)]
    found = [own for own in all_of if _within(_CONTEXT, own.before)]
    items = []
    for own in _drawn(random, found, count):
        apart = [other for other in all_of if other.paragraph != own.paragraph and other.sentence != own.sentence]
        others = _nearest([(other.sentence, other.paragraph) for other in apart], own.paragraph)
        alike = sorted(others, key=lambda other: abs(len(other) - len(own.sentence)))[: CHOICES - 1]
        if len(alike) == CHOICES - 1:
            items.append(item(own.before, f" {own.sentence}", [f" {other}" for other in alike], random))
    return items[:count]


def needle(text: str, count: int, length: Callable[[str], int], tokens: int) -> list[Item]:
    """Which of four words, spread over a context, is whose. length: of a text in tokens, of which there are `tokens`.

    As multi-key retrieval is asked for elsewhere (RULER, Hsieh et al. 2024): the wrong words stand in the context, too.
    UserError for fewer tokens than all four take.
    """
    random, sentences = Random("needle"), [own.sentence for own in passages(text)]
    sizes = [length(f" {own}") for own in sentences]
    items = []
    for _ in range(count):
        roles, words = random.sample(_ROLES, CHOICES), random.sample(_WORDS, CHOICES)
        hidden = [f"The secret word of the {role} is {word}." for role, word in zip(roles, words, strict=True)]
        asked = random.randrange(CHOICES)
        question = f"\n\nThe secret word of the {roles[asked]} is"
        room = tokens - length(" ".join([*hidden, question, f" {words[asked]}"])) - CHOICES
        if room < 0:
            raise UserError(f"task needle: {tokens} tokens of context are too few: four words take {tokens - room}")
        start, hay = random.randrange(len(sentences)), list[str]()
        for index in (*range(start, len(sentences)), *range(start)):
            if room < _LEAST:
                break
            if sizes[index] <= room:
                hay.append(sentences[index])
                room -= sizes[index]
        for number, own in reversed(list(enumerate(hidden))):
            hay.insert(round((number + random.random()) * len(hay) / CHOICES), own)
        right, wrong = f" {words[asked]}", [f" {word}" for word in words if word != words[asked]]
        items.append(item(" ".join(hay) + question, right, wrong, random))
    return items


def _within(bounds: tuple[int, int], text: str) -> bool:
    return bounds[0] <= len(text) <= bounds[1]


def _nearest(found: list[tuple[str, int]], place: int) -> list[str]:
    """Different ones of (what, its paragraph) that stand nearest to a paragraph."""
    return list(dict.fromkeys(what for what, _ in sorted(found, key=lambda own: (abs(own[1] - place), own))))[:_NEAR]


def _drawn(random: Random, found: list[T], count: int) -> list[T]:
    """More than are wanted, in random order, for some have no wrong answers."""
    return random.sample(found, min(len(found), 4 * count))
