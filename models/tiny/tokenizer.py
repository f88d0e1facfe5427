"""A tokenizer for tiny models: one token a byte."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def tiny_tokenizer(vocab_size: int, path: Path | str) -> Path:
    """Write tokenizer.json (and tokenizer_config.json) with exactly `vocab_size` tokens into the folder `path`.

    Bytes are tokens, letters and blanks first; bytes that find no room are dropped from the text, room that no byte
    needs is filled with special tokens. Returns the path of tokenizer.json.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (c not in "ĠĊ", not c.isalpha(), ord(c)))
    tokens = alphabet[:vocab_size]
    extra = [f"<|extra_{i}|>" for i in range(vocab_size - len(tokens))]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(extra)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return folder / "tokenizer.json"
