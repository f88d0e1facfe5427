"""Tokenizers that put a token before every text, as Gemma's and Llama's put BOS."""

from pathlib import Path

import tokenizers
from tokenizers.processors import TemplateProcessing


def put_before_texts(tokenizer: Path, token: int) -> None:
    """Let a tokenizer.json do so with the token of that id."""
    inner = tokenizers.Tokenizer.from_file(str(tokenizer))
    word = inner.id_to_token(token)
    inner.post_processor = TemplateProcessing(single=f"{word} $A", special_tokens=[(word, token)])
    inner.save(str(tokenizer))
