"""The task sets by name, and their items for a tokenizer."""

from collections.abc import Callable, Sequence

from qcompile.compiler.data.tokens import Tokenizer
from qcompile.compiler.measure.tasks import generated, texts
from qcompile.compiler.measure.tasks.items import Item
from qcompile.models.text import tasks_text
from qcompile.passes.errors import UserError
from qcompile.passes.near import near

# By name: (how many items, the tokenizer, tokens of a long context) -> items.
TASKS: dict[str, Callable[[int, Tokenizer, int], list[Item]]] = {
    "cloze": lambda count, _, __: texts.cloze(tasks_text(), count),
    "next-sentence": lambda count, _, __: texts.next_sentence(tasks_text(), count),
    "needle": lambda count, tokenizer, tokens: texts.needle(
        tasks_text(), count, lambda text: len(tokenizer.encode(text)), tokens
    ),
    "arithmetic": lambda count, _, __: generated.arithmetic(count),
    "pattern": lambda count, _, __: generated.pattern(count),
    "code": lambda count, _, __: generated.code(count),
}


def named(words: str | Sequence[str]) -> tuple[str, ...]:
    """Names of tasks, each once: "cloze,needle", or a list of them; "all" for all. UserError for others."""
    given = [word.strip() for word in (words.split(",") if isinstance(words, str) else words)]
    for word in given:
        if word not in TASKS and word != "all":
            known = ", ".join(TASKS)
            raise UserError(f"--tasks: no task {word!r}; there are {known}, and all{near(word, [*TASKS, 'all'])}")
    return tuple(TASKS) if "all" in given else tuple(dict.fromkeys(given))
