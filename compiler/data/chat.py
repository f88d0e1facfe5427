"""Chat templates: what an instruct model reads for a question, as the file beside its tokenizer says."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from qcompile.compiler.data.tokens import Tokenizer
from qcompile.passes.errors import UserError

_LARGEST = 1 << 20
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The template in chat_template.jinja, chat_template.json or tokenizer_config.json; None for models without one."""
    folder = tokenizer.path.parent
    file = folder / "chat_template.jinja"
    if file.is_file() and file.stat().st_size <= _LARGEST:
        return file.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _table(folder / name).get("chat_template")
        if isinstance(found, list):  # several by name
            named = {own.get("name"): own.get("template") for own in found if isinstance(own, dict)}
            found = named.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def prompt_of(tokenizer: Tokenizer, template: str, question: str) -> str:
    """The text that stands before the answer to a question. Templates come with models: they run in a sandbox."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    made.globals |= {"raise_exception": _refused, "strftime_now": lambda form: datetime.now().strftime(form)}
    made.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False)
    messages = [{"role": "user", "content": question}]
    try:
        text = made.from_string(template).render(
            messages=messages, add_generation_prompt=True, **_special(tokenizer.path.parent)
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        told = f"{tokenizer.path.parent}: the chat template cannot be used ({reason}): --raw goes without it"
        raise UserError(told) from error
    return str(text)


def _refused(told: str) -> None:
    raise ValueError(told)


def _special(folder: Path) -> dict[str, str]:
    """Special tokens by the names that templates know."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        table = _table(folder / name)
        for key in _TOKENS:
            own = table.get(key)
            text = own.get("content") if isinstance(own, dict) else own
            if isinstance(text, str):
                found[key] = text
    return found


def _table(path: Path) -> Mapping[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}
