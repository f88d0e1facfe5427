"""Seeded small graphs for tests: shaped like real exports, runnable in ONNX Runtime, made without torch."""

from qcompile.models.tiny.classifier import pictures, tiny_classifier
from qcompile.models.tiny.decoder import tiny_decoder
from qcompile.models.tiny.encoder import tiny_encoder
from qcompile.models.tiny.floats import tiny_branch, tiny_conv, tiny_mlp
from qcompile.models.tiny.tokenizer import tiny_tokenizer

__all__ = [
    "pictures",
    "tiny_branch",
    "tiny_classifier",
    "tiny_conv",
    "tiny_decoder",
    "tiny_encoder",
    "tiny_mlp",
    "tiny_tokenizer",
]
